"""Alarms: signs in a step's metrics that training is going wrong, each with a threshold in `config.alarms`.

An alarm does not judge; it is 1 in the metrics while its sign stands, and a line on the screen when it begins and ends.
With `alarms.stop` a sign that stands for `alarms.patience` steps in a row ends the run; the best checkpoint is kept.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

FEWEST_CALLS = 20  # of which a share says something


class CollapseError(RuntimeError):
    """A run that was stopped by an alarm. One line that says which, since when, and what is kept."""


def _call_share(metrics: Mapping[str, Any]) -> float:
    """The share of calls that the most called model received."""
    return max(metrics["calls/share"].values(), default=0.0) if metrics["rollout/calls"] >= FEWEST_CALLS else 0.0


# Name -> what is looked at, and in which unit. Fields of config.alarms have the same names.
SIGNS: dict[str, tuple[Callable[[Mapping[str, Any]], float], str]] = {
    "entropy": (lambda m: m["entropy"], "nats per token"),
    "kl": (lambda m: m.get("kl", 0.0), "nats per token"),
    "malformed": (lambda m: m["malformed_share"], "of the episodes"),
    "length": (lambda m: m["response_tokens"], "tokens per episode"),
    "one_model": (_call_share, "of the calls"),
    "logp_diff": (lambda m: m.get("logp_diff_mean", 0.0), "nats between sampler and learner"),
    "skipped": (lambda m: m["skipped"], "updates that were not finite"),
}


class Alarms:
    """Looks at each step's metrics. Its state is small JSON and goes into the checkpoint."""

    def __init__(self, settings: ConfigDict) -> None:
        """`settings` is config.alarms."""
        self._settings = settings
        self._first_length: float | None = None
        self._standing = dict.fromkeys(SIGNS, 0)  # steps in a row

    def look(self, metrics: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
        """`alarms/<name>`, 1 where a sign stands, and lines for the screen: what has begun or ended with this step."""
        if self._first_length is None:
            self._first_length = metrics["response_tokens"]
        lines = []
        for name, (measure, unit) in SIGNS.items():
            value, limit = measure(metrics), self._limit(name)
            wrong = limit is not None and (value < limit if name == "entropy" else not value <= limit)
            if wrong != (self._standing[name] > 0):
                verb = "is" if wrong else "is no longer"
                side = "below" if name == "entropy" else "above"
                lines.append(f"alarm {name}: {value:.4g} {unit} {verb} {side} {limit:.4g}")
            self._standing[name] = self._standing[name] + 1 if wrong else 0
        return {f"alarms/{name}": float(steps > 0) for name, steps in self._standing.items()}, lines

    def _limit(self, name: str) -> float | None:
        """Where a sign begins; None for one that is off."""
        limit = self._settings[name]
        if limit is None or not math.isfinite(limit):
            return None
        return limit * self._first_length if name == "length" else limit

    def check(self) -> None:
        """Raise CollapseError where a sign has stood for too long and `alarms.stop` is set."""
        standing = [name for name, steps in self._standing.items() if steps >= self._settings.patience]
        if self._settings.stop and standing:
            raise CollapseError(
                f"alarm {', '.join(standing)} has stood for {self._settings.patience} steps (alarms.patience); the "
                "best checkpoint and the last are kept: evaluate one, or change settings and start in another workdir"
            )

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"first_length": self._first_length, "standing": dict(self._standing)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self._first_length = state["first_length"]
        self._standing |= state["standing"]
