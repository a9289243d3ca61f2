"""The demo with and without the format reward, three seeds each.

    python -m router_r1_jax.sweep --config=configs/sweeps/demo_format.py --workdir=runs/demo_format

The format has an advantage of its own, whose weight can be 0. The warm start has less than half of the demo's updates,
because the demo's warm start hardly writes a malformed episode and would leave nothing to learn. The study
`experiments/studies/format_reward.py` trains the warm start once for all six runs.
Hardware: a CPU. Time: six runs of the demo, each four to five minutes on one core. Number to expect: the study's table
in experiments/studies/README.md.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from router_r1_jax.sweep import Overrides, choices, product

DEMO = Path(__file__).parents[1] / "demo.py"
FORMAT = "learner.component_weights.format"


def get_config(arg: str | None = None) -> ConfigDict:
    c = runpy.run_path(str(DEMO))["get_config"](arg)
    c.learner.component_weights.outcome = 1.0
    c.warmstart.file = str(DEMO.parents[1] / "runs" / "demo_format_warmstart.safetensors")
    c.warmstart.steps = 320  # the first 250 (synthetic.copy_steps) include copying exercises
    return c


def get_sweep() -> list[Overrides]:
    return product(choices(FORMAT, 1.0, 0.0), choices("seed", 0, 1, 2))
