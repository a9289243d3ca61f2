"""Sampling of one token per row: temperature, top-k, top-p, min-p, inverse CDF, and the exact log-prob of the sample.

The inverse CDF needs one uniform number per row. (Gumbel sampling needs one per vocabulary entry, which dominates
decoding on a CPU.) The CDF is walked in two levels, blocks and then the entries of one block, so no prefix sum over the
whole vocabulary is formed.

Top-k and top-p need the smallest weight that is kept. It is found by bisection over the bit patterns of floats, whose
order is that of the numbers: 31 passes over the vocabulary, without a sort. Equal weights are kept or dropped together.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128  # entries of the vocabulary per block of the first level


def row_keys(seed_key: jax.Array, episodes: jax.Array, positions: jax.Array) -> jax.Array:
    """Keys [B] that depend only on the episode and its position: not on slot, arrival order or schedule."""
    return jax.vmap(lambda e, p: jax.random.fold_in(jax.random.fold_in(seed_key, e), p))(episodes, positions)


def _first_above(weights: jax.Array, cumulative: jax.Array, threshold: jax.Array) -> jax.Array:
    """Index [B] of the first of weights [B, N] that is above 0 and whose prefix sum exceeds threshold [B].

    Prefix sums are formed as a tree, so rounding can make them rise at an entry of weight 0. Such an entry is never
    taken. If rounding puts the threshold at or past the last sum, the last entry with weight is taken.
    """
    possible = weights > 0
    above = possible & (cumulative > threshold[:, None])
    last = weights.shape[-1] - 1 - jnp.argmax(possible[:, ::-1], axis=-1)
    return jnp.where(jnp.any(above, axis=-1), jnp.argmax(above, axis=-1), last)


def inverse_cdf(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Sample ids [B] with probability proportional to weights [B, V] >= 0, from uniforms [B] in [0, 1)."""
    B, V = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
    totals = jnp.sum(blocks, axis=-1)  # [B, V / BLOCK]
    sums = jnp.cumsum(totals, axis=-1)
    target = uniforms * sums[:, -1]
    block = _first_above(totals, sums, target)
    before = jnp.where(block > 0, jnp.take_along_axis(sums, jnp.maximum(block - 1, 0)[:, None], 1)[:, 0], 0.0)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [B, BLOCK]
    entry = _first_above(inside, jnp.cumsum(inside, axis=-1), target - before)
    return jnp.minimum(block * BLOCK + entry, V - 1).astype(jnp.int32)  # V - 1: only NaN weights point past the end


class Truncation(NamedTuple):
    """Truncation of the distribution before sampling; arrays, so that other values compile nothing anew.

    The three are applied in this order, each to the rest that the one before leaves, scaled to 1. All ties at a
    boundary are kept.
    """

    top_k: jax.Array  # int32: keep the k most probable; 0 keeps all
    top_p: jax.Array  # float32: keep the most probable ones that together reach p; 1 keeps all
    min_p: jax.Array  # float32: keep those at least this times as probable as the most probable; 0 keeps all


def _kept(weights: jax.Array, truncation: Truncation) -> jax.Array:
    """Which of weights [B, V], whose largest in a row is 1, are kept: [B, V] bool."""
    B, V = weights.shape
    top_k, top_p, min_p = truncation
    k = jnp.where(top_k > 0, jnp.minimum(top_k, V), V)
    kept = weights >= _boundary(jnp.ones_like(weights), weights, jnp.full((B,), k, jnp.float32))
    mass = jnp.where(kept, weights, 0.0)
    goal = jnp.where(top_p < 1, top_p, 0.0) * jnp.sum(mass, axis=-1)
    boundary = jnp.where(top_p < 1, _boundary(mass, weights, goal), 0.0)
    return kept & (weights >= boundary) & (weights >= min_p)


def _boundary(mass: jax.Array, weights: jax.Array, goal: jax.Array) -> jax.Array:
    """The largest float [B, 1] such that the mass [B, V] of all weights [B, V] from it on is at least goal [B]."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # the mass from low on reaches the goal, that from high on does not
        middle = low + (high - low) // 2
        from_here = weights >= jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None]
        reached = jnp.sum(jnp.where(from_here, mass, 0.0), axis=-1) >= goal
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    low = jnp.zeros(goal.shape, jnp.int32)
    high = jnp.full(goal.shape, jnp.float32(1).view(jnp.int32) + 1)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)[:, None]


def sample(
    logits: jax.Array, keys: jax.Array, temperature: jax.Array, truncation: Truncation | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sample one id per row.

    Args:
      logits: [B, V].
      keys: [B], one key per row.
      temperature: float32 scalar; 0 takes the first largest logit and reports log-probs at temperature 1.
      truncation: ids to leave out; None to sample from the whole distribution.

    Returns:
      ids [B] int32;
      their log-probs [B] float32 at this temperature in the whole distribution, which the learner computes too;
      their log-probs [B] float32 in the distribution they were sampled from, truncated and scaled to 1 (0 at
      temperature 0).
    """
    greedy = temperature == 0
    scaled = logits.astype(jnp.float32) / jnp.where(greedy, 1.0, temperature)
    top = jnp.max(scaled, axis=-1, keepdims=True)
    weights = jnp.exp(scaled - top)
    kept = weights if truncation is None else jnp.where(_kept(weights, truncation), weights, 0.0)
    uniforms = jax.vmap(jax.random.uniform)(keys)
    ids = jnp.where(greedy, jnp.argmax(scaled, axis=-1).astype(jnp.int32), inverse_cdf(kept, uniforms))
    chosen = jnp.take_along_axis(scaled, ids[:, None], axis=-1)[:, 0] - top[:, 0]
    whole, left = jnp.sum(weights, axis=-1), jnp.sum(kept, axis=-1)
    return ids, chosen - jnp.log(whole), jnp.where(greedy, 0.0, chosen - jnp.log(left))
