"""Metrics of a policy per data set and their mean over sets, with bootstrap confidence intervals.

Everything is computed from records (`episode_records`). If a question has several records (sampled answers), its value
is their mean, and intervals still resample questions: samples of one question say nothing new about other questions.
The intervals leave two things out. Questions of one batch share their candidates, and candidates that suit the router
lift all of them. And another training seed gives another router.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from router_r1_jax.evaluation.episode_records import EPISODE_METRICS, Record, summarise
from router_r1_jax.evaluation.statistics import bootstrap_mean_of_sets
from router_r1_jax.pool.cards import Card

METRICS: dict[str, Callable[[Record], float]] = EPISODE_METRICS | {
    "sub_em": lambda r: r["sub_exact_match"],
    "failed_share": lambda r: float(r["failed"]),
}
Question = tuple[str, str]  # (dataset, id)


def policy_metrics(records: Sequence[Record], cards: Sequence[Card], *, resamples: int, seed: int) -> dict[str, Any]:
    """All metrics of one policy: `metrics_with_intervals`, and the other means of `episode_records.summarise`."""
    summary = summarise(records, cards)
    del summary["calls/share"]  # the same as calls_share
    models = [card.key for card in cards]
    return summary | metrics_with_intervals(records, models, resamples=resamples, seed=seed)


def metrics_with_intervals(
    records: Sequence[Record], models: Sequence[str], *, resamples: int, seed: int
) -> dict[str, Any]:
    """Each of METRICS and its 95 % interval "<name>_ci": the mean over data sets and, under "datasets", each set.

    In the mean over data sets each set has the same weight. Each table also holds "questions", "calls_share" (model ->
    share of the calls that reached a model; `models` are always listed), "stops" (reason -> share of the episodes) and
    "call_seconds" (median and 95th percentile of one call).
    """
    names = list(dict.fromkeys(r["dataset"] for r in records))
    datasets = {name: [r for r in records if r["dataset"] == name] for name in names}
    tables = {name: _table([members], models, resamples, seed) for name, members in datasets.items()}
    mean = tables[names[0]] if len(names) == 1 else _table(list(datasets.values()), models, resamples, seed)
    return mean | {"datasets": tables}


def per_question(records: Sequence[Record], metric: Callable[[Record], float]) -> dict[Question, float]:
    """(dataset, id) -> mean of `metric` over the question's records, in the order of their first records."""
    values: dict[Question, list[float]] = {}
    for record in records:
        values.setdefault((record["dataset"], record["id"]), []).append(metric(record))
    return {question: float(np.mean(samples)) for question, samples in values.items()}


def _table(sets: Sequence[Sequence[Record]], models: Sequence[str], resamples: int, seed: int) -> dict[str, Any]:
    table: dict[str, Any] = {"questions": sum(len({r["id"] for r in records}) for records in sets)}
    for name, metric in METRICS.items():
        columns = [list(per_question(records, metric).values()) for records in sets]
        mean, low, high = bootstrap_mean_of_sets(columns, resamples=resamples, seed=seed)
        table |= {name: mean, f"{name}_ci": [low, high]}
    records = [record for members in sets for record in members]
    calls = [call for record in records for call in record["calls"] if call["model"]]
    median, p95 = np.quantile([call["latency"] for call in calls] or [0.0], [0.5, 0.95])
    return table | {
        "calls_share": dict.fromkeys(models, 0.0) | _shares([call["model"] for call in calls]),
        "stops": _shares([record["stop"] for record in records]),
        "call_seconds": {"median": float(median), "p95": float(p95)},
    }


def _shares(names: Sequence[str]) -> dict[str, float]:
    return {name: names.count(name) / len(names) for name in sorted(set(names))}
