"""One model in three uses that must agree: whole sequences, any split into cached chunks, a prefix kept apart.

The truth is the plain forward of whole sequences (test_hf_checkpoint.py compares it with transformers). The truth of
sampling is `generate` of transformers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, VOCAB, forward, random_tokens, relative_error

from router_r1_jax.model import Prefix, RouterLM, empty_cache, unroll

B, C, S = 3, 4, 16  # rows, tokens of a call, slots of a row's cache
P, PREFIX = 8, 5  # positions of the prefix's block, and how many of them are real
CASE = "qwen3_tied"


@functools.partial(jax.jit, static_argnums=0)
def decode(config, params, tokens, positions, cache, prefix=None, rows=None):
    """Logits and the cache after these tokens, from unrolled parameters."""
    return RouterLM(config, unrolled=True).apply(
        {"params": params}, tokens, positions=positions, cache=cache, prefix=prefix, rows=rows
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill(config, unrolled, params, tokens):
    """The KV of whole sequences in either layout, batch of 1 removed."""
    _, kv = RouterLM(config, unrolled=unrolled).apply({"params": params}, tokens[None], method=RouterLM.hidden)
    return jax.tree.map(lambda x: x[0] if unrolled else x[:, 0], kv)


def make_prefix(config, params, tokens, *, unrolled):
    """A prefix padded to P positions with large values: whoever looks at them is found out."""

    def pad(x):
        axis = 0 if unrolled else 1
        widths = [(0, P - len(tokens) if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, widths, constant_values=100.0)

    kv = jax.tree.map(pad, prefill(config, unrolled, params, tokens))
    return Prefix(kv, jnp.int32(len(tokens)))


@pytest.fixture(scope="module")
def tiny(checkpoint):
    """config, stacked and unrolled parameters, a prefix's tokens, and each row's tokens behind it [B, S]."""
    c = checkpoint(CASE)
    return c.config, c.params, unroll(c.params, c.config.num_layers), random_tokens(PREFIX), random_tokens(B, S, seed=1)


@pytest.fixture(scope="module")
def truth(tiny):
    """Logits [B, S, V] of whole sequences without a prefix and behind one."""
    config, params, _, prefix, tokens = tiny
    whole = np.concatenate([np.broadcast_to(prefix, (B, PREFIX)), tokens], axis=1)
    return forward(config, params, tokens), forward(config, params, whole)[:, PREFIX:]


@pytest.fixture(scope="module")
def prefixes(tiny):
    """What `behind_prefix` stands for in unrolled layout."""
    config, _, params, prefix, _ = tiny
    return {False: None, True: make_prefix(config, params, prefix, unrolled=True)}


@st.composite
def schedules(draw):
    """Calls that feed every row to its end: [(rows or None, tokens per row of the call, 0 .. C)]."""
    left, calls = [S] * B, []
    while any(left):
        rows = draw(st.sampled_from([None, (0, 1), (2, 0), (1, 2)]))
        sizes = [draw(st.integers(0, min(C, left[row]))) for row in rows or range(B)]
        if not any(sizes):  # a call of nothing, once in a while, then one that goes on
            row = next(row for row in range(B) if left[row])
            calls.append((rows, sizes))
            rows, sizes = None, [min(C, left[row]) if r == row else 0 for r in range(B)]
        for row, size in zip(rows or range(B), sizes, strict=True):
            left[row] -= size
        calls.append((rows, sizes))
    return calls


@settings(max_examples=15, deadline=None)
@given(calls=schedules(), behind_prefix=st.booleans())
def test_any_schedule_of_chunks_gives_the_logits_of_whole_sequences(tiny, truth, prefixes, calls, behind_prefix):
    """Rows advance by 0 to C tokens a call, each at its own position, all rows or a choice of them."""
    config, _, params, _, tokens = tiny
    cache = empty_cache(config, B, S)
    done, seen = [0] * B, np.full((B, S, VOCAB), np.nan, np.float32)
    for rows, sizes in calls:
        of = list(rows or range(B))
        chunk, positions = np.zeros((len(of), C), np.int32), np.full((len(of), C), S, np.int32)  # S: nothing is written
        for i, (row, size) in enumerate(zip(of, sizes, strict=True)):
            chunk[i, :size] = tokens[row, done[row] : done[row] + size]
            positions[i, :size] = np.arange(done[row], done[row] + size)
        rows = None if rows is None else jnp.array(rows)
        logits, cache = decode(config, params, chunk, positions, cache, prefixes[behind_prefix], rows)
        for i, (row, size) in enumerate(zip(of, sizes, strict=True)):
            seen[row, done[row] : done[row] + size] = logits[i, :size]
            done[row] += size
    assert done == [S] * B
    assert relative_error(seen, truth[behind_prefix]) < 1e-4


def test_prefix_in_training_layout_gives_the_logits_of_whole_sequences(tiny, truth):
    config, params, _, prefix, tokens = tiny
    logits = forward(config, params, tokens, prefix=make_prefix(config, params, prefix, unrolled=False))
    assert relative_error(logits, truth[True]) < 1e-4
    assert relative_error(truth[False], truth[True]) > 0.1  # the prefix matters to this model


def test_prefix_of_length_0_is_none(tiny, truth):
    config, params, _, prefix, tokens = tiny
    padded = make_prefix(config, params, prefix, unrolled=False).replace(length=jnp.int32(0))
    assert relative_error(forward(config, params, tokens, prefix=padded), truth[False]) < 1e-4


def test_layouts_agree(tiny, truth):
    config, _, params, _, tokens = tiny
    logits = jax.jit(RouterLM(config, unrolled=True).apply)({"params": params}, tokens)
    assert relative_error(logits, truth[False]) < 1e-5


def test_what_stands_later_or_in_another_row_changes_nothing(tiny, truth):
    config, params, _, _, tokens = tiny
    other = np.array(tokens)
    other[0, 7:] = (other[0, 7:] + 1) % VOCAB
    other[1:] = (other[1:] + 1) % VOCAB
    logits = forward(config, params, other)
    np.testing.assert_array_equal(logits[0, :7], truth[False][0, :7])
    assert relative_error(logits[0, 7:], truth[False][0, 7:]) > 0.1


def test_positions_alone_decide_what_is_seen(tiny):
    """Tokens handed over in any order are the same text: causal means by position."""
    config, params, _, _, tokens = tiny
    order = np.random.default_rng(0).permutation(S)
    positions = np.broadcast_to(9_000 + np.arange(S, dtype=np.int32), (B, S))
    logits = forward(config, params, tokens, positions)
    shuffled = forward(config, params, tokens[:, order], positions[:, order])
    assert relative_error(shuffled, logits[:, order]) < 1e-4


def test_a_slot_taken_over_shows_nothing_of_its_old_row(tiny, truth):
    """A refilled slot keeps its old keys behind the new row's position; they must never be seen."""
    config, _, params, _, tokens = tiny
    dirty = jax.tree.map(lambda x: jnp.full_like(x, 50.0), empty_cache(config, B, S))
    positions = np.broadcast_to(np.arange(C, dtype=np.int32), (B, C))
    logits, _ = decode(config, params, tokens[:, :C], positions, dirty)
    assert relative_error(logits, truth[False][:, :C]) < 1e-4


