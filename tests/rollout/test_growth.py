"""Rows that outgrow their cache: the loop is left, the cache grows, and no bit of an episode changes."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_router import SHAPES, Latecomers, make_engine, make_prompts, sample

from router_r1_jax.rollout import EpisodeLimits, replica
from router_r1_jax.rollout.replica import cache_lengths
from router_r1_jax.rollout.row_state import DECODE, PREFILL, WAIT, empty_rows, positions_needed

LONG = dict(row_tokens=500, prefill_tokens=160, prefill_chunk=32)
PROMPTS = make_prompts(10)


def long_texts(route, episode, call):
    """Replies of 20 to 139 words."""
    return " ".join(f"w{(episode + i) % 60}" for i in range(20 + (episode + 31 * len(route) + 17 * call) % 120))


@pytest.fixture(scope="module")
def long_engine():
    """long_engine(driver, slots) -> an engine whose rows hold up to 500 tokens, and replies of up to 140."""
    made = {}

    def get(driver, slots):
        if (driver, slots) not in made:
            episode_limits = EpisodeLimits(max_calls=6, reply_tokens=140)
            made[driver, slots] = make_engine(
                driver, episode_limits=episode_limits, slots=slots, decode_batch=4, **LONG
            )
        return made[driver, slots]

    return get


def sampled(engine, delays=(0.0,)):
    pool = Latecomers(delays, texts=long_texts)
    return sample(engine, PROMPTS, pool)[0]


@pytest.fixture(scope="module", params=[4, 7], ids=["all rows in the decode batch", "some rows outside"])
def slots(request):
    return request.param


@pytest.fixture(scope="module")
def at_full_length(long_engine, slots):
    """The episodes where the cache has its full length from the start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replica, "cache_lengths", lambda row_tokens: cache_lengths(row_tokens)[-1:])
        return sampled(long_engine("jit", slots))


@pytest.mark.parametrize("driver", ["jit", "host"])
def test_a_growing_cache_changes_no_bit(long_engine, slots, at_full_length, driver, monkeypatch):
    lengths = []
    engine = long_engine(driver, slots)
    (only,) = engine._replicas
    grow = only._grow
    monkeypatch.setattr(only, "_grow", lambda cache, length: lengths.append(length) or grow(cache, length))
    for delays in ((0.0,), (0.0, 0.02, 0.005)):
        assert sampled(engine, delays) == at_full_length
    assert set(lengths) == {512}
    lengths_of_rows = [len(e.prompt) - 9 + len(e.tokens) for e in at_full_length]
    assert max(lengths_of_rows) > 256 and min(lengths_of_rows) < 128  # rows of all lengths took part
    assert collections.Counter(e.stop for e in at_full_length)["row_full"] < len(PROMPTS)


@given(st.integers(1, 100_000))
def test_lengths_double_up_to_a_whole_row(row_tokens):
    lengths = cache_lengths(row_tokens)
    assert row_tokens <= lengths[-1] < row_tokens + 128
    assert all(n % 128 == 0 for n in lengths) or lengths == [row_tokens]
    assert all(b <= 2 * a for a, b in zip(lengths, lengths[1:], strict=False)) and lengths == sorted(set(lengths))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_what_a_step_may_write_fits(data):
    """Row by row: the tokens read in this step, and the token decoded in it or the next."""
    draw = data.draw
    n = SHAPES.slots
    status = draw(st.lists(st.sampled_from([DECODE, PREFILL, WAIT]), min_size=n, max_size=n))
    position = draw(st.lists(st.integers(0, 30), min_size=n, max_size=n))
    length = draw(st.lists(st.integers(1, SHAPES.prefill_tokens), min_size=n, max_size=n))
    done = [draw(st.integers(0, k - 1)) for k in length]
    rows = empty_rows(SHAPES).replace(
        status=np.array(status),
        position=np.array(position),
        prefill_length=np.array(length),
        prefill_done=np.array(done),
    )
    ends = [0]
    for s, p, k, d in zip(status, position, length, done, strict=True):
        read = min(k - 1 - d, SHAPES.prefill_chunk) if s == PREFILL else 0
        ends += [p + read + 1] if s != WAIT else []
    assert int(positions_needed(rows, SHAPES)) == max(ends)
