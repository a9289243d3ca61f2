"""Sampling against float64 NumPy: the drawn id, its log-prob, and how often each id comes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from router_r1_jax.rollout.sampling import Truncation, inverse_cdf, row_keys, sample

ROWS = 512
SIZES = (1, 5, 127, 128, 129, 300, 1000)  # of the vocabulary, around and between multiples of the block size
NEAR = 1e-5  # a draw this close to a boundary of the CDF may fall on either side in float32

draw_ids = jax.jit(inverse_cdf)
draw = jax.jit(sample)


def weights_of(rng, size):
    """[ROWS, size] of many shapes: flat, peaked over many orders of magnitude, with holes, with one entry left."""
    weights = np.exp(rng.normal(size=(ROWS, size)) * rng.choice([0.1, 1, 10, 40], size=(ROWS, 1)))
    weights *= rng.random((ROWS, size)) >= rng.choice([0, 0.5, 0.99], size=(ROWS, 1))
    weights[np.arange(ROWS), rng.integers(size, size=ROWS)] += 1.0
    return np.minimum(weights, 1e6).astype(np.float32)


def float64_draw(weights, uniforms):
    """Ids by the textbook in float64, and the distance [ROWS] of each draw from the nearest boundary."""
    cdf = np.cumsum(weights.astype(np.float64), axis=1)
    cdf /= cdf[:, -1:]
    ids = np.array([np.searchsorted(c, u, side="right") for c, u in zip(cdf, uniforms, strict=True)])
    return ids, np.min(np.abs(cdf[:, :-1] - uniforms[:, None]), axis=1, initial=1.0)


@pytest.mark.parametrize("size", SIZES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_inverse_cdf_is_float64_searchsorted(size, seed):
    rng = np.random.default_rng(seed)
    weights, uniforms = weights_of(rng, size), rng.random(ROWS).astype(np.float32)
    uniforms = np.minimum(uniforms, np.float32(1 - 2**-24))
    expected, distance = float64_draw(weights, uniforms.astype(np.float64))
    drawn = np.asarray(draw_ids(weights, uniforms))
    clear = distance > NEAR
    assert clear.sum() > ROWS / 4  # the comparison says something
    np.testing.assert_array_equal(drawn[clear], expected[clear])


@pytest.mark.parametrize("size", SIZES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_an_id_without_weight_is_never_drawn_also_at_a_boundary(size, seed):
    """Draws are put within rounding of the CDF's steps, where prefix sums in another order disagree."""
    rng = np.random.default_rng(seed)
    weights = weights_of(rng, size)
    cdf = np.cumsum(weights.astype(np.float64), axis=1)
    steps = (cdf / cdf[:, -1:])[np.arange(ROWS), rng.integers(size, size=ROWS)]
    uniforms = steps.astype(np.float32) + rng.integers(-3, 4, size=ROWS).astype(np.float32) * np.float32(2**-24)
    uniforms = np.clip(uniforms, 0, np.float32(1 - 2**-24))
    drawn = np.asarray(draw_ids(weights, uniforms))
    assert np.all(weights[np.arange(ROWS), drawn] > 0)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_ids_come_as_often_as_their_probability_says(temperature):
    logits = np.array([2.0, -1.0, 0.5, 0.0, -np.inf, 1.5, -3.0], np.float32)
    n = 20_000
    keys = row_keys(jax.random.key(3), jnp.arange(n, dtype=jnp.uint32) // 50, jnp.arange(n) % 50)
    ids, *_ = draw(jnp.tile(logits, (n, 1)), keys, jnp.float32(temperature))
    p = np.exp(logits.astype(np.float64) / temperature)
    p /= p.sum()
    share = np.bincount(ids, minlength=len(p)) / n
    np.testing.assert_array_less(np.abs(share - p), 4.5 * np.sqrt(p * (1 - p) / n) + 1e-12)


@pytest.mark.parametrize("temperature", [0.0, 0.25, 1.0, 1.7])
@pytest.mark.parametrize("size", [5, 300])
def test_log_prob_is_that_of_float64_log_softmax(size, temperature):
    logits = np.random.default_rng(size).normal(size=(ROWS, size)).astype(np.float32) * 4
    keys = row_keys(jax.random.key(1), jnp.arange(ROWS, dtype=jnp.uint32), jnp.zeros(ROWS, jnp.int32))
    ids, logps, sampler_logps = map(np.asarray, draw(logits, keys, jnp.float32(temperature)))
    np.testing.assert_array_equal(sampler_logps, 0 if temperature == 0 else logps)  # nothing was truncated
    scaled = logits.astype(np.float64) / (temperature or 1.0)
    expected = scaled - np.log(np.sum(np.exp(scaled), axis=1, keepdims=True))
    np.testing.assert_allclose(logps, expected[np.arange(ROWS), ids], atol=2e-5, rtol=0)
    if temperature == 0:
        np.testing.assert_array_equal(ids, np.argmax(logits, axis=1))
    else:
        assert len(set(ids.tolist())) > 1


def equations(jaxpr):
    """All of a jaxpr's, those of the functions it calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from equations(getattr(value, "jaxpr", value))


def test_a_row_draws_one_number_however_large_the_vocabulary():
    """A Gumbel draw per logit took most of a decode step."""
    keys = jax.random.split(jax.random.key(0), 3)
    jaxpr = jax.make_jaxpr(sample)(jnp.zeros((3, 5000)), keys, jnp.float32(1)).jaxpr
    drawn = [e.outvars[0].aval.size for e in equations(jaxpr) if e.primitive.name == "random_bits"]
    assert drawn == [len(keys)]


def float64_kept(logits, temperature, top_k, top_p, min_p):
    """Which ids [ROWS, V] are left by the textbook (sorted, ties kept), and whether rounding may decide a row."""
    weights = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / temperature)
    kept, unclear = np.ones(weights.shape, bool), np.zeros(len(weights), bool)
    for i, w in enumerate(weights):
        if top_k:
            kept[i] &= w >= np.sort(w)[::-1][min(top_k, len(w)) - 1]
        if top_p < 1:
            values, counts = np.unique(np.where(kept[i], w, 0), return_counts=True)
            reached = np.cumsum((values * counts)[::-1]) / np.sum(values * counts)
            kept[i] &= w >= values[::-1][np.argmax(reached >= top_p)]
            unclear[i] = np.min(np.abs(reached - top_p)) < NEAR
        kept[i] &= w >= min_p
        unclear[i] |= np.min(np.abs(w - min_p)) < NEAR * min_p
    return kept, unclear


TRUNCATIONS = [
    (1, 1.0, 0.0),
    (7, 1.0, 0.0),
    (10_000, 1.0, 0.0),
    (0, 0.01, 0.0),
    (0, 0.9, 0.0),
    (0, 1.0, 0.2),
    (20, 0.8, 0.05),
]


@pytest.mark.parametrize("temperature", [0.5, 1.3])
@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_truncation_leaves_what_the_textbook_leaves(truncation, temperature):
    rng = np.random.default_rng(4)
    logits = (4 * rng.normal(size=(ROWS, 300))).astype(np.float32)
    logits[::2] = np.round(logits[::2])  # with ties
    kept, unclear = float64_kept(logits, temperature, *truncation)
    assert unclear.mean() < 0.1
    keys = row_keys(jax.random.key(1), jnp.arange(ROWS, dtype=jnp.uint32), jnp.zeros(ROWS, jnp.int32))
    as_arrays = Truncation(jnp.int32(truncation[0]), jnp.float32(truncation[1]), jnp.float32(truncation[2]))
    ids, logps, sampler_logps = map(np.asarray, draw(logits, keys, jnp.float32(temperature), as_arrays))
    rows, scaled = np.arange(ROWS), logits.astype(np.float64) / temperature
    left = np.where(kept, scaled, -np.inf)
    assert np.all(kept[rows, ids] | unclear)
    for found, space in ((logps, scaled), (sampler_logps, left)):
        expected = scaled[rows, ids] - np.log(np.sum(np.exp(space), axis=1))
        np.testing.assert_allclose(found[~unclear], expected[~unclear], atol=2e-5, rtol=0)


@pytest.mark.parametrize("truncation", TRUNCATIONS[1:], ids=str)
def test_truncation_is_that_of_transformers(truncation):
    """Without ties, whose fate is a matter of taste."""
    logits = (4 * np.random.default_rng(2).normal(size=(64, 300))).astype(np.float32)
    scores = torch.tensor(logits)
    for warper, value, off in zip(
        (TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper), truncation, (0, 1.0, 0.0), strict=True
    ):
        scores = scores if value == off else warper(min(value, 300))(None, scores)
    kept = np.isfinite(scores.numpy())
    expected, unclear = float64_kept(logits, 1.0, *truncation)
    np.testing.assert_array_equal(kept[~unclear], expected[~unclear])
    keys = row_keys(jax.random.key(1), jnp.arange(64, dtype=jnp.uint32), jnp.zeros(64, jnp.int32))
    arrays = Truncation(jnp.int32(truncation[0]), jnp.float32(truncation[1]), jnp.float32(truncation[2]))
    drawn = np.array(
        [draw(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, i), jnp.float32(1), arrays)[0] for i in range(40)]
    )
    assert all(kept[row, drawn[:, row]].all() or unclear[row] for row in range(64))


def test_nan_logits_still_give_an_id_of_the_vocabulary():
    ids, logps, _ = draw(jnp.full((2, 5), jnp.nan), jax.random.split(jax.random.key(0), 2), jnp.float32(1))
    assert np.all((np.asarray(ids) >= 0) & (np.asarray(ids) < 5)) and np.all(np.isnan(logps))


def test_greedy_takes_the_first_of_equal_logits():
    keys = row_keys(jax.random.key(1), jnp.arange(2, dtype=jnp.uint32), jnp.zeros(2, jnp.int32))
    ids, logps, _ = draw(jnp.array([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0]]), keys, jnp.float32(0))
    np.testing.assert_array_equal(ids, [1, 0])
    np.testing.assert_allclose(logps, [-np.log(2 + np.exp(-2)), -np.log(3)], atol=1e-6)


def test_a_key_is_the_episodes_and_positions_own():
    seed = jax.random.key(5)
    episodes, positions = np.meshgrid(np.arange(40, dtype=np.uint32), np.arange(40, dtype=np.int32))
    episodes, positions = episodes.ravel(), positions.ravel()
    data = np.asarray(jax.random.key_data(row_keys(seed, episodes, positions)))
    assert len({tuple(row) for row in data.tolist()}) == len(data)
    for i in (0, 41, 999, 1599):
        key = jax.random.fold_in(jax.random.fold_in(seed, episodes[i]), positions[i])
        np.testing.assert_array_equal(data[i], jax.random.key_data(key))
    order = np.random.default_rng(0).permutation(len(data))
    shuffled = jax.random.key_data(row_keys(seed, episodes[order], positions[order]))
    np.testing.assert_array_equal(shuffled, data[order])
