"""Telemetry: times interpolated from steps, costs fitted to intervals, and the stats of a real run."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_router import REPLY_TOKENS, SHAPES, Latecomers, make_engine, make_prompts, sample

from router_r1_jax.rollout import telemetry as module
from router_r1_jax.rollout.episode import Episode
from router_r1_jax.rollout.telemetry import Span, Timeline, concat_stats


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


def counts(decode, prefill, steps):
    return np.array([decode, 0, prefill, 0, steps, 0], np.int32)


def test_spans_of_a_row(clock):
    """Prefill from 1, first token at step 10 of those from step 0 (at 1) to step 40 (at 5), ended at 5, reply at 7."""
    timeline = Timeline(4)
    clock.now = 1.0
    timeline.prefill_begins(2)
    timeline.callback_ends(0.9, counts(0, 0, 0), 100)
    clock.now = 5.0
    timeline.turn_ends(2, 10)
    timeline.wait_begins(2)
    timeline.callback_ends(5.0, counts(30, 10, 40), 50)
    clock.now = 7.0
    timeline.prefill_begins(2)
    clock.now = 9.0
    timeline.callback_ends(9.0, counts(60, 10, 70), 50)
    timeline.turn_ends(2, 55)
    spans = sorted(timeline.spans(), key=lambda s: s.start)
    first = 0.9 + 10 / 40 * (5.0 - 0.9)
    second = 5.0 + 15 / 30 * 4.0
    assert {s.row for s in spans} == {2}
    assert [s.kind for s in spans] == ["prefill", "decode", "wait", "prefill", "decode"]
    np.testing.assert_allclose(
        [s[2:] for s in spans], [(1, first), (first, 5), (5, 7), (7, second), (second, 9)], atol=1e-9
    )
    stats = timeline.stats(began=0.9, prefix_tokens=0)
    assert (stats.callbacks, stats.callback_bytes, stats.decode_steps, stats.prefill_steps) == (3, 200, 60, 10)


def test_a_row_that_stops_waiting_without_a_reply(clock):
    timeline = Timeline(1)
    timeline.callback_ends(0.0, counts(0, 0, 0), 0)
    timeline.prefill_begins(0)
    clock.now = 1.0
    timeline.turn_ends(0, 0)
    timeline.wait_begins(0)
    clock.now = 4.0
    timeline.episode_ends(0, Episode(7, (1,), stop="no_reply"))
    assert Span(0, "wait", 1.0, 4.0) in timeline.spans()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), min_size=3, max_size=40))
def test_costs_of_steps_are_found_again(steps):
    decode, prefill = 0.01, 0.07
    seconds = [decode * a + prefill * b for a, b in steps]
    found = module._costs(np.array(steps, float), np.array(seconds))
    if np.linalg.matrix_rank(np.array(steps)) == 2:
        usual = np.array([a * decode + b * prefill for a, b in steps])
        pace = usual / np.maximum(np.sum(steps, axis=1), 1)
        if np.linalg.matrix_rank(np.array(steps)[pace <= 10 * np.median(pace)]) == 2:
            np.testing.assert_allclose(found, [decode, prefill], rtol=1e-6)
    assert np.all(found >= 0)


def test_an_interval_with_a_compilation_in_it_does_not_count():
    steps = np.array([[8, 1], [8, 0], [3, 2], [8, 1]], float)
    seconds = steps @ [0.01, 0.05]
    seconds[1] += 30.0
    np.testing.assert_allclose(module._costs(steps, seconds), [0.01, 0.05], rtol=1e-6)
    assert module._costs(np.zeros((0, 2)), np.zeros(0)).tolist() == [0, 0]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=20))
def test_calls_in_flight_are_those_of_brute_force(pairs):
    intervals = [(start, start + length) for start, length in pairs]
    expected = max((sum(a <= t < b for a, b in intervals) for t in range(71)), default=0)
    timeline = Timeline(1)
    timeline.call_times = intervals
    assert timeline.stats(began=0.0, prefix_tokens=0).calls_in_flight == expected


def count_runs(episode, *, sampled):
    """Runs of tokens that were sampled, or of those that were not."""
    return sum(key == sampled for key, _ in itertools.groupby(episode.sampled))


def test_stats_of_a_run():
    """What was counted agrees with the episodes; no row does two things at once."""
    engine, pool = make_engine("jit"), Latecomers((0.0, 0.02, 0.005))
    episodes, stats = sample(engine, make_prompts(24), pool)
    assert stats.decoded_tokens == sum(sum(e.sampled) for e in episodes)
    # All but the last token of a question is prefilled, and with a reply the last token of the turn before it.
    assert stats.prefilled_tokens == sum(len(e.prompt) - 9 - 1 + len(e.tokens) - sum(e.sampled) for e in episodes)
    assert stats.calls == len(pool.calls)
    assert 0 < stats.latency(50) <= stats.latency(95) and 1 <= stats.calls_in_flight <= SHAPES.slots
    assert stats.decode_batch_wait_share == 0
    assert 0 < stats.slots_used <= 1 and 0 <= stats.idle_share < 1 and stats.callback_bytes > 0
    assert 0 < stats.decode_seconds + stats.prefill_seconds + stats.prefix_seconds < stats.seconds
    kinds = {kind: sum(s.kind == kind for s in stats.spans) for kind in ("prefill", "decode", "wait")}
    turns = sum(max(1, count_runs(e, sampled=True)) for e in episodes)
    assert kinds == {"wait": stats.calls, "prefill": turns, "decode": turns}
    for row in range(SHAPES.slots):
        spans = sorted((s for s in stats.spans if s.row == row), key=lambda s: (s.start, s.end))
        assert spans and spans[0].start >= 0 and spans[-1].end <= stats.seconds
        assert all(a.end <= b.start + 1e-9 for a, b in zip(spans, spans[1:], strict=False))
    entered = [reply for e in episodes for reply in e.replies[: count_runs(e, sampled=False)]]
    assert stats.truncated_replies == sum(len(reply.text.split()) > REPLY_TOKENS for reply in entered) > 0
    names = {f.name for f in dataclasses.fields(stats)} | {"calls_in_flight", "latency_p50", "latency_p95"}
    assert stats.metrics().keys() == names - {"spans", "call_times"}
    check_concat(stats)


def check_concat(part):
    """Two processes that did the same at the same time."""
    both = concat_stats([part, part])
    for name in (
        "rows",
        "decoded_tokens",
        "prefilled_tokens",
        "calls",
        "truncated_replies",
        "callbacks",
        "idle_seconds",
    ):
        assert getattr(both, name) == 2 * getattr(part, name), name
    for name in ("seconds", "prefix_tokens", "idle_share", "slots_used", "decode_batch_wait_share"):
        assert getattr(both, name) == pytest.approx(getattr(part, name)), name
    assert both.calls_in_flight == 2 * part.calls_in_flight and both.latency(50) == pytest.approx(part.latency(50))
    assert len(both.spans) == 2 * len(part.spans) and {s.row for s in both.spans} == set(range(both.rows))
