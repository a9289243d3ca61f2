"""A decode batch smaller than the rows: who is in it, that caches follow their rows, that episodes do not change."""

import collections
import threading
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_router
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import Placing, check_against_naive, check_schedule, latencies, orders
from tiny_router import MODEL, SHAPES, Latecomers, Reply, at_once, make_engine, make_prompts, sample

from router_r1_jax.rollout import engine as engine_module
from router_r1_jax.rollout.decode_batch import Caches, empty_caches, should_swap, swap
from router_r1_jax.rollout.row_state import DECODE, EMPTY, ENDED, PREFILL, WAIT, empty_rows, should_prefill

FEW = SHAPES._replace(slots=9, decode_batch=3)  # spare caches: 2
A, B, SPARE = FEW.decode_batch, FEW.slots, FEW.num_caches - FEW.slots
PROMPTS = make_prompts(24)
DRIVERS = ("host", "jit")


# One swap, against what plain Python makes of it.

swapped = jax.jit(lambda caches, rows: swap(FEW, caches, rows))


@st.composite
def placed_rows(draw):
    """Rows anywhere, those that decode in the batch; a row's cache holds its number + 1, a spare one -1."""
    rows = draw(st.permutations(range(B)))
    row_of_cache = np.array([*rows[:A], *draw(st.permutations([*rows[A:], *[B] * SPARE]))])
    cache_of_row = np.argsort(row_of_cache)[:B]
    outside = st.sampled_from([EMPTY, ENDED, WAIT, PREFILL])
    numbers = st.lists(st.integers(0, 5), min_size=B, max_size=B)
    status = [draw(outside | st.just(DECODE) if cache_of_row[row] < A else outside) for row in range(B)]
    fields = {"status": status, "arrived": draw(numbers), "position": draw(numbers)}
    fields |= {"cache_of_row": cache_of_row, "row_of_cache": row_of_cache}
    rows = empty_rows(FEW).replace(**{name: jnp.array(value, jnp.int32) for name, value in fields.items()})
    marks = np.where(row_of_cache == B, -1, row_of_cache + 1)[:, None, None, None]
    marks = {"batch": marks[:A], "swapped_out": marks[A:]}
    caches = empty_caches(MODEL, FEW, 8)._asdict()
    filled = {
        name: jax.tree.map(lambda x, n=name: jnp.broadcast_to(marks[n].astype(x.dtype), x.shape), part)
        for name, part in caches.items()
    }
    return rows, Caches(**filled)


def priorities_of(rows):
    """By row, by plain means: lower values come first; rows that neither decode nor have tokens to read come last."""
    named = {DECODE: lambda arrived: -1, PREFILL: lambda arrived: arrived}
    return [
        named.get(status, lambda arrived: np.inf)(arrived)
        for status, arrived in zip(rows.status.tolist(), rows.arrived.tolist(), strict=True)
    ]


@settings(max_examples=150, deadline=None)
@given(placed_rows())
def test_the_batch_goes_to_the_oldest_requests_and_caches_follow(made):
    rows, caches = made
    priorities, before = priorities_of(rows), set(rows.row_of_cache[:A].tolist())
    inside, outside, moves = sorted(before), sorted(set(range(B)) - before), 0
    for _ in range(SPARE):  # one by one: the first of the rows outside for the last one inside
        last, first = max(inside, key=priorities.__getitem__), min(outside, key=priorities.__getitem__)
        if priorities[first] < priorities[last]:
            inside[inside.index(last)], outside[outside.index(first)], moves = first, last, moves + 1
    assert bool(should_swap(rows, FEW)) == (moves > 0)
    caches, after = jax.device_get(swapped(caches, rows))
    now = set(after.row_of_cache[:A].tolist())
    assert sorted(priorities[row] for row in now) == sorted(priorities[row] for row in inside)
    assert len(now - before) == moves
    assert all(row in now for row in before if rows.status[row] == DECODE)
    assert sorted(after.row_of_cache.tolist()) == sorted([*range(B), *[B] * SPARE])
    assert after.row_of_cache[after.cache_of_row].tolist() == list(range(B))
    for row, cache in enumerate(after.cache_of_row):
        if rows.status[row] != EMPTY and rows.position[row] > 0:  # what was read so far came along
            part, at = (caches.batch, cache) if cache < A else (caches.swapped_out, cache - A)
            assert all(np.all(x[at] == row + 1) for x in jax.tree.leaves(part)), row


def test_rows_outside_the_batch_are_not_prefilled_and_make_none_wait_shorter():
    rows = empty_rows(FEW)
    outside = rows.replace(
        status=jnp.array([DECODE, DECODE, WAIT, *[PREFILL] * 6], jnp.int32), prefill_held=jnp.int32(99)
    )
    assert not should_prefill(outside, FEW) and should_swap(outside, FEW)
    assert not should_swap(outside.replace(status=jnp.array([DECODE, DECODE, DECODE, *[PREFILL] * 6])), FEW)
    assert should_prefill(outside.replace(status=jnp.array([PREFILL, DECODE, WAIT, *[WAIT] * 6])), FEW)


