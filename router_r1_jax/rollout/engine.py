"""The rollout engine: compiles the sampling loop once and runs it over any number of episodes.

Two drivers share `step.work` and the state's `collect` and `deliver`:

- `jit`: one `lax.while_loop`; a single unordered `io_callback`, behind a `lax.cond`, meets the host;
- `host`: the same functions called from Python, without a callback. The test's oracle, and a fall-back.
"""

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from transformers import PreTrainedTokenizerBase

from router_r1_jax.model import ModelConfig, Params, Prefix, RouterLM, empty_cache
from router_r1_jax.rollout.automaton import build_automaton, token_bytes
from router_r1_jax.rollout.episode import Episode, Prompt, PromptError, Respond, RolloutStats, common_prefix
from router_r1_jax.rollout.exchange import STOP_TAGS, Exchange
from router_r1_jax.rollout.state import Inbox, Limits, Rows, collect, deliver, empty_rows, inbox_spec, wants_exchange
from router_r1_jax.rollout.step import Caches, Sampler, work

PREFIX_BUCKET = 64  # the shared prefix is padded to a multiple of it: few compilations
CALLBACK_BYTES = 16 * 1024  # larger callback arguments can deadlock (measured: 512 KB hung, 16 KB never did)
TAG_TOKENS = 32  # room for the information tags and white space around a reply


