"""The whole main job on two CPU cores: a 1M-parameter router learns whom to ask in the synthetic world.

make demo
python -m router_r1_jax.train --config=configs/demo.py --workdir=runs/demo
python -m router_r1_jax.evaluate --config=configs/demo.py --workdir=runs/demo
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from router_r1_jax.config import base_config


def _pool():
    path = Path(__file__).parent / "pools" / "simulated.py"
    spec = importlib.util.spec_from_file_location("simulated_pool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def get_config(arg: str | None = None) -> ConfigDict:
    c = base_config()
    pool = _pool()
    c.pool.providers, c.pool.models = pool.providers(), pool.models()
    c.pool.simulate = True
    c.pool.price_date = "2026-11-01"
    c.steps = 60
    c.prompt.template = "terse"
    c.prompt.question_tokens = 32
    c.rollout.questions = 16
    c.rollout.group = 8
    c.rollout.slots = 64
    c.rollout.max_calls = 2
    c.rollout.max_turn_tokens = 48
    c.rollout.reply_tokens = 32
    c.rollout.max_tokens = 192
    c.rollout.chunk = 16
    c.learner.learning_rate = 5e-4
    c.learner.micro_batch = 32
    c.warmstart.steps = 900
    c.warmstart.copy_steps = 300
    c.warmstart.file = str(Path(__file__).parent / "demo_warmstart.safetensors")
    c.checkpoint.every = c.validation.every = 10
    return c
