"""A FrugalGPT-style cascade: ask a cheap model, judge its reply, and ask a dearer one where it does not pass.

As in arXiv 2305.05176 a scorer reads question and reply, and the list of models and their thresholds are searched for
on train questions. Here the scorer is one logistic regression per model over the words of both, cross-fitted so that
the thresholds are not chosen on scores of questions that it has seen.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from router_r1_jax.baselines.features import scikit_learn
from router_r1_jax.baselines.interface import Baseline, TrainRecord, cheapness, cost_bounds, known_keys
from router_r1_jax.pool.cards import Card

LONGEST = 3  # models in a list, as published
THRESHOLDS = np.linspace(0.0, 1.0, 11)
FOLDS = 5


class Cascade(Baseline):
    """The baseline. `alpha` weighs cost as the published reward does; of lists worth the same, the cheaper is taken."""

    def __init__(self, cards: Sequence[Card], alpha: float) -> None:
        self._prices, self._alpha = {card.key: card.price_out for card in cards}, alpha

    def fit(self, records: Sequence[TrainRecord]) -> None:
        """Fit the scorers, then search for the list and its thresholds."""
        scikit_learn()
        keys = sorted((key for key in known_keys(records) if key in self._prices), key=self._prices.__getitem__)
        em = np.array([[record.trials[key].exact_match for key in keys] for record in records])
        raw = np.array([[record.trials[key].reply.raw_cost for key in keys] for record in records])
        fitted = [_fit_scorer(_texts(records, key), em[:, i]) for i, key in enumerate(keys)]
        self._scorers = {key: scorer for key, (scorer, _) in zip(keys, fitted, strict=True)}
        scores = np.stack([scores for _, scores in fitted], axis=1)
        best = search(em, raw, scores, self._alpha)
        self._list = [(keys[i], threshold) for i, threshold in best]

    def choose(self, question: str, cards: Sequence[Card]) -> str:
        """The first model of the list among `cards`; the cheapest card where they hold none."""
        left = {card.key for card in cards}
        cheapest = min(cards, key=lambda card: card.price_out)
        return next((key for key, _ in self._list if key in left), cheapest.key)

    def accept(self, question: str, key: str, reply: str) -> bool:
        """Whether the reply's score passes the model's threshold; the last model's, and one outside the list, does."""
        threshold = dict(self._list).get(key, 0.0)
        return threshold == 0.0 or _score(self._scorers[key], [_text(question, reply)])[0] >= threshold


def search(em: np.ndarray, raw: np.ndarray, scores: np.ndarray, alpha: float) -> list[tuple[int, float]]:
    """The list of models and thresholds of the greatest mean reward on n questions, cheaper models first.

    Args:
        em: [n, M] exact match, models in order of price.
        raw: [n, M] raw cost of each answer.
        scores: [n, M] the scorer's opinion of each answer.
        alpha: weight of cost in the published reward.

    Returns:
        (index of the model, its threshold), in the order of asking; the last threshold is 0.
    """
    bounds = cost_bounds(raw)
    best, value = [], -np.inf
    for length in range(1, min(LONGEST, em.shape[1]) + 1):
        for models in itertools.combinations(range(em.shape[1]), length):
            for thresholds in itertools.product(THRESHOLDS[1:], repeat=length - 1):
                cut = (*thresholds, 0.0)
                right, cost = _follow(em, raw, scores, models, cut)
                cheap = cheapness(cost, bounds)
                reward = float(np.mean(right * (1 - alpha + alpha * cheap))) - 1e-6 * float(np.mean(cost))
                if reward > value:
                    best, value = list(zip(models, cut, strict=True)), reward
    return best


def _follow(
    em: np.ndarray, raw: np.ndarray, scores: np.ndarray, models: Sequence[int], thresholds: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Exact match and summed raw cost [n] of a cascade on n questions."""
    right, cost, open_ = np.zeros(len(em)), np.zeros(len(em)), np.ones(len(em), dtype=bool)
    for model, threshold in zip(models, thresholds, strict=True):
        cost += open_ * raw[:, model]
        taken = open_ & (scores[:, model] >= threshold)
        right[taken] = em[taken, model]
        open_ &= ~taken
    return right, cost


def _text(question: str, reply: str) -> str:
    return f"{question} {reply}"


def _texts(records: Sequence[TrainRecord], key: str) -> list[str]:
    return [_text(record.question, record.trials[key].reply.text) for record in records]


def _fit_scorer(texts: Sequence[str], right: np.ndarray) -> tuple[object, np.ndarray]:
    """A scorer fitted on all texts, and the scores [n] that scorers fitted without a text's fold give it.

    Where a fold would lack right or wrong answers there is nothing to tell apart: the scorer is their share.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline

    if min(right.sum(), len(right) - right.sum()) < FOLDS:
        return float(right.mean()), np.full(len(right), right.mean())
    scorer = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10.0, max_iter=1000))
    scores = cross_val_predict(scorer, texts, right, cv=FOLDS, method="predict_proba")[:, 1]
    return scorer.fit(texts, right), scores


def _score(scorer: object, texts: Sequence[str]) -> np.ndarray:
    return np.full(len(texts), scorer) if isinstance(scorer, float) else scorer.predict_proba(texts)[:, 1]
