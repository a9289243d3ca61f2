"""What a training step learns from: episodes of a batch of questions, scored; sampled now, or one step ahead.

Groups in which all that the update compares is equal teach nothing. With learner.resample they are replaced by groups
of new questions (dynamic sampling; DAPO, section 3.2).

With rollout.ahead the next step's episodes are sampled while the update runs, by parameters that lack that one update
(one step off-policy). The clipped ratio corrects for it with learner.old_logps "sampler", the weights of
`learner.importance_cap` do with "learner". Calls and decoding then hide behind the update, where sampling has devices,
or cores, of its own.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from router_r1_jax.data.questions import QuestionIterator
from router_r1_jax.learner import groups_with_spread
from router_r1_jax.learning import compared
from router_r1_jax.pool.cards import route_names
from router_r1_jax.reward import CostNormalizer, Rewards, score
from router_r1_jax.router import Answers, Router, join_answers


class Round(NamedTuple):
    """Answers to one batch of questions, and what they earned."""

    answers: Answers
    rewards: Rewards


class Experience(NamedTuple):
    """All rounds of a step, and the groups of them that the update learns from."""

    rounds: Sequence[Round]
    chosen: Round


def judge(config: ConfigDict, answers: Answers, normalizer: CostNormalizer) -> Rewards:
    """Rewards of one rollout; the normaliser's window takes the costs in the episodes' order."""
    return score(
        [episode.text for episode in answers.episodes],
        [question.golds for question in answers.questions],
        answers.raw_costs(config.reward),
        route_names(answers.roster),
        preset=config.reward.preset,
        alpha=config.reward.alpha,
        metric=config.reward.metric,
        normalizer=normalizer,
        groups=answers.groups,
        valid=answers.valid,
    )


def steady_costs(config: ConfigDict, first: Mapping[str, Any] | None) -> CostNormalizer:
    """What several policies' costs are judged by, alike: `first`, a run's window after its first rollout.

    A window that moved along would call the middle of any policy's own costs cheap. It does where `first` is None.
    """
    return CostNormalizer.fixed(first) if first else CostNormalizer(config.reward.window)


def gather(
    config: ConfigDict, router: Router, iterator: QuestionIterator, normalizer: CostNormalizer, step: int
) -> Experience:
    """The episodes of training step `step`, counted from 1. The iterator and the window move on."""
    rounds: list[Round] = []
    wanted = config.rollout.questions
    while True:
        draws = (config.seed, step - 1, *([len(rounds)] if rounds else []))
        answers = router.answer(
            iterator.next(), group=config.rollout.group, temperature=config.rollout.temperature, seed=draws,
            roster_seed=(config.seed, step - 1), step=step, split="train",
        )  # fmt: skip
        rounds.append(Round(answers, judge(config, answers, normalizer)))
        alive = sum(len(_alive(config, one)) for one in rounds)
        if alive >= wanted or len(rounds) > config.learner.resample:
            return Experience(rounds, _choose(config, rounds))


def _alive(config: ConfigDict, one: Round) -> np.ndarray:
    """Groups of a round in which the rewards that the update compares differ, or one of them."""
    weights = one.answers.weights(config.pool)
    parts = compared(config, one.rewards).values()
    return np.unique(np.concatenate([groups_with_spread(part, one.answers.groups, weights) for part in parts]))


def _choose(config: ConfigDict, rounds: Sequence[Round]) -> Round:
    """As many groups as a step has: those with a spread first, in the order in which they were sampled."""
    if len(rounds) == 1:
        return rounds[0]
    answers, rewards = join_answers([one.answers for one in rounds]), Rewards.join([one.rewards for one in rounds])
    questions = config.rollout.questions
    alive = np.concatenate([i * questions + _alive(config, one) for i, one in enumerate(rounds)])
    others = np.setdiff1d(np.arange(len(rounds) * questions), alive)
    groups = np.sort(np.concatenate([alive, others])[:questions])
    rows = (groups[:, None] * answers.group + np.arange(answers.group)).ravel()
    return Round(answers.take(rows), rewards.take(rows))


class Ahead:
    """Gathers in a thread, at most one experience at a time. A context manager that ends the rollout under way."""

    def __init__(self, router: Router, gather: Callable[[int], Experience]) -> None:
        """`gather(step)` is called in the thread, or by `take` itself for a step that was not begun."""
        self._router, self._gather = router, gather
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._begun: Future[Experience] | None = None

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *exception: object) -> None:
        while self._begun is not None and not self._begun.done():
            self._router.stop()  # once is not enough: the thread may be between two rollouts
            wait([self._begun], timeout=0.2)
        self._thread.shutdown(wait=True, cancel_futures=True)

    @property
    def begun(self) -> bool:
        """Whether a step's episodes are being sampled, or are there to be taken."""
        return self._begun is not None

    def begin(self, step: int) -> None:
        """Start on a step's episodes."""
        self._begun = self._thread.submit(self._gather, step)

    def take(self, step: int) -> Experience:
        """A step's episodes. Raises what their sampling raised."""
        if self._begun is None:
            return self._gather(step)
        begun = self._begun
        while not begun.done():
            with contextlib.suppress(TimeoutError):  # short waits, so that Ctrl-C is heard
                begun.exception(timeout=0.2)
        self._begun = None
        return begun.result()
