"""RouterLM: the router as a pure-functional Flax Linen module, without hidden state.

Parameters are plain nested dicts; the KV cache is an argument and a result. Two layouts of the same parameters:

- *stacked* (training): one `lax.scan` over layers, rematerialised (`config.remat`); leaves under "layers" lead with L.
- *unrolled* (rollout): one entry per layer, so that a decode step copies no weight and no cache. `unroll` goes from one
  to the other, once at each weight push.
"""

import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from router_r1_jax.model.attention import KV, Cache, apply_rope, attend, read_cache, write_cache
from router_r1_jax.model.config import LoRA, ModelConfig

Params = dict[str, Any]

# What a rematerialised block keeps beside its input.
_REMAT = {"full": None, "dots": jax.checkpoint_policies.save_only_these_names("projection", "attention")}


@flax.struct.dataclass
class Prefix:
    """Keys and values of the tokens that all rows share, and how many of the P positions are real (int32 scalar).

    `kv` is one KV with leading L (stacked) or a tuple of L (unrolled): KVs, or for decoding Caches.
    """

    kv: Any
    length: jax.Array


def adapter_dtype(config: ModelConfig) -> jnp.dtype:
    """Of LoRA's parameters: at least float32."""
    return jnp.promote_types(config.dtype, jnp.float32)


def _init(deviation: float, *axes: str | None) -> nn.initializers.Initializer:
    return nn.with_logical_partitioning(nn.initializers.normal(deviation), axes)


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [M, I] @ w [I, O] -> [M, O], with a gradient of w that XLA's CPU compiler computes fast."""
    return x @ w


def _matmul_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ w, (x, w)


def _matmul_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    return g @ w.T, weight_gradient(x, g)


matmul.defvjp(_matmul_forward, _matmul_backward)


def weight_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """x [M, I], g [M, O] -> x.T @ g [I, O].

    The product contracts M, the long axis, along which one operand must be laid out. XLA's CPU compiler takes x as it
    lies or copies it, whatever its size; here the narrower one of the two is copied. It also folds a transposition of
    the result into the product, which then takes 1.6 times as long: hence the outer barrier.
    """
    barrier = jax.lax.optimization_barrier

    def laid_out_anew(x: jax.Array, g: jax.Array) -> jax.Array:
        if x.shape[1] <= g.shape[1]:
            return barrier(x.T) @ g
        return barrier(barrier(g.T) @ x).T

    return jax.lax.platform_dependent(x, g, cpu=laid_out_anew, default=lambda x, g: x.T @ g)


def head_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """Hidden states [..., D] and head [V, D] -> logits [..., V], float32."""
    return jnp.einsum("...D,VD->...V", hidden, head, preferred_element_type=jnp.float32)


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last axis, in float32."""

    config: ModelConfig
    axis: str | None = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Same shape and dtype as x."""
        scale = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones_init(), (self.axis,)),
            (x.shape[-1],),
            self.config.dtype,
        )
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.config.rms_eps)
        return x32.astype(x.dtype) * scale


