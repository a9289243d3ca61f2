"""The rollout engine: replicas of the sampling loop, each on devices of its own, that share one queue of questions.

A replica runs in a thread of its own, never the main one, so that Ctrl-C reaches Python. No collective crosses replicas
or processes: with several processes each runs an engine on its own devices, over its own prompts.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from router_r1_jax.model import ModelConfig, Params
from router_r1_jax.rollout.agenda import Agenda
from router_r1_jax.rollout.automaton import build_automaton, token_bytes
from router_r1_jax.rollout.episode import Episode, Prompt, PromptError, Respond, common_prefix
from router_r1_jax.rollout.exchange import STOP_TAGS, Exchange, Manners
from router_r1_jax.rollout.replica import Replica
from router_r1_jax.rollout.sampling import Cut
from router_r1_jax.rollout.state import Limits
from router_r1_jax.rollout.trace import RolloutStats, summary

CALLBACK_BYTES = 16 * 1024  # larger callback arguments can deadlock (measured: 512 KB hung, 16 KB never did)
TAG_TOKENS = 32  # room for the information tags and white space around a reply
LAST_STEPS = 1.0  # seconds that a stopped run waits for its replicas; one that is compiling takes longer


def make_limits(rollout: Any, question_tokens: int) -> Limits:
    """Static sizes from `config.rollout` and the longest question behind the shared prefix.

    Raises ValueError where one turn makes a callback's argument larger than CALLBACK_BYTES. Questions and replies are
    its result, which no device holds back: they may be longer.
    """
    if rollout.driver == "jit" and 4 * rollout.max_turn_tokens > CALLBACK_BYTES:
        raise ValueError(
            f"rollout.max_turn_tokens is {rollout.max_turn_tokens}; with rollout.driver 'jit' a turn has at most "
            f"{CALLBACK_BYTES // 4} tokens, what one callback carries: lower it, or set rollout.driver to 'host'"
        )
    feed_tokens = max(rollout.reply_tokens + TAG_TOKENS, question_tokens)
    widest = max(feed_tokens, rollout.max_turn_tokens)
    lanes = rollout.lanes or rollout.slots
    return Limits(
        slots=rollout.slots,
        lanes=lanes,
        row_tokens=rollout.max_tokens,
        turn_tokens=rollout.max_turn_tokens,
        episode_tokens=rollout.max_episode_tokens or rollout.max_tokens,
        feed_tokens=feed_tokens,
        chunk=rollout.chunk,
        feed_rows=min(rollout.feed_rows, lanes),
        exchange_rows=min(rollout.slots, max(1, CALLBACK_BYTES // (4 * widest))),
        feed_wait=rollout.feed_wait,
        poll_every=rollout.poll_every,
    )


def make_cut(rollout: Any) -> Cut | None:
    """What `config.rollout` cuts from the distribution; None for nothing."""
    if rollout.top_k == 0 and rollout.top_p == 1 and rollout.min_p == 0:
        return None
    return Cut(np.int32(rollout.top_k), np.float32(rollout.top_p), np.float32(rollout.min_p))


class RolloutStoppedError(Exception):
    """Raised by a run that `Engine.stop` has ended."""


class Engine:
    """Samples episodes on this process's devices."""

    def __init__(
        self,
        model: ModelConfig,
        limits: Limits,
        tokenizer: PreTrainedTokenizerBase,
        manners: Manners,
        *,
        driver: str = "jit",
        devices: Sequence[jax.Device] | None = None,
        tensor: int = 1,
    ) -> None:
        """One replica for each `tensor` of `devices` (by default one on the first of this process's devices).

        Nothing is compiled before the first run. Raises ValueError where `tensor` does not divide the devices.
        """
        devices = jax.local_devices()[:1] if devices is None else list(devices)
        if tensor < 1 or len(devices) % tensor:
            raise ValueError(f"rollout.tensor is {tensor}; it must divide the rollout's devices ({len(devices)})")
        self._limits, self._tokenizer, self._manners = limits, tokenizer, manners
        automaton = build_automaton(STOP_TAGS, token_bytes(tokenizer, model.vocab_size))
        end_of_text = -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        groups = [devices[i : i + tensor] for i in range(0, len(devices), tensor)]
        self._agenda: Agenda | None = None  # of the run in progress
        self._replicas = [Replica(model, limits, group, automaton.next_state, end_of_text, driver) for group in groups]
        self._threads: list[threading.Thread] = []  # of the latest run; none lives when the next one begins

    def push(self, params: Params) -> None:
        """Take stacked parameters, as `push.Spread` lays them out, to every replica; return when they are there."""
        for replica in self._replicas:
            replica.push(params)
        for replica in self._replicas:
            replica.wait()

    def stop(self) -> None:
        """End the run that another thread has in progress; there it raises RolloutStoppedError."""
        if self._agenda is not None:
            self._agenda.fail(RolloutStoppedError("the rollout was stopped"))

    def run(
        self,
        prompts: Sequence[Prompt],
        respond: Respond,
        *,
        temperature: float,
        seed: int,
        cut: Cut | None = None,
        prefix_tokens: int | None = None,
        on_finish: Callable[[Episode], None] | None = None,
    ) -> tuple[list[Episode], RolloutStats]:
        """Sample one episode per prompt; returns them in the prompts' order.

        `seed` and each prompt's `episode` decide every draw. `prefix_tokens`, of what all prompts begin with, is the
        longest common prefix by default; processes that share a run's prompts must agree on it. Raises PromptError,
        what a reply's future raised, and KeyboardInterrupt promptly.
        """
        began = time.monotonic()
        shared = common_prefix([p.tokens for p in prompts]) if prefix_tokens is None else prefix_tokens
        self._check(prompts, shared)
        self._agenda = agenda = Agenda(prompts, replicas=len(self._replicas), on_finish=on_finish)
        args = self._limits, self._tokenizer, agenda, shared, respond, self._manners
        exchanges = [Exchange(*args) for _ in self._replicas]
        prefix, draws = prompts[0].tokens[:shared], {"temperature": temperature, "cut": cut, "seed": seed}
        self._drive(
            agenda,
            [lambda r=r, e=e: r.run(e, prefix, **draws) for r, e in zip(self._replicas, exchanges, strict=True)],
        )
        by_id = {episode.id: episode for episode in agenda.finished}
        traces = [exchange.trace for exchange in exchanges]
        stats = summary(traces, self._limits.slots, agenda.finished, began=began, prefix_tokens=shared)
        return [by_id[p.episode] for p in prompts], stats

    def _check(self, prompts: Sequence[Prompt], shared: int) -> None:
        for prompt in prompts:
            own = len(prompt.tokens) - shared
            if own > self._limits.feed_tokens or own + 2 > self._limits.row_tokens:
                raise PromptError(
                    f"episode {prompt.episode} has {own} prompt tokens of its own; raise prompt.question_tokens "
                    f"({self._limits.feed_tokens}) or rollout.max_tokens ({self._limits.row_tokens}), or shorten it"
                )
        if len({p.episode for p in prompts}) != len(prompts):
            raise ValueError("two prompts carry the same episode number; numbers must be unique within a run")

    def _drive(self, agenda: Agenda, runs: Sequence[Callable[[], None]]) -> None:
        """Each run in a thread, until all are done; the first error is raised here."""

        def guarded(run: Callable[[], None]) -> None:
            try:
                run()
            except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
                agenda.fail(error)

        for thread in self._threads:  # of a run that was stopped while they compiled
            thread.join()
        threads = [threading.Thread(target=guarded, args=[r], name="rollout", daemon=True) for r in runs]
        self._threads = threads
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(timeout=0.1)
        except BaseException:
            agenda.stopping = True
            until = time.monotonic() + LAST_STEPS
            for thread in threads:
                thread.join(timeout=max(0.0, until - time.monotonic()))
            raise
        if agenda.error is not None:
            raise agenda.error
