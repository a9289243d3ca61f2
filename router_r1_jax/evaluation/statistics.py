"""Statistics over questions: the bootstrap confidence interval of a mean, and the sign test for paired differences."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

LEVEL = 0.95  # share of the resampled means that an interval holds
_CHUNK = 4_000_000  # resampled indices held at a time: 32 MB, for any number of questions and resamples


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def bootstrap_mean_of_sets(sets: Sequence[Sequence[float] | np.ndarray], *, resamples: int, seed: int) -> Interval:
    """95 % percentile bootstrap (Efron 1979) of the mean of the data sets' means.

    Each data set has the same weight: 125 questions weigh as much as 500. `scipy.stats.bootstrap` is not used, because
    with several sets its result depends on how many resamples it holds in memory at a time.

    Args:
        sets: one sequence of numbers per data set, one number per question, none empty. Questions are resampled with
            replacement, each within its own set.
        resamples: number of resampled means; 10,000 leave about 0.5 % noise in the ends of the interval.
        seed: of NumPy's PCG64; the same seed gives the same interval.
    """
    samples = [np.asarray(values, dtype=np.float64) for values in sets]
    rng = np.random.default_rng(seed)
    means = np.mean([_resampled_means(sample, resamples, rng) for sample in samples], axis=0)
    low, high = np.quantile(means, [(1.0 - LEVEL) / 2.0, (1.0 + LEVEL) / 2.0])
    return Interval(float(np.mean([sample.mean() for sample in samples])), float(low), float(high))


class SignTest(NamedTuple):
    """On how many questions a policy was better, worse and equal, and the p-value of so uneven a split."""

    better: int
    worse: int
    equal: int
    p: float


def sign_test(differences: Sequence[float] | np.ndarray) -> SignTest:
    """Exact two-sided sign test of one difference per question.

    Ties are left out. Under the null hypothesis every other question is a fair coin. For scores of 0 and 1 this is
    McNemar's exact test.
    """
    sample = np.asarray(differences, dtype=np.float64)
    better, worse = int(np.sum(sample > 0)), int(np.sum(sample < 0))
    p = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return SignTest(better, worse, len(sample) - better - worse, p)


def _resampled_means(sample: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """[resamples] means of as many samples with replacement."""
    n = len(sample)
    means = np.empty(resamples)
    rows = max(1, _CHUNK // n)
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        means[start:stop] = sample[rng.integers(0, n, size=(stop - start, n))].mean(axis=1)
    return means