class Projection(nn.Module):
    """A linear map between named axes; `kernel` carries their logical names for sharding.

    Where `config.lora` targets it, an adapter `lora_a` [inputs, r] and `lora_b` [r, outputs] adds its product.
    """

    config: ModelConfig
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str | None, ...]
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Contract the last len(inputs) axes of x with the kernel's first."""
        dtype, init = self.config.dtype, _init(self.config.initializer_range, *self.axes)
        kernel = self.param("kernel", init, self.inputs + self.outputs, dtype)
        # As a product of two matrices: XLA's CPU compiler copies the operands of the kernel's gradient where they have
        # more axes, and fuses into each copy whatever made them (the whole update took 1.2 times as long).
        lead = x.shape[: x.ndim - len(self.inputs)]
        x = x.reshape(math.prod(lead), -1)
        y = matmul(x, kernel.reshape(x.shape[-1], -1))
        lora = self.config.lora
        if lora is not None and self.name in lora.targets:
            y += self._adapted(x, lora).astype(y.dtype)
        y = y.reshape(*lead, *self.outputs)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[len(self.inputs) :])
            y += self.param("bias", zeros, self.outputs, dtype)
        return checkpoint_name(y, "projection")

    def _adapted(self, x: jax.Array, lora: LoRA) -> jax.Array:
        """[M, inputs] -> [M, outputs]. Adapters move by steps that half precision would round away, the rest does not.

        The start is that of the `peft` library: A uniform, so that A x has a third of the variance of x, and B zero.
        """
        dtype, cut = adapter_dtype(self.config), len(self.inputs)
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", range(cut), cut)
        a = nn.with_logical_partitioning(uniform, (*self.axes[:cut], "rank"))
        b = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("rank", *self.axes[cut:]))
        a = self.param("lora_a", a, (*self.inputs, lora.rank), dtype).astype(x.dtype)
        b = self.param("lora_b", b, (lora.rank, *self.outputs), dtype).astype(x.dtype)
        return (x @ a.reshape(x.shape[-1], -1)) @ b.reshape(lora.rank, -1) * lora.scale


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions, an optional shared prefix and an optional cache."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array | None,
        prefix: KV | Cache | None,
        prefix_length: jax.Array,
        cache: Cache | None,
        rows: jax.Array | None,
    ) -> tuple[jax.Array, KV | Cache]:
        """x [B, T, D] -> ([B, T, D], the cache after writing, or without a cache this call's own KV [B, T, K, H])."""
        c = self.config
        D, N, K, H = c.width, c.num_heads, c.num_kv_heads, c.head_dim
        q = Projection(c, (D,), (N, H), ("embed", "heads", None), c.qkv_bias, name="q")(x)
        k = Projection(c, (D,), (K, H), ("embed", "kv_heads", None), c.qkv_bias, name="k")(x)
        v = Projection(c, (D,), (K, H), ("embed", "kv_heads", None), c.qkv_bias, name="v")(x)
        if c.qk_norm:
            q, k = RMSNorm(c, None, name="q_norm")(q), RMSNorm(c, None, name="k_norm")(k)
        in_order = positions is None
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None] if in_order else positions
        absolute = positions + prefix_length
        q, own = apply_rope(q, absolute, c), KV(apply_rope(k, absolute, c), v)
        if cache is None:
            # Keys lie where the tokens do: with positions that do not start at 0, a slot number would not be causal.
            out = attend(
                q, own, positions, positions, prefix, prefix_length, causal=in_order, implementation=c.attention
            )
            seen = own
        else:
            seen = write_cache(cache, own, positions, rows)
            slots = jnp.arange(cache.length)[None]
            keys = read_cache(seen, rows)
            out = attend(q, keys, positions, slots, prefix, prefix_length, causal=False, implementation=c.attention)
        return Projection(c, (N, H), (D,), ("heads", None, "embed"), name="o")(out), seen


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        c = self.config
        gate = Projection(c, (c.width,), (c.mlp,), ("embed", "mlp"), name="gate")(x)
        up = Projection(c, (c.width,), (c.mlp,), ("embed", "mlp"), name="up")(x)
        return Projection(c, (c.mlp,), (c.width,), ("mlp", "embed"), name="down")(nn.silu(gate) * up)


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and added to the stream."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        prefix: KV | Cache | None,
        cache: Cache | None,
        positions: jax.Array | None,
        prefix_length: jax.Array,
        rows: jax.Array | None,
    ) -> tuple[jax.Array, KV | Cache]:
        """x [B, T, D] -> ([B, T, D], as Attention); argument order suits `nn.scan` (scanned ones first)."""
        c = self.config
        normed = RMSNorm(c, name="attention_norm")(x)
        out, kv = Attention(c, name="attention")(normed, positions, prefix, prefix_length, cache, rows)
        x = x + out
        x = x + MLP(c, name="mlp")(RMSNorm(c, name="mlp_norm")(x))
        return nn.with_logical_constraint(x, ("batch", "length", "embed_act")), kv