# Whole rollouts


@pytest.fixture(scope="module")
def engines():
    return {driver: make_engine(driver, slots=B, decode_batch=A) for driver in DRIVERS}


@pytest.fixture(scope="module")
def run(engines):
    def run(driver, prompts=PROMPTS, respond=None, *, places=tuple(range(B))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_module, "HostCallback", Placing)
            Placing.order = tuple(places)
            return sample(engines[driver], prompts, respond or at_once())

    return run


@pytest.fixture(scope="module")
def expected(run):
    return {episode.id: episode for episode in run("host")[0]}


@pytest.mark.parametrize("driver", DRIVERS)
def test_episodes_are_those_of_the_naive_rollout_and_of_a_full_batch(run, driver):
    episodes, stats = run(driver)
    check_against_naive(tiny_router.make_params(), episodes, stats)
    whole, _ = sample(make_engine("jit", slots=B), PROMPTS, at_once())
    for few, all_rows in zip(episodes, whole, strict=True):
        assert (few.tokens, few.stop) == (all_rows.tokens, all_rows.stop)
        np.testing.assert_allclose(few.logps, all_rows.logps, atol=1e-5, rtol=0)
    assert 0 < stats.decode_batch_wait_share < (B - A) / B


@settings(max_examples=30, deadline=None)
@given(orders, latencies, st.permutations(range(B)))
def test_no_schedule_changes_a_jitted_episode(run, expected, order, delays, places):
    check_schedule(lambda *args: run(*args, places=places), expected, "jit", order, delays)


@settings(max_examples=4, deadline=None)
@given(orders, latencies, st.permutations(range(B)))
def test_no_schedule_changes_a_host_driven_episode(run, expected, order, delays, places):
    check_schedule(lambda *args: run(*args, places=places), expected, "host", order, delays)


@pytest.mark.parametrize("driver", DRIVERS)
def test_every_row_may_wait_for_a_reply_at_a_time(run, expected, driver):
    """Three times as many calls in flight as rows in the decode batch; nobody is answered before all have asked."""
    asking = [p for p in PROMPTS if expected[p.episode].replies][:B]
    waiting, lock, seen = [], threading.Lock(), collections.Counter()

    def respond(route, *, episode, call):
        with lock:
            seen[call] += 1
            waiting.append((future := Future(), Reply(tiny_router.reply_text(route, episode, call))))
            if call or len(waiting) == B:
                for other, reply in waiting:
                    other.set_result(reply)
                waiting.clear()
        return future

    assert len(asking) == B
    episodes, stats = run(driver, asking, respond)
    assert stats.calls_in_flight == seen[0] == B
    for episode in episodes:
        # The shared prefix is longer or shorter with other prompts: sums over keys are formed in another order.
        assert (episode.tokens, episode.stop) == (expected[episode.id].tokens, expected[episode.id].stop)


def test_rows_that_wait_long_keep_no_place_in_the_batch(run, expected):
    """Most of the rows wait for 0.15 s at a time: the others go on in the batch, and nothing is computed meanwhile."""
    pool = Latecomers((0.15, 0.15, 0.15, 0.0))
    episodes, stats = run("jit", respond=pool)
    assert {episode.id: episode for episode in episodes} == expected
    assert stats.calls_in_flight > 2 * A and 0 < stats.idle_share < 1
    assert stats.decoded_tokens == sum(sum(e.sampled) for e in episodes)


def test_the_batch_is_given_in_the_order_of_requests(monkeypatch):
    """Replies come at once, so each row has tokens to read as soon as its turn ends, and would never leave the batch.

    In no step does a row begin a turn while an older request is outside.
    """
    engine = make_engine("host", slots=B, decode_batch=A, prefill_rows=A)  # a spare cache for each row of the batch
    (replica,) = engine._replicas
    step, begun = replica._step, collections.Counter()

    def watched(*args):
        before = np.array(args[-1].status)
        caches, rows = step(*args)
        status, arrived, cache = map(np.array, (rows.status, rows.arrived, rows.cache_of_row))
        started, left = (before == PREFILL) & (status != PREFILL), (status == PREFILL) & (cache >= A)
        if started.any() and left.any():
            assert arrived[started].max() <= arrived[left].min()
        begun.update(np.flatnonzero(started).tolist())
        return caches, rows

    monkeypatch.setattr(replica, "_step", watched)
    episodes, stats = sample(engine, make_prompts(60), at_once())
    assert len(episodes) == 60 and stats.decode_batch_wait_share > 0.3
    assert min(begun[row] for row in range(B)) > 0.5 * sum(begun.values()) / B  # no slot is worked off late
