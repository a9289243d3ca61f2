"""Turns an episode's raw cost into a number in [0, 1] that can stand beside the outcome.

Raw costs spread over orders of magnitude and shift as the policy learns, so each is judged within a sliding window of
the latest ones. The window is state: one per run, kept in the checkpoint; policies that are compared are judged by one
window that does not move.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_LOW, _HIGH = 0.05, 0.95  # quantiles that stand for cheap and dear, from the published code
FLAT = 1e-8  # a narrower spread of costs says nothing about cheap and dear
NEUTRAL = 0.5  # the component of a cost that nothing is known about: neither cheap nor dear


# What an episode's raw cost may count, and its unit.
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
        replies: the calls' `pool.Reply`s.
        sampled_tokens: that the router itself has sampled.
        router_price: dollars per million of them.
    """
    if kind == "output":
        return sum(reply.raw_cost for reply in replies)
    if kind == "seconds":
        return sum(reply.latency for reply in replies)
    dollars = sum(reply.charged for reply in replies)
    return 1e6 * dollars + (sampled_tokens * router_price if kind == "all" else 0.0)


class CostNormalizer:
    """Cost component c = 1 - clip((r - lo) / (hi - lo), 0, 1), with r the square root of the raw cost.

    lo and hi are the 5th and 95th percentile, linearly interpolated, of the last `window` values of r. Costs enter one
    by one and in order, each before it is judged. c is 1 for the cheapest, 0 for the dearest, and 0.5 while the window
    is flat.
    """

    def __init__(self, window: int = 1000):
        if window < 1:
            raise ValueError(f"window is {window}; the cost window holds at least 1 value")
        self.window = window
        self._fixed = False
        self._arrived: deque[float] = deque()  # square roots in order of arrival; what leaves is at its left
        self._sorted: list[float] = []  # the same values in order of size: a percentile costs no sort

    @classmethod
    def fixed(cls, state: Mapping[str, Any]) -> "CostNormalizer":
        """Judges by the window that `state()` returned, which no cost enters any more: the order is no matter.

        Raises ValueError for a state that is damaged or holds no cost.
        """
        normalizer = cls(state["window"])
        normalizer.restore(state)
        if not normalizer._sorted:
            raise ValueError("the saved cost window holds no sqrt_costs; nothing can be judged by it")
        normalizer._fixed = True
        return normalizer

    def __call__(self, raw_costs: np.ndarray) -> np.ndarray:
        """Cost components [B] in [0, 1] of raw costs [B] (tokens x dollars per million tokens), which enter the window.

        Raises ValueError, with the window unchanged, for a cost that is negative or not finite.
        """
        raw_costs = np.asarray(raw_costs, dtype=np.float64)
        if raw_costs.ndim != 1:
            raise ValueError(f"raw_costs has shape {raw_costs.shape}; pass one cost per episode, [B]")
        for row in np.flatnonzero(~(np.isfinite(raw_costs) & (raw_costs >= 0))):
            raise ValueError(f"raw_costs[{row}] is {raw_costs[row]}; a cost is finite and >= 0")
        return np.array([self._component(cost) for cost in np.sqrt(raw_costs).tolist()], dtype=np.float64)

    def state(self) -> dict[str, Any]:
        """The window as plain numbers; JSON keeps them exactly."""
        return {"window": self.window, "sqrt_costs": list(self._arrived)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state()` returned.

        Raises ValueError, with nothing changed, for a state that is damaged or of another window.
        """
        if set(state) != {"window", "sqrt_costs"}:
            raise ValueError(f"the saved cost window has fields {sorted(state)}; they must be sqrt_costs and window")
        if state["window"] != self.window:
            raise ValueError(
                f"the saved cost window is {state['window']} values long and this one {self.window}; "
                f"set reward.window={state['window']} to continue that run"
            )
        values = [float(value) for value in state["sqrt_costs"]]
        if len(values) > self.window:
            raise ValueError(f"the saved cost window of {self.window} holds {len(values)} sqrt_costs; it is damaged")
        for value in values:
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"the saved cost window has {value} in sqrt_costs; each is finite and >= 0")
        self._arrived = deque(values)
        self._sorted = sorted(values)

    def _component(self, value: float) -> float:
        """Let one square root of a cost into the window, unless that is fixed, and judge it."""
        if not self._fixed:
            if len(self._arrived) == self.window:
                del self._sorted[bisect_left(self._sorted, self._arrived.popleft())]
            self._arrived.append(value)
            insort(self._sorted, value)
        low, high = _quantile(self._sorted, _LOW), _quantile(self._sorted, _HIGH)
        if high - low < FLAT:
            return NEUTRAL
        return 1.0 - min(max((value - low) / (high - low), 0.0), 1.0)


def _quantile(values: list[float], q: float) -> float:
    """Quantile q of sorted values by linear interpolation between neighbours; NumPy's default method."""
    position = q * (len(values) - 1)
    index = math.floor(position)
    if index + 1 == len(values):
        return values[index]
    return values[index] + (values[index + 1] - values[index]) * (position - index)
