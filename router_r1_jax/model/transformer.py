"""RouterLM, the decoder-only transformer: RMSNorm, projections with LoRA, attention, SwiGLU, rematerialisation.

The Flax Linen modules have no hidden state: parameters are plain nested dicts, and the KV cache is an argument and a
result. The parameters have two layouts:

- *stacked* (training): one `lax.scan` over layers, rematerialised (`config.remat`). Leaves under "layers" have a
  leading axis L.
- *unrolled* (rollout): one entry per layer, so that a decode step copies no weight and no cache. `unroll` turns the
  stacked layout into this one after each update.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from router_r1_jax.model.attention import attend
from router_r1_jax.model.config import LoRA, ModelConfig
from router_r1_jax.model.kv_cache import KV, Cache, Prefix
from router_r1_jax.model.rotary_embedding import apply_rope

Params = dict[str, Any]

# The results that a block keeps for its backward pass, beside its input.
_REMAT = {"full": None, "dots": jax.checkpoint_policies.save_only_these_names("projection", "attention")}


def _init(deviation: float, *axes: str | None) -> nn.initializers.Initializer:
    return nn.with_logical_partitioning(nn.initializers.normal(deviation), axes)


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [M, I] @ w [I, O] -> [M, O]; the gradient of w is `weight_gradient`."""
    return x @ w


def _matmul_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ w, (x, w)


def _matmul_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    return g @ w.T, weight_gradient(x, g)


matmul.defvjp(_matmul_forward, _matmul_backward)


def weight_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """x [M, I], g [M, O] -> x.T @ g [I, O], in a form that XLA's CPU compiler computes fast.

    The product contracts the long axis M, so one operand must be copied into another layout. By itself the compiler
    does not choose the smaller operand; here the narrower one is copied. The outer barrier keeps the compiler from
    folding a transposition of the result into the product, which is slower.
    """
    barrier = jax.lax.optimization_barrier

    def copy_the_narrower(x: jax.Array, g: jax.Array) -> jax.Array:
        if x.shape[1] <= g.shape[1]:
            return barrier(x.T) @ g
        return barrier(barrier(g.T) @ x).T

    return jax.lax.platform_dependent(x, g, cpu=copy_the_narrower, default=lambda x, g: x.T @ g)


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
    """A linear map between named axes. The names are the kernel's logical axes for sharding.

    If `config.lora` targets it, the product with an adapter `lora_a` [inputs, r] and `lora_b` [r, outputs] is added.
    """

    config: ModelConfig
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str | None, ...]
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Contract the last len(inputs) axes of x with the first axes of the kernel."""
        dtype, init = self.config.dtype, _init(self.config.initializer_range, *self.axes)
        kernel = self.param("kernel", init, self.inputs + self.outputs, dtype)
        # A product of two matrices: if they had more axes, XLA's CPU compiler would copy the operands of the kernel's
        # gradient, and recompute in each copy whatever made them.
        lead = x.shape[: x.ndim - len(self.inputs)]
        x = x.reshape(math.prod(lead), -1)
        y = matmul(x, kernel.reshape(x.shape[-1], -1))
        lora = self.config.lora
        if lora is not None and self.name in lora.targets:
            y += self._adapter_product(x, lora).astype(y.dtype)
        y = y.reshape(*lead, *self.outputs)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[len(self.inputs) :])
            y += self.param("bias", zeros, self.outputs, dtype)
        return checkpoint_name(y, "projection")

    def _adapter_product(self, x: jax.Array, lora: LoRA) -> jax.Array:
        """[M, inputs] -> [M, outputs]. Adapters start as in the `peft` library: B is 0, and A is uniform.

        A x then has a third of the variance of x.
        """
        dtype, split = self.config.adapter_dtype, len(self.inputs)
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", range(split), split)
        a = nn.with_logical_partitioning(uniform, (*self.axes[:split], "rank"))
        b = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("rank", *self.axes[split:]))
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
        """x [B, T, D] -> ([B, T, D], the updated cache, or without a cache the KV [B, T, K, H] of x)."""
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
        q, kv = apply_rope(q, absolute, c), KV(apply_rope(k, absolute, c), v)
        if cache is None:
            keys, key_positions = kv, positions
        else:
            kv = cache.write(kv, positions, rows)
            in_order, key_positions, keys = False, jnp.arange(cache.length)[None], kv.read(rows)
        out = attend(
            q, keys, positions, key_positions, prefix, prefix_length, causal=in_order, implementation=c.attention
        )
        return Projection(c, (N, H), (D,), ("heads", None, "embed"), name="o")(out), kv


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
    """One layer: attention and feed-forward, each behind a norm and added to the residual stream."""

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
        """x [B, T, D] -> ([B, T, D], as Attention). `nn.scan` needs the scanned arguments first."""
        c = self.config
        normed = RMSNorm(c, name="attention_norm")(x)
        out, kv = Attention(c, name="attention")(normed, positions, prefix, prefix_length, cache, rows)
        x = x + out
        x = x + MLP(c, name="mlp")(RMSNorm(c, name="mlp_norm")(x))
        return nn.with_logical_constraint(x, ("batch", "length", "embed_act")), kv


class RouterLM(nn.Module):
    """The router's language model. `unrolled` chooses the parameter layout (see the module docstring)."""

    config: ModelConfig
    unrolled: bool = False

    def setup(self) -> None:
        """Create embedding, layers, final norm and, if it is untied, the head."""
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
          positions: [B, T] int32, counted behind the prefix; 0 .. T-1 by default.
          prefix: tokens that all rows see before their position 0.
          cache: one Cache per layer (unrolled layout only). It is written at `positions`, then attended to.
          rows: [R] rows of the cache to which `tokens` [R, T] belong; all rows by default.

        Returns:
          [B, T, D] hidden states after the final norm, and the updated cache. Without a cache the second result is the
          KV of `tokens` in every layer (stacked or a tuple, as the parameters are), from which a `Prefix` is made.

        Raises:
          ValueError: a cache is given to the stacked layout.
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
        """Logits [B, T, V] of tokens [B, T]; with `cache` in kwargs (see `hidden`) also the updated cache."""
        hidden, kv = self.hidden(tokens, **kwargs)
        return self.logits(hidden) if kwargs.get("cache") is None else (self.logits(hidden), kv)


def unroll(params: Params, num_layers: int) -> Params:
    """Stacked parameters in the unrolled layout (`layer_0`, `layer_1`, ...)."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    layers = {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(num_layers)}
    return rest | layers
