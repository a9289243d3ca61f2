"""The demo trained without two of its five models, with three seeds from one warm start.

`experiments/studies/unseen_models.py` first trains the demo's tokenizer, which knows all five names; the router meets
the two names that are held out in copying exercises only. Then the study trains these runs, and evaluates them with all
five models in the prompt. This command made the warm start, in 15 minutes on two busy CPU cores:

    python -m router_r1_jax.training.warmstart --config=configs/sweeps/demo_unseen.py \
        --workdir=runs/demo_unseen_warmstart

The numbers to expect stand in experiments/studies/README.md, *Unseen models*.
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
