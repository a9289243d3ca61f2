"""Published results: the paper's exact match per data set, and whether ours differs by more than chance.

Exact match of Router-R1 (arXiv 2506.09033, its main table): one run, 500 questions of each set's test split (Bamboogle
has 125), sampled at temperature 1.
"""

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

from router_r1_jax.config import PAPER_SETS

QUESTIONS = dict.fromkeys(PAPER_SETS, 500) | {"bamboogle": 125}  # in the paper's evaluation
EXACT_MATCH: Mapping[str, Mapping[str, float]] = {
    model: dict(zip(PAPER_SETS, values, strict=True))
    for model, values in {
        "Qwen2.5-3B-Instruct": (0.388, 0.706, 0.384, 0.352, 0.434, 0.138, 0.512),
        "Llama-3.2-3B-Instruct": (0.416, 0.680, 0.432, 0.322, 0.368, 0.128, 0.520),
    }.items()
}


def base_model(family: str) -> str:
    """The paper's base model that a router of this `model.arch.family` is compared with."""
    return "Llama-3.2-3B-Instruct" if family == "llama" else "Qwen2.5-3B-Instruct"


def compare_with_paper(datasets: Mapping[str, Mapping[str, Any]], family: str) -> dict[str, dict[str, Any]]:
    """Our exact match minus the published one, for each data set that the paper has.

    The interval joins our bootstrap interval with the binomial error of the published number, which is a mean over few
    questions too.

    Args:
        datasets: metrics per data set, as `aggregates.metrics_with_intervals` gives them.
        family: `model.arch.family` of the router.

    Returns:
        Data set -> {"em": published, "difference", "ci": its 95 % interval, "verdict"}. The verdict is "within noise"
        if the interval holds 0, else "differs". If `datasets` are the paper's seven, "mean" compares their mean.
    """
    published = EXACT_MATCH[base_model(family)]
    variances = {name: em * (1 - em) / QUESTIONS[name] for name, em in published.items()}
    ours = {name: (table["em"], *table["em_ci"]) for name, table in datasets.items() if name in published}
    rows = {
        name: _compare(em, (high - low) / 2, published[name], variances[name]) for name, (em, low, high) in ours.items()
    }
    if datasets.keys() == published.keys():
        n = len(published)
        em = sum(em for em, _, _ in ours.values()) / n
        half_width = math.sqrt(sum(((high - low) / 2) ** 2 for _, low, high in ours.values())) / n
        rows["mean"] = _compare(em, half_width, sum(published.values()) / n, sum(variances.values()) / n**2)
    return rows


def _compare(em: float, half_width: float, published: float, variance: float) -> dict[str, Any]:
    """`half_width` is of our interval, `variance` that of the published mean."""
    half = math.hypot(half_width, NormalDist().inv_cdf(0.975) * math.sqrt(variance))
    difference = em - published
    verdict = "within noise" if abs(difference) <= half else "differs"
    return {
        "em": published,
        "difference": difference,
        "ci": [difference - half, difference + half],
        "verdict": verdict,
    }
