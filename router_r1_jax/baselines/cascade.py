"""FrugalGPT cascade: ask a cheap model, score its reply, and ask a more expensive model if the score is too low.

As in arXiv 2305.05176, a scorer reads question and reply, and the list of models and their thresholds are searched on
train questions. Here the scorer is one logistic regression per model over the words of question and reply. It is
cross-fitted, so that thresholds are not chosen on scores of questions that the scorer has seen.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from router_r1_jax.baselines.base import Baseline, Example, exact_matches, raw_costs
from router_r1_jax.pool.cards import Card
from router_r1_jax.reward import cost_bounds, normalize_costs

LONGEST = 3  # models in a list, as published
THRESHOLDS = np.linspace(0.0, 1.0, 11)
FOLDS = 5


class Cascade(Baseline):
    """The cascade. `alpha` weighs cost as in the published reward; of equally good lists the cheaper is taken."""

    def __init__(self, cards: Sequence[Card], alpha: float) -> None:
        """`cards` are the models of the examples, in the same order."""
        self._cards, self._alpha = cards, alpha

    def fit(self, examples: Sequence[Example]) -> None:
        """Fit the scorers, then search the list and its thresholds."""
        order = np.argsort([card.price_out for card in self._cards], stable=True)
        keys = [self._cards[i].key for i in order]
        em, costs = exact_matches(examples)[:, order], raw_costs(examples)[:, order]
        self._scorers, scores = {}, np.empty(em.shape)
        for i, key in enumerate(keys):
            texts = [_text(example.question, example.trials[key].reply.text) for example in examples]
            self._scorers[key], scores[:, i] = _fit_scorer(texts, em[:, i])
        self._thresholds = {keys[i]: threshold for i, threshold in search(em, costs, scores, self._alpha)}

    def choose(self, question: str, cards: Sequence[Card]) -> str:
        """The first model of the list that is among `cards`: the last of the list is never rejected."""
        left = {card.key for card in cards}
        return next(key for key in self._thresholds if key in left)

    def accept(self, question: str, key: str, reply: str) -> bool:
        """Whether the reply's score reaches the model's threshold, which is 0 for the last model of the list."""
        return _score(self._scorers[key], _text(question, reply)) >= self._thresholds[key]


def search(em: np.ndarray, costs: np.ndarray, scores: np.ndarray, alpha: float) -> list[tuple[int, float]]:
    """The list of models and thresholds with the greatest mean reward on n questions, cheaper models first.

    Args:
        em: [n, M] exact match, models in order of price.
        costs: [n, M] raw cost of each answer.
        scores: [n, M] the scorer's score of each answer.
        alpha: weight of cost in the published reward.

    Returns:
        (index of the model, its threshold), in the order of asking; the last threshold is 0.
    """
    bounds = cost_bounds(costs)
    best, best_value = [], -np.inf
    for length in range(1, min(LONGEST, em.shape[1]) + 1):
        for models in itertools.combinations(range(em.shape[1]), length):
            for thresholds in itertools.product(THRESHOLDS[1:], repeat=length - 1):
                cascade = list(zip(models, (*thresholds, 0.0), strict=True))
                right, cost = _run(em, costs, scores, cascade)
                reward = right * (1 - alpha + alpha * normalize_costs(cost, *bounds))
                value = float(np.mean(reward)) - 1e-6 * float(np.mean(cost))
                if value > best_value:
                    best, best_value = cascade, value
    return best


def _run(
    em: np.ndarray, costs: np.ndarray, scores: np.ndarray, cascade: Sequence[tuple[int, float]]
) -> tuple[np.ndarray, np.ndarray]:
    """Exact match and summed raw cost [n] of a cascade on n questions."""
    right, cost, unanswered = np.zeros(len(em)), np.zeros(len(em)), np.ones(len(em), dtype=bool)
    for model, threshold in cascade:
        cost += unanswered * costs[:, model]
        accepted = unanswered & (scores[:, model] >= threshold)
        right[accepted] = em[accepted, model]
        unanswered &= ~accepted
    return right, cost


def _text(question: str, reply: str) -> str:
    return f"{question} {reply}"


def _fit_scorer(texts: Sequence[str], right: np.ndarray) -> tuple[object, np.ndarray]:
    """A scorer fitted on all texts, and a score [n] of each text by a scorer that was fitted without its fold.

    If a fold would lack right or wrong answers, there is nothing to learn: the scorer is the share of right answers.
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


def _score(scorer: object, text: str) -> float:
    return scorer if isinstance(scorer, float) else scorer.predict_proba([text])[0, 1]
