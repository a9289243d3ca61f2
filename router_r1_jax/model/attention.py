"""Grouped-query attention over up to two blocks of keys: a prefix shared by all rows, and the row's own.

    keys of row b:   [ shared prefix, P positions | own positions 0 .. S-1 ]
    rotary angle:      0 .. length-1                length + own position

The prefix (instructions and model cards) is the same for every row of a batch, so its keys are kept once and never
copied per row. A row's own keys are either those of this very call (training: S = T) or a cache that this call first
writes to (decoding: T = 1, feeding: T = chunk).
"""

import dataclasses
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from router_r1_jax.model.config import AttentionName, ModelConfig, RopeScaling

SCORE_ROWS = 1024  # queries, heads of a group counted apart, whose scores are held at a time where gradients follow
QUERY_BLOCK = 128  # fewest queries of a block of causal attention: the scores of smaller ones gain nothing
MOST_BLOCKS = 8  # of one call: the last doublings of their number save little work and compile as long


@flax.struct.dataclass
class KV:
    """Keys and values of one layer as tokens bring them: [B, S, K, H] for rows, [P, K, H] for a prefix.

    Stacked layers lead with L.
    """

    k: jax.Array
    v: jax.Array

    def laid_out(self) -> "Cache":
        """As a decode step reads them."""
        return Cache(jnp.moveaxis(self.k, -3, -1), jnp.moveaxis(self.v, -3, -2))


@flax.struct.dataclass
class Cache:
    """One layer's keys [B, K, H, S] and values [B, K, S, H]; those of a prefix lack B.

    So the two products of a decode step read them. In any other order XLA's CPU compiler copies the whole cache before
    each product: with 64 rows of 384 positions scores took four times and outputs three times as long.
    """

    k: jax.Array
    v: jax.Array

    @property
    def length(self) -> int:
        """S, positions that there is room for."""
        return self.v.shape[-2]

    def until(self, length: int) -> "Cache":
        """Its first positions."""
        return Cache(self.k[..., :length], self.v[..., :length, :])

    def grown(self, length: int) -> "Cache":
        """With room for `length` positions, at least as many as now."""
        more, none = (0, length - self.length), (0, 0)
        return Cache(jnp.pad(self.k, (none, none, none, more)), jnp.pad(self.v, (none, none, more, none)))

    def as_tokens(self) -> KV:
        """As tokens bring them."""
        return KV(jnp.moveaxis(self.k, -1, -3), jnp.moveaxis(self.v, -2, -3))

    def laid_out(self) -> "Cache":
        """Itself, which is laid out."""
        return self


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


def write_cache(cache: Cache, new: KV, positions: jax.Array, rows: jax.Array | None) -> Cache:
    """Write keys and values of tokens [R, T] at their rows and positions, in place under donation or in a loop.

    A position of S or more, and a row of B or more, writes nothing: that is how padding is fed.
    """
    rows = (jnp.arange(positions.shape[0]) if rows is None else rows)[:, None]
    return Cache(
        cache.k.at[rows, :, :, positions].set(new.k, mode="drop"),
        cache.v.at[rows, :, positions].set(new.v, mode="drop"),
    )


def read_cache(cache: Cache, rows: jax.Array | None) -> Cache:
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
    own: KV | Cache,
    positions: jax.Array,
    key_positions: jax.Array,
    prefix: KV | Cache | None,
    prefix_length: jax.Array,
    *,
    causal: bool,
    implementation: AttentionName = "einsum",
) -> jax.Array:
    """Attention output [B, T, N, H] of queries [B, T, N, H] at own positions [B or 1, T].

    A query at own position t sees the whole prefix (its first `prefix_length` entries) and those of its row's keys
    whose own position, `key_positions` [B or 1, S], is t or less. `causal` says that queries and keys are the same
    tokens in the order of their positions, so that half of the products need not be made.

    One query per row on a cache (decoding) reads the keys where they lie, whatever `implementation` says: joining a
    prefix to each row's cache would copy the cache at every step.
    """
    decoding = q.shape[1] == 1 and isinstance(own, Cache)
    if implementation != "einsum" and not decoding:
        alone = causal and prefix is None
        mask = None if alone else _visible(positions, key_positions, prefix, prefix_length)
        return _attend_by_jax(q, own, prefix, mask, implementation)
    B, T, N, H = q.shape
    at_once = isinstance(own, Cache)  # no gradient follows, and a loop over rows would copy their caches
    own, prefix = own.laid_out(), None if prefix is None else prefix.laid_out()
    K = own.k.shape[1]
    q = (q * (H**-0.5)).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    positions, key_positions = (jnp.broadcast_to(x, (B, x.shape[1])) for x in (positions, key_positions))
    cut = _Cut.of(q.shape, causal=causal, at_once=at_once)
    out = _attend_rows(cut, _Rows(q, own, positions, key_positions), prefix, prefix_length)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _visible(
    positions: jax.Array, key_positions: jax.Array, prefix: KV | Cache | None, prefix_length: jax.Array
) -> jax.Array:
    """Which of prefix and own keys a query sees, [B or 1, T, P + S] bool."""
    visible = key_positions[:, None, :] <= positions[:, :, None]
    if prefix is None:
        return visible
    P = prefix.laid_out().length
    before = jnp.broadcast_to(jnp.arange(P) < prefix_length, (*visible.shape[:2], P))
    return jnp.concatenate([before, visible], axis=-1)


