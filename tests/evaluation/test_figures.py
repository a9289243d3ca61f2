"""Figures per set against plain loops, and paired differences that refuse what cannot be paired."""

import numpy as np
import pytest
from fake_records import record

from router_r1_jax.evaluation.figures import VALUES, CompareError, compare_records, policy_figures, tabulate
from router_r1_jax.evaluation.statistics import bootstrap_mean
from router_r1_jax.pool.cards import Card

DRAWS = {"resamples": 400, "seed": 0}
MODELS = ("Titan", "Pico")


def two_sets(rng, em=0.5):
    """40 questions of one set and 10 of another."""
    return [record(i, float(rng.random() < em)) for i in range(40)] + [
        record(i, float(rng.random() < 0.2), suite="bamboogle") for i in range(10)
    ]


def test_one_set_has_its_mean_and_bootstrap_interval():
    records = [record(i, float(i % 3 == 0)) for i in range(50)]
    table = tabulate(records, MODELS, **DRAWS)
    expected = bootstrap_mean([r["exact_match"] for r in records], **DRAWS)
    assert (table["em"], *table["em_ci"]) == pytest.approx(expected)
    assert table["questions"] == 50 and list(table["suites"]) == ["nq"]
    assert {k: v for k, v in table.items() if k != "suites"} == table["suites"]["nq"]


def test_every_set_weighs_the_same_in_the_mean():
    records = two_sets(np.random.default_rng(0))
    table = tabulate(records, MODELS, **DRAWS)
    for name, value in VALUES.items():
        means = []
        for suite in ("nq", "bamboogle"):
            own = [value(r) for r in records if r["suite"] == suite]
            means.append(sum(own) / len(own))
            assert table["suites"][suite][name] == pytest.approx(means[-1])
        assert table[name] == pytest.approx(sum(means) / 2)
        low, high = table[f"{name}_ci"]
        assert low <= table[name] + 1e-12 and table[name] - 1e-12 <= high


def test_samples_of_a_question_are_one_question():
    """Ten samples that all agree say no more about other questions than one does."""
    single = [record(i, float(i % 2)) for i in range(30)]
    table, once = (tabulate(records, MODELS, **DRAWS) for records in (single * 10, single))
    assert table["questions"] == 30
    for name in VALUES:
        assert (table[name], *table[f"{name}_ci"]) == pytest.approx((once[name], *once[f"{name}_ci"]))


def test_shares_stops_and_seconds_are_counted():
    records = [
        record(0, calls=[("Titan", 1e-5, 1.0), ("Pico", 1e-6, 3.0)]),
        record(1, calls=[("Titan", 1e-5, 2.0), ("", 0.0, 0.0)], stop="call_limit"),
        record(2, calls=[], failed=True),
    ]
    table = tabulate(records, ("Titan", "Pico", "Aria"), **DRAWS)
    assert table["calls_share"] == {"Titan": pytest.approx(2 / 3), "Pico": pytest.approx(1 / 3), "Aria": 0.0}
    assert table["stops"] == {"answer": pytest.approx(2 / 3), "call_limit": pytest.approx(1 / 3)}
    assert table["call_seconds"]["median"] == 2.0 and table["call_seconds"]["p95"] == pytest.approx(2.9)
    assert table["calls_per_question"] == pytest.approx(4 / 3)
    assert table["failed_share"] == pytest.approx(1 / 3)


def test_a_policys_figures_hold_the_summary_too():
    card = Card("Titan", "Titan", "p", "t", 1.0, 2.0, None, {}, "", ())
    figures = policy_figures(two_sets(np.random.default_rng(1)), [card], **DRAWS)
    assert {"reward/total", "watch/repeated_call", "em", "em_ci", "suites", "calls_share"} <= figures.keys()
    assert figures["em"] == np.mean([suite["em"] for suite in figures["suites"].values()])
    assert "calls/share" not in figures


def test_differences_are_paired_by_question_whatever_the_order():
    rng = np.random.default_rng(2)
    after, before = two_sets(rng, 0.9), two_sets(rng, 0.3)
    found = compare_records(after, [before[i] for i in rng.permutation(len(before))], **DRAWS)
    pairs = [(a["exact_match"], b["exact_match"], a["suite"]) for a, b in zip(after, before, strict=True)]
    per_set = [np.mean([a - b for a, b, own in pairs if own == suite]) for suite in ("nq", "bamboogle")]
    assert found["em"]["mean"] == pytest.approx(np.mean(per_set))
    assert found["suites"]["nq"]["em"]["mean"] == pytest.approx(per_set[0])
    signs = found["em"]["sign_test"]
    assert signs["better"] == sum(a > b for a, b, _ in pairs) and signs["worse"] == sum(a < b for a, b, _ in pairs)
    assert sum(signs[key] for key in ("better", "worse", "equal")) == len(pairs)
    assert set(found) == {*VALUES, "suites"}


def test_a_policy_does_not_differ_from_itself():
    records = two_sets(np.random.default_rng(3))
    found = compare_records(records, records, **DRAWS)
    for name in VALUES:
        assert found[name] == {
            "mean": 0.0, "ci": [0.0, 0.0], "sign_test": {"better": 0, "worse": 0, "equal": 50, "p": 1.0},
        }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[:-1], "1 of the 50 questions of the first evaluation are not in the second one's 49"),
        (lambda r: [*r, record(77)], "1 of the 51 questions of the second evaluation are not in the first one's 50"),
        (lambda r: [*r[1:], r[0] | {"suite": "popqa"}], "question 'nq-0' of set 'nq'"),
        (lambda r: [*r[1:], r[0] | {"question": "another?"}], "1 questions have one id and two texts"),
        (lambda r: [*r[1:], r[0] | {"golds": ["another"]}], "1 questions have one id and two texts"),
    ],
)
def test_other_questions_are_refused(change, message):
    records = two_sets(np.random.default_rng(4))
    with pytest.raises(CompareError, match=message):
        compare_records(records, change(records), **DRAWS)
