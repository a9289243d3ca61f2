"""Fixtures of the pool's tests: a scripted provider and a configuration that points to it."""

from contextlib import ExitStack

import pytest
from scripted_provider import serving

from router_r1_jax.config import base_config, model_card, provider


@pytest.fixture
def serve():
    """serve(script) -> Scripted, running until the test ends."""
    with ExitStack() as stack:
        yield lambda script: stack.enter_context(serving(script))


@pytest.fixture
def pool_config():
    """pool_config(base_url, **fields of config.pool) with two models of provider "p", quick to give up and to retry."""

    def make(base_url="http://127.0.0.1:9/v1", **fields):
        config = base_config().pool
        config.providers = (provider(name="p", base_url=base_url),)
        config.models = (
            model_card(
                name="Titan",
                provider="p",
                model="titan-70b",
                price_in=3.0,
                price_out=12.0,
                latency=0.5,
                performance={"film": 0.9},
                aliases=("Titan XL",),
            ),
            model_card(name="Pico", provider="p", model="pico-1b", price_in=0.05, price_out=0.2),
        )
        config.update(dict(deadline=20.0, request_timeout=5.0, backoff=0.01, backoff_max=0.05, concurrency=8))
        config.circuit_breaker.failures = fields.pop("failures_to_open", 0)
        config.call_cache.mode = fields.pop("call_cache", "off")
        config.update(fields)
        return config

    return make
