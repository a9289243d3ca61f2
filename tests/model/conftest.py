"""Checkpoints of the tiny models, written once by transformers."""

import functools
from types import SimpleNamespace

import pytest
from tiny_models import CONFIGS, random_model

from router_r1_jax.model import load_hf


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(case) -> the transformers model, its folder, and what load_hf made of it (config, params)."""

    @functools.cache
    def make(case):
        model = random_model(CONFIGS[case]())
        folder = tmp_path_factory.mktemp(case)
        model.save_pretrained(folder)
        config, params = load_hf(folder)
        return SimpleNamespace(model=model, folder=folder, config=config, params=params)

    return make
