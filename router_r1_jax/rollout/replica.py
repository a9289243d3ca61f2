"""One replica of the rollout: the sampling loop compiled for one group of devices, and its caches.

Two drivers share `step.work` and the state's `collect` and `deliver`:

- `jit`: one `lax.while_loop`; a single unordered `io_callback`, behind a `lax.cond`, meets the host;
- `host`: the same functions called from Python, without a callback. The test's oracle, and a fall-back.

The caches begin short and grow as rows do, by doubling: attention reads all of a cache, so its length is what a step
costs. The loop is left for it, and entered again in a program compiled for the new length.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import io_callback
from jax.sharding import NamedSharding, PartitionSpec

from router_r1_jax.mesh import RULES, make_mesh, replicated
from router_r1_jax.model import (
    KV,
    Cache,
    ModelConfig,
    Params,
    Prefix,
    RouterLM,
    abstract_params,
    merge_adapters,
    unroll,
)
from router_r1_jax.rollout.exchange import STOP_TAGS, Exchange
from router_r1_jax.rollout.lanes import Caches, empty_caches
from router_r1_jax.rollout.push import take_local
from router_r1_jax.rollout.sampling import Cut
from router_r1_jax.rollout.state import (
    Inbox,
    Limits,
    Rows,
    collect,
    deliver,
    empty_rows,
    inbox_spec,
    positions_needed,
    wants_exchange,
)
from router_r1_jax.rollout.step import Sampler, work

# Cache lengths are multiples of it. From the shortest on XLA's CPU compiler sums over keys in the same order for all of
# them, so that the length changes no bit of a result (128 does, by 7e-7, and any does with two or three lanes, by
# 1e-6); a GPU does not promise that.
LENGTH_BUCKET = 128
PREFIX_BUCKET = 64  # the shared prefix is padded to a multiple of it: few compilations
SHORTEST_CACHE = 256


def cache_lengths(row_tokens: int) -> list[int]:
    """The lengths that a cache grows through, the last one with room for a whole row."""
    if row_tokens <= SHORTEST_CACHE:
        return [row_tokens]
    whole = -(-row_tokens // LENGTH_BUCKET) * LENGTH_BUCKET
    lengths = [SHORTEST_CACHE]
    while lengths[-1] < whole:
        lengths.append(2 * lengths[-1])
    return [*lengths[:-1], whole]


class Replica:
    """Samples on the devices it is given, which share every product (`tensor`). Not for two runs at a time."""

    def __init__(
        self,
        model: ModelConfig,
        limits: Limits,
        devices: Sequence[jax.Device],
        next_state: np.ndarray,
        end_of_text: int,
        driver: str,
    ) -> None:
        """`next_state` is the tag automaton [states, V]. Nothing is compiled before the first run."""
        self._limits, self._driver = limits, driver
        self._model = RouterLM(model.base, unrolled=True)
        self._mesh = make_mesh(1, 1, len(devices), list(devices))
        self._whole = replicated(self._mesh)
        self._stacked = jax.tree.map(lambda x: x.sharding, abstract_params(model, self._mesh))
        heads = "tensor" if model.num_kv_heads % len(devices) == 0 else None
        self._cut_heads = NamedSharding(self._mesh, PartitionSpec(None, heads))
        self._table = jax.device_put(next_state, self._whole)
        self._end_of_text = jax.device_put(np.int32(end_of_text), self._whole)
        self._params: Params | None = None
        self._exchange: Exchange | None = None  # of the run in progress; the compiled callback finds it here
        self._unroll = jax.jit(lambda params: unroll(merge_adapters(model, params), model.num_layers))
        self._prefill = jax.jit(self._prefill_fn)
        self._empty = jax.jit(self._empty_fn, static_argnums=0, out_shardings=self._cut_heads)
        self._grow = jax.jit(Cache.grown, static_argnums=1)
        self._loop = jax.jit(self._loop_fn, donate_argnums=(3, 4))
        self._work = jax.jit(functools.partial(work, self._model, limits), donate_argnums=(3, 4))
        self._collect = jax.jit(functools.partial(collect, limits=limits))
        self._deliver = jax.jit(deliver)
        self._wants = jax.jit(functools.partial(wants_exchange, limits=limits))
        self._needed = jax.jit(functools.partial(positions_needed, limits=limits))

    def push(self, params: Params) -> None:
        """Take stacked parameters, from its own devices where they lie there; adapters are merged."""
        self._params = None  # two copies are enough: those on their way, and these unrolled
        self._params = self._unroll(jax.tree.map(take_local, params, self._stacked))

    def wait(self) -> None:
        """Return when the parameters pushed last are there."""
        jax.block_until_ready(self._params)

    def run(self, exchange: Exchange, prefix: Sequence[int], *, temperature: float, cut: Cut | None, seed: int) -> None:
        """Run until the exchange says stop. `prefix` holds the tokens that all prompts share."""
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(RULES):
            started = time.monotonic()
            shared = jax.block_until_ready(self._shared_prefix(prefix))
            exchange.trace.prefill_seconds = time.monotonic() - started
            tags, draws = np.int32(len(STOP_TAGS)), (np.float32(temperature), jax.random.key(seed), cut)
            sampler = jax.device_put(Sampler(self._table, tags, self._end_of_text, *draws), self._whole)
            rows = jax.device_put(empty_rows(self._limits), self._whole)
            drive = self._drive_jit if self._driver == "jit" else self._drive_host
            lengths = cache_lengths(self._limits.row_tokens)
            caches = self._empty(lengths[0])
            self._exchange = exchange
            while True:
                caches, rows = drive(self._params, shared, sampler, caches, rows)
                if rows.stop:
                    return
                needed, parts = int(self._needed(rows)), [list(part) for part in caches]
                length = next(n for n in lengths if n >= needed)
                del caches  # so that each layer's old cache goes when its new one is made
                grown = [tuple(self._grow(part.pop(0), length) for _ in range(len(part))) for part in parts]
                caches = Caches(*grown)

    def _shared_prefix(self, tokens: Sequence[int]) -> Prefix:
        padded = np.zeros(max(1, -(-len(tokens) // PREFIX_BUCKET)) * PREFIX_BUCKET, np.int32)
        padded[: len(tokens)] = tokens
        kv = self._prefill(self._params, jax.device_put(padded[None], self._whole))
        return Prefix(kv, jax.device_put(np.int32(len(tokens)), self._whole))

    def _prefill_fn(self, params: Params, tokens: jax.Array) -> tuple[Cache, ...]:
        _, kv = self._model.apply({"params": params}, tokens, method=RouterLM.hidden)
        return tuple(KV(layer.k[0], layer.v[0]).laid_out() for layer in kv)

    def _empty_fn(self, length: int) -> Caches:
        return empty_caches(self._model.config, self._limits, length)

    def _fits(self, caches: Caches, rows: Rows) -> jax.Array:
        return positions_needed(rows, self._limits) <= caches.length

    def _drive_jit(self, *args: Any) -> tuple[Caches, Rows]:
        return self._loop(*args)

    def _loop_fn(
        self, params: Params, prefix: Prefix, sampler: Sampler, caches: Caches, rows: Rows
    ) -> tuple[Caches, Rows]:
        limits = self._limits

        def meet_host(rows: Rows) -> Rows:
            rows, out = collect(rows, limits)
            inbox = io_callback(lambda *leaves: self._exchange(*leaves), inbox_spec(limits), *out)
            return deliver(rows, inbox)

        def body(carry: tuple[Caches, Rows]) -> tuple[Caches, Rows]:
            caches, rows = work(self._model, limits, params, prefix, sampler, *carry)
            return caches, jax.lax.cond(wants_exchange(rows, limits), meet_host, lambda r: r, rows)

        return jax.lax.while_loop(lambda carry: ~carry[1].stop & self._fits(*carry), body, (caches, rows))

    def _drive_host(
        self, params: Params, prefix: Prefix, sampler: Sampler, caches: Caches, rows: Rows
    ) -> tuple[Caches, Rows]:
        while not rows.stop and self._needed(rows) <= caches.length:
            caches, rows = self._work(params, prefix, sampler, caches, rows)
            if self._wants(rows):
                rows, out = self._collect(rows)
                inbox: Inbox = self._exchange(*out)
                rows = self._deliver(rows, inbox)
        return caches, rows