def test_cache_is_refused_where_it_would_be_copied(tiny):
    config, params, _, _, tokens = tiny
    with pytest.raises(ValueError, match="unrolled=True"):
        RouterLM(config).apply({"params": params}, tokens, cache=empty_cache(config, B, S))


@pytest.mark.parametrize("case", CONFIGS)
def test_greedy_continuation_is_that_of_generate(checkpoint, case):
    c = checkpoint(case)
    prompt = random_tokens(2, C, seed=2)
    steps = 64
    expected = c.model.generate(
        torch.tensor(prompt), attention_mask=torch.ones(prompt.shape), max_new_tokens=steps, do_sample=False
    ).numpy()
    assert len(np.unique(expected[:, C:])) > 8  # a continuation that goes somewhere

    @jax.jit
    def greedy(params):
        model, rows = RouterLM(c.config, unrolled=True), len(prompt)
        positions = jnp.broadcast_to(jnp.arange(C), prompt.shape)
        cache = empty_cache(c.config, rows, C + steps)
        logits, cache = model.apply({"params": params}, prompt, positions=positions, cache=cache)

        def step(carry, position):
            token, cache = carry
            at = jnp.full((rows, 1), position)
            logits, cache = model.apply({"params": params}, token[:, None], positions=at, cache=cache)
            return (logits[:, -1].argmax(-1), cache), token

        return jax.lax.scan(step, (logits[:, -1].argmax(-1), cache), C + jnp.arange(steps))[1].T

    np.testing.assert_array_equal(greedy(unroll(c.params, c.config.num_layers)), expected[:, C:])
