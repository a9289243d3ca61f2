"""Rows meeting the host: what is reported, how often, and what a delivery changes."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_router import LIMITS

from router_r1_jax.rollout.state import (
    EMPTY,
    FEED,
    RUN,
    WAIT,
    collect,
    deliver,
    empty_rows,
    inbox_spec,
    wants_exchange,
    wants_feed,
)

B, E = LIMITS.slots, LIMITS.exchange_rows


take = jax.jit(lambda rows: collect(rows, LIMITS))


def make_rows(status, reported=None, **fields):
    rows = empty_rows(LIMITS).replace(status=jnp.array(status, jnp.int32), more=jnp.array(False), **fields)
    return rows if reported is None else rows.replace(reported=jnp.array(reported))


statuses = st.lists(st.sampled_from([EMPTY, RUN, WAIT, FEED]), min_size=B, max_size=B)


@settings(max_examples=30, deadline=None)
@given(statuses, st.lists(st.booleans(), min_size=B, max_size=B))
def test_each_ended_turn_is_reported_once(status, reported):
    rows = make_rows(status, reported, turn_length=jnp.arange(B), reason=10 * jnp.arange(B))
    unseen = [row for row in range(B) if status[row] == WAIT and not reported[row]]
    seen = []
    for _ in range(B):
        rows, out = take(rows)
        told = [int(row) for row in out.row if row < B]
        assert [int(n) for n in out.length[: len(told)]] == told
        assert [int(r) for r in out.reason[: len(told)]] == [10 * row for row in told]
        seen += told
        # The host may block where `idle`: not while a row could go on, nor while a turn it must know is still unsaid.
        assert bool(out.idle) == (not {RUN, FEED} & set(status) and seen == unseen)
    assert seen == unseen


def test_when_the_host_is_met():
    def wants(status, reported=None, since=0, more=False):
        rows = make_rows(status, reported, since_exchange=jnp.int32(since)).replace(more=jnp.array(more))
        return bool(wants_exchange(rows, LIMITS))

    poll, all_run = LIMITS.poll_every, [RUN] * B
    assert not wants(all_run)
    assert wants(all_run, more=True)
    assert wants([WAIT, RUN, RUN, RUN], [False, True, True, True])  # news
    assert not wants([WAIT, RUN, RUN, RUN], since=poll - 1)
    assert wants([WAIT, RUN, RUN, RUN], since=poll)  # a reply may have come
    assert not wants(all_run, since=poll)
    assert wants(all_run, since=8 * poll)  # a stop may be asked for
    assert wants([WAIT, EMPTY, EMPTY, WAIT]) and wants([EMPTY] * B)  # nothing else to do
    assert not wants([FEED, WAIT, EMPTY, EMPTY])


@settings(max_examples=30, deadline=None)
@given(st.data(), st.permutations(range(B)))
def test_a_delivery_changes_its_rows_and_no_others(data, rows_in_order):
    n = data.draw(st.integers(0, E))
    before = make_rows([WAIT] * B, [False] * B, position=jnp.arange(5, 5 + B), episode=jnp.arange(B, dtype=jnp.uint32))
    inbox = inbox_spec(LIMITS)
    inbox = type(inbox)(*[np.zeros(x.shape, x.dtype) for x in inbox])
    inbox.row[:] = B
    for i, row in enumerate(rows_in_order[:n]):
        inbox.row[i], inbox.fresh[i] = row, data.draw(st.booleans())
        inbox.length[i], inbox.episode[i] = data.draw(st.integers(0, 3)), 70 + i
        inbox.feed[i] = i + 1
    after = jax.device_get(deliver(before, inbox))
    for row in range(B):
        if row not in rows_in_order[:n]:
            assert (after.status[row], after.position[row], after.episode[row]) == (WAIT, 5 + row, row)
            assert not after.reported[row]
            continue
        i = rows_in_order.index(row)
        assert after.status[row] == (FEED if inbox.length[i] else EMPTY)
        assert after.position[row] == (0 if inbox.fresh[i] else 5 + row)
        assert after.episode[row] == (70 + i if inbox.fresh[i] else row)
        assert (after.feed_length[row], after.feed_done[row], after.reported[row]) == (inbox.length[i], 0, True)
        assert np.all(after.feed[row] == i + 1)


def test_when_rows_are_fed():
    def wants(status, held=0, **limits):
        return bool(wants_feed(make_rows(status, held=jnp.int32(held)), LIMITS._replace(feed_rows=3, **limits)))

    few, crowd = [FEED, RUN, RUN, EMPTY], [FEED, FEED, WAIT, *[RUN] * 6]
    assert wants(few)  # a third of three busy rows
    assert not wants([RUN, WAIT, RUN, EMPTY]) and not wants([EMPTY] * 4, held=9)  # nothing to read
    assert not wants(crowd, feed_wait=5) and not wants(crowd, held=4, feed_wait=5)  # a third row is waited for
    assert wants(crowd, held=5, feed_wait=5) and wants(crowd, feed_wait=0)  # not for ever
    assert wants([FEED, *crowd])  # as many as one feed takes
    assert wants([FEED, *[WAIT] * 8])  # nothing else goes on
