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

from router_r1_jax.model.config import AttentionName, ModelConfig, RopeScaling

QUERY_BLOCK = 128  # fewest queries of a block of causal attention: the scores of smaller ones gain nothing
MOST_BLOCKS = 8  # of one call: the last doublings of their number save little work and compile as long


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


def check_attention(config: ModelConfig) -> None:
    """Raise ValueError where this machine cannot run `config.attention`; the rest is checked by ModelConfig itself."""
    backend = jax.default_backend()
    if config.attention == "cudnn" and backend not in ("gpu", "cuda"):
        raise ValueError(
            f"attention is 'cudnn', which needs an NVIDIA GPU; this is {backend}: choose 'einsum' or 'xla'"
        )


def attend(
    q: jax.Array,
    own: KV,
    positions: jax.Array,
    key_positions: jax.Array,
    prefix: KV | None,
    prefix_length: jax.Array,
    *,
    causal: bool,
    implementation: AttentionName = "einsum",
) -> jax.Array:
    """Attention output [B, T, N, H] of queries [B, T, N, H] at own positions [B or 1, T].

    A query at own position t sees the whole prefix (its first `prefix_length` entries) and those of its row's keys
    whose own position, `key_positions` [B or 1, S], is t or less. `causal` says that queries and keys are the same
    tokens in the order of their positions, so that half of the products need not be made.

    One query per row (decoding) reads the keys where they lie, whatever `implementation` says: joining a prefix to
    each row's cache would copy the cache at every step.
    """
    if q.shape[1] == 1:
        return _attend_one(q, own, positions, key_positions, prefix, prefix_length)
    keys = own if prefix is None else _join(prefix, own)
    P = keys.k.shape[1] - own.k.shape[1]
    visible = key_positions[:, None, :] <= positions[:, :, None]  # [B or 1, T, S]
    if P:
        before = jnp.broadcast_to(jnp.arange(P) < prefix_length, (*visible.shape[:2], P))
        visible = jnp.concatenate([before, visible], axis=-1)
    if implementation == "einsum":
        return _attend_in_blocks(q, keys, visible, P, causal)
    if causal and prefix is None:
        return jax.nn.dot_product_attention(q, keys.k, keys.v, is_causal=True, implementation=implementation)
    return jax.nn.dot_product_attention(q, keys.k, keys.v, mask=visible[:, None], implementation=implementation)


def _join(prefix: KV, own: KV) -> KV:
    """Keys and values [B, P + S, K, H]: small beside the scores, whose concatenation took three times as long."""

    def join(before: jax.Array, after: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.broadcast_to(before, (after.shape[0], *before.shape)), after], axis=1)

    return jax.tree.map(join, prefix, own)


def query_blocks(T: int) -> list[tuple[int, int]]:
    """(start, end) of the blocks into which causal attention over T tokens is cut."""
    size = max(QUERY_BLOCK, -(-T // MOST_BLOCKS))
    return [(start, min(start + size, T)) for start in range(0, T, size)]


def _attend_in_blocks(q: jax.Array, keys: KV, visible: jax.Array, P: int, causal: bool) -> jax.Array:
    """Attention in einsums, over blocks of queries where a block's last query bounds the keys that it needs.

    Rows and kv heads lead in every operand: XLA's CPU compiler otherwise transposes scores before and after a product.
    """
    B, T, N, H = q.shape
    K = keys.k.shape[2]
    q = (q * (H**-0.5)).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k, v = keys.k.swapaxes(1, 2), keys.v.swapaxes(1, 2)
    outs = []
    for start, end in query_blocks(T) if causal else [(0, T)]:
        S = P + end if causal else k.shape[2]
        outs.append(_attend_block(q[..., start:end, :], k[:, :, :S], v[:, :, :S], visible[:, start:end, :S]))
    return jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _attend_block(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """Scaled queries [B, K, G, T, H], keys and values [B, K, S, H], visible [B or 1, T, S] -> like the queries.

    Dividing the output by the sum of the weights, not each weight, saves passes over [.., T, S].
    """
    B, K, G, T, H = q.shape
    rows = (B, K, G * T, H)
    scores = jnp.einsum("BKRH,BKSH->BKRS", q.reshape(rows), k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores.reshape(B, K, G, T, -1), -jnp.inf).reshape(scores.shape)
    # The shift by the largest score cancels, so no gradient goes through it.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    out = jnp.einsum("BKRS,BKSH->BKRH", weights.astype(q.dtype), v, preferred_element_type=jnp.float32)
    return (out / jnp.sum(weights, axis=-1, keepdims=True)).astype(q.dtype).reshape(q.shape)


def _attend_one(
    q: jax.Array, own: KV, positions: jax.Array, key_positions: jax.Array, prefix: KV | None, prefix_length: jax.Array
) -> jax.Array:
    """`attend` for T = 1, with the prefix and the row's own keys as two blocks."""
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
