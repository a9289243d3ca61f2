"""Fixtures of the pool's tests: a scripted provider and a configuration that points to it."""

import threading
from http.server import ThreadingHTTPServer

import pytest
from scripted_provider import Scripted, handler

from router_r1_jax.config import base_config, model_card, provider


@pytest.fixture
def serve():
    """serve(script) -> Scripted, running until the test ends."""
    servers = []

    def start(script):
        scripted = Scripted(script)
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler(scripted, threading.Lock()))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        scripted.base_url = f"http://127.0.0.1:{server.server_port}/v1"
        servers.append(server)
        return scripted

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


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
