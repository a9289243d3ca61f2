"""Alarms: signs in a step's metrics that training collapses, each with a threshold in `config.alarms`.

While its sign lasts, an alarm is 1 in the metrics. A line on the screen says when it begins and ends. With
`alarms.stop` a sign that lasts for `alarms.patience` steps in a row ends the run; the best checkpoint is kept.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from router_r1_jax.errors import UserError

MIN_CALLS = 20  # a share of fewer calls than this says nothing


class CollapseError(UserError, RuntimeError):
    """An alarm has stopped the run. The message says which one, for how long, and what is kept."""


def _call_share(metrics: Mapping[str, Any]) -> float:
    """The share of calls that the most called model received."""
    return max(metrics["calls/share"].values(), default=0.0) if metrics["rollout/calls"] >= MIN_CALLS else 0.0


# Name of the alarm -> what it measures, and the unit. The fields of config.alarms have the same names.
SIGNS: dict[str, tuple[Callable[[Mapping[str, Any]], float], str]] = {
    "entropy": (lambda m: m["entropy"], "nats per token"),
    "kl": (lambda m: m.get("kl", 0.0), "nats per token"),
    "malformed": (lambda m: m["malformed_share"], "of the episodes"),
    "length": (lambda m: m["response_tokens"], "tokens per episode"),
    "one_model": (_call_share, "of the calls"),
    "logp_diff": (lambda m: m.get("logp_diff_mean", 0.0), "nats between sampler and learner"),
    "skipped": (lambda m: m["skipped_updates"], "updates that were not finite"),
}


class Alarms:
    """Checks each step's metrics. Its state is small JSON and goes into the checkpoint."""

    def __init__(self, settings: ConfigDict) -> None:
        """`settings` is config.alarms."""
        self._settings = settings
        self._first_length: float | None = None
        self._lasting = dict.fromkeys(SIGNS, 0)  # steps in a row

    def check(self, metrics: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
        """`alarms/<name>`, 1 if its sign is there, and lines for the screen about alarms that begin or end."""
        if self._first_length is None:
            self._first_length = metrics["response_tokens"]
        lines = []
        for name, (measure, unit) in SIGNS.items():
            value, limit = measure(metrics), self._limit(name)
            wrong = limit is not None and (value < limit if name == "entropy" else not value <= limit)
            if wrong != (self._lasting[name] > 0):
                verb = "is" if wrong else "is no longer"
                side = "below" if name == "entropy" else "above"
                lines.append(f"alarm {name}: {value:.4g} {unit} {verb} {side} {limit:.4g}")
            self._lasting[name] = self._lasting[name] + 1 if wrong else 0
        return {f"alarms/{name}": float(steps > 0) for name, steps in self._lasting.items()}, lines

    def _limit(self, name: str) -> float | None:
        """The threshold of an alarm; None if it is off."""
        limit = self._settings[name]
        if limit is None or not math.isfinite(limit):
            return None
        return limit * self._first_length if name == "length" else limit

    def stop_if_collapsed(self) -> None:
        """Raise CollapseError if `alarms.stop` is set and a sign has lasted for `alarms.patience` steps."""
        lasting = [name for name, steps in self._lasting.items() if steps >= self._settings.patience]
        if self._settings.stop and lasting:
            raise CollapseError(
                f"alarm {', '.join(lasting)} has stood for {self._settings.patience} steps (alarms.patience); the "
                "best checkpoint and the last are kept: evaluate one, or change settings and start in another workdir"
            )

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"first_length": self._first_length, "standing": dict(self._lasting)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`."""
        self._first_length = state["first_length"]
        self._lasting |= state["standing"]
