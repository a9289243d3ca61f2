"""The tiny configuration with one fault, or with another pool: --config=bad_config.py:FAULT or bad_config.py:pool=URL.

A fault that ml_collections refuses is reported with its line in this file.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from router_r1_jax.config import model_card


def tiny_config() -> ConfigDict:
    """What tiny_config.py says."""
    spec = importlib.util.spec_from_file_location("tiny_config", Path(__file__).with_name("tiny_config.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def get_config(arg: str) -> ConfigDict:
    c = tiny_config()
    fault, _, value = arg.partition("=")
    match fault:
        case "pool":  # the server that the tests have started
            c.synthetic.simulate_models = False
            c.pool.providers[0].base_url = value
        case "unknown_field":
            c.rollout.grup = 8
        case "wrong_type":
            c.rollout.num_generations = "eight"
        case "unknown_card_field":
            c.pool.models = (model_card(name="Titan", prise=12.0),)
        case "wrong_card_type":
            c.pool.models[1].price_in = "0.2"
        case "no_program":
            c.steps = setps  # noqa: F821
        case "negative_price":
            c.pool.models[2].price_out = -1.0
        case "two_of_one_name":
            c.pool.models[3].name = "Titan"
        case "score_in_percent":
            c.pool.models[0].performance.film = 97.0
        case "missing_key":
            c.pool.providers[0].key_env = value
        case "undeclared_provider":
            c.pool.models[4].provider = "openai"
        case _:
            raise AssertionError(fault)
    return c
