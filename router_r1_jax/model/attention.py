"""Grouped-query attention over up to two blocks of keys: a prefix shared by all rows, and the row's own.

    keys of row b:   [ shared prefix, P positions | own positions 0 .. S-1 ]
    rotary angle:      0 .. length-1                length + own position

The prefix (instructions and model cards) is the same for every row of a batch, so its keys are kept once and never
copied per row. A row's own keys are either those of this very call (training: S = T) or a cache that this call first
writes to (decoding: T = 1, feeding: T = chunk).
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from router_r1_jax.model.config import ModelConfig, RopeScaling


@flax.struct.dataclass
class KV:
    """Keys and values of one layer: [B, S, K, H] for rows, [P, K, H] for a prefix; stacked layers lead with L."""

    k: jax.Array
    v: jax.Array


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angular frequencies [H/2], float32, with Llama 3's scaling where it is set.

    Rounded in the steps in which PyTorch rounds: a frequency's last bit turns an angle at position 10,000 by 1e-3.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freqs = 1 / (theta ** exponents.astype(np.float64)).astype(np.float32)
    if scaling is None:
        return freqs
    wavelength = np.float32(2 * np.pi) / freqs
    # 1 keeps a frequency (short waves), 0 divides it by the factor (long waves), a line in between.
    keep = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    keep = np.clip(keep, 0.0, 1.0)
    return (1 - keep) * freqs / scaling.factor + keep * freqs


def apply_rope(x: jax.Array, positions: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotate x [B, T, heads, H] to absolute positions [B, T]; halves are paired as Hugging Face pairs them."""
    freqs = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = positions[..., None, None].astype(jnp.float32) * freqs  # [B, T, 1, H/2]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def write_cache(cache: KV, new: KV, positions: jax.Array, rows: jax.Array | None) -> KV:
    """Write keys and values of tokens [R, T] at their rows and positions, in place under donation or in a loop.

    A position of S or more, and a row of B or more, writes nothing: that is how padding is fed.
    """
    rows = jnp.arange(positions.shape[0]) if rows is None else rows
    index = (rows[:, None], positions)
    return KV(cache.k.at[index].set(new.k, mode="drop"), cache.v.at[index].set(new.v, mode="drop"))


def read_cache(cache: KV, rows: jax.Array | None) -> KV:
    """The cache of the given rows, or the whole of it (no copy) where `rows` is None."""
    if rows is None:
        return cache
    return jax.tree.map(lambda x: x.at[rows].get(mode="clip"), cache)


def attend(
    q: jax.Array,
    own: KV,
    positions: jax.Array,
    key_positions: jax.Array,
    prefix: KV | None,
    prefix_length: jax.Array,
) -> jax.Array:
    """Attention output [B, T, N, H] of queries [B, T, N, H] at own positions [B, T].

    A query at own position t sees the whole prefix (its first `prefix_length` entries) and those of its row's keys
    whose own position, `key_positions` [B or 1, S], is t or less.
    """
    B, T, N, H = q.shape
    K = own.k.shape[2]
    q = q.reshape(B, T, K, N // K, H) * (H**-0.5)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, own.k, preferred_element_type=jnp.float32)
    visible = key_positions[:, None, None, None, :] <= positions[:, None, None, :, None]  # [B, 1, 1, T, S]
    scores = jnp.where(visible, scores, -jnp.inf)
    if prefix is None:
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        return jnp.einsum("BKGTS,BSKH->BTKGH", weights, own.v).reshape(B, T, N, H)
    P = prefix.k.shape[0]
    before = jnp.einsum("BTKGH,PKH->BKGTP", q, prefix.k, preferred_element_type=jnp.float32)
    before = jnp.where(jnp.arange(P) < prefix_length, before, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([before, scores], axis=-1), axis=-1).astype(q.dtype)
    out = jnp.einsum("BKGTP,PKH->BTKGH", weights[..., :P], prefix.v)
    out += jnp.einsum("BKGTS,BSKH->BTKGH", weights[..., P:], own.v)
    return out.reshape(B, T, N, H)
