"""The demo with and without the format reward, three seeds each.

python -m router_r1_jax.sweep --config=configs/sweeps/demo_format.py --workdir=runs/demo_format

Advantages are made of components, so that the format's weight can be 0. The warm start is cut to less than half: that
of the demo hardly writes a malformed episode, and nothing would be left to learn. The study trains it once for all six
(`experiments/studies/format_reward.py`).
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
    c.warmstart.steps = 320  # the copying curriculum is its first 250
    return c


def get_sweep() -> list[Overrides]:
    return product(choices(FORMAT, 1.0, 0.0), choices("seed", 0, 1, 2))
