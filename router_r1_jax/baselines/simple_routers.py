"""Simple baselines: a single model, a random model, kNN, an MLP, and a linear classifier."""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from router_r1_jax.baselines.base import Baseline, Example, UtilityBaseline, utilities
from router_r1_jax.pool.cards import Card

NEIGHBOURS = 20


class SingleModel(Baseline):
    """Always asks the model of the given key."""

    def __init__(self, key: str) -> None:
        self._key = key

    def choose(self, question: str, cards: Sequence[Card]) -> str:
        """The key, for every question."""
        return self._key


def largest(cards: Sequence[Card]) -> Card:
    """The most expensive model: sizes are not declared, and providers price by size."""
    return max(cards, key=lambda card: (card.price_out, card.price_in))


class RandomModel(Baseline):
    """Asks a uniformly random model."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def choose(self, question: str, cards: Sequence[Card]) -> str:
        """A model that depends on seed and question only, so that the order of questions does not matter."""
        rng = np.random.default_rng([self._seed, zlib.crc32(question.encode("utf-8", "replace"))])
        return cards[rng.integers(len(cards))].key


class _Regression(UtilityBaseline):
    """A scikit-learn regressor from TF-IDF vectors to each model's utility."""

    def _learn(self, features: np.ndarray, examples: Sequence[Example]) -> None:
        self._model = self._regressor(len(examples)).fit(features, utilities(examples, self._alpha))

    def _predict(self, features: np.ndarray) -> np.ndarray:
        return self._model.predict(features).reshape(len(features), -1)  # of one model, some regressors give [n]

    def _regressor(self, questions: int) -> Any:
        """The regressor before it is fitted, for this number of train questions."""
        raise NotImplementedError


class KNNRouter(_Regression):
    """kNN: the mean utility of each model on the nearest train questions, by cosine of TF-IDF (RouterBench)."""

    def _regressor(self, questions: int) -> Any:
        from sklearn.neighbors import KNeighborsRegressor

        return KNeighborsRegressor(min(NEIGHBOURS, questions), metric="cosine")


class MLPRouter(_Regression):
    """An MLP with one hidden layer from TF-IDF vectors to each model's utility (RouterBench)."""

    def _regressor(self, questions: int) -> Any:
        from sklearn.neural_network import MLPRegressor

        return MLPRegressor(
            hidden_layer_sizes=(64,), alpha=1e-3, learning_rate_init=3e-3, max_iter=400, random_state=self._seed
        )


class LinearClassifier(UtilityBaseline):
    """Logistic regression from a frozen encoder's embedding to the model of the greatest utility.

    With the router's hidden states as embedding it stands for BERT classifiers, which need weights of their own.
    """

    def _learn(self, features: np.ndarray, examples: Sequence[Example]) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        best = utilities(examples, self._alpha).argmax(axis=1)
        self._classes = np.unique(best)
        if len(self._classes) > 1:
            self._model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
            self._model.fit(features, best)

    def _predict(self, features: np.ndarray) -> np.ndarray:
        probabilities = np.zeros((len(features), len(self._keys)))
        single = len(self._classes) == 1
        probabilities[:, self._classes] = 1.0 if single else self._model.predict_proba(features)
        return probabilities
