"""Cost curve of the demo: five weights of the cost in the reward, three seeds each.

    python -m router_r1_jax.sweep --config=configs/sweeps/demo_alpha.py --workdir=runs/demo_alpha

Hardware: a CPU. Time: fifteen runs of the demo, each four to five minutes on one core. `--dry_run` prints the fifteen
commands instead. Number to expect: the cost curve in experiments/studies/README.md.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from router_r1_jax.sweep import Overrides, choices, product

DEMO = Path(__file__).parents[1] / "demo.py"


def get_config(arg: str | None = None) -> ConfigDict:
    return runpy.run_path(str(DEMO))["get_config"](arg)


def get_sweep() -> list[Overrides]:
    return product(choices("reward.alpha", 0.0, 0.3, 0.6, 0.8, 0.9), choices("seed", 0, 1, 2))
