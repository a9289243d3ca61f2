"""Telemetry: times interpolated from steps, costs fitted to intervals, and the stats of a real run."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_router import LIMITS, REPLY_TOKENS, SEED, Latecomers, make_engine, make_prompts

from router_r1_jax.rollout import trace as module
from router_r1_jax.rollout.trace import Span, Trace, joined, most_at_once


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def counts(decode, feed, steps):
    return np.array([decode, 0, feed, 0, steps, 0], np.int32)


def test_spans_of_a_row(clock):
    """Fed at 1, first token at step 10 of a stretch from step 0 (at 1) to step 40 (at 5), ended at 5, reply at 7."""
    trace = Trace(4)
    clock.now = 1.0
    trace.fed(2)
    trace.met(0.9, counts(0, 0, 0), 100)
    clock.now = 5.0
    trace.turn_ended(2, 10)
    trace.waits(2)
    trace.met(5.0, counts(30, 10, 40), 50)
    clock.now = 7.0
    trace.fed(2)
    clock.now = 9.0
    trace.met(9.0, counts(60, 10, 70), 50)
    trace.turn_ended(2, 55)
    spans = sorted(trace.spans(), key=lambda s: s.start)
    first = 0.9 + 10 / 40 * (5.0 - 0.9)
    second = 5.0 + 15 / 30 * 4.0
    assert [(s.row, s.kind) for s in spans] == [(2, "feed"), (2, "decode"), (2, "wait"), (2, "feed"), (2, "decode")]
    np.testing.assert_allclose(
        [s[2:] for s in spans], [(1, first), (first, 5), (5, 7), (7, second), (second, 9)], atol=1e-9
    )
    assert (trace.exchanges, trace.callback_bytes, trace.counts[4]) == (3, 200, 70)


def test_a_row_that_stops_waiting_without_a_reply(clock):
    trace = Trace(1)
    trace.met(0.0, counts(0, 0, 0), 0)
    trace.fed(0)
    clock.now = 1.0
    trace.turn_ended(0, 0)
    trace.waits(0)
    clock.now = 4.0
    trace.freed(0)
    trace.freed(0)
    assert Span(0, "wait", 1.0, 4.0) in trace.spans()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), min_size=3, max_size=40))
def test_costs_of_steps_are_found_again(steps):
    decode, feed = 0.01, 0.07
    seconds = [decode * a + feed * b for a, b in steps]
    found = module._costs(np.array(steps, float), np.array(seconds))
    if np.linalg.matrix_rank(np.array(steps)) == 2:
        usual = np.array([a * decode + b * feed for a, b in steps])
        pace = usual / np.maximum(np.sum(steps, axis=1), 1)
        if np.linalg.matrix_rank(np.array(steps)[pace <= 10 * np.median(pace)]) == 2:
            np.testing.assert_allclose(found, [decode, feed], rtol=1e-6)
    assert np.all(found >= 0)


def test_an_interval_with_a_compilation_in_it_does_not_count():
    steps = np.array([[8, 1], [8, 0], [3, 2], [8, 1]], float)
    seconds = steps @ [0.01, 0.05]
    seconds[1] += 30.0
    np.testing.assert_allclose(module._costs(steps, seconds), [0.01, 0.05], rtol=1e-6)
    assert module._costs(np.zeros((0, 2)), np.zeros(0)).tolist() == [0, 0]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=20))
def test_most_at_once_is_brute_force(pairs):
    intervals = [(start, start + length) for start, length in pairs]
    expected = max((sum(a <= t < b for a, b in intervals) for t in range(71)), default=0)
    assert most_at_once(intervals) == expected


def count_runs(episode, *, sampled):
    """Runs of tokens that were sampled, or of those that were not."""
    return sum(key == sampled for key, _ in itertools.groupby(episode.sampled))


def test_stats_of_a_run():
    """What was counted agrees with the episodes; no row does two things at once."""
    engine, pool = make_engine("jit"), Latecomers((0.0, 0.02, 0.005))
    episodes, stats = engine.run(make_prompts(24), pool, temperature=1.0, seed=SEED)
    assert stats.decoded_tokens == sum(sum(e.sampled) for e in episodes)
    # All but the last token of a question is fed, and with a reply the last token of the turn before it.
    assert stats.fed_tokens == sum(len(e.prompt) - 9 - 1 + len(e.tokens) - sum(e.sampled) for e in episodes)
    assert stats.calls == len(pool.calls) and sum(stats.stops.values()) == 24
    assert 0 < stats.latency_p50 <= stats.latency_p95 and 1 <= stats.calls_in_flight <= LIMITS.slots
    assert stats.lane_wait_share == 0
    assert 0 < stats.slots_used <= 1 and 0 <= stats.idle_share < 1 and stats.callback_bytes > 0
    assert 0 < stats.decode_seconds + stats.feed_seconds + stats.prefill_seconds < stats.seconds
    kinds = {kind: sum(s.kind == kind for s in stats.spans) for kind in ("feed", "decode", "wait")}
    turns = sum(max(1, count_runs(e, sampled=True)) for e in episodes)
    assert kinds == {"wait": stats.calls, "feed": turns, "decode": turns}
    for row in range(LIMITS.slots):
        spans = sorted((s for s in stats.spans if s.row == row), key=lambda s: (s.start, s.end))
        assert spans and spans[0].start >= 0 and spans[-1].end <= stats.seconds
        assert all(a.end <= b.start + 1e-9 for a, b in zip(spans, spans[1:], strict=False))
    entered = [reply for e in episodes for reply in e.replies[: count_runs(e, sampled=False)]]
    assert stats.cut_replies == sum(len(reply.text.split()) > REPLY_TOKENS for reply in entered) > 0
    assert stats.metrics().keys() == {f.name for f in dataclasses.fields(stats)} - {"stops", "spans", "call_times"}
    check_joined(stats)


def check_joined(part):
    """Two processes that did the same at the same time."""
    both = joined([part, part])
    assert joined([part]) is part
    for name in ("rows", "decoded_tokens", "fed_tokens", "calls", "cut_replies", "exchanges", "idle_seconds"):
        assert getattr(both, name) == 2 * getattr(part, name), name
    for name in ("seconds", "prefix_tokens", "idle_share", "slots_used", "lane_wait_share", "latency_p50"):
        assert getattr(both, name) == pytest.approx(getattr(part, name)), name
    assert both.calls_in_flight == 2 * part.calls_in_flight
    assert both.stops == {reason: 2 * count for reason, count in part.stops.items()}
    assert len(both.spans) == 2 * len(part.spans) and {s.row for s in both.spans} == set(range(both.rows))
