"""Rollout engine with continuous batching: replicas of the sampling loop, each on its devices, share one work queue.

A replica runs in its own thread, never in the main one, so that Ctrl-C reaches Python. No collective crosses replicas
or processes. If there are several processes, each runs an engine on its own devices, over its own prompts.
"""

import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from router_r1_jax.errors import ConfigError
from router_r1_jax.model import ModelConfig, Params
from router_r1_jax.rollout.episode import Episode, Prompt, PromptError, Respond
from router_r1_jax.rollout.host_callback import EpisodeLimits, HostCallback
from router_r1_jax.rollout.replica import Replica
from router_r1_jax.rollout.row_state import StaticShapes
from router_r1_jax.rollout.sampling import Truncation
from router_r1_jax.rollout.stop_tags import STOP_TAGS, build_automaton, token_bytes
from router_r1_jax.rollout.telemetry import RolloutStats, concat_stats
from router_r1_jax.rollout.work_queue import WorkQueue

CALLBACK_BYTES = 16 * 1024  # larger callback arguments can deadlock (512 KB do, 16 KB do not)
TAG_TOKENS = 32  # room for the information tags and white space around a reply
# A prefill step costs the same for one row as for all of prefill_rows. A turn takes tens of steps, so a row loses
# little by these few, and in this time others usually join it.
PREFILL_WAIT = 8
# A look for replies is a callback, which costs a good part of a small model's step. Replies take far longer than this.
POLL_EVERY = 8
STOP_SECONDS = 1.0  # a stopped run waits this long for its replicas; one that is compiling takes longer


