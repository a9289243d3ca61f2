"""Telemetry of a rollout: counts, seconds of decode and prefill, idle time, call latency, and a timeline of every row.

The device is not asked more often for it. The report of a turn carries the number of the step that began it, and each
callback carries the number of steps so far. Times of steps between two callbacks are interpolated.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from router_r1_jax.rollout.episode import Episode
from router_r1_jax.rollout.row_state import COUNTS


class Span(NamedTuple):
    """What a row did from `start` to `end`, in seconds since the run began: prefill | decode | wait."""

    row: int
    kind: str
    start: float
    end: float


def _merged(how: str) -> Any:
    return dataclasses.field(metadata={"merge": how}, repr=how != "chain")


@dataclasses.dataclass(frozen=True)
class RolloutStats:
    """What one rollout did. Times are in seconds. `concat_stats` adds fields up, except if another way is named.

    Attributes:
      seconds: wall time of the run.
      rows: slots of all replicas.
      prefix_tokens: tokens that all prompts share; each replica prefills them once, in prefix_seconds.
      decode_seconds: time of all decode steps. This and prefill_seconds are estimated by least squares over the times
        between callbacks; swaps count in either.
      callback_bytes: bytes that went through the callbacks, both ways.
      idle_seconds: time in which no row of a replica could go on by itself, summed over the replicas.
      idle_share: idle_seconds as a share of the replicas' time.
      slots_used: share of the rows' time in which they held an episode.
      decode_batch_wait_share: share of the rows' steps in which they had tokens to read but were outside the batch.
      calls: replies that came in time.
      truncated_replies: replies of which only a beginning, at most rollout.reply_tokens tokens, entered the context.
      spans: timeline of every row, for a plot; rows are numbered over all replicas.
      call_times: times (asked, answered) of each call, on the clock of the spans.
    """

    seconds: float = _merged("max")
    rows: int
    prefix_tokens: int = _merged("max")
    prefix_seconds: float = _merged("max")
    decode_steps: int
    decoded_tokens: int
    decode_seconds: float
    prefill_steps: int
    prefilled_tokens: int
    prefill_seconds: float
    callbacks: int
    callback_bytes: int
    idle_seconds: float
    idle_share: float = _merged("mean")
    slots_used: float = _merged("mean")
    decode_batch_wait_share: float = _merged("mean")
    calls: int
    truncated_replies: int
    spans: tuple[Span, ...] = _merged("chain")
    call_times: tuple[tuple[float, float], ...] = _merged("chain")

    @property
    def calls_in_flight(self) -> int:
        """The largest number of calls in flight at one time."""
        events = sorted([(asked, 1) for asked, _ in self.call_times] + [(end, -1) for _, end in self.call_times])
        return int(max(np.cumsum([step for _, step in events]), default=0))

    def latency(self, percent: float) -> float:
        """Percentile of the calls' latency as the rollout sees it; 0 without calls."""
        return float(np.percentile([end - start for start, end in self.call_times] or [0.0], percent))

    def metrics(self) -> dict[str, float]:
        """All numbers, for a line of metrics."""
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, (int, float))}
        latencies = {f"latency_p{percent}": self.latency(percent) for percent in (50, 95)}
        return numbers | latencies | {"calls_in_flight": self.calls_in_flight}


def concat_stats(parts: Sequence[RolloutStats]) -> RolloutStats:
    """One rollout's stats from those of replicas or processes that began together and shared its questions.

    Shares are means weighted by the rows' time.
    """
    weights = [part.seconds * part.rows for part in parts]
    first_row = np.cumsum([0, *(part.rows for part in parts)]).tolist()
    parts = [
        dataclasses.replace(part, spans=tuple(span._replace(row=span.row + first) for span in part.spans))
        for part, first in zip(parts, first_row, strict=False)
    ]
    merge = {
        "sum": sum,
        "max": max,
        "mean": lambda values: float(np.average(values, weights=weights)),
        "chain": lambda values: sum(values, ()),
    }
    ways = {f.name: merge[f.metadata.get("merge", "sum")] for f in dataclasses.fields(RolloutStats)}
    return RolloutStats(**{name: way([getattr(part, name) for part in parts]) for name, way in ways.items()})


