"""Metrics per data set against plain loops."""

import numpy as np
import pytest
from fake_records import record, two_sets

from router_r1_jax.evaluation.aggregates import METRICS, metrics_with_intervals, policy_metrics
from router_r1_jax.evaluation.statistics import bootstrap_mean_of_sets
from router_r1_jax.pool.cards import Card

RESAMPLING = {"resamples": 400, "seed": 0}
MODELS = ("Titan", "Pico")


def test_one_set_has_its_mean_and_bootstrap_interval():
    records = [record(i, float(i % 3 == 0)) for i in range(50)]
    table = metrics_with_intervals(records, MODELS, **RESAMPLING)
    expected = bootstrap_mean_of_sets([[r["exact_match"] for r in records]], **RESAMPLING)
    assert (table["em"], *table["em_ci"]) == pytest.approx(expected)
    assert table["questions"] == 50 and list(table["datasets"]) == ["nq"]
    assert {k: v for k, v in table.items() if k != "datasets"} == table["datasets"]["nq"]


def test_every_set_weighs_the_same_in_the_mean():
    records = two_sets(np.random.default_rng(0))
    table = metrics_with_intervals(records, MODELS, **RESAMPLING)
    for name, metric in METRICS.items():
        means = []
        for dataset in ("nq", "bamboogle"):
            values = [metric(r) for r in records if r["dataset"] == dataset]
            means.append(sum(values) / len(values))
            assert table["datasets"][dataset][name] == pytest.approx(means[-1])
        assert table[name] == pytest.approx(sum(means) / 2)
        low, high = table[f"{name}_ci"]
        assert low <= table[name] + 1e-12 and table[name] - 1e-12 <= high


def test_samples_of_a_question_are_one_question():
    """Ten samples that all agree say no more about other questions than one does."""
    single = [record(i, float(i % 2)) for i in range(30)]
    table, once = (metrics_with_intervals(records, MODELS, **RESAMPLING) for records in (single * 10, single))
    assert table["questions"] == 30
    for name in METRICS:
        assert (table[name], *table[f"{name}_ci"]) == pytest.approx((once[name], *once[f"{name}_ci"]))


def test_shares_stops_and_seconds_are_counted():
    records = [
        record(0, calls=[("Titan", 1e-5, 1.0), ("Pico", 1e-6, 3.0)]),
        record(1, calls=[("Titan", 1e-5, 2.0), ("", 0.0, 0.0)], stop="call_limit"),
        record(2, calls=[], failed=True),
    ]
    table = metrics_with_intervals(records, ("Titan", "Pico", "Aria"), **RESAMPLING)
    assert table["calls_share"] == {"Titan": pytest.approx(2 / 3), "Pico": pytest.approx(1 / 3), "Aria": 0.0}
    assert table["stops"] == {"answer": pytest.approx(2 / 3), "call_limit": pytest.approx(1 / 3)}
    assert table["call_seconds"]["median"] == 2.0 and table["call_seconds"]["p95"] == pytest.approx(2.9)
    assert table["calls_per_question"] == pytest.approx(4 / 3)
    assert table["failed_share"] == pytest.approx(1 / 3)


def test_a_policys_metrics_hold_the_summary_too():
    card = Card("Titan", "Titan", "p", "t", 1.0, 2.0, None, {}, "", ())
    metrics = policy_metrics(two_sets(np.random.default_rng(1)), [card], **RESAMPLING)
    assert {"reward/total", "reward_hacking/repeated_call", "em", "em_ci", "datasets", "calls_share"} <= metrics.keys()
    assert metrics["em"] == np.mean([dataset["em"] for dataset in metrics["datasets"].values()])
    assert "calls/share" not in metrics
