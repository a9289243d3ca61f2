"""Grouped-query attention over a shared prefix and each row's keys; einsums with a gradient like FlashAttention's.

    keys that row b reads:   [ shared prefix, P positions | the row's positions 0 .. S-1 ]
    rotary position:           0 .. length-1                length + position

All rows of a batch begin with the same prefix (instructions and model cards), so its keys are kept once and never
copied per row. The keys of a row are those of the tokens at hand (training: S = T), or a cache to which they have been
written (decoding: T = 1, chunked prefill: T = chunk).

`attend` chooses between the einsums of this file and `jax.nn.dot_product_attention` (XLA or cuDNN).
"""

import dataclasses
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from router_r1_jax.errors import ConfigError
from router_r1_jax.model.config import AttentionName, ModelConfig
from router_r1_jax.model.kv_cache import KV, Cache

SCORE_ROWS = 1024  # queries per KV head whose scores are held at a time in training
QUERY_BLOCK = 128  # smallest block of queries in causal attention; smaller ones save no work
MOST_BLOCKS = 8  # blocks of queries in one call; more would compile longer and save little


def check_attention(config: ModelConfig) -> None:
    """Raise ConfigError if this machine cannot run `config.attention`; ModelConfig itself checks everything else."""
    backend = jax.default_backend()
    if config.attention == "cudnn" and backend not in ("gpu", "cuda"):
        raise ConfigError(
            f"model.attention is 'cudnn', which needs an NVIDIA GPU; this is {backend}: choose 'einsum' or 'xla'"
        )


