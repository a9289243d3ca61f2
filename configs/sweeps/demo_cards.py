"""The demo over 240 models, five of them in a prompt, under names dealt anew each time: for a router that reads.

`experiments/studies/unseen_models.py` makes the tokenizer, to which the demo's five names are words too, and trains
these runs from a kept warm start, which was made, in 16 minutes on two cores, with

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
MANY = CONFIGS / "pools" / "many.py"


def get_config(arg: str | None = None) -> ConfigDict:
    c = runpy.run_path(str(CONFIGS / "demo.py"))["get_config"](arg)
    demo_names = [model.name for model in c.pool.models]
    use_pool(c, MANY)
    c.pool.shown, c.pool.rename = 5, True
    c.pool.names = (*runpy.run_path(str(MANY))["NAMES"], *demo_names)
    c.steps = 100
    c.model.tokenizer = str(TOKENIZER)
    c.warmstart.file = str(CONFIGS / "demo_cards_warmstart.safetensors")
    c.checkpoint.every = c.validation.every = 25
    c.prompt.template = "table"
    c.rollout.max_tokens, c.learner.micro_tokens = 112, 11520  # a pass of the warm start takes all of its rows
    c.model.arch.update(dict(
        family="qwen2", num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32, initializer_range=0.03,
        embedding_range=0.1, induction_heads=2,
    ))  # fmt: skip
    c.warmstart.batch, c.warmstart.learning_rate = 48, 2e-3
    c.warmstart.lessons = (("copy", 60, 2, 4), ("read", 60, 5, 1), ("read", 150, 5, 7))
    c.warmstart.steps, c.warmstart.copy_steps, c.warmstart.copy_periods = 720, 150, (4, 24)
    return c


def get_sweep() -> list[Overrides]:
    return choices("seed", 0, 1, 2)
