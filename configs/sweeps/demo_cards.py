"""The demo with 240 models: each prompt shows five of them under new names, so that the router must read the cards.

`experiments/studies/unseen_models.py` first trains the tokenizer, which knows the demo's five names too. Then it trains
these runs from a kept warm start. This command made the warm start, in 16 minutes on two CPU cores:

    python -m router_r1_jax.training.warmstart --config=configs/sweeps/demo_cards.py --workdir=runs/demo_cards_warmstart

RL can only choose among models that the warm start can read. The settings below were found by experiment. The numbers
to expect stand in experiments/studies/README.md, *Unseen models*.
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
    c.pool.candidates, c.pool.rename = 5, True
    c.pool.names = (*runpy.run_path(str(MANY))["NAMES"], *demo_names)
    c.steps = 100
    c.model.tokenizer = str(TOKENIZER)
    c.warmstart.file = str(CONFIGS / "demo_cards_warmstart.safetensors")
    c.checkpoint.every = c.validation.every = 25
    c.prompt.template = "table"
    c.rollout.max_row_tokens, c.learner.micro_tokens = (
        112,
        11520,
    )  # one micro-batch holds all rows of a warm start's update
    c.model.arch.update(
        dict(
            family="qwen2",
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            initializer_range=0.03,
            embedding_range=0.1,
            induction_heads=2,
        )
    )
    c.warmstart.batch, c.warmstart.learning_rate = 48, 2e-3
    c.synthetic.curriculum = (("copy", 60, 2, 4), ("read", 60, 5, 1), ("read", 150, 5, 7))
    c.warmstart.steps, c.synthetic.copy_steps, c.synthetic.copy_periods = 720, 150, (4, 24)
    return c


def get_sweep() -> list[Overrides]:
    return choices("seed", 0, 1, 2)