def attend(
    q: jax.Array,
    kv: KV | Cache,
    positions: jax.Array,
    key_positions: jax.Array,
    prefix: KV | Cache | None,
    prefix_length: jax.Array,
    *,
    causal: bool,
    implementation: AttentionName = "einsum",
) -> jax.Array:
    """Attention output [B, T, N, H] of queries [B, T, N, H] at positions [B or 1, T], counted behind the prefix.

    A query at position t sees the first `prefix_length` entries of the prefix, and those keys of its row that have a
    position of at most t (`key_positions` [B or 1, S]). `causal` promises that queries and keys are the same tokens in
    the order of their positions, so that about half of the products can be left out.

    Decoding (one query per row on a cache) always uses the einsums: the other implementations would join the prefix to
    each row's cache, which copies the cache at every step.
    """
    B, T, N, H = q.shape
    if implementation == "einsum" or (T == 1 and isinstance(kv, Cache)):
        at_once = isinstance(kv, Cache)  # there is no gradient, and a loop over parts would copy the cache
        kv, prefix = (x.to_cache() if isinstance(x, KV) else x for x in (kv, prefix))
        K = kv.k.shape[1]
        q = (q * (H**-0.5)).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
        positions, key_positions = (jnp.broadcast_to(x, (B, x.shape[1])) for x in (positions, key_positions))
        tiling = _Tiling.of(q.shape, causal=causal, at_once=at_once)
        out = _attend_einsum(tiling, _Rows(q, kv, positions, key_positions), prefix, prefix_length)
        return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    kv, prefix = (x.to_kv() if isinstance(x, Cache) else x for x in (kv, prefix))
    if causal and prefix is None:
        return jax.nn.dot_product_attention(q, kv.k, kv.v, is_causal=True, implementation=implementation)
    visible = key_positions[:, None, :] <= positions[:, :, None]  # [B or 1, T, S]
    if prefix is not None:
        P = len(prefix.k)
        in_prefix = jnp.broadcast_to(jnp.arange(P) < prefix_length, (*visible.shape[:2], P))
        visible = jnp.concatenate([in_prefix, visible], axis=-1)

        def join(shared: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.concatenate([jnp.broadcast_to(shared, (B, *shared.shape)), x], axis=1)

        kv = jax.tree.map(join, prefix, kv)
    return jax.nn.dot_product_attention(q, kv.k, kv.v, mask=visible[:, None], implementation=implementation)


def query_blocks(T: int) -> list[tuple[int, int]]:
    """(start, end) of the blocks of queries into which causal attention over T tokens is divided."""
    size = max(QUERY_BLOCK, -(-T // MOST_BLOCKS))
    return [(start, min(start + size, T)) for start in range(0, T, size)]


def rows_at_once(rows: int, queries: int) -> int:
    """The largest divisor of `rows` with at most SCORE_ROWS queries, at `queries` per row and KV head; at least 1."""
    most = max(SCORE_ROWS // queries, 1)
    return max(n for n in range(1, rows + 1) if rows % n == 0 and n <= most)


@flax.struct.dataclass
class _Rows:
    """Scaled queries [B, K, G, T, H] of some rows, the rows' keys and values, and the positions [B, T] and [B, S]."""

    q: jax.Array
    kv: Cache
    positions: jax.Array
    key_positions: jax.Array

    def block(self, start: int, end: int, keys: int | None) -> "_Rows":
        """Queries start .. end-1 and the first `keys` keys (None: all keys)."""
        return _Rows(
            self.q[..., start:end, :], self.kv.first(keys), self.positions[:, start:end], self.key_positions[:, :keys]
        )


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """Tiles of the work: each of `shares` devices divides its rows into `loops` parts, and a part into query blocks.

    A block is (first query, end, number of keys that it reads). Parts are computed one after the other, and the blocks
    of a part one after the other: data that a part reads and writes more than once then stays in a CPU's cache.
    """

    shares: int
    loops: int
    blocks: tuple[tuple[int, int, int | None], ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], *, causal: bool, at_once: bool) -> "_Tiling":
        """The tiling for queries [B, K, G, T, H]; `at_once` keeps all rows in one part."""
        B, _, G, T, _ = shape
        blocks = tuple((start, end, end) for start, end in query_blocks(T)) if causal else ((0, T, None),)
        mesh = jax.sharding.get_abstract_mesh()
        shares = math.prod(mesh.shape.get(axis, 1) for axis in ("data", "fsdp"))
        if at_once or B % shares:  # rows that do not divide are not split over devices
            return cls(1, 1, blocks)
        rows, queries = B // shares, blocks[0][1]
        return cls(shares, rows // rows_at_once(rows, G * queries), blocks)

    def split(self, tree: Any) -> Any:
        """[B, ...] -> [loops, B / loops, ...]. Every part has rows of each device; one device needs no copy."""

        def split(x: jax.Array) -> jax.Array:
            parts = x.reshape(self.shares, self.loops, -1, *x.shape[1:]).swapaxes(0, 1)
            return parts.reshape(self.loops, -1, *x.shape[1:])

        return jax.tree.map(split, tree)

    def merge(self, tree: Any) -> Any:
        """The inverse of `split`."""

        def merge(x: jax.Array) -> jax.Array:
            parts = x.reshape(self.loops, self.shares, -1, *x.shape[2:]).swapaxes(0, 1)
            return parts.reshape(-1, *x.shape[2:])

        return jax.tree.map(merge, tree)


# Softmax attention in einsums, with its gradient by hand. As in FlashAttention, the backward pass recomputes the
# weights from the logarithm of their sum: scores exist for SCORE_ROWS queries at a time, and none are kept. The prefix
# and the rows' keys stay two separate blocks: products with a row's keys have a leading axis of rows, one product with
# the prefix serves all rows, and nothing is concatenated.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_einsum(tiling: _Tiling, rows: _Rows, prefix: Cache | None, prefix_length: jax.Array) -> jax.Array:
    """Attention output in the shape of the queries, [B, K, G, T, H]."""
    return _attend_forward(tiling, rows, prefix, prefix_length)[0]


def _attend_forward(
    tiling: _Tiling, rows: _Rows, prefix: Cache | None, prefix_length: jax.Array
) -> tuple[jax.Array, Any]:
    def attend_part(rows: _Rows) -> tuple[jax.Array, jax.Array]:
        blocks = [_softmax_product(rows.block(*block), prefix, prefix_length) for block in tiling.blocks]
        out, log_sum = (jnp.concatenate(x, axis=3) for x in zip(*blocks, strict=True))
        return out, log_sum

    if tiling.loops == 1:
        out, log_sum = attend_part(rows)
    else:
        out, log_sum = tiling.merge(jax.lax.map(attend_part, tiling.split(rows)))
    out, log_sum = checkpoint_name(out, "attention"), checkpoint_name(log_sum, "attention")
    return out, (rows, prefix, prefix_length, out, log_sum)


def _softmax_product(rows: _Rows, prefix: Cache | None, prefix_length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output in the shape of the queries, and the logarithm of the sum of weights [B, K, G, T], float32 at least.

    The output is divided by the sum of the weights, because dividing each weight would pass over [.., T, S] again.
    """
    q, B = _merge_groups(rows.q), len(rows.q)
    scores, prefix_scores = _scores(rows, prefix, prefix_length)
    top = jnp.max(scores, axis=-1)
    if prefix is not None:
        top = jnp.maximum(top, _to_rows(jnp.max(prefix_scores, axis=-1), B))
    weights = jnp.exp(scores - top[..., None])
    out = jnp.einsum("BKRS,BKSH->BKRH", weights.astype(q.dtype), rows.kv.v, preferred_element_type=weights.dtype)
    total = jnp.sum(weights, axis=-1)
    if prefix is not None:
        weights = jnp.exp(prefix_scores - _to_heads(top)[..., None])
        more = jnp.einsum("KRP,KPH->KRH", weights.astype(q.dtype), prefix.v, preferred_element_type=weights.dtype)
        out, total = out + _to_rows(more, B), total + _to_rows(jnp.sum(weights, axis=-1), B)
    log_sum = (top + jnp.log(total)).reshape(rows.q.shape[:-1])
    return (out / total[..., None]).astype(q.dtype).reshape(rows.q.shape), log_sum


def _scores(rows: _Rows, prefix: Cache | None, prefix_length: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Scores of the rows' keys [B, K, G T, S] and of the prefix [K, B G T, P]; -inf for keys that are not seen."""
    (B, K, G, T, _), q = rows.q.shape, _merge_groups(rows.q)
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    visible = (rows.key_positions[:, None, :] <= rows.positions[:, :, None])[:, None, None]
    scores = jnp.einsum("BKRH,BKHS->BKRS", q, rows.kv.k, preferred_element_type=accumulate)
    scores = jnp.where(visible, scores.reshape(B, K, G, T, -1), -jnp.inf).reshape(scores.shape)
    if prefix is None:
        return scores, None
    prefix_scores = jnp.einsum("KRH,KHP->KRP", _to_heads(q), prefix.k, preferred_element_type=accumulate)
    return scores, jnp.where(jnp.arange(prefix.length) < prefix_length, prefix_scores, -jnp.inf)


def _attend_backward(tiling: _Tiling, saved: Any, grad_out: jax.Array) -> tuple[_Rows, Cache | None, None]:
    rows, prefix, prefix_length, out, log_sum = saved
    accumulate = log_sum.dtype
    # If dp is the gradient of a weight p, that of its score is p (dp - sum over keys of p dp). The sum is <out, g>.
    inner = jnp.sum(out.astype(accumulate) * grad_out, axis=-1)
    zero = prefix_t = None
    if prefix is not None:
        prefix_t = _transposed(prefix)
        zero = Cache(jnp.zeros(prefix.k.shape, accumulate), jnp.zeros(prefix_t.v.shape, accumulate))

    def part_gradients(grad_prefix: Cache | None, part: Any) -> tuple[Cache | None, tuple[jax.Array, Cache]]:
        rows, *per_query = part
        kv_t, S = _transposed(rows.kv), rows.kv.length
        grad_q, grad_kv = [], []
        for start, end, keys in tiling.blocks:
            block = rows.block(start, end, keys)
            queries = [block.q, *(x[:, :, :, start:end] for x in per_query)]
            queries = [_merge_groups(x) for x in queries]
            scores, prefix_scores = _scores(block, prefix, prefix_length)
            block_kv_t = Cache(kv_t.k[..., :keys, :], kv_t.v[..., :keys])
            of_q, of_kv = _block_gradients("B", scores, *queries, block_kv_t)
            if prefix is not None:
                more, of_prefix = _block_gradients("", prefix_scores, *map(_to_heads, queries), prefix_t)
                of_q += _to_rows(more, len(block.q))
                grad_prefix = jax.tree.map(jnp.add, grad_prefix, of_prefix)
            grad_q.append(of_q.reshape(block.q.shape).astype(block.q.dtype))
            grad_kv.append(jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * 3 + [(0, S - x.shape[-1])]), of_kv))
        grad_kv = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), grad_kv)
        grad_kv = Cache(grad_kv.k.astype(rows.q.dtype), grad_kv.v.swapaxes(-1, -2).astype(rows.q.dtype))
        return grad_prefix, (jnp.concatenate(grad_q, axis=3), grad_kv)

    parts = (rows, grad_out, log_sum, inner)
    if tiling.loops == 1:
        grad_prefix, (grad_q, grad_kv) = part_gradients(zero, parts)
    else:
        grad_prefix, out = jax.lax.scan(part_gradients, zero, tiling.split(parts))
        grad_q, grad_kv = tiling.merge(out)
    if prefix is not None:
        grad_prefix = Cache(grad_prefix.k.astype(prefix.k.dtype), grad_prefix.v.swapaxes(-1, -2).astype(prefix.v.dtype))
    return _Rows(grad_q, grad_kv, None, None), grad_prefix, None


_attend_einsum.defvjp(_attend_forward, _attend_backward)


def _block_gradients(
    rows_axis: str,
    scores: jax.Array,
    q: jax.Array,
    g: jax.Array,
    log_sum: jax.Array,
    inner: jax.Array,
    kv_t: Cache,
) -> tuple[jax.Array, Cache]:
    """Gradients of queries, and of keys and values as [.., H, S], by one block of keys; `rows_axis` is "B" or "".

    The gradient of the values keeps the axis of the keys last, like that of the keys: XLA's CPU compiler takes twice as
    long otherwise.
    """

    def product(spec: str, *operands: jax.Array) -> jax.Array:
        return jnp.einsum(spec.replace("B", rows_axis), *operands, preferred_element_type=scores.dtype)

    weights = jnp.exp(scores - log_sum[..., None])
    grad_scores = (weights * (product("BKRH,BKHS->BKRS", g, kv_t.v) - inner[..., None])).astype(q.dtype)
    grad_q = product("BKRS,BKSH->BKRH", grad_scores, kv_t.k)
    grad_k = product("BKRS,BKRH->BKHS", grad_scores, q)
    return grad_q, Cache(grad_k, product("BKRS,BKRH->BKHS", weights.astype(q.dtype), g))


def _transposed(cache: Cache) -> Cache:
    """Keys [.., S, H] and values [.., H, S]: the backward pass reads them along the other axis than the forward."""
    return Cache(cache.k.swapaxes(-1, -2), cache.v.swapaxes(-1, -2))


def _merge_groups(x: jax.Array) -> jax.Array:
    """[B, K, G, T, ...] -> [B, K, G T, ...]."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _to_heads(x: jax.Array) -> jax.Array:
    """[B, K, R, ...] -> [K, B R, ...]."""
    B, K, R, *rest = x.shape
    return x.swapaxes(0, 1).reshape(K, B * R, *rest)


def _to_rows(x: jax.Array, B: int) -> jax.Array:
    """[K, B R, ...] -> [B, K, R, ...], the inverse of `_to_heads`."""
    K, R, *rest = x.shape
    return x.reshape(K, B, R // B, *rest).swapaxes(0, 1)
