"""The demo over forty models, five of them in a prompt, under names dealt anew each time: for a router that reads.

python -m router_r1_jax.sweep --config=configs/sweeps/demo_cards.py --workdir=runs/demo_cards

Not there yet: no warm start of this size has learnt to read so far, and RL needs one that does (what was tried:
experiments/studies/README.md, *Unseen models*). The three seeds share the file, where it exists.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from router_r1_jax.config import use_pool
from router_r1_jax.sweep import Overrides, choices

CONFIGS = Path(__file__).parents[1]


def get_config(arg: str | None = None) -> ConfigDict:
    c = runpy.run_path(str(CONFIGS / "demo.py"))["get_config"](arg)
    use_pool(c, CONFIGS / "pools" / "many.py")
    c.pool.shown, c.pool.rename = 5, True
    c.steps = 100
    c.warmstart.file = str(CONFIGS.parent / "runs" / "demo_cards_warmstart.safetensors")
    c.warmstart.steps, c.warmstart.copy_steps, c.warmstart.copy_periods = 2400, 1800, (2, 16)
    return c


def get_sweep() -> list[Overrides]:
    return choices("seed", 0, 1, 2)