class Timeline:
    """Records one replica's run while it goes on: callbacks, turns, waits and calls."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._callbacks: list[tuple[float, float, np.ndarray]] = []  # began, ended, counts
        self._turns: list[tuple[int, float, int, float]] = []  # row, prefill from, step that began it, ended
        self._waits: list[Span] = []
        self._since: dict[int, float] = {}  # row -> when its prefill or its wait began
        self._calls = 0
        self.call_times: list[tuple[float, float]] = []  # asked, answered; the pool's threads append to it
        self.idle_seconds = self.prefix_seconds = 0.0
        self.callback_bytes = self.truncated_replies = 0

    def callback_ends(self, began: float, counts: np.ndarray, nbytes: int) -> None:
        """A callback that began at this time ends now."""
        self._callbacks.append((began, time.monotonic(), counts))
        self.callback_bytes += nbytes

    def prefill_begins(self, row: int) -> None:
        """The host delivered tokens to a row."""
        self._end_wait(row)
        self._since[row] = time.monotonic()

    def turn_ends(self, row: int, began: int) -> None:
        """A row's turn, which began at step `began`, is over."""
        self._turns.append((row, self._since.pop(row), began, time.monotonic()))

    def wait_begins(self, row: int) -> None:
        """A row waits for a reply from now on."""
        self._since[row] = time.monotonic()

    def episode_ends(self, row: int, episode: Episode) -> None:
        """A row's episode is over. If the row was waiting, the wait ends too."""
        self._end_wait(row)
        self._calls += len(episode.replies)

    def _end_wait(self, row: int) -> None:
        if row in self._since:
            self._waits.append(Span(row, "wait", self._since.pop(row), time.monotonic()))

    def spans(self) -> list[Span]:
        """Spans of all rows on the clock of time.monotonic()."""
        steps = [counts[COUNTS.index("steps")] for _, _, counts in self._callbacks]
        times = [began for began, _, _ in self._callbacks]
        result = list(self._waits)
        for row, prefill_from, began, ended in self._turns:
            started = min(max(float(np.interp(began, steps, times)), prefill_from), ended)
            result += [Span(row, "prefill", prefill_from, started), Span(row, "decode", started, ended)]
        return result

    def _seconds_of_steps(self) -> list[float]:
        """[decode, prefill] seconds, by the costs per step that fit the times between callbacks best."""
        kinds = [COUNTS.index("decode_steps"), COUNTS.index("prefill_steps")]
        steps = np.diff(np.array([counts[kinds] for _, _, counts in self._callbacks]).reshape(-1, 2), axis=0)
        seconds = [after[0] - before[1] for before, after in itertools.pairwise(self._callbacks)]
        return (_costs(steps, np.array(seconds)) * steps.sum(axis=0)).tolist()

    def stats(self, *, began: float, prefix_tokens: int) -> RolloutStats:
        """The stats of a run that began at this time.monotonic() and is over now."""
        seconds = time.monotonic() - began
        last = self._callbacks[-1][2] if self._callbacks else np.zeros(len(COUNTS), np.int32)
        counts = dict(zip(COUNTS, last.tolist(), strict=True))
        steps, waits = counts.pop("steps"), counts.pop("decode_batch_waits")
        decode_seconds, prefill_seconds = self._seconds_of_steps()
        spans = tuple(s._replace(start=s.start - began, end=s.end - began) for s in self.spans())
        return RolloutStats(
            seconds=seconds,
            rows=self._slots,
            prefix_tokens=prefix_tokens,
            prefix_seconds=self.prefix_seconds,
            **counts,
            decode_seconds=decode_seconds,
            prefill_seconds=prefill_seconds,
            callbacks=len(self._callbacks),
            callback_bytes=self.callback_bytes,
            idle_seconds=self.idle_seconds,
            idle_share=self.idle_seconds / seconds,
            slots_used=sum(s.end - s.start for s in spans) / (seconds * self._slots),
            decode_batch_wait_share=waits / max(1, self._slots * steps),
            calls=self._calls,
            truncated_replies=self.truncated_replies,
            spans=spans,
            call_times=tuple((asked - began, answered - began) for asked, answered in self.call_times),
        )


def _costs(steps: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Seconds per step of two kinds, not negative, from steps [n, 2] and the time that they took together [n]."""
    pace = seconds / np.maximum(steps.sum(axis=1), 1)
    usual = pace <= 10 * np.median(pace) if len(pace) else pace > 0  # the others hold a compilation
    steps, seconds = steps[usual], seconds[usual]
    cost = np.linalg.lstsq(steps, seconds, rcond=None)[0] if len(steps) else np.zeros(2)
    if np.any(cost < 0):  # the two kinds cannot be told apart: one takes all the time
        only = np.argmax(cost)
        cost = np.where(np.arange(2) == only, seconds.sum() / max(steps[:, only].sum(), 1), 0.0)
    return cost
