"""Bootstrap intervals against the normal approximation (large n) and against every possible resample (tiny n)."""

import itertools
from statistics import NormalDist

import numpy as np
import pytest

from router_r1_jax.evaluation import statistics
from router_r1_jax.evaluation.statistics import bootstrap_mean_of_sets, sign_test


def bootstrap(values, **settings):
    """The interval of a single set."""
    return bootstrap_mean_of_sets([values], **settings)


def enumerated(values):
    """The exact percentile interval: all n**n resamples of `values`, each equally likely."""
    means = np.array([np.mean(draw) for draw in itertools.product(values, repeat=len(values))])
    return np.quantile(means, [0.025, 0.975])


def test_tiny_samples_agree_with_all_resamples():
    values = [0.0, 1.0, 4.0, 9.0, 2.5]  # 3125 resamples, most means distinct
    got = bootstrap(values, resamples=200_000, seed=3)
    np.testing.assert_allclose(got[1:], enumerated(values), atol=0.08)
    assert got.mean == pytest.approx(np.mean(values))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_large_samples_agree_with_the_normal_approximation(p):
    values = (np.random.default_rng(0).random(4000) < p).astype(float)
    got = bootstrap(values, resamples=20_000, seed=1)
    half = NormalDist().inv_cdf(0.975) * values.std() / np.sqrt(len(values))
    assert got.low == pytest.approx(values.mean() - half, abs=0.03 * half)
    assert got.high == pytest.approx(values.mean() + half, abs=0.03 * half)


def test_chunks_do_not_change_the_result(monkeypatch):
    values = np.random.default_rng(1).random(37)
    whole = bootstrap(values, resamples=501, seed=8)
    for chunk in (1, 100, 37 * 7 + 5):  # one row at a time, two rows, a size that divides nothing
        monkeypatch.setattr(statistics, "_CHUNK", chunk)
        assert bootstrap(values, resamples=501, seed=8) == whole


def test_seed_decides():
    values = np.random.default_rng(1).random(50)
    assert bootstrap(values, resamples=200, seed=1) == bootstrap(values, resamples=200, seed=1)
    assert bootstrap(values, resamples=200, seed=1) != bootstrap(values, resamples=200, seed=2)


def test_sets_weigh_the_same_and_questions_are_drawn_within_theirs():
    big, small = np.r_[np.zeros(300), np.ones(100)], np.r_[np.zeros(5), np.ones(5)]
    got = bootstrap_mean_of_sets([big, small], resamples=20_000, seed=0)
    assert got.mean == pytest.approx((0.25 + 0.5) / 2)
    error = np.sqrt(big.var() / 400 + small.var() / 10) / 2
    half = NormalDist().inv_cdf(0.975) * error
    assert got.low == pytest.approx(got.mean - half, abs=0.06 * half)
    assert got.high == pytest.approx(got.mean + half, abs=0.06 * half)


@pytest.mark.parametrize(("better", "worse", "equal"), [(0, 0, 3), (1, 0, 0), (5, 1, 2), (4, 7, 0), (6, 6, 1)])
def test_the_sign_test_counts_every_way_that_coins_can_fall(better, worse, equal):
    differences = [1.0] * better + [-0.5] * worse + [0.0] * equal
    n = better + worse
    falls = [sum(coins) for coins in itertools.product((0, 1), repeat=n)]
    as_uneven = sum(abs(heads - n / 2) >= abs(better - n / 2) for heads in falls)
    got = sign_test(differences)
    assert got[:3] == (better, worse, equal)
    assert got.p == pytest.approx(as_uneven / len(falls))


def test_the_sign_test_of_many_questions_neither_overflows_nor_vanishes():
    got = sign_test([1.0] * 2000 + [-1.0] * 1500)
    z = (2000 - 1750 - 0.5) / np.sqrt(3500 / 4)  # with correction for continuity
    assert got.p == pytest.approx(2 * NormalDist().cdf(-z), rel=0.05)
    assert 0.0 < sign_test([1.0] * 1000).p < 1e-300
