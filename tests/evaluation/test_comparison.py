"""Paired differences between two policies, and the refusal of questions that cannot be paired."""

import numpy as np
import pytest
from fake_records import record, two_sets

from router_r1_jax.evaluation.aggregates import METRICS
from router_r1_jax.evaluation.comparison import CompareError, compare_records

RESAMPLING = {"resamples": 400, "seed": 0}


def test_differences_are_paired_by_question_whatever_the_order():
    rng = np.random.default_rng(2)
    after, before = two_sets(rng, 0.9), two_sets(rng, 0.3)
    found = compare_records(after, [before[i] for i in rng.permutation(len(before))], **RESAMPLING)
    pairs = [(a["exact_match"], b["exact_match"], a["dataset"]) for a, b in zip(after, before, strict=True)]
    per_set = [np.mean([a - b for a, b, name in pairs if name == dataset]) for dataset in ("nq", "bamboogle")]
    assert found["em"]["mean"] == pytest.approx(np.mean(per_set))
    assert found["datasets"]["nq"]["em"]["mean"] == pytest.approx(per_set[0])
    signs = found["em"]["sign_test"]
    assert signs["better"] == sum(a > b for a, b, _ in pairs) and signs["worse"] == sum(a < b for a, b, _ in pairs)
    assert sum(signs[key] for key in ("better", "worse", "equal")) == len(pairs)
    assert set(found) == {*METRICS, "datasets"}


def test_a_policy_does_not_differ_from_itself():
    records = two_sets(np.random.default_rng(3))
    found = compare_records(records, records, **RESAMPLING)
    for name in METRICS:
        assert found[name] == {
            "mean": 0.0,
            "ci": [0.0, 0.0],
            "sign_test": {"better": 0, "worse": 0, "equal": 50, "p": 1.0},
        }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[:-1], "1 questions of the two evaluations, of 50 and 49 questions, differ in id, text or gold"),
        (lambda r: [*r, record(77)], "1 questions of the two evaluations, of 50 and 51 questions, differ"),
        (lambda r: [*r[1:], r[0] | {"dataset": "popqa"}], "2 questions .* question 'nq-0' of set 'nq'"),
        (lambda r: [*r[1:], r[0] | {"question": "another?"}], "1 questions .* question 'nq-0' of set 'nq'"),
        (lambda r: [*r[1:], r[0] | {"golds": ["another"]}], "1 questions .* question 'nq-0' of set 'nq'"),
    ],
)
def test_other_questions_are_refused(change, message):
    records = two_sets(np.random.default_rng(4))
    with pytest.raises(CompareError, match=message):
        compare_records(records, change(records), **RESAMPLING)
