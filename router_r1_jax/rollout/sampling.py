"""One token per row: inverse-CDF sampling with one uniform draw, and the exact log-prob of what was drawn.

A Gumbel draw per logit costs a random number per vocabulary entry, which dominated decoding on CPU when measured. Here
a row draws one number; the CDF is walked in two levels (blocks, then the entries of one block), so that no prefix sum
over the whole vocabulary is ever formed.
"""

import jax
import jax.numpy as jnp

BLOCK = 128  # entries of the vocabulary per block of the first level


def row_keys(seed_key: jax.Array, episodes: jax.Array, positions: jax.Array) -> jax.Array:
    """Keys [B] that depend on the episode and its position only: not on slot, arrival order or schedule."""
    return jax.vmap(lambda e, p: jax.random.fold_in(jax.random.fold_in(seed_key, e), p))(episodes, positions)


def _first_above(weights: jax.Array, cumulative: jax.Array, threshold: jax.Array) -> jax.Array:
    """Index [B] of the first of weights [B, N] that is above 0 and whose prefix sum exceeds threshold [B].

    Prefix sums are formed as a tree, so they can rise by a rounding across an entry of weight 0: such an entry is never
    taken. Where rounding leaves the threshold at or past the last sum, the last entry with weight is the one.
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


def sample(logits: jax.Array, keys: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draw ids [B] int32 from logits [B, V], and their log-probs [B] float32 under the distribution drawn from.

    `temperature` is a float32 scalar; 0 takes the first largest logit and reports its log-prob at temperature 1.
    """
    greedy = temperature == 0
    scaled = logits.astype(jnp.float32) / jnp.where(greedy, 1.0, temperature)
    top = jnp.max(scaled, axis=-1, keepdims=True)
    weights = jnp.exp(scaled - top)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key))(keys)
    ids = jnp.where(greedy, jnp.argmax(scaled, axis=-1).astype(jnp.int32), inverse_cdf(weights, uniforms))
    chosen = jnp.take_along_axis(scaled, ids[:, None], axis=-1)[:, 0]
    return ids, chosen - top[:, 0] - jnp.log(jnp.sum(weights, axis=-1))
