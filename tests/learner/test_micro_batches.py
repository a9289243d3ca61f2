"""Micro-batches: ragged rows are assigned to buckets and padded, and every value comes back out at its token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_r1_jax.learner import Layout, Row, make_batch, make_layout
from router_r1_jax.learner.micro_batches import assign_buckets, unpack

FIELDS = Row._fields[2:]
lengths = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=9)
layouts = st.builds(
    lambda buckets, tokens, shares, rows: make_layout(81, buckets=buckets, tokens=tokens, rows=rows, shares=shares),
    st.integers(1, 4),
    st.integers(1, 400),
    st.integers(1, 3),
    st.integers(1, 12),
)


@given(lengths, st.integers(0, 130), layouts)
def test_rows_come_back_out(lengths, prefix_length, layout):
    rng = np.random.default_rng(len(lengths) + prefix_length)
    prefix = rng.integers(1, 99, prefix_length).tolist()
    rows = [Row(rng.integers(1, 99, p), rng.integers(1, 99, n), *rng.random((len(FIELDS), n))) for p, n in lengths]
    batch = make_batch(prefix, rows, layout)
    assert batch.prefix[: batch.prefix_length].tolist() == prefix and batch.prefix_length == prefix_length
    assert not batch.prefix[prefix_length:].any()
    assert len(batch.prefix) % 64 == 0 and 0 < len(batch.prefix) < prefix_length + 64 + (prefix_length == 0)
    for name in ("tokens", *FIELDS):
        found = unpack([getattr(bucket.rows, name) for bucket in batch.buckets], rows, layout)
        for row, values in zip(rows, found, strict=True):
            np.testing.assert_array_equal(values, np.asarray(getattr(row, name), np.float32))
    # Each token stands once, prompts too, and all else is 0.
    total = sum(float(bucket.rows.tokens.sum()) for bucket in batch.buckets)
    assert total == sum(float(np.sum(row.prompt)) + float(np.sum(row.tokens)) for row in rows)
    for name in FIELDS:
        total = sum(bucket.rows.__dict__[name].sum(dtype=np.float64) for bucket in batch.buckets)
        assert total == pytest.approx(sum(np.sum(getattr(row, name)) for row in rows))
    for bucket, length, size in zip(batch.buckets, *layout, strict=True):
        n, m, T = bucket.rows.tokens.shape
        assert (m, T) == (size, length + 1) and n == -(-len(rows) // size) and 0 <= bucket.count <= n
        assert not bucket.rows.tokens[bucket.count :].any()


@given(st.lists(st.integers(1, 81), min_size=1, max_size=40), layouts)
def test_no_row_is_lost_and_none_could_be_shorter_for_nothing(lengths, layout):
    assigned = assign_buckets(lengths, layout)
    assert sorted(i for members in assigned for i in members) == list(range(len(lengths)))
    for k, members in enumerate(assigned):
        assert all(lengths[i] - 1 <= layout.lengths[k] for i in members)
        moved = [i for i in members if k and lengths[i] - 1 <= layout.lengths[k - 1]]
        native = len(members) - len(moved)
        assert -(-len(members) // layout.rows[k]) == -(-native // layout.rows[k])  # who moved up cost no pass


@given(layouts)
def test_layouts_are_what_they_promise(layout):
    assert layout.lengths[-1] == 96 and all(length % 32 == 0 for length in layout.lengths)  # 80 are read
    assert list(layout.lengths) == sorted(set(layout.lengths))


def test_a_layout_keeps_to_its_budget_its_devices_and_its_batch():
    assert make_layout(257, buckets=3, tokens=512, rows=100) == Layout((64, 128, 256), (8, 4, 2))
    assert make_layout(257, buckets=3, tokens=512, rows=100, shares=4) == Layout((64, 128, 256), (32, 16, 8))
    assert make_layout(257, buckets=2, tokens=10, rows=100, shares=2) == Layout((128, 256), (2, 2))
    assert make_layout(257, buckets=2, tokens=10_000, rows=5, shares=2) == Layout((128, 256), (6, 6))


def test_a_row_that_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match="a row has 34 tokens; the longest bucket reads 32"):
        make_batch([], [Row([1] * 4, [2] * 30)], Layout((32,), (1,)))
