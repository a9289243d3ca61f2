"""Telemetry of a rollout: who did what when, and where the time went.

The device is not asked more often for it: a turn's report carries the number of the step that began it, and each
exchange the number of steps so far, from which times between exchanges are interpolated.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from router_r1_jax.rollout.episode import Episode
from router_r1_jax.rollout.state import COUNTS


class Span(NamedTuple):
    """What a row did from `start` to `end`, seconds since the run began: feed | decode | wait."""

    row: int
    kind: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class RolloutStats:
    """What one rollout did, all replicas together. Times in seconds.

    Attributes:
      seconds: the run's wall time.
      rows: of all replicas.
      prefix_tokens: tokens that all prompts share; prefilled once per replica, in prefill_seconds.
      decode_seconds: of decode steps, estimated, as feed_seconds, by least squares over the times between exchanges;
        moving rows into lanes counts in either.
      exchanges: callbacks; callback_bytes is what went through them, both ways.
      idle_seconds: in which no row of a replica could go on by itself, summed over the replicas.
      idle_share: of idle_seconds in the replicas' time.
      slots_used: share of the rows' time in which they held an episode.
      lane_wait_share: of the rows' steps, those in which they had tokens to read and no lane.
      cut_replies: of which only the first rollout.reply_tokens tokens entered the context.
      calls_in_flight: at most, at one time.
      latency_p50: of a call as the rollout sees it, with latency_p95; 0 without calls.
      stops: stop reason -> episodes.
      spans: what each row did when, for a plot; rows of all replicas are numbered through.
      call_times: (asked, answered) of each call, on the clock of the spans.
    """

    seconds: float
    rows: int
    prefix_tokens: int
    prefill_seconds: float
    decode_steps: int
    decoded_tokens: int
    decode_seconds: float
    feed_steps: int
    fed_tokens: int
    feed_seconds: float
    exchanges: int
    callback_bytes: int
    idle_seconds: float
    idle_share: float
    slots_used: float
    lane_wait_share: float
    calls: int
    cut_replies: int
    calls_in_flight: int
    latency_p50: float
    latency_p95: float
    stops: dict[str, int]
    spans: tuple[Span, ...] = dataclasses.field(repr=False)
    call_times: tuple[tuple[float, float], ...] = dataclasses.field(repr=False)

    def metrics(self) -> dict[str, float]:
        """All numbers, for a line of metrics."""
        return {f.name: v for f in dataclasses.fields(self) if isinstance(v := getattr(self, f.name), (int, float))}


class Trace:
    """What one replica's exchange notes down while it runs."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._meetings: list[tuple[float, float, np.ndarray]] = []  # came, left, counts
        self._turns: list[tuple[int, float, int, float]] = []  # row, fed at, step that began it, ended at
        self._fed_at: dict[int, float] = {}
        self._waits: list[Span] = []
        self._waiting_since: dict[int, float] = {}
        self.calls: list[tuple[float, float]] = []  # asked, answered; appended to from the pool's threads
        self.idle_seconds = 0.0
        self.prefill_seconds = 0.0
        self.callback_bytes = 0
        self.cut_replies = 0

    def met(self, came: float, counts: np.ndarray, nbytes: int) -> None:
        """An exchange ends now."""
        self._meetings.append((came, time.monotonic(), counts))
        self.callback_bytes += nbytes

    def fed(self, row: int) -> None:
        """Tokens were handed to a row."""
        self.freed(row)
        self._fed_at[row] = time.monotonic()

    def turn_ended(self, row: int, began: int) -> None:
        """A row's turn, begun at step `began`, is over."""
        self._turns.append((row, self._fed_at[row], began, time.monotonic()))

    def waits(self, row: int) -> None:
        """A row waits for a reply from now on."""
        self._waiting_since[row] = time.monotonic()

    def freed(self, row: int) -> None:
        """A row, if it was waiting, waits no longer."""
        if row in self._waiting_since:
            self._waits.append(Span(row, "wait", self._waiting_since.pop(row), time.monotonic()))

    @property
    def counts(self) -> np.ndarray:
        """[5] of COUNTS, at the last exchange."""
        return self._meetings[-1][2] if self._meetings else np.zeros(len(COUNTS), np.int32)

    @property
    def exchanges(self) -> int:
        """How often the host was met."""
        return len(self._meetings)

    def spans(self) -> list[Span]:
        """Every row's spans on the clock of time.monotonic()."""
        steps = [counts[COUNTS.index("steps")] for _, _, counts in self._meetings]
        came = [came for came, _, _ in self._meetings]
        result = list(self._waits)
        for row, fed, began, ended in self._turns:
            started = min(max(float(np.interp(began, steps, came)), fed), ended)
            result += [Span(row, "feed", fed, started), Span(row, "decode", started, ended)]
        return result

    def seconds_of_steps(self) -> tuple[float, float]:
        """(decode, feed) seconds: a cost per step of each kind that fits the intervals between exchanges best."""
        kinds = [COUNTS.index("decode_steps"), COUNTS.index("feed_steps")]
        steps = np.diff(np.array([counts[kinds] for _, _, counts in self._meetings]).reshape(-1, 2), axis=0)
        left, came = [m[1] for m in self._meetings[:-1]], [m[0] for m in self._meetings[1:]]
        cost = _costs(steps, np.subtract(came, left))
        return tuple((cost * steps.sum(axis=0)).tolist())


