"""Replica of the rollout: the jitted sampling loop on one group of devices, and the growth of its KV caches.

Two drivers share `step.step` and the functions of `row_state` that exchange data with the host callback:

- `jit`: one `lax.while_loop`; a single unordered `io_callback`, behind a `lax.cond`, calls the host;
- `host`: a Python loop calls the same functions, without an `io_callback`. Tests compare both, and it is a fall-back.

The KV caches begin short and grow by doubling as rows do, because attention reads the whole cache and a step's cost
depends on its length. To grow, the loop ends, and a program compiled for the new length goes on.
"""

import functools
import time
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import io_callback
from jax.sharding import NamedSharding, PartitionSpec

from router_r1_jax import model as lm
from router_r1_jax.distributed.mesh import RULES, make_mesh, replicated
from router_r1_jax.rollout import row_state
from router_r1_jax.rollout.decode_batch import Caches, empty_caches
from router_r1_jax.rollout.host_callback import HostCallback
from router_r1_jax.rollout.row_state import Rows, StaticShapes
from router_r1_jax.rollout.sampling import Truncation
from router_r1_jax.rollout.step import Carry, Sampler, step
from router_r1_jax.rollout.weight_sync import take_local

# Cache lengths are multiples of LENGTH_BUCKET. From SHORTEST_CACHE on, XLA's CPU compiler sums over keys in the same
# order for all lengths, so the length changes no bit of a result. (A length of 128 changes results by 7e-7, and with a
# decode batch of two or three rows any length does, by 1e-6.) A GPU does not promise that.
LENGTH_BUCKET = 128
SHORTEST_CACHE = 256


def cache_lengths(row_tokens: int) -> list[int]:
    """The lengths through which a cache grows; the last one has room for a whole row."""
    if row_tokens <= SHORTEST_CACHE:
        return [row_tokens]
    whole = -(-row_tokens // LENGTH_BUCKET) * LENGTH_BUCKET
    lengths = [SHORTEST_CACHE]
    while lengths[-1] < whole:
        lengths.append(2 * lengths[-1])
    return [*lengths[:-1], whole]


class Replica:
    """Samples on its devices, which are tensor-parallel. It takes one run at a time."""

    def __init__(
        self,
        model: lm.ModelConfig,
        shapes: StaticShapes,
        devices: Sequence[jax.Device],
        next_state: np.ndarray,
        end_of_text: int,
        driver: str,
    ) -> None:
        """`next_state` is the stop-tag automaton [states, V]. Nothing is compiled before the first run."""
        self._shapes, self._driver = shapes, driver
        self._mesh = make_mesh(1, 1, len(devices), list(devices))
        self._replicated = replicated(self._mesh)
        self._stacked = jax.tree.map(lambda x: x.sharding, lm.abstract_params(model, self._mesh))
        self._automaton = jax.device_put((next_state, np.int32(end_of_text)), self._replicated)
        self._params: lm.Params | None = None
        self._callback: HostCallback | None = None  # of the run in progress; the compiled loop finds it here
        router = lm.RouterLM(model.base, unrolled=True)
        self._unroll = jax.jit(lambda params: lm.unroll(lm.merge_adapters(model, params), model.num_layers))
        self._prefill_prefix = jax.jit(functools.partial(_prefill_prefix, router))
        heads = "tensor" if model.num_kv_heads % len(devices) == 0 else None
        by_heads = NamedSharding(self._mesh, PartitionSpec(None, heads))
        make_caches = functools.partial(empty_caches, model.base, shapes)
        self._empty_caches = jax.jit(make_caches, static_argnums=0, out_shardings=by_heads)
        self._grow = jax.jit(lm.Cache.grown, static_argnums=1)
        self._step_fn = functools.partial(step, router, shapes)
        self._step = jax.jit(self._step_fn, donate_argnums=(1, 2))
        self._loop = jax.jit(self._loop_fn, donate_argnums=(1, 2))

    def sync_weights(self, params: lm.Params) -> lm.Params:
        """Take stacked parameters, without a copy of those that lie on its devices, and merge adapters into them.

        Returns the new parameters of the sampling loop, which may still be on their way.
        """
        self._params = None  # there is room for two copies: the one on its way, and the unrolled one
        self._params = self._unroll(jax.tree.map(take_local, params, self._stacked))
        return self._params

    def run(
        self, callback: HostCallback, prefix: list[int], temperature: float, truncation: Truncation | None, seed: int
    ) -> None:
        """Run until the callback says stop. `prefix` holds the tokens that all prompts share."""
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(RULES):
            started = time.monotonic()
            tokens, length = jax.device_put((lm.pad_prefix(prefix)[None], np.int32(len(prefix))), self._replicated)
            shared = jax.block_until_ready(lm.Prefix(self._prefill_prefix(self._params, tokens), length))
            callback.timeline.prefix_seconds = time.monotonic() - started
            draws = jax.device_put((np.float32(temperature), jax.random.key(seed), truncation), self._replicated)
            sampler = Sampler(self._params, shared, *self._automaton, *draws)
            rows = jax.device_put(row_state.empty_rows(self._shapes), self._replicated)
            drive = self._loop if self._driver == "jit" else self._drive_host
            lengths = cache_lengths(self._shapes.row_tokens)
            caches = self._empty_caches(lengths[0])
            self._callback = callback
            while True:
                caches, rows = drive(sampler, caches, rows)
                if rows.stop:
                    return
                needed = int(row_state.positions_needed(rows, self._shapes))
                length = next(n for n in lengths if n >= needed)
                parts = [list(part) for part in caches]
                del caches  # with the pop below it frees each layer's old cache as soon as the new one is made
                caches = Caches(*[tuple(self._grow(part.pop(0), length) for _ in range(len(part))) for part in parts])

    def _loop_fn(self, sampler: Sampler, caches: Caches, rows: Rows) -> Carry:
        shapes = self._shapes

        def call_host(rows: Rows) -> Rows:
            rows, report = row_state.collect(rows, shapes)
            delivery = io_callback(lambda *x: self._callback(*x), row_state.empty_delivery(shapes), *report)
            return row_state.deliver(rows, delivery)

        def body(carry: Carry) -> Carry:
            caches, rows = self._step_fn(sampler, *carry)
            return caches, jax.lax.cond(row_state.should_call_host(rows, shapes), call_host, lambda r: r, rows)

        def goes_on(carry: Carry) -> jax.Array:
            caches, rows = carry
            return ~rows.stop & (row_state.positions_needed(rows, shapes) <= caches.length)

        return jax.lax.while_loop(goes_on, body, (caches, rows))

    def _drive_host(self, sampler: Sampler, caches: Caches, rows: Rows) -> Carry:
        while not rows.stop and row_state.positions_needed(rows, self._shapes) <= caches.length:
            caches, rows = self._step(sampler, caches, rows)
            if row_state.should_call_host(rows, self._shapes):
                rows, report = row_state.collect(rows, self._shapes)
                rows = row_state.deliver(rows, self._callback(*report))
        return caches, rows


def _prefill_prefix(router: lm.RouterLM, params: lm.Params, tokens: jax.Array) -> tuple[lm.Cache, ...]:
    _, kv = router.apply({"params": params}, tokens, method=lm.RouterLM.hidden)
    return tuple(lm.KV(layer.k[0], layer.v[0]).to_cache() for layer in kv)
