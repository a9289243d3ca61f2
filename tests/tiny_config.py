"""The demo's configuration, shrunk until a whole run takes seconds; the mains under test read it with --config.

Sixty supervised updates teach the router the format but not whom to ask: it calls, answers, fails and is rewarded,
so that nothing in a run is trivially zero.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

DEMO = Path(__file__).parents[1] / "configs" / "demo.py"


def demo_config() -> ConfigDict:
    """What configs/demo.py says."""
    spec = importlib.util.spec_from_file_location("demo_config", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def get_config(arg: str | None = None) -> ConfigDict:
    c = demo_config()
    c.steps = 4
    c.model.arch.update(dict(num_layers=2, width=32, mlp=64, num_heads=2, num_kv_heads=1, head_dim=16))
    c.synthetic.world.update(dict(films=8, songs=8, clubs=8, persons=10, cities=10, countries=4, rivers=4))
    c.pool.update(dict(backoff=0.02, backoff_max=0.2))
    c.rollout.update(dict(prompts_per_step=4, num_generations=4, slots=8, max_row_tokens=96, max_turn_tokens=32))
    c.learner.micro_tokens, c.learner.length_buckets = 1536, 1
    c.warmstart.update(dict(steps=120, file="", batch=32, warmup=10, learning_rate=1e-2))
    c.synthetic.copy_steps = 0
    c.checkpoint.every = 2
    c.validation.update(dict(every=2, questions=8))
    c.evaluation.update(dict(questions=20, bootstrap=200))
    c.logging.episodes_every = 1
    return c
