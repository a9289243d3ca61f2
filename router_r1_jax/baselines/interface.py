"""The one interface of baselines that choose a model per question, and what they are fitted on."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from router_r1_jax.pool.cards import Card
from router_r1_jax.pool.outcomes import Reply

TIE = 1e-3  # weight of cheapness between models that are worth the same


@dataclasses.dataclass(frozen=True)
class Trial:
    """How one model answered one question: the pool's reply and its scores against the golds, in [0, 1]."""

    reply: Reply
    exact_match: float
    f1: float


@dataclasses.dataclass(frozen=True)
class TrainRecord:
    """A train question, and how every model answered it (`Card.key` -> Trial)."""

    question: str
    trials: Mapping[str, Trial]


class Baseline:
    """Chooses whom to ask. A reply that `accept` turns down is followed by another choice among the models left."""

    def fit(self, records: Sequence[TrainRecord]) -> None:
        """Learn from train questions. Some baselines have nothing to learn."""

    def choose(self, question: str, cards: Sequence[Card]) -> str:
        """Key of the card to ask, one of `cards`, by the question's text alone."""
        raise NotImplementedError

    def accept(self, question: str, key: str, reply: str) -> bool:
        """Whether the reply of model `key` is the answer."""
        return True


def known_keys(records: Sequence[TrainRecord]) -> tuple[str, ...]:
    """Keys of the models that every record has asked, in the records' order. Raises ValueError for no records."""
    if not records:
        raise ValueError("there are no train records to fit on; try all models on at least one train question")
    return tuple(key for key in records[0].trials if all(key in record.trials for record in records))


def utilities(records: Sequence[TrainRecord], keys: Sequence[str], alpha: float) -> np.ndarray:
    """What each model's answer was worth, [n, M] in [0, 1 + TIE]: the published reward of a call that is an episode.

    Cost is normalised by the 5th and 95th percentile of these trials' costs, not by a window: nothing moves here. Of
    models that are worth the same, the cheaper one is worth a little more.
    """
    em = np.array([[record.trials[key].exact_match for key in keys] for record in records])
    raw = np.array([[record.trials[key].reply.raw_cost for key in keys] for record in records])
    cheap = cheapness(raw, cost_bounds(raw))
    return em * (1 - alpha + alpha * cheap + TIE * cheap)


def cost_bounds(raw: np.ndarray) -> tuple[float, float]:
    """5th and 95th percentile of the square roots of raw costs."""
    low, high = np.quantile(np.sqrt(raw), [0.05, 0.95])
    return float(low), float(high)


def cheapness(raw: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    """1 for cheap .. 0 for dear, as the reward's cost component has it; 0.5 where all costs are alike."""
    low, high = bounds
    if high - low < 1e-8:
        return np.full_like(raw, 0.5, dtype=np.float64)
    return 1 - np.clip((np.sqrt(raw) - low) / (high - low), 0, 1)


def instructive(records: Sequence[TrainRecord]) -> list[TrainRecord]:
    """The records from which a choice can be learnt: some models were right and others wrong.

    All of them where there is no such record.
    """
    chosen = [r for r in records if len({trial.exact_match for trial in r.trials.values()}) > 1]
    return chosen or list(records)


class ScoringBaseline(Baseline):
    """A baseline that predicts what each known model's answer is worth, and takes the best; of equals, the cheapest.

    `fit` sets `_keys`, `_predict` follows it. Models that were not tried on the train questions are never chosen.
    """

    _keys: tuple[str, ...] = ()

    def _predict(self, question: str) -> np.ndarray:
        """Worth of each of `_keys`, [M]."""
        raise NotImplementedError

    def choose(self, question: str, cards: Sequence[Card]) -> str:
        """The known card of the greatest predicted worth. Raises ValueError where none is known."""
        worth = dict(zip(self._keys, self._predict(question), strict=True))
        known = [card for card in cards if card.key in worth]
        if not known:
            raise ValueError(f"none of {', '.join(card.key for card in cards)} was tried in the records of fit")
        return max(known, key=lambda card: (worth[card.key], -card.price_out)).key
