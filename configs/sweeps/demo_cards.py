"""The demo over forty models, five of them in a prompt, under names dealt anew each time: for a router that reads.

`experiments/studies/unseen_models.py` makes the tokenizer, to which the demo's five names are words too, and trains
these runs from a kept warm start, which was made, in half an hour on one core, with

    python -m router_r1_jax.warmstart --config=configs/sweeps/demo_cards.py --workdir=runs/demo_cards_warmstart

RL can only choose among what the warm start can read; what that takes was found by experiment
(experiments/studies/README.md, *Unseen models*).
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from router_r1_jax.config import use_pool
from router_r1_jax.sweep import Overrides, choices

CONFIGS = Path(__file__).parents[1]
RUNS = CONFIGS.parent / "runs"
TOKENIZER = RUNS / "demo_cards_tokenizer"


def get_config(arg: str | None = None) -> ConfigDict:
    c = runpy.run_path(str(CONFIGS / "demo.py"))["get_config"](arg)
    use_pool(c, CONFIGS / "pools" / "many.py")
    c.pool.shown, c.pool.rename = 5, True
    c.steps = 200
    c.model.tokenizer = str(TOKENIZER)
    c.warmstart.file = str(CONFIGS / "demo_cards_warmstart.safetensors")
    c.checkpoint.every = c.validation.every = 25
    c.prompt.template = "table"
    c.rollout.max_tokens, c.learner.micro_tokens = 112, 9984  # a pass of the warm start takes all of its rows
    c.model.arch.update(dict(
        family="qwen2", num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32, rope_theta=100.0,
        initializer_range=0.06, embedding_range=0.1, previous_token_heads=2,
    ))  # fmt: skip
    c.warmstart.batch, c.warmstart.learning_rate = 48, 3e-3
    c.warmstart.lessons = (
        ("copy", 120, 2, 4), ("read", 450, 5, 1), ("read", 60, 5, 2), ("read", 150, 5, 5), ("read", 150, 5, 7),
    )  # fmt: skip
    c.warmstart.steps, c.warmstart.copy_steps, c.warmstart.copy_periods = 1630, 250, (4, 24)
    return c


def get_sweep() -> list[Overrides]:
    return choices("seed", 0, 1, 2)