class RouterLM(nn.Module):
    """The router language model. `unrolled` chooses the parameter layout (see the module docstring)."""

    config: ModelConfig
    unrolled: bool = False

    def setup(self) -> None:
        """Embedding, layers, final norm and, where untied, the head."""
        c = self.config
        self.embed = self.param("embed", _init(c.embedding_range, "vocab", "embed"), (c.vocab_size, c.width), c.dtype)
        if self.unrolled:
            self.layers = [Block(c, name=f"layer_{i}") for i in range(c.num_layers)]
        else:
            block = Block if c.remat == "none" else nn.remat(Block, prevent_cse=False, policy=_REMAT[c.remat])
            self.layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
                out_axes=0,
                length=c.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c, name="layers")
        self.final_norm = RMSNorm(c, name="final_norm")
        if not c.tie_embeddings:
            self.head = self.param("head", _init(c.embedding_range, "vocab", "embed"), (c.vocab_size, c.width), c.dtype)

    def hidden(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        prefix: Prefix | None = None,
        cache: tuple[Cache, ...] | None = None,
        rows: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Hidden states before the head.

        Args:
          tokens: [B, T] int32.
          positions: [B, T] int32 own positions, counted from the end of the prefix; 0 .. T-1 by default.
          prefix: what all rows see before their own position 0.
          cache: one Cache per layer (unrolled layout only); written at `positions`, then attended to.
          rows: [R] rows of the cache that `tokens` [R, T] belong to; all of them by default.

        Returns:
          [B, T, D] hidden states after the final norm, and the updated cache, or without one this call's own KV of
          every layer (stacked or tuple, as the layout has it), from which a `Prefix` is made.
        """
        if cache is not None and not self.unrolled:
            raise ValueError("a cache needs RouterLM(config, unrolled=True): a scan over layers would copy it")
        if cache is not None and positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        length = jnp.int32(0) if prefix is None else prefix.length
        x = jnp.take(nn.with_logical_constraint(self.embed, ("vocab", None)), tokens, axis=0)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed_act"))
        if self.unrolled:
            kvs = []
            for i, layer in enumerate(self.layers):
                before = None if prefix is None else prefix.kv[i]
                x, kv = layer(x, before, None if cache is None else cache[i], positions, length, rows)
                kvs.append(kv)
            kv = tuple(kvs)
        else:
            x, kv = self.layers(x, None if prefix is None else prefix.kv, None, positions, length, None)
        return self.final_norm(x), kv

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] -> logits [..., V], float32."""
        return head_logits(hidden, self.embed if self.config.tie_embeddings else self.head)

    def __call__(self, tokens: jax.Array, **kwargs: Any) -> Any:
        """Logits [B, T, V] of tokens [B, T]; with `cache=` in kwargs (see `hidden`) also the updated cache."""
        hidden, kv = self.hidden(tokens, **kwargs)
        return self.logits(hidden) if kwargs.get("cache") is None else (self.logits(hidden), kv)


def unroll(params: Params, num_layers: int) -> Params:
    """Stacked parameters -> unrolled layout (`layer_0`, `layer_1`, ...)."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    layers = {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(num_layers)}
    return rest | layers


def empty_cache(config: ModelConfig, rows: int, length: int) -> tuple[Cache, ...]:
    """Zeroed caches of B rows and S positions, one per layer."""
    B, S, K, H = rows, length, config.num_kv_heads, config.head_dim
    return tuple(
        Cache(jnp.zeros((B, K, H, S), config.dtype), jnp.zeros((B, K, S, H), config.dtype))
        for _ in range(config.num_layers)
    )
