"""The demo over forty models, five of them in a prompt, under names dealt anew each time: for a router that reads.

python -m router_r1_jax.sweep --config=configs/sweeps/demo_cards.py --workdir=runs/demo_cards

Not there yet: the warm start reads one line of five models and not yet their whole table, and RL needs one that does
(what was tried and what helped: experiments/studies/README.md, *Unseen models*). The three seeds share the file, where
it exists.
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
    c.prompt.template = "table"
    c.model.arch.update(dict(num_layers=2, num_heads=8, num_kv_heads=8, head_dim=16, initializer_range=0.06))
    c.warmstart.batch, c.warmstart.learning_rate = 48, 3e-3
    c.warmstart.lessons = (
        ("copy", 150, 2, 4), ("read", 120, 2, 1), ("read", 150, 3, 1), ("read", 600, 5, 1), ("read", 200, 5, 2),
        ("read", 200, 5, 4), ("read", 400, 5, 7),
    )  # fmt: skip
    c.warmstart.steps, c.warmstart.copy_steps, c.warmstart.copy_periods = 2500, 200, (4, 24)
    return c


def get_sweep() -> list[Overrides]:
    return choices("seed", 0, 1, 2)
