"""Fewer lanes than rows: who gets a lane, that caches follow their rows, and that episodes are what they always are."""

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
from tiny_router import LIMITS, MODEL, SEED, Latecomers, Reply, at_once, make_engine, make_prompts

from router_r1_jax.rollout import engine as engine_module
from router_r1_jax.rollout.lanes import Caches, empty_caches, swap, wants_swap
from router_r1_jax.rollout.state import EMPTY, FEED, RUN, WAIT, empty_rows, wants_feed

FEW = LIMITS._replace(slots=9, lanes=3)  # spare places: 2
A, B, SPARE = FEW.lanes, FEW.slots, FEW.places - FEW.slots
PROMPTS = make_prompts(24)
DRIVERS = ("host", "jit")


# One swap, against what plain Python makes of it.

swapped = jax.jit(lambda caches, rows: swap(FEW, caches, rows))


@st.composite
def placed_rows(draw):
    """Rows anywhere, those that run in lanes; a row's cache holds its number + 1, a spare place -1."""
    rows = draw(st.permutations(range(B)))
    row_at = np.array([*rows[:A], *draw(st.permutations([*rows[A:], *[B] * SPARE]))])
    place = np.argsort(row_at)[:B]
    parked, numbers = st.sampled_from([EMPTY, WAIT, FEED]), st.lists(st.integers(0, 5), min_size=B, max_size=B)
    status = [draw(parked | st.just(RUN) if place[row] < A else parked) for row in range(B)]
    fields = {"status": status, "handed": draw(numbers), "position": draw(numbers), "place": place, "row_at": row_at}
    rows = empty_rows(FEW).replace(**{name: jnp.array(value, jnp.int32) for name, value in fields.items()})
    marks = np.where(row_at == B, -1, row_at + 1)[:, None, None, None]
    places = {"lanes": marks[:A], "parked": marks[A:]}
    caches = empty_caches(MODEL, FEW, 8)._asdict()
    filled = {
        name: jax.tree.map(lambda x, n=name: jnp.broadcast_to(places[n].astype(x.dtype), x.shape), part)
        for name, part in caches.items()
    }
    return rows, Caches(**filled)


def claims_of(rows):
    """By row, by plain means: the lower the better; what neither runs nor has tokens to read claims nothing."""
    named = {RUN: lambda handed: -1, FEED: lambda handed: handed}
    return [
        named.get(status, lambda handed: np.inf)(handed)
        for status, handed in zip(rows.status.tolist(), rows.handed.tolist(), strict=True)
    ]


@settings(max_examples=150, deadline=None)
@given(placed_rows())
def test_lanes_go_to_the_oldest_requests_and_caches_follow(made):
    rows, caches = made
    claims, before = claims_of(rows), set(rows.row_at[:A].tolist())
    lanes, parked, moves = sorted(before), sorted(set(range(B)) - before), 0
    for _ in range(SPARE):  # one by one: the best of the parked rows for the worst in a lane
        worst, best = max(lanes, key=claims.__getitem__), min(parked, key=claims.__getitem__)
        if claims[best] < claims[worst]:
            lanes[lanes.index(worst)], parked[parked.index(best)], moves = best, worst, moves + 1
    assert bool(wants_swap(rows, FEW)) == (moves > 0)
    caches, after = jax.device_get(swapped(caches, rows))
    now = set(after.row_at[:A].tolist())
    assert sorted(claims[row] for row in now) == sorted(claims[row] for row in lanes) and len(now - before) == moves
    assert all(row in now for row in before if rows.status[row] == RUN)
    assert sorted(after.row_at.tolist()) == sorted([*range(B), *[B] * SPARE])
    assert after.row_at[after.place].tolist() == list(range(B))
    for row, place in enumerate(after.place):
        if rows.status[row] != EMPTY and rows.position[row] > 0:  # what was read so far came along
            part, at = (caches.lanes, place) if place < A else (caches.parked, place - A)
            assert all(np.all(x[at] == row + 1) for x in jax.tree.leaves(part)), row


