"""Row state and the host: what is reported, how often, and what a delivery changes."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_router import SHAPES

from router_r1_jax.rollout.row_state import (
    DECODE,
    EMPTY,
    ENDED,
    PREFILL,
    WAIT,
    collect,
    deliver,
    empty_delivery,
    empty_rows,
    should_call_host,
    should_prefill,
)

B, E = SHAPES.slots, SHAPES.callback_rows


take = jax.jit(lambda rows: collect(rows, SHAPES))


def make_rows(status, **fields):
    return empty_rows(SHAPES).replace(status=jnp.array(status, jnp.int32), more=jnp.array(False), **fields)


statuses = st.lists(st.sampled_from([EMPTY, DECODE, ENDED, WAIT, PREFILL]), min_size=B, max_size=B)


@settings(max_examples=30, deadline=None)
@given(statuses)
def test_each_ended_turn_is_reported_once(status):
    rows = make_rows(status, turn_length=jnp.arange(B), reason=10 * jnp.arange(B))
    unseen = [row for row in range(B) if status[row] == ENDED]
    seen = []
    for _ in range(B):
        rows, out = take(rows)
        told = [int(row) for row in out.row if row < B]
        assert [int(n) for n in out.turn_length[: len(told)]] == told
        assert [int(r) for r in out.reason[: len(told)]] == [10 * row for row in told]
        seen += told
        # The host may block where `idle`: not while a row could go on, nor while a turn it must know is still unsaid.
        assert bool(out.idle) == (not {DECODE, PREFILL} & set(status) and seen == unseen)
    assert seen == unseen
    assert rows.status.tolist() == [WAIT if s == ENDED else s for s in status]


def test_when_the_host_is_met():
    def wants(status, since=0, more=False):
        rows = make_rows(status, since_callback=jnp.int32(since)).replace(more=jnp.array(more))
        return bool(should_call_host(rows, SHAPES))

    poll, all_run = SHAPES.poll_every, [DECODE] * B
    assert not wants(all_run)
    assert wants(all_run, more=True)
    assert wants([ENDED, DECODE, DECODE, DECODE])  # news
    assert not wants([WAIT, DECODE, DECODE, DECODE], since=poll - 1)
    assert wants([WAIT, DECODE, DECODE, DECODE], since=poll)  # a reply may have come
    assert not wants(all_run, since=poll)
    assert wants(all_run, since=8 * poll)  # a stop may be asked for
    assert wants([WAIT, EMPTY, EMPTY, WAIT]) and wants([EMPTY] * B)  # nothing else to do
    assert not wants([PREFILL, WAIT, EMPTY, EMPTY])


@settings(max_examples=30, deadline=None)
@given(st.data(), st.permutations(range(B)))
def test_a_delivery_changes_its_rows_and_no_others(data, rows_in_order):
    n = data.draw(st.integers(0, E))
    before = make_rows([WAIT] * B, position=jnp.arange(5, 5 + B), episode=jnp.arange(B, dtype=jnp.uint32))
    result = empty_delivery(SHAPES)
    for i, row in enumerate(rows_in_order[:n]):
        result.row[i], result.fresh[i] = row, data.draw(st.booleans())
        result.length[i], result.episode[i] = data.draw(st.integers(0, 3)), 70 + i
        result.tokens[i] = i + 1
    after = jax.device_get(deliver(before, result))
    for row in range(B):
        if row not in rows_in_order[:n]:
            assert (after.status[row], after.position[row], after.episode[row]) == (WAIT, 5 + row, row)
            continue
        i = rows_in_order.index(row)
        assert after.status[row] == (PREFILL if result.length[i] else EMPTY)
        assert after.position[row] == (0 if result.fresh[i] else 5 + row)
        assert after.episode[row] == (70 + i if result.fresh[i] else row)
        assert (after.prefill_length[row], after.prefill_done[row]) == (result.length[i], 0)
        assert np.all(after.prefill[row] == i + 1)


def test_when_rows_are_prefilled():
    def wants(status, held=0, **limits):
        return bool(
            should_prefill(make_rows(status, prefill_held=jnp.int32(held)), SHAPES._replace(prefill_rows=3, **limits))
        )

    few, crowd = [PREFILL, DECODE, DECODE, EMPTY], [PREFILL, PREFILL, WAIT, *[DECODE] * 6]
    assert wants(few)  # a third of three busy rows
    assert not wants([DECODE, WAIT, DECODE, EMPTY]) and not wants([EMPTY] * 4, held=9)  # nothing to read
    assert not wants(crowd, prefill_wait=5) and not wants(crowd, held=4, prefill_wait=5)  # a third row is waited for
    assert wants(crowd, held=5, prefill_wait=5) and wants(crowd, prefill_wait=0)  # not for ever
    assert wants([PREFILL, *crowd])  # as many as one prefill takes
    assert wants([PREFILL, *[WAIT] * 8])  # nothing else goes on