def _attend_by_jax(
    q: jax.Array, own: KV | Cache, prefix: KV | Cache | None, mask: jax.Array | None, implementation: AttentionName
) -> jax.Array:
    """`jax.nn.dot_product_attention`, the prefix joined to every row's keys; causal where there is no mask."""
    own, prefix = (x.as_tokens() if isinstance(x, Cache) else x for x in (own, prefix))
    if prefix is not None:
        B = q.shape[0]
        own = jax.tree.map(
            lambda before, after: jnp.concatenate([jnp.broadcast_to(before, (B, *before.shape)), after], axis=1),
            prefix,
            own,
        )
    mask = None if mask is None else mask[:, None]
    return jax.nn.dot_product_attention(
        q, own.k, own.v, mask=mask, is_causal=mask is None, implementation=implementation
    )


def query_blocks(T: int) -> list[tuple[int, int]]:
    """(start, end) of the blocks into which causal attention over T tokens is cut."""
    size = max(QUERY_BLOCK, -(-T // MOST_BLOCKS))
    return [(start, min(start + size, T)) for start in range(0, T, size)]


@flax.struct.dataclass
class _Rows:
    """Scaled queries [B, K, G, T, H] of some rows, their own keys, and both's own positions [B, T] and [B, S]."""

    q: jax.Array
    own: Cache
    positions: jax.Array
    key_positions: jax.Array

    def block(self, start: int, end: int, keys: int | None) -> "_Rows":
        """Queries start .. end-1 and the first keys (all where None)."""
        return _Rows(
            self.q[..., start:end, :], self.own.until(keys), self.positions[:, start:end], self.key_positions[:, :keys]
        )


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How the work is cut: rows of each of `shares` devices into `loops` parts, a part into blocks of queries.

    A block is (first query, end, keys that it reads). Parts come one after the other, and in each its blocks: what a
    part reads and writes more than once stays in a CPU's cache.
    """

    shares: int
    loops: int
    blocks: tuple[tuple[int, int, int | None], ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], *, causal: bool, at_once: bool) -> "_Cut":
        """Of queries [B, K, G, T, H]; `at_once` keeps all rows in one part."""
        B, _, G, T, _ = shape
        blocks = tuple((start, end, end) for start, end in query_blocks(T)) if causal else ((0, T, None),)
        mesh = jax.sharding.get_abstract_mesh()
        shares = math.prod(mesh.shape.get(axis, 1) for axis in ("data", "fsdp"))
        if at_once or B % shares:  # rows that do not divide are not split over devices either
            return cls(1, 1, blocks)
        rows, queries = B // shares, blocks[0][1]
        return cls(shares, rows // rows_at_once(rows, G * queries), blocks)

    def parts(self, tree: Any) -> Any:
        """[B, ...] -> [loops, B / loops, ...], every part with rows of each device; on one device no copy."""

        def split(x: jax.Array) -> jax.Array:
            x = x.reshape(self.shares, self.loops, -1, *x.shape[1:]).swapaxes(0, 1)
            return x.reshape(self.loops, -1, *x.shape[3:])

        return jax.tree.map(split, tree)

    def whole(self, tree: Any) -> Any:
        """`parts` undone."""

        def merge(x: jax.Array) -> jax.Array:
            x = x.reshape(self.loops, self.shares, -1, *x.shape[2:]).swapaxes(0, 1)
            return x.reshape(-1, *x.shape[3:])

        return jax.tree.map(merge, tree)


def rows_at_once(rows: int, queries: int) -> int:
    """The largest divisor of `rows` whose queries (per row and kv head) are SCORE_ROWS or less; at least 1."""
    most = max(SCORE_ROWS // queries, 1)
    return max(n for n in range(1, rows + 1) if rows % n == 0 and n <= most)


# Softmax attention in einsums with its gradient by hand: backward computes the weights anew from the logarithm of their
# sum, as FlashAttention does, so scores exist for SCORE_ROWS queries at a time and none are kept (on a CPU they stay in
# its cache, where the products with 1024 keys took a third of the time). Prefix and own keys stay two blocks: products
# with own keys lead with rows, one product with the prefix serves all rows, and nothing is joined.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_rows(cut: _Cut, rows: _Rows, prefix: Cache | None, prefix_length: jax.Array) -> jax.Array:
    """Attention output, like the queries [B, K, G, T, H]."""
    return _attend_forward(cut, rows, prefix, prefix_length)[0]


def _attend_forward(cut: _Cut, rows: _Rows, prefix: Cache | None, prefix_length: jax.Array) -> tuple[jax.Array, Any]:
    def some(rows: _Rows) -> tuple[jax.Array, jax.Array]:
        outs, log_sums = zip(
            *(_softmax_product(rows.block(*block), prefix, prefix_length) for block in cut.blocks), strict=True
        )
        return jnp.concatenate(outs, axis=3), jnp.concatenate(log_sums, axis=3)

    out, log_sum = some(rows) if cut.loops == 1 else cut.whole(jax.lax.map(some, cut.parts(rows)))
    out, log_sum = checkpoint_name(out, "attention"), checkpoint_name(log_sum, "attention")
    return out, (rows, prefix, prefix_length, out, log_sum)


def _softmax_product(rows: _Rows, prefix: Cache | None, prefix_length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output like the queries, and the logarithm of the sum of weights [B, K, G, T], float32 at least.

    Dividing the output by the sum of the weights, not each weight, saves passes over [.., T, S].
    """
    q, own = _by_row(rows.q), rows.own
    scores, shared = _scores(rows, prefix, prefix_length)
    top = jnp.max(scores, axis=-1)
    if prefix is not None:
        top = jnp.maximum(top, _from_heads(jnp.max(shared, axis=-1), len(q)))
    weights = jnp.exp(scores - top[..., None])
    out = jnp.einsum("BKRS,BKSH->BKRH", weights.astype(q.dtype), own.v, preferred_element_type=weights.dtype)
    total = jnp.sum(weights, axis=-1)
    if prefix is not None:
        weights = jnp.exp(shared - _to_heads(top)[..., None])
        more = jnp.einsum("KRP,KPH->KRH", weights.astype(q.dtype), prefix.v, preferred_element_type=weights.dtype)
        out, total = out + _from_heads(more, len(q)), total + _from_heads(jnp.sum(weights, axis=-1), len(q))
    log_sum = (top + jnp.log(total)).reshape(rows.q.shape[:-1])
    return (out / total[..., None]).astype(q.dtype).reshape(rows.q.shape), log_sum


def _scores(rows: _Rows, prefix: Cache | None, prefix_length: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Scores of own keys [B, K, G T, S] and of the prefix [K, B G T, P], -inf where a key is not seen."""
    (B, K, G, T, _), q = rows.q.shape, _by_row(rows.q)
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    visible = (rows.key_positions[:, None, :] <= rows.positions[:, :, None])[:, None, None]
    scores = jnp.einsum("BKRH,BKHS->BKRS", q, rows.own.k, preferred_element_type=accumulate)
    scores = jnp.where(visible, scores.reshape(B, K, G, T, -1), -jnp.inf).reshape(scores.shape)
    if prefix is None:
        return scores, None
    shared = jnp.einsum("KRH,KHP->KRP", _to_heads(q), prefix.k, preferred_element_type=accumulate)
    return scores, jnp.where(jnp.arange(prefix.length) < prefix_length, shared, -jnp.inf)


def _attend_backward(cut: _Cut, saved: Any, cotangent: jax.Array) -> tuple[_Rows, Cache | None, None]:
    rows, prefix, prefix_length, out, log_sum = saved
    accumulate = log_sum.dtype
    # Of weight p and its cotangent dp, the score's is p (dp - sum over keys of p dp), and that sum is <out, cotangent>.
    inner = jnp.sum(out.astype(accumulate) * cotangent, axis=-1)
    zero, turned = None, None
    if prefix is not None:
        turned = _turned(prefix)
        zero = Cache(jnp.zeros(prefix.k.shape, accumulate), jnp.zeros(turned.v.shape, accumulate))

    def some(of_prefix: Cache | None, part: Any) -> tuple[Cache | None, tuple[jax.Array, Cache]]:
        rows, *sums = part
        own_turned, S = _turned(rows.own), rows.own.length
        of_q, of_own = [], []
        for start, end, keys in cut.blocks:
            block = rows.block(start, end, keys)
            g, log_sum, inner = (x[:, :, :, start:end] for x in sums)
            q, g, log_sum, inner = (
                _by_row(block.q),
                _by_row(g),
                *(x.reshape(*x.shape[:2], -1) for x in (log_sum, inner)),
            )
            scores, shared = _scores(block, prefix, prefix_length)
            of_rows, of_keys = _cotangents(
                "B", scores, q, g, log_sum, inner, Cache(own_turned.k[..., :keys, :], own_turned.v[..., :keys])
            )
            if prefix is not None:
                more, of_shared = _cotangents("", shared, *map(_to_heads, (q, g, log_sum, inner)), turned)
                of_rows += _from_heads(more, len(q))
                of_prefix = jax.tree.map(jnp.add, of_prefix, of_shared)
            of_q.append(of_rows.reshape(block.q.shape).astype(q.dtype))
            of_own.append(jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * 3 + [(0, S - x.shape[-1])]), of_keys))
        of_own = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), of_own)
        of_own = Cache(of_own.k.astype(q.dtype), of_own.v.swapaxes(-1, -2).astype(q.dtype))
        return of_prefix, (jnp.concatenate(of_q, axis=3), of_own)

    parts = (rows, cotangent, log_sum, inner)
    if cut.loops == 1:
        of_prefix, (of_q, of_own) = some(zero, parts)
    else:
        of_prefix, out = jax.lax.scan(some, zero, cut.parts(parts))
        of_q, of_own = cut.whole(out)
    if prefix is not None:
        of_prefix = Cache(of_prefix.k.astype(prefix.k.dtype), of_prefix.v.swapaxes(-1, -2).astype(prefix.v.dtype))
    return _Rows(of_q, of_own, None, None), of_prefix, None


_attend_rows.defvjp(_attend_forward, _attend_backward)


def _cotangents(
    rows_axis: str, scores: jax.Array, q: jax.Array, g: jax.Array, log_sum: jax.Array, inner: jax.Array, turned: Cache
) -> tuple[jax.Array, Cache]:
    """Of queries, and of keys and values both [.., H, S], by one block of keys; `rows_axis` is B or none.

    Values' cotangent is laid out with keys last, as that of keys: otherwise XLA's CPU compiler takes twice as long.
    """

    def product(spec: str, *operands: jax.Array) -> jax.Array:
        return jnp.einsum(spec.replace("B", rows_axis), *operands, preferred_element_type=scores.dtype)

    weights = jnp.exp(scores - log_sum[..., None])
    of_scores = (weights * (product("BKRH,BKHS->BKRS", g, turned.v) - inner[..., None])).astype(q.dtype)
    of_q = product("BKRS,BKSH->BKRH", of_scores, turned.k)
    of_k = product("BKRS,BKRH->BKHS", of_scores, q)
    return of_q, Cache(of_k, product("BKRS,BKRH->BKHS", weights.astype(q.dtype), g))


def _turned(cache: Cache) -> Cache:
    """Keys [.., S, H] and values [.., H, S]: backward's products read them along the other axis than forward's."""
    return Cache(cache.k.swapaxes(-1, -2), cache.v.swapaxes(-1, -2))


def _by_row(x: jax.Array) -> jax.Array:
    """[B, K, G, T, H] -> [B, K, G T, H]."""
    B, K, _, _, H = x.shape
    return x.reshape(B, K, -1, H)


def _to_heads(x: jax.Array) -> jax.Array:
    """[B, K, R, ...] -> [K, B R, ...]."""
    B, K, R, *rest = x.shape
    return x.swapaxes(0, 1).reshape(K, B * R, *rest)


def _from_heads(x: jax.Array, B: int) -> jax.Array:
    """[K, B R, ...] -> [B, K, R, ...]."""
    K, R, *rest = x.shape
    return x.reshape(K, B, R // B, *rest).swapaxes(0, 1)
