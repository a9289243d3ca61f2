"""The interface of baselines that choose a model per question, the examples they are fitted on, and model utilities."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from router_r1_jax.baselines.features import Features, WordFeatures
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
    """A question, and how every model answered it (`Card.key` -> Trial, in the order of the session's cards)."""

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

    A kind of baseline implements `_learn` and `_predict`.
    """

    def __init__(
        self, alpha: float, seed: int = 0, make_features: Callable[[Sequence[str]], Features] = WordFeatures
    ) -> None:
        """`alpha` is the weight of cost in a model's utility, `seed` that of random draws.

        `make_features` is given the train questions.
        """
        self._alpha, self._seed, self._make_features = alpha, seed, make_features

    def fit(self, examples: Sequence[Example]) -> None:
        """Learn from the informative questions."""
        examples = informative(examples)
        self._keys = tuple(examples[0].trials)
        texts = [example.question for example in examples]
        self._features = self._make_features(texts)
        self._learn(self._features(texts), examples)

    def choose(self, question: str, cards: Sequence[Card]) -> str:
        """The card of the greatest predicted utility. The cards are among the models of the examples."""
        (predicted,) = self._predict(self._features([question]))
        utility = dict(zip(self._keys, predicted, strict=True))
        return max(cards, key=lambda card: (utility[card.key], -card.price_out)).key

    def _learn(self, features: np.ndarray, examples: Sequence[Example]) -> None:
        """Learn from the examples; `features` are those of their questions, [n, F]."""
        raise NotImplementedError

    def _predict(self, features: np.ndarray) -> np.ndarray:
        """A score of each model, in the order of the examples' trials: [n, F] -> [n, M]. Only its order matters."""
        raise NotImplementedError


def exact_matches(examples: Sequence[Example]) -> np.ndarray:
    """Exact match of each model's answer, [n, M]."""
    return np.array([[trial.exact_match for trial in example.trials.values()] for example in examples])


def raw_costs(examples: Sequence[Example]) -> np.ndarray:
    """Raw cost of each model's answer, [n, M]."""
    return np.array([[trial.reply.raw_cost for trial in example.trials.values()] for example in examples])


def utilities(examples: Sequence[Example], alpha: float) -> np.ndarray:
    """Utility of each model's answer, [n, M] in [0, 1 + TIE]: the published reward of an episode of this one call.

    Costs are normalised by the 5th and 95th percentile of these trials' costs and not by a sliding window, because no
    policy changes here. Among models of equal utility, the cheaper one gets a little more.
    """
    costs = raw_costs(examples)
    cost_components = normalize_costs(costs, *cost_bounds(costs))
    return exact_matches(examples) * (1 - alpha + alpha * cost_components + TIE * cost_components)


def informative(examples: Sequence[Example]) -> list[Example]:
    """The examples that can teach a choice: some models were right and others wrong. If there is none, all examples."""
    chosen = [e for e in examples if len({trial.exact_match for trial in e.trials.values()}) > 1]
    return chosen or list(examples)
