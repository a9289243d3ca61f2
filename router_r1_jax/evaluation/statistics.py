"""Bootstrap intervals of a mean over questions, and the sign test of differences."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_CHUNK = 4_000_000  # drawn indices held at a time: 32 MB, whatever the number of questions and resamples


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: Sequence[float] | np.ndarray, *, resamples: int, seed: int, level: float = 0.95) -> Interval:
    """Percentile bootstrap (Efron 1979) of the mean of `values`, one number per question.

    Args:
        values: n numbers; each question is drawn with replacement, n at a time.
        resamples: how many such draws; 10,000 leave about 0.5 % noise in the interval's ends.
        seed: of NumPy's PCG64; the same seed gives the same interval.
        level: share of the resampled means that the interval holds.

    Raises:
        ValueError: for no values, a value that is not finite, no resamples, or a level outside (0, 1).
    """
    sample = _checked("values", values)
    _check(resamples, level)
    return _interval(sample.mean(), _resampled_means(sample, resamples, np.random.default_rng(seed)), level)


def bootstrap_mean_of_sets(
    sets: Sequence[Sequence[float] | np.ndarray], *, resamples: int, seed: int, level: float = 0.95
) -> Interval:
    """Interval of the mean of the sets' means: a set of 125 questions weighs as much as one of 500.

    `sets` holds one sequence of numbers per data set; questions are resampled within their own set. Other arguments and
    errors as for `bootstrap_mean`, which gives the same for a single set.
    """
    samples = [_checked(f"sets[{i}]", values) for i, values in enumerate(sets)]
    _check(resamples, level)
    if not samples:
        raise ValueError("sets is empty; give one sequence of numbers per data set")
    rng = np.random.default_rng(seed)
    means = np.mean([_resampled_means(sample, resamples, rng) for sample in samples], axis=0)
    return _interval(np.mean([sample.mean() for sample in samples]), means, level)


class SignTest(NamedTuple):
    """On how many questions a policy was better, worse and equal, and how likely so uneven a split is by chance."""

    better: int
    worse: int
    equal: int
    p: float


def sign_test(differences: Sequence[float] | np.ndarray) -> SignTest:
    """Exact two-sided sign test: ties are left out, and each other question is a fair coin under the null hypothesis.

    Where scores are 0 or 1 this is McNemar's exact test. `differences` holds one number per question; errors as for
    `bootstrap_mean`.
    """
    sample = _checked("differences", differences)
    better, worse = int(np.sum(sample > 0)), int(np.sum(sample < 0))
    decided = better + worse
    tail = sum(math.comb(decided, k) for k in range(min(better, worse) + 1))  # whole numbers: nothing underflows
    return SignTest(better, worse, len(sample) - decided, min(1.0, 2 * tail / 2**decided))


def _check(resamples: int, level: float) -> None:
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; it must be at least 1 (10000 is usual)")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level}; it lies between 0 and 1 (0.95 is usual)")


def _resampled_means(sample: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """[resamples] means of as many draws with replacement."""
    n = len(sample)
    means = np.empty(resamples)
    rows = max(1, _CHUNK // n)
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        means[start:stop] = sample[rng.integers(0, n, size=(stop - start, n))].mean(axis=1)
    return means


def _interval(mean: float, means: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(float(mean), float(low), float(high))


def _checked(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} has shape {array.shape}; give one number per question, at least one")
    wrong = np.flatnonzero(~np.isfinite(array))
    if len(wrong):
        value = "NaN" if math.isnan(array[wrong[0]]) else "infinite"
        raise ValueError(f"{name}[{wrong[0]}] is {value}; leave that question out or give it a score")
    return array
