"""The demo, trained without two of its five models, three seeds from one warm start.

`experiments/studies/unseen_models.py` trains these runs and then puts all five models into the prompt. Before, it makes
the tokenizer, which is the demo's, so that the held out names are words (a router meets them in the copying curriculum
only). The warm start is a kept one, made in 15 minutes beside other work with

    python -m router_r1_jax.warmstart --config=configs/sweeps/demo_unseen.py --workdir=runs/demo_unseen_warmstart
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from router_r1_jax.sweep import Overrides, choices

DEMO = Path(__file__).parents[1] / "demo.py"
TOKENIZER = Path(__file__).parents[2] / "runs" / "demo_tokenizer"
UNSEEN = ("Aria", "Atlas")  # each is the best of five in a domain where the three others are poor


def get_config(arg: str | None = None) -> ConfigDict:
    c = runpy.run_path(str(DEMO))["get_config"](arg)
    c.model.tokenizer = str(TOKENIZER)
    c.warmstart.file = str(DEMO.parent / "demo_unseen_warmstart.safetensors")
    c.pool.models = tuple(model for model in c.pool.models if model.name not in UNSEEN)
    return c


def get_sweep() -> list[Overrides]:
    return choices("seed", 0, 1, 2)