def make_limits(rollout: Any, question_tokens: int) -> Limits:
    """Static sizes from `config.rollout` and the longest question behind the shared prefix."""
    feed_tokens = max(rollout.reply_tokens + TAG_TOKENS, question_tokens)
    widest = max(feed_tokens, rollout.max_turn_tokens)
    return Limits(
        slots=rollout.slots,
        row_tokens=rollout.max_tokens,
        turn_tokens=rollout.max_turn_tokens,
        feed_tokens=feed_tokens,
        chunk=rollout.chunk,
        feed_rows=min(rollout.feed_rows, rollout.slots),
        exchange_rows=min(rollout.slots, max(1, CALLBACK_BYTES // (4 * widest))),
        poll_every=rollout.poll_every,
    )


class Engine:
    """Samples episodes on one device. `params` are given unrolled, on that device, at each run."""

    def __init__(
        self,
        model: ModelConfig,
        limits: Limits,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_calls: int,
        reply_tokens: int,
        driver: str = "jit",
        device: jax.Device | None = None,
    ) -> None:
        """Nothing is compiled before the first run."""
        self._model = RouterLM(model, unrolled=True)
        self._limits = limits
        self._tokenizer = tokenizer
        self._max_calls = max_calls
        self._reply_tokens = reply_tokens
        self._driver = driver
        self._device = device or jax.local_devices()[0]
        automaton = build_automaton(STOP_TAGS, token_bytes(tokenizer, model.vocab_size))
        eos = tokenizer.eos_token_id
        self._table = jax.device_put(automaton.next_state, self._device)
        self._end_of_text = jax.device_put(np.int32(-1 if eos is None else eos), self._device)
        self._exchange: Exchange | None = None  # of the run in progress; the compiled callback finds it here
        self._prefill = jax.jit(self._prefill_fn)
        self._loop = jax.jit(self._loop_fn, donate_argnums=(3, 4))
        self._work = jax.jit(functools.partial(work, self._model, limits), donate_argnums=(3, 4))
        self._collect = jax.jit(functools.partial(collect, limits=limits))
        self._deliver = jax.jit(deliver)

    @property
    def device(self) -> jax.Device:
        """Where parameters are expected."""
        return self._device

    def run(
        self,
        params: Params,
        prompts: list[Prompt],
        respond: Respond,
        *,
        temperature: float,
        seed: int,
        on_finish: Callable[[Episode], None] | None = None,
    ) -> tuple[list[Episode], RolloutStats]:
        """Sample one episode per prompt; returns them in the prompts' order.

        `seed` and each prompt's `episode` decide every draw. Raises PromptError, what a reply's future raised, and
        KeyboardInterrupt promptly: the loop runs in a thread of its own.
        """
        started = time.monotonic()
        shared = common_prefix([p.tokens for p in prompts])
        self._check(prompts, shared)
        exchange = Exchange(
            self._limits, self._tokenizer, prompts, shared, respond,
            max_calls=self._max_calls, reply_tokens=self._reply_tokens, on_finish=on_finish,
        )  # fmt: skip
        sampler = Sampler(
            self._table, jnp.int32(len(STOP_TAGS)), self._end_of_text, jnp.float32(temperature), jax.random.key(seed)
        )
        prefix = self._shared_prefix(params, prompts[0].tokens[:shared])
        caches = empty_cache(self._model.config, self._limits.slots, self._limits.row_tokens)
        state = jax.device_put((caches, empty_rows(self._limits)), self._device)
        counts = self._drive(exchange, params, prefix, jax.device_put(sampler, self._device), *state)
        by_id = {episode.id: episode for episode in exchange.finished}
        stats = RolloutStats(
            seconds=time.monotonic() - started,
            prefix_tokens=shared,
            decode_steps=int(counts[0]),
            decoded_tokens=int(counts[1]),
            feed_steps=int(counts[2]),
            fed_tokens=int(counts[3]),
            exchanges=exchange.exchanges,
            idle_seconds=exchange.idle_seconds,
            calls=sum(len(e.replies) for e in exchange.finished),
        )
        return [by_id[p.episode] for p in prompts], stats

    def _check(self, prompts: list[Prompt], shared: int) -> None:
        for prompt in prompts:
            own = len(prompt.tokens) - shared
            if own > self._limits.feed_tokens or own + 2 > self._limits.row_tokens:
                raise PromptError(
                    f"episode {prompt.episode} has {own} prompt tokens of its own; raise prompt.question_tokens "
                    f"({self._limits.feed_tokens}) or rollout.max_tokens ({self._limits.row_tokens}), or shorten it"
                )
        if len({p.episode for p in prompts}) != len(prompts):
            raise ValueError("two prompts carry the same episode number; numbers must be unique within a run")

    def _shared_prefix(self, params: Params, tokens: tuple[int, ...]) -> Prefix:
        padded = np.zeros(max(1, -(-len(tokens) // PREFIX_BUCKET)) * PREFIX_BUCKET, np.int32)
        padded[: len(tokens)] = tokens
        kv = self._prefill(params, jax.device_put(padded[None], self._device))
        return jax.device_put(Prefix(kv, np.int32(len(tokens))), self._device)

    def _prefill_fn(self, params: Params, tokens: jax.Array) -> Any:
        _, kv = self._model.apply({"params": params}, tokens, method=RouterLM.hidden)
        return jax.tree.map(lambda x: x[0], kv)

    def _drive(self, exchange: Exchange, *args: Any) -> np.ndarray:
        """Run the chosen driver in a thread, so that Ctrl-C reaches Python; returns the counters."""
        drive = self._drive_jit if self._driver == "jit" else self._drive_host
        result: dict[str, Any] = {}

        def target() -> None:
            try:
                result["counts"] = np.asarray(drive(exchange, *args))
            except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
                result["error"] = error

        thread = threading.Thread(target=target, name="rollout", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(timeout=0.1)
        except BaseException:
            exchange.stopping = True
            thread.join(timeout=5.0)
            raise
        error = exchange.error or result.get("error")
        if error is not None:
            raise error
        return result["counts"]

    def _drive_jit(
        self, exchange: Exchange, params: Params, prefix: Prefix, sampler: Sampler, caches: Caches, rows: Rows
    ) -> jax.Array:
        self._exchange = exchange
        _, rows = self._loop(params, prefix, sampler, caches, rows)
        return rows.counts

    def _loop_fn(
        self, params: Params, prefix: Prefix, sampler: Sampler, caches: Caches, rows: Rows
    ) -> tuple[Caches, Rows]:
        limits = self._limits

        def meet_host(rows: Rows) -> Rows:
            rows, out = collect(rows, limits)
            inbox = io_callback(lambda *leaves: self._exchange(*leaves), inbox_spec(limits), *out)
            return deliver(rows, inbox)

        def body(carry: tuple[Caches, Rows]) -> tuple[Caches, Rows]:
            caches, rows = carry
            rows = jax.lax.cond(wants_exchange(rows, limits), meet_host, lambda r: r, rows)
            return work(self._model, limits, params, prefix, sampler, caches, rows)

        return jax.lax.while_loop(lambda carry: ~carry[1].stop, body, (caches, rows))

    def _drive_host(
        self, exchange: Exchange, params: Params, prefix: Prefix, sampler: Sampler, caches: Caches, rows: Rows
    ) -> jax.Array:
        wants = jax.jit(functools.partial(wants_exchange, limits=self._limits))
        while True:
            if wants(rows):
                rows, out = self._collect(rows)
                inbox: Inbox = exchange(*out)
                rows = self._deliver(rows, inbox)
                if inbox.stop:
                    return rows.counts
            caches, rows = self._work(params, prefix, sampler, caches, rows)
