"""Rollouts of a training step: collect_rollouts, DAPO's dynamic sampling, and sampling one step off-policy (prefetch).

Dynamic sampling (DAPO, section 3.2): a group in which all rewards are equal teaches nothing. With
learner.dynamic_sampling, more rollouts with new questions replace such groups.

One step off-policy: with rollout.one_step_off_policy the next step's episodes are sampled while the update runs, by
parameters that lack that one update. The clipped ratio corrects for it if learner.old_logps is "sampler", the weights
of learner.tis_cap if it is "learner". Calls and decoding then run beside the update, which pays if sampling has
devices or cores of its own.
"""

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.learner import groups_with_spread
from router_r1_jax.reward import Rewards
from router_r1_jax.router import RolloutBatch, Router, concat_batches


class Round(NamedTuple):
    """One rollout of a training step and its rewards. A step has several with dynamic sampling."""

    rollouts: RolloutBatch
    rewards: Rewards


def collect_rollouts(
    router: Router, questions: Sequence[QuestionRecord], config: ConfigDict, *, step: int, round: int
) -> RolloutBatch:
    """Sample a group of episodes per question.

    Args:
      step: number of the training step, from 1. All its rounds show the same candidates.
      round: number of the rollout within the step, from 0.
    """
    return router.answer(
        questions,
        num_generations=config.rollout.num_generations,
        temperature=config.rollout.temperature,
        seed=(config.seed, step - 1, *([round] if round else [])),
        candidates_seed=(config.seed, step - 1),
        step=step,
        split="train",
    )


def compared_rewards(config: ConfigDict, rewards: Rewards) -> dict[str, np.ndarray]:
    """The rewards [B] that the advantages compare: the components that have weights, or else the total."""
    weights = config.learner.component_weights
    return {name: getattr(rewards, name) for name, weight in weights.items() if weight} or {"total": rewards.total}


def wants_another_round(config: ConfigDict, rounds: Sequence[Round]) -> bool:
    """Whether the step needs (more) rollouts: too few groups have a spread, and dynamic sampling allows one more."""
    if len(rounds) > config.learner.dynamic_sampling:
        return False
    return sum(len(_useful_groups(config, one)) for one in rounds) < config.rollout.prompts_per_step


def choose_groups(config: ConfigDict, rounds: Sequence[Round]) -> Round:
    """As many groups as a step has: those with a spread first, in the order in which they were sampled."""
    if len(rounds) == 1:
        return rounds[0]
    rollouts = concat_batches([one.rollouts for one in rounds])
    rewards = Rewards.concat([one.rewards for one in rounds])
    size = config.rollout.prompts_per_step
    useful = np.concatenate([i * size + _useful_groups(config, one) for i, one in enumerate(rounds)])
    others = np.setdiff1d(np.arange(len(rounds) * size), useful)
    groups = np.sort(np.concatenate([useful, others])[:size])
    rows = (groups[:, None] * rollouts.num_generations + np.arange(rollouts.num_generations)).ravel()
    return Round(rollouts.take(rows), rewards.take(rows))


def _useful_groups(config: ConfigDict, one: Round) -> np.ndarray:
    """Groups in which some of the compared rewards differ."""
    weights, groups = one.rollouts.weights(config.pool), one.rollouts.groups
    parts = compared_rewards(config, one.rewards).values()
    return np.unique(np.concatenate([groups_with_spread(part, groups, weights) for part in parts]))


class Prefetch:
    """Samples a step's rounds in a thread, one step at a time. A context manager that ends a running rollout."""

    def __init__(self, router: Router, sample: Callable[[int], list[Round]]) -> None:
        """`sample(step)` is called in the thread, or by `take` itself for a step that was not begun."""
        self._router, self._sample = router, sample
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._future: Future[list[Round]] | None = None

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *exception: object) -> None:
        while self._future is not None and not self._future.done():
            self._router.stop()  # repeated, since the thread may be between two rollouts
            wait([self._future], timeout=0.2)
        self._thread.shutdown(wait=True, cancel_futures=True)

    @property
    def begun(self) -> bool:
        """Whether a step is being sampled, or is ready to be taken."""
        return self._future is not None

    def begin(self, step: int) -> None:
        """Start to sample a step."""
        self._future = self._thread.submit(self._sample, step)

    def take(self, step: int) -> list[Round]:
        """The rounds of a step. Raises what their sampling raised."""
        if self._future is None:
            return self._sample(step)
        future = self._future
        while not future.done():
            with contextlib.suppress(TimeoutError):  # short waits, so that Ctrl-C is heard
                future.exception(timeout=0.2)
        self._future = None
        return future.result()
