"""KV cache layout: keys and values of new tokens (KV), of cached rows (Cache), and of the shared prefix (Prefix).

The two layouts hold the same numbers. A forward pass makes keys and values in the order of the tokens. Decoding reads
them from a cache whose axes stand in the order of its two matrix products.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from router_r1_jax.model.config import ModelConfig

PREFIX_MULTIPLE = 64  # a shared prefix is padded to a multiple of it, so that few programs are compiled


@flax.struct.dataclass
class KV:
    """Keys and values of one layer in the order of the tokens: [B, T, K, H] for rows, [P, K, H] for a prefix.

    Stacked layers have a leading axis L.
    """

    k: jax.Array
    v: jax.Array

    def to_cache(self) -> "Cache":
        """The same keys and values in the layout of a cache."""
        return Cache(jnp.moveaxis(self.k, -3, -1), jnp.moveaxis(self.v, -3, -2))


@flax.struct.dataclass
class Cache:
    """Keys [B, K, H, S] and values [B, K, S, H] of one layer, with room for S positions; a prefix has no axis B.

    The two products of a decode step read this layout in place. If the axes stood in another order, XLA's CPU compiler
    would copy the whole cache before each product.
    """

    k: jax.Array
    v: jax.Array

    @property
    def length(self) -> int:
        """S, the number of positions that there is room for."""
        return self.v.shape[-2]

    def first(self, length: int | None) -> "Cache":
        """The first `length` positions; None means all of them."""
        return Cache(self.k[..., :length], self.v[..., :length, :])

    def grown(self, length: int) -> "Cache":
        """The cache with room for `length` positions, which is at least its present length."""
        more, none = (0, length - self.length), (0, 0)
        return Cache(jnp.pad(self.k, (none, none, none, more)), jnp.pad(self.v, (none, none, more, none)))

    def to_kv(self) -> KV:
        """The same keys and values in the order of the tokens."""
        return KV(jnp.moveaxis(self.k, -1, -3), jnp.moveaxis(self.v, -2, -3))

    def write(self, new: KV, positions: jax.Array, rows: jax.Array | None) -> "Cache":
        """Write the keys and values of tokens [R, T] at their `rows` [R] (None: all rows) and `positions` [R, T].

        A position of S or more and a row of B or more are not written, so that padding can be passed along. The write
        happens in place if the cache is donated or is the carry of a loop.
        """
        rows = (jnp.arange(positions.shape[0]) if rows is None else rows)[:, None]
        return Cache(
            self.k.at[rows, :, :, positions].set(new.k, mode="drop"),
            self.v.at[rows, :, positions].set(new.v, mode="drop"),
        )

    def read(self, rows: jax.Array | None) -> "Cache":
        """The cache of the given rows [R]; None means all rows, without a copy."""
        return self if rows is None else jax.tree.map(lambda x: x.at[rows].get(mode="clip"), self)


@flax.struct.dataclass
class Prefix:
    """Keys and values of the tokens that all rows share, padded to P positions, and the number of real ones (int32).

    `kv` is one KV with a leading L (stacked layout) or a tuple of L entries (unrolled layout), which are Caches for
    decoding.
    """

    kv: Any
    length: jax.Array


def pad_prefix(tokens: Sequence[int]) -> np.ndarray:
    """The tokens of a shared prefix, padded with 0 to [P] int32."""
    padded = np.zeros(-(-max(len(tokens), 1) // PREFIX_MULTIPLE) * PREFIX_MULTIPLE, np.int32)
    padded[: len(tokens)] = tokens
    return padded


def empty_cache(config: ModelConfig, rows: int, length: int) -> tuple[Cache, ...]:
    """Caches of zeros for B rows and S positions, one per layer."""
    B, S, K, H = rows, length, config.num_kv_heads, config.head_dim
    return tuple(
        Cache(jnp.zeros((B, K, H, S), config.dtype), jnp.zeros((B, K, S, H), config.dtype))
        for _ in range(config.num_layers)
    )