def _costs(steps: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Seconds per step of two kinds, not negative, from steps [n, 2] and what they took together [n]."""
    pace = seconds / np.maximum(steps.sum(axis=1), 1)
    usual = pace <= 10 * np.median(pace) if len(pace) else pace > 0  # others hold a compilation
    steps, seconds = steps[usual], seconds[usual]
    cost = np.linalg.lstsq(steps, seconds, rcond=None)[0] if len(steps) else np.zeros(2)
    if np.any(cost < 0):  # too alike to be told apart: one kind takes it all
        only = np.argmax(cost)
        cost = np.where(np.arange(2) == only, seconds.sum() / max(steps[:, only].sum(), 1), 0.0)
    return cost


def most_at_once(intervals: Sequence[tuple[float, float]]) -> int:
    """The largest number of intervals (start, end) that overlap."""
    events = sorted([(start, 1) for start, _ in intervals] + [(end, -1) for _, end in intervals])
    return int(max(np.cumsum([step for _, step in events]), default=0))


def summary(
    traces: Sequence[Trace], slots: int, episodes: Sequence[Episode], *, began: float, prefix_tokens: int
) -> RolloutStats:
    """The stats of a run that `began` at this time.monotonic() and is over now."""
    seconds = time.monotonic() - began
    counts = dict(zip(COUNTS, np.sum([trace.counts for trace in traces], axis=0).tolist(), strict=True))
    split = np.sum([trace.seconds_of_steps() for trace in traces], axis=0)
    spans = tuple(
        Span(i * slots + s.row, s.kind, s.start - began, s.end - began)
        for i, trace in enumerate(traces)
        for s in trace.spans()
    )
    calls = [(asked - began, answered - began) for trace in traces for asked, answered in trace.calls]
    idle = sum(trace.idle_seconds for trace in traces)
    return RolloutStats(
        seconds=seconds,
        rows=slots * len(traces),
        prefix_tokens=prefix_tokens,
        prefill_seconds=max(trace.prefill_seconds for trace in traces),
        decode_steps=counts["decode_steps"],
        decoded_tokens=counts["decoded_tokens"],
        decode_seconds=float(split[0]),
        feed_steps=counts["feed_steps"],
        fed_tokens=counts["fed_tokens"],
        feed_seconds=float(split[1]),
        exchanges=sum(trace.exchanges for trace in traces),
        callback_bytes=sum(trace.callback_bytes for trace in traces),
        idle_seconds=idle,
        idle_share=idle / (seconds * len(traces)),
        lane_wait_share=counts["lane_waits"] / max(1, slots * counts["steps"]),
        slots_used=sum(s.end - s.start for s in spans) / (seconds * slots * len(traces)),
        calls=sum(len(e.replies) for e in episodes),
        cut_replies=sum(trace.cut_replies for trace in traces),
        stops=dict(Counter(e.stop for e in episodes)),
        spans=spans,
        **_call_figures(calls),
    )


def _call_figures(calls: Sequence[tuple[float, float]]) -> dict[str, Any]:
    latencies = [end - start for start, end in calls] or [0.0]
    return {
        "calls_in_flight": most_at_once(calls),
        "latency_p50": float(np.percentile(latencies, 50)),
        "latency_p95": float(np.percentile(latencies, 95)),
        "call_times": tuple(calls),
    }


_SUMMED = (
    "rows", "decode_steps", "decoded_tokens", "decode_seconds", "feed_steps", "fed_tokens", "feed_seconds", "exchanges",
    "callback_bytes", "idle_seconds", "calls", "cut_replies",
)  # fmt: skip


def joined(parts: Sequence[RolloutStats]) -> RolloutStats:
    """The stats of processes that began together, each with its share of the questions, as one rollout's."""
    if len(parts) == 1:
        return parts[0]
    row_seconds = [part.seconds * part.rows for part in parts]
    before = np.cumsum([0, *(part.rows for part in parts)]).tolist()
    return RolloutStats(
        seconds=max(part.seconds for part in parts),
        prefix_tokens=parts[0].prefix_tokens,
        prefill_seconds=max(part.prefill_seconds for part in parts),
        idle_share=float(np.average([part.idle_share for part in parts], weights=row_seconds)),
        lane_wait_share=float(np.average([part.lane_wait_share for part in parts], weights=row_seconds)),
        slots_used=float(np.average([part.slots_used for part in parts], weights=row_seconds)),
        stops=dict(sum((Counter(part.stops) for part in parts), Counter())),
        spans=tuple(s._replace(row=s.row + b) for part, b in zip(parts, before, strict=False) for s in part.spans),
        **{name: sum(getattr(part, name) for part in parts) for name in _SUMMED},
        **_call_figures([call for part in parts for call in part.call_times]),
    )
