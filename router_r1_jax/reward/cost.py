"""Cost component of the reward: sliding cost window (5th and 95th percentile), costs within a group, kinds of raw cost.

Raw costs spread over orders of magnitude and shift as the policy learns, so each cost is normalised within a window of
the latest costs. The window is state: each run has one, in its checkpoint. Policies that are compared with each other
share a frozen window.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from router_r1_jax.errors import ConfigError

_LOW, _HIGH = 0.05, 0.95  # quantiles of the window that count as cheap and expensive, from the published code
FLAT = 1e-8  # costs whose spread is smaller count as equal
NEUTRAL = 0.5  # cost component of equal costs, and of a cost that says nothing about the policy

# What the raw cost of an episode may count, and its unit.
COSTS = {
    "output": "millionths of a dollar, output tokens of the calls only, as published",
    "tokens": "millionths of a dollar, input and output tokens of the calls",
    "all": "millionths of a dollar, tokens of the calls and those that the router samples",
    "seconds": "seconds that the calls took",
}


def episode_cost(kind: str, replies: Sequence[Any], sampled_tokens: int, router_price: float) -> float:
    """The raw cost of one episode, in the unit that COSTS gives.

    Args:
        kind: a key of COSTS.
        replies: the `pool.outcomes.Reply` of each call.
        sampled_tokens: number of tokens that the router itself has sampled.
        router_price: dollars per million of these.
    """
    if kind == "output":
        return sum(reply.raw_cost for reply in replies)
    if kind == "seconds":
        return sum(reply.latency for reply in replies)
    dollars = sum(reply.charged for reply in replies)
    return 1e6 * dollars + (sampled_tokens * router_price if kind == "all" else 0.0)


def normalize_costs(raw_costs: np.ndarray, low: float | np.ndarray, high: float | np.ndarray) -> np.ndarray:
    """Cost components c = 1 - clip((r - low) / (high - low), 0, 1), with r the square root of the raw cost.

    The bounds are square roots too, one for all costs or one for each. c is 1 for a cheap cost, 0 for an expensive one,
    and 0.5 if the bounds are equal.
    """
    return _interpolate(np.sqrt(raw_costs), low, high)


def _interpolate(values: np.ndarray, low: float | np.ndarray, high: float | np.ndarray) -> np.ndarray:
    """1 at `low` and below, 0 at `high` and above, linear in between; NEUTRAL if they are equal."""
    spread = np.subtract(high, low)
    flat = spread < FLAT
    return np.where(flat, NEUTRAL, 1.0 - np.clip((values - low) / np.where(flat, 1.0, spread), 0.0, 1.0))


def cost_bounds(raw_costs: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
    """5th and 95th percentile of the square roots of raw costs, for `normalize_costs`.

    Percentiles are interpolated linearly. If there are `weights`, one for each cost, a bound is
    one of the square roots, not interpolated.
    """
    method = "linear" if weights is None else "inverted_cdf"
    low, high = np.quantile(np.sqrt(raw_costs), [_LOW, _HIGH], weights=weights, method=method)
    return float(low), float(high)


def group_costs(raw_costs: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Cost components [B] of raw costs [B]: 1 for the cheapest of its group, 0 for the most expensive, linear between.

    0.5 if all costs of the group are equal.
    """
    components = np.empty(len(raw_costs))
    for group in np.unique(groups):
        members = groups == group
        components[members] = _interpolate(raw_costs[members], raw_costs[members].min(), raw_costs[members].max())
    return components


class CostNormalizer:
    """Cost components of raw costs by a sliding window of the last `window` costs (`normalize_costs`).

    The bounds are the window's 5th and 95th percentile, interpolated linearly. Costs enter the window one by one and in
    order, and each is normalised after it has entered. If `frozen` is set, costs no longer enter.
    """

    def __init__(self, window: int = 1000) -> None:
        """Raises ValueError if the window has no room."""
        if window < 1:
            raise ValueError(f"window is {window}; the cost window holds at least 1 value")
        self.window = window
        self.frozen = False
        self._arrived: deque[float] = deque()  # square roots in order of arrival; the oldest is at the left
        self._sorted: list[float] = []  # the same values in ascending order, so that a percentile needs no sort

    def __call__(self, raw_costs: np.ndarray) -> np.ndarray:
        """Cost components [B] in [0, 1] of raw costs [B] (in the unit of COSTS), which enter the window.

        Raises ValueError, with the window unchanged, for a cost that is negative or not finite.
        """
        raw_costs = np.asarray(raw_costs, dtype=np.float64)
        if raw_costs.ndim != 1:
            raise ValueError(f"raw_costs has shape {raw_costs.shape}; pass one cost per episode, [B]")
        for row in np.flatnonzero(~(np.isfinite(raw_costs) & (raw_costs >= 0))):
            raise ValueError(f"raw_costs[{row}] is {raw_costs[row]}; a cost is finite and >= 0")
        if self.frozen:
            return normalize_costs(raw_costs, *self._bounds())
        bounds = np.array([self._enter(value) for value in np.sqrt(raw_costs).tolist()]).reshape(-1, 2)
        return normalize_costs(raw_costs, bounds[:, 0], bounds[:, 1])

    def state(self) -> dict[str, Any]:
        """The window as plain numbers; JSON keeps them exactly."""
        return {"window": self.window, "sqrt_costs": list(self._arrived)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state()` returned.

        Raises ConfigError, with nothing changed, for a state that is damaged or belongs to another window.
        """
        if set(state) != {"window", "sqrt_costs"}:
            raise ConfigError(f"the saved cost window has fields {sorted(state)}; they must be sqrt_costs and window")
        if state["window"] != self.window:
            raise ConfigError(
                f"the saved cost window is {state['window']} values long and this one {self.window}; "
                f"set reward.window={state['window']} to continue that run"
            )
        values = [float(value) for value in state["sqrt_costs"]]
        if len(values) > self.window:
            raise ConfigError(f"the saved cost window of {self.window} holds {len(values)} sqrt_costs; it is damaged")
        for value in values:
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"the saved cost window has {value} in sqrt_costs; each is finite and >= 0")
        self._arrived = deque(values)
        self._sorted = sorted(values)

    def _enter(self, value: float) -> tuple[float, float]:
        """Let the square root of a cost enter the window; returns the new bounds."""
        if len(self._arrived) == self.window:
            del self._sorted[bisect_left(self._sorted, self._arrived.popleft())]
        self._arrived.append(value)
        insort(self._sorted, value)
        return self._bounds()

    def _bounds(self) -> tuple[float, float]:
        return _quantile(self._sorted, _LOW), _quantile(self._sorted, _HIGH)


def make_normalizer(window: int, frozen: Mapping[str, Any] | None = None) -> CostNormalizer:
    """A normaliser with a new window, or with the window whose state is `frozen`, which costs no longer enter.

    Several policies are compared by the same frozen window. A window that slides would call the middle of any policy's
    costs average. Raises ConfigError for a frozen window that is damaged or holds no cost.
    """
    if not frozen:
        return CostNormalizer(window)
    normalizer = CostNormalizer(frozen["window"])
    normalizer.restore(frozen)
    if not frozen["sqrt_costs"]:
        raise ConfigError("the saved cost window holds no sqrt_costs; nothing can be normalised by it")
    normalizer.frozen = True
    return normalizer


def _quantile(values: list[float], q: float) -> float:
    """Quantile q of sorted values, interpolated linearly between neighbours as `np.quantile` does."""
    position = q * (len(values) - 1)
    index = math.floor(position)
    if index + 1 == len(values):
        return values[index]
    return values[index] + (values[index + 1] - values[index]) * (position - index)
