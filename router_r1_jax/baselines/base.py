"""The interface of baselines that choose a model per question, the examples they are fitted on, and model utilities."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from router_r1_jax.pool.cards import Card
from router_r1_jax.pool.outcomes import Reply
from router_r1_jax.reward import cost_bounds, normalize_costs

TIE = 1e-3  # weight of the cost component between models of equal utility


@dataclasses.dataclass(frozen=True)
class Trial:
    """How one model answered one question: the pool's reply and its scores against the golds, in [0, 1]."""

    reply: Reply
    exact_match: float
    f1: float


@dataclasses.dataclass(frozen=True)
class Example:
    """A question, and how every model answered it (`Card.key` -> Trial)."""

    question: str
    trials: Mapping[str, Trial]


class Baseline:
    """Chooses a model for a question. If `accept` rejects the reply, it chooses again among the models left."""

    def fit(self, examples: Sequence[Example]) -> None:
        """Learn from train questions. Some baselines have nothing to learn."""

    def choose(self, question: str, cards: Sequence[Card]) -> str:
        """Key of the model to ask, one of `cards`, by the question's text alone."""
        raise NotImplementedError

    def accept(self, question: str, key: str, reply: str) -> bool:
        """Whether the reply of model `key` is taken as the answer."""
        return True


class UtilityBaseline(Baseline):
    """A baseline that predicts each model's utility and chooses the best model; among equals, the cheapest.

    `fit` sets `_keys`, the models of the train examples; other models are never chosen.
    """

    _keys: tuple[str, ...] = ()

    def _predict(self, question: str) -> np.ndarray:
        """Utility of each of `_keys`, [M]."""
        raise NotImplementedError

    def choose(self, question: str, cards: Sequence[Card]) -> str:
        """The known card of the greatest predicted utility. Raises ValueError if none is known."""
        utility = dict(zip(self._keys, self._predict(question), strict=True))
        known = [card for card in cards if card.key in utility]
        if not known:
            raise ValueError(f"none of {', '.join(card.key for card in cards)} was tried in the examples of fit")
        return max(known, key=lambda card: (utility[card.key], -card.price_out)).key


def tried_models(examples: Sequence[Example]) -> tuple[str, ...]:
    """Keys of the models that answered every example, in the examples' order. Raises ValueError for no examples."""
    if not examples:
        raise ValueError("there are no train examples to fit on; try all models on at least one train question")
    return tuple(key for key in examples[0].trials if all(key in example.trials for example in examples))


def exact_matches(examples: Sequence[Example], keys: Sequence[str]) -> np.ndarray:
    """Exact match of each model's answer, [n, M]."""
    return np.array([[example.trials[key].exact_match for key in keys] for example in examples])


def raw_costs(examples: Sequence[Example], keys: Sequence[str]) -> np.ndarray:
    """Raw cost of each model's answer, [n, M]."""
    return np.array([[example.trials[key].reply.raw_cost for key in keys] for example in examples])


def utilities(examples: Sequence[Example], keys: Sequence[str], alpha: float) -> np.ndarray:
    """Utility of each model's answer, [n, M] in [0, 1 + TIE]: the published reward of an episode of this one call.

    Costs are normalised by the 5th and 95th percentile of these trials' costs and not by a sliding window, because no
    policy changes here. Among models of equal utility, the cheaper one gets a little more.
    """
    costs = raw_costs(examples, keys)
    cost_components = normalize_costs(costs, *cost_bounds(costs))
    return exact_matches(examples, keys) * (1 - alpha + alpha * cost_components + TIE * cost_components)


def informative(examples: Sequence[Example]) -> list[Example]:
    """The examples that can teach a choice: some models were right and others wrong. If there is none, all examples."""
    chosen = [e for e in examples if len({trial.exact_match for trial in e.trials.values()}) > 1]
    return chosen or list(examples)