def test_rows_without_a_lane_are_not_fed_and_gather_no_company():
    rows = empty_rows(FEW)
    parked = rows.replace(status=jnp.array([RUN, RUN, WAIT, *[FEED] * 6], jnp.int32), held=jnp.int32(99))
    assert not wants_feed(parked, FEW) and wants_swap(parked, FEW)
    assert not wants_swap(parked.replace(status=jnp.array([RUN, RUN, RUN, *[FEED] * 6])), FEW)
    assert wants_feed(parked.replace(status=jnp.array([FEED, RUN, WAIT, *[WAIT] * 6])), FEW)


# Whole rollouts


@pytest.fixture(scope="module")
def engines():
    return {driver: make_engine(driver, slots=B, lanes=A) for driver in DRIVERS}


@pytest.fixture(scope="module")
def run(engines):
    def run(driver, prompts=PROMPTS, respond=None, *, places=tuple(range(B))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_module, "Exchange", Placing)
            Placing.order = tuple(places)
            return engines[driver].run(prompts, respond or at_once(), temperature=1.0, seed=SEED)

    return run


@pytest.fixture(scope="module")
def expected(run):
    return {episode.id: episode for episode in run("host")[0]}


@pytest.mark.parametrize("driver", DRIVERS)
def test_episodes_are_those_of_the_naive_rollout_and_of_all_rows_in_lanes(run, driver):
    episodes, stats = run(driver)
    check_against_naive(tiny_router.make_params(), episodes, stats)
    whole, _ = make_engine("jit", slots=B).run(PROMPTS, at_once(), temperature=1.0, seed=SEED)
    for few, all_rows in zip(episodes, whole, strict=True):
        assert (few.tokens, few.stop) == (all_rows.tokens, all_rows.stop)
        np.testing.assert_allclose(few.logps, all_rows.logps, atol=1e-5, rtol=0)
    assert 0 < stats.lane_wait_share < (B - A) / B


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
    """Three times as many calls in flight as there are lanes; nobody is answered before all have asked."""
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


def test_parked_rows_that_wait_long_keep_no_lane(run, expected):
    """Most of the rows wait for 0.15 s at a time: the others go on in the lanes, and nothing is computed meanwhile."""
    pool = Latecomers((0.15, 0.15, 0.15, 0.0))
    episodes, stats = run("jit", respond=pool)
    assert {episode.id: episode for episode in episodes} == expected
    assert stats.calls_in_flight > 2 * A and 0 < stats.idle_share < 1
    assert stats.decoded_tokens == sum(sum(e.sampled) for e in episodes)


def test_lanes_are_given_in_the_order_of_requests(monkeypatch):
    """Replies come at once, so each row has tokens to read as soon as its turn ends, and would never give its lane up.

    In no step does a row begin a turn while an older request has no lane.
    """
    engine = make_engine("host", slots=B, lanes=A, feed_rows=A)  # a spare place for each lane
    (replica,) = engine._replicas
    work, begun = replica._work, collections.Counter()

    def watched(*args):
        before = np.array(args[-1].status)
        caches, rows = work(*args)
        status, handed, place = map(np.array, (rows.status, rows.handed, rows.place))
        started, left = (before == FEED) & (status != FEED), (status == FEED) & (place >= A)
        if started.any() and left.any():
            assert handed[started].max() <= handed[left].min()
        begun.update(np.flatnonzero(started).tolist())
        return caches, rows

    monkeypatch.setattr(replica, "_work", watched)
    episodes, stats = engine.run(make_prompts(60), at_once(), temperature=1.0, seed=SEED)
    assert len(episodes) == 60 and stats.lane_wait_share > 0.3
    assert min(begun[row] for row in range(B)) > 0.5 * sum(begun.values()) / B  # no slot is worked off late
