"""Padding of ragged rows into one batch: everything stands where it was given, and nothing else does."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from router_r1_jax.learner import Row, make_batch

lengths = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=4)


@given(lengths, st.integers(0, 130))
def test_rows_come_back_out(lengths, prefix_length):
    rng = np.random.default_rng(len(lengths) + prefix_length)
    prefix = rng.integers(1, 99, prefix_length).tolist()
    rows = [
        Row(rng.integers(1, 99, p), rng.integers(1, 99, n), rng.random(n) > 0.5, -rng.random(n), float(rng.normal()))
        for p, n in lengths
    ]
    batch = make_batch(prefix, rows)
    assert batch.prefix[: batch.prefix_length].tolist() == prefix and batch.prefix_length == prefix_length
    assert not batch.prefix[prefix_length:].any()
    assert len(batch.prefix) % 64 == 0 and 0 < len(batch.prefix) < prefix_length + 64 + (prefix_length == 0)
    longest = max(p + n for p, n in lengths)
    assert batch.tokens.shape[1] % 32 == 1 and longest <= batch.tokens.shape[1] < max(longest, 2) + 32
    for i, row in enumerate(rows):
        p, n = lengths[i]
        assert batch.tokens[i].tolist() == [*row.prompt, *row.tokens] + [0] * (batch.tokens.shape[1] - p - n)
        for field, values in ((batch.mask, row.mask), (batch.logps, row.logps)):
            np.testing.assert_array_equal(field[i, p : p + n], np.asarray(values, np.float32))
            assert not field[i, :p].any() and not field[i, p + n :].any()
        assert batch.advantages[i] == np.float32(row.advantage)
    assert batch.reference_logps.shape == batch.tokens.shape and not batch.reference_logps.any()
