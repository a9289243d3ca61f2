"""Baselines without much to learn: one model always, a random one, nearest neighbours, an MLP, a linear classifier."""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from router_r1_jax.baselines.features import Features, WordFeatures, scikit_learn
from router_r1_jax.baselines.interface import (
    Baseline,
    ScoringBaseline,
    TrainRecord,
    instructive,
    known_keys,
    utilities,
)
from router_r1_jax.pool.cards import Card

NEIGHBOURS = 20


class OneModel(Baseline):
    """Always asks the model of the given key."""

    def __init__(self, key: str) -> None:
        self._key = key

    def choose(self, question: str, cards: Sequence[Card]) -> str:
        """The key, whatever the question."""
        return self._key


def largest(cards: Sequence[Card]) -> Card:
    """The dearest card: size is not declared, and providers price by it."""
    return max(cards, key=lambda card: (card.price_out, card.price_in))


class RandomModel(Baseline):
    """Asks a uniformly random model."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def choose(self, question: str, cards: Sequence[Card]) -> str:
        """A draw that follows from seed and question, whatever is asked at the same time."""
        rng = np.random.default_rng([self._seed, zlib.crc32(question.encode("utf-8", "replace"))])
        return cards[rng.integers(len(cards))].key


class _WordRegression(ScoringBaseline):
    """A regressor of scikit-learn from TF-IDF vectors to each model's worth."""

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha

    def fit(self, records: Sequence[TrainRecord]) -> None:
        """Fit on the instructive questions."""
        scikit_learn()
        records = instructive(records)
        self._keys = known_keys(records)
        texts = [record.question for record in records]
        self._features = WordFeatures().fit(texts)
        self._model = self._regressor(len(texts))
        self._model.fit(self._features(texts), utilities(records, self._keys, self._alpha))

    def _predict(self, question: str) -> np.ndarray:
        return np.atleast_1d(self._model.predict(self._features([question]))[0])

    def _regressor(self, questions: int) -> Any:
        """The regressor before it is fitted, for so many train questions."""
        raise NotImplementedError


class NearestNeighbours(_WordRegression):
    """Mean worth of each model on the nearest train questions, by cosine of TF-IDF (RouterBench's kNN router)."""

    def _regressor(self, questions: int) -> Any:
        from sklearn.neighbors import KNeighborsRegressor

        return KNeighborsRegressor(min(NEIGHBOURS, questions), metric="cosine")


class Perceptron(_WordRegression):
    """An MLP of one hidden layer from TF-IDF vectors to each model's worth (RouterBench's MLP router)."""

    def __init__(self, alpha: float, seed: int) -> None:
        super().__init__(alpha)
        self._seed = seed

    def _regressor(self, questions: int) -> Any:
        from sklearn.neural_network import MLPRegressor

        return MLPRegressor(
            hidden_layer_sizes=(64,), alpha=1e-3, learning_rate_init=3e-3, max_iter=400, random_state=self._seed
        )


class LinearClassifier(ScoringBaseline):
    """Logistic regression from a frozen encoder's embedding to the model that was worth most.

    With the router's own hidden states it stands for the BERT classifiers of the field, whose weights are not needed.
    """

    def __init__(self, features: Features, alpha: float) -> None:
        self._features, self._alpha = features, alpha

    def fit(self, records: Sequence[TrainRecord]) -> None:
        """Fit on the best model of each instructive question."""
        scikit_learn()
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        records = instructive(records)
        self._keys = known_keys(records)
        best = utilities(records, self._keys, self._alpha).argmax(axis=1)
        self._classes = np.unique(best)
        if len(self._classes) > 1:
            self._model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
            self._model.fit(self._features([record.question for record in records]), best)

    def _predict(self, question: str) -> np.ndarray:
        chances = np.zeros(len(self._keys))
        only = len(self._classes) == 1
        chances[self._classes] = 1.0 if only else self._model.predict_proba(self._features([question]))[0]
        return chances
