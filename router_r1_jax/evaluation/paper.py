"""The published figures, to stand beside ours, and whether the two differ by more than chance.

Exact match of Router-R1 (arXiv 2506.09033, its main table): one run, 500 questions of each set's test split (Bamboogle
has 125), sampled at temperature 1.
"""

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

QUESTIONS = {"bamboogle": 125}  # of a set in the paper; 500 of every other
EXACT_MATCH: Mapping[str, Mapping[str, float]] = {
    "Qwen2.5-3B-Instruct": {
        "nq": 0.388, "triviaqa": 0.706, "popqa": 0.384, "hotpotqa": 0.352, "2wikimultihopqa": 0.434, "musique": 0.138,
        "bamboogle": 0.512,
    },
    "Llama-3.2-3B-Instruct": {
        "nq": 0.416, "triviaqa": 0.680, "popqa": 0.432, "hotpotqa": 0.322, "2wikimultihopqa": 0.368, "musique": 0.128,
        "bamboogle": 0.520,
    },
}  # fmt: skip


def base_model(family: str) -> str:
    """The base model of the paper that a router of this `model.arch.family` is held against."""
    return "Llama-3.2-3B-Instruct" if family == "llama" else "Qwen2.5-3B-Instruct"


def beside(tables: Mapping[str, Mapping[str, Any]], family: str) -> dict[str, dict[str, Any]]:
    """Set -> {"em": published, "difference": ours minus it, "ci": its 95 % interval, "verdict"}, of the paper's sets.

    `tables` are those of `figures.tabulate` per set. Where they are the paper's seven and no other, "mean" stands for
    their mean. The verdict is "within noise" where the interval of the difference holds 0, else "differs". Its width
    joins our bootstrap interval with the binomial error of the published figure, which is a mean over few questions,
    too.
    """
    published = EXACT_MATCH[base_model(family)]
    ours = {name: (table["em"], table["em_ci"]) for name, table in tables.items() if name in published}
    rows = {name: _row(published[name], _variance(name, published[name]), *ours[name]) for name in ours}
    if tables.keys() == published.keys():
        mean = sum(published.values()) / len(published)
        noise = sum(_variance(name, em) for name, em in published.items()) / len(published) ** 2
        em = sum(em for em, _ in ours.values()) / len(ours)
        half = math.sqrt(sum(((high - low) / 2) ** 2 for _, (low, high) in ours.values())) / len(ours)
        rows["mean"] = _row(mean, noise, em, (em - half, em + half))
    return rows


def _variance(suite: str, em: float) -> float:
    """Of the published mean."""
    return em * (1.0 - em) / QUESTIONS.get(suite, 500)


def _row(published: float, variance: float, em: float, interval: tuple[float, float]) -> dict[str, Any]:
    z = NormalDist().inv_cdf(0.975)
    half = math.hypot((interval[1] - interval[0]) / 2, z * math.sqrt(variance))
    difference = em - published
    verdict = "within noise" if abs(difference) <= half else "differs"
    return {
        "em": published,
        "difference": difference,
        "ci": [difference - half, difference + half],
        "verdict": verdict,
    }
