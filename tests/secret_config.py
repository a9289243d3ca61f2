"""The tiny configuration with its models behind a provider that wants a key; its address comes from the environment."""

import importlib.util
import os
from pathlib import Path

from ml_collections import ConfigDict

from router_r1_jax.config import provider


def get_config(arg: str | None = None) -> ConfigDict:
    spec = importlib.util.spec_from_file_location("tiny_config", Path(__file__).with_name("tiny_config.py"))
    tiny_config = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny_config)
    c = tiny_config.get_config()
    c.synthetic.simulate_models = False
    c.pool.providers = (provider(name="simulated", base_url=os.environ["POOL_URL"], key_env="MARKED_KEY"),)
    c.pool.call_cache.mode = "record"
    c.steps = 2
    c.pool.temperature = 0.5  # each call is a request of its own: a refusal that many rows shared would end the run
    return c