def static_shapes(rollout: Any, question_tokens: int) -> StaticShapes:
    """Static sizes from `config.rollout` and the longest question behind the shared prefix.

    Raises ConfigError if one turn makes a callback's argument larger than CALLBACK_BYTES. Questions and replies may be
    longer: they are the callback's result, which cannot deadlock.
    """
    if rollout.driver == "jit" and 4 * rollout.max_turn_tokens > CALLBACK_BYTES:
        raise ConfigError(
            f"rollout.max_turn_tokens is {rollout.max_turn_tokens}; with rollout.driver 'jit' a turn has at most "
            f"{CALLBACK_BYTES // 4} tokens, as many as one callback carries: lower it, or set rollout.driver to 'host'"
        )
    prefill_tokens = max(rollout.reply_tokens + TAG_TOKENS, question_tokens)
    longest = max(prefill_tokens, rollout.max_turn_tokens)
    decode_batch = rollout.decode_batch or rollout.slots
    return StaticShapes(
        slots=rollout.slots,
        decode_batch=decode_batch,
        row_tokens=rollout.max_row_tokens,
        turn_tokens=rollout.max_turn_tokens,
        episode_tokens=rollout.max_episode_tokens or rollout.max_row_tokens,
        prefill_tokens=prefill_tokens,
        prefill_chunk=rollout.prefill_chunk,
        prefill_rows=min(rollout.prefill_rows, decode_batch),
        prefill_wait=PREFILL_WAIT,
        callback_rows=min(rollout.slots, max(1, CALLBACK_BYTES // (4 * longest))),
        poll_every=POLL_EVERY,
    )


def make_truncation(rollout: Any) -> Truncation | None:
    """The truncation of the distribution that `config.rollout` asks for, or None."""
    if rollout.top_k == 0 and rollout.top_p == 1 and rollout.min_p == 0:
        return None
    return Truncation(np.int32(rollout.top_k), np.float32(rollout.top_p), np.float32(rollout.min_p))


class RolloutStoppedError(Exception):
    """Raised by a run that `Engine.stop` has ended."""


class Engine:
    """Samples episodes on this process's devices."""

    def __init__(
        self,
        model: ModelConfig,
        shapes: StaticShapes,
        tokenizer: PreTrainedTokenizerBase,
        limits: EpisodeLimits,
        *,
        driver: str,
        devices: Sequence[jax.Device],
        tensor: int,
    ) -> None:
        """Make one replica for each `tensor` of the devices; nothing is compiled before the first run.

        The number of devices is a multiple of `tensor`.
        """
        self._shapes, self._tokenizer, self._limits = shapes, tokenizer, limits
        next_state = build_automaton(STOP_TAGS, token_bytes(tokenizer, model.vocab_size))
        end_of_text = -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        groups = [devices[i : i + tensor] for i in range(0, len(devices), tensor)]
        self._work_queue: WorkQueue | None = None  # of the run in progress
        self._replicas = [Replica(model, shapes, group, next_state, end_of_text, driver) for group in groups]
        self._threads: list[threading.Thread] = []  # of the latest run; all have ended when the next one begins

    def sync_weights(self, params: Params) -> None:
        """Give stacked parameters, as `WeightSync` lays them out, to every replica; return when they have arrived."""
        jax.block_until_ready([replica.sync_weights(params) for replica in self._replicas])

    def stop(self) -> None:
        """End the run that another thread has in progress; there it raises RolloutStoppedError."""
        if self._work_queue is not None:
            self._work_queue.fail(RolloutStoppedError("the rollout was stopped"))

    def run(
        self,
        prompts: Sequence[Prompt],
        respond: Respond,
        *,
        temperature: float,
        seed: int,
        prefix_tokens: int,
        truncation: Truncation | None = None,
        on_finish: Callable[[Episode], None] | None = None,
    ) -> tuple[list[Episode], RolloutStats]:
        """Sample one episode per prompt; returns them in the prompts' order.

        `seed` and each prompt's `episode`, which is unique, decide every random draw. All prompts share their first
        `prefix_tokens` tokens; processes that share a run's prompts must agree on it. Raises PromptError, an error of
        `respond` or of a future, and, promptly, KeyboardInterrupt.
        """
        began = time.monotonic()
        self._check(prompts, prefix_tokens)
        self._work_queue = work_queue = WorkQueue(prompts, replicas=len(self._replicas), on_finish=on_finish)
        args = self._shapes, self._tokenizer, work_queue, prefix_tokens, respond, self._limits
        callbacks = [HostCallback(*args) for _ in self._replicas]
        prefix = list(prompts[0].tokens[:prefix_tokens])
        settings = {"prefix": prefix, "temperature": temperature, "truncation": truncation}
        pairs = zip(self._replicas, callbacks, strict=True)
        runs = [functools.partial(replica.run, callback, seed=seed, **settings) for replica, callback in pairs]
        self._run_threads(work_queue, runs)
        by_id = {episode.id: episode for episode in work_queue.finished}
        stats = concat_stats([c.timeline.stats(began=began, prefix_tokens=prefix_tokens) for c in callbacks])
        return [by_id[p.episode] for p in prompts], stats

    def _check(self, prompts: Sequence[Prompt], prefix_tokens: int) -> None:
        longest, row_tokens = self._shapes.prefill_tokens, self._shapes.row_tokens
        for prompt in prompts:
            rest = len(prompt.tokens) - prefix_tokens
            if rest > longest or rest + 2 > row_tokens:
                raise PromptError(
                    f"episode {prompt.episode} has {rest} prompt tokens behind the shared prefix; raise "
                    f"prompt.question_tokens ({longest}) or rollout.max_row_tokens ({row_tokens}), or shorten it"
                )

    def _run_threads(self, work_queue: WorkQueue, runs: Sequence[Callable[[], None]]) -> None:
        """Run each in a thread until all have ended; raise the first error."""

        def guarded(run: Callable[[], None]) -> None:
            try:
                run()
            except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
                work_queue.fail(error)

        for thread in self._threads:  # of a run that was stopped while they compiled
            thread.join()
        threads = [threading.Thread(target=guarded, args=[r], name="rollout", daemon=True) for r in runs]
        self._threads = threads
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(timeout=0.1)  # a join without timeout cannot be interrupted
        except BaseException as error:
            work_queue.fail(error)
            until = time.monotonic() + STOP_SECONDS
            for thread in threads:
                thread.join(timeout=max(0.0, until - time.monotonic()))
            raise
        if work_queue.error is not None:
            raise work_queue.error
