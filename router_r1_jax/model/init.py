"""Parameters at rest: their shapes, their shardings, and a random start straight into them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from router_r1_jax.mesh import param_shardings
from router_r1_jax.model.attention import rope_frequencies
from router_r1_jax.model.config import STILL_FREQUENCY, ModelConfig
from router_r1_jax.model.transformer import Params, RouterLM

PREVIOUS_TOKEN_SCORE = 8.0  # nats, before the softmax, of the token before
PREVIOUS_TOKEN_FREQUENCY = 0.1  # radians per token
# The second layer of induction heads: how strongly it matches and copies.
MATCH_GAIN, COPY_GAIN = 16.0, 6.0


def _boxed(config: ModelConfig, key: jax.Array) -> Any:
    return RouterLM(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def random_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random stacked parameters, for use under `jax.jit`: what of them is not read is not made."""
    params = nn.meta.unbox(_boxed(config, key))
    return _with_induction_heads(config, params, jax.random.fold_in(key, 1)) if config.induction_heads else params


def _with_induction_heads(config: ModelConfig, params: Params, key: jax.Array) -> Params:
    """The first two layers begin as induction heads (Olsson et al. 2022): they read on from where a token stood before.

    That is what copying and looking up are built on, and what a small transformer that starts at random takes long to
    find, if it does (experiments/studies/README.md); pretrained ones have it. Such starts are called mimetic (Trockman
    and Kolter 2023, there of single products of weights). Heads of the first layer carry the token before, in a
    subspace of their own, into the stream; keys of the second layer read that subspace as queries read the token
    itself, so that a token finds what stood behind it; values of the second layer are written as they were read.
    """
    layers = dict(params["layers"])
    attention = {name: dict(projection) for name, projection in layers["attention"].items()}
    width, heads = config.width, config.induction_heads
    group, kv_heads, head_dim = config.num_heads // config.num_kv_heads, config.num_kv_heads, config.head_dim
    dtype = attention["q"]["kernel"].dtype

    def orthonormal(i: int, columns: int) -> jax.Array:
        """Random [D, columns]; as many of them as there are axes at right angles."""
        normal = jax.random.normal(jax.random.fold_in(key, i), (width, columns))
        blocks = [normal[:, j : j + width] for j in range(0, columns, width)]
        return jnp.concatenate([jnp.linalg.qr(block)[0] for block in blocks], axis=1)

    def put(name: str, field: str, layer: int, value: jax.Array, count: int) -> None:
        old = attention[name][field]
        attention[name][field] = old.at[layer, ..., :count, :].set(value.astype(dtype))

    # First layer: where from, what is read there, and where it is written.
    for name, bias, per_kv_head in zip(("q", "k"), _previous_token_biases(config), (group, 1), strict=True):
        put(name, "bias", 0, jnp.asarray(bias), heads * per_kv_head)
    read, written = (orthonormal(i, heads * head_dim).reshape(width, heads, head_dim) for i in range(2))
    # As large in the stream as the embeddings are, behind a norm that gives its input the length sqrt(width).
    scale = np.sqrt(config.embedding_range * np.sqrt(width / (heads * head_dim)))
    out = jnp.repeat(written.transpose(1, 2, 0), group, axis=0) / group
    put("v", "kernel", 0, read * scale, heads)
    attention["o"]["kernel"] = attention["o"]["kernel"].at[0, : heads * group].set((out * scale).astype(dtype))
    # Second layer: queries in pairs that do not turn, keys as queries of what was carried, values back as they came.
    still = np.flatnonzero(_frequencies(config) < STILL_FREQUENCY)
    still = np.concatenate([still, still + head_dim // 2])
    asked = orthonormal(2, kv_heads * still.size).reshape(width, kv_heads, still.size) * np.sqrt(MATCH_GAIN)
    query = jnp.zeros((width, kv_heads, head_dim)).at[..., still].set(asked)
    carried = jnp.einsum("DJH,EJH->DE", written, read)
    put("q", "kernel", 1, jnp.repeat(query, group, axis=1), config.num_heads)
    put("k", "kernel", 1, jnp.einsum("DE,EKH->DKH", carried, query), kv_heads)
    value = jnp.repeat(attention["v"]["kernel"][1].transpose(1, 2, 0), group, axis=0) / group
    attention["o"]["kernel"] = attention["o"]["kernel"].at[1].set((COPY_GAIN * value).astype(dtype))
    return params | {"layers": layers | {"attention": attention}}


def _frequencies(config: ModelConfig) -> np.ndarray:
    """Of the rotary pairs, radians per token; dimension i is turned with dimension i + head_dim / 2."""
    return np.asarray(rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling))


def _previous_token_biases(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Biases of query and key, [H], that make a head attend to the token before, whatever the tokens are.

    A rotary pair of frequency f adds w^2 cos(f (d - 1)) to the score of a key d tokens back, where the query's bias is
    the key's, turned by f. Pairs that turn too little from one token to the next to tell them apart take no part.
    """
    frequencies = _frequencies(config)
    turning = frequencies > PREVIOUS_TOKEN_FREQUENCY
    weight = turning * np.sqrt(PREVIOUS_TOKEN_SCORE * np.sqrt(config.head_dim) / turning.sum())
    key = np.concatenate([weight, np.zeros_like(weight)])
    query = np.concatenate([weight * np.cos(frequencies), -weight * np.sin(frequencies)])
    return query, key


def abstract_params(config: ModelConfig, mesh: Mesh | AbstractMesh) -> Params:
    """Stacked parameters as `jax.ShapeDtypeStruct`s with their shardings: no memory is used."""
    boxed = jax.eval_shape(lambda key: _boxed(config, key), jax.random.key(0))
    shardings = param_shardings(boxed, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.meta.unbox(boxed), shardings
    )


def init_params(config: ModelConfig, mesh: Mesh, seed: int) -> Params:
    """Random stacked parameters, created shard by shard on the mesh; the same values on every mesh."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_params(config, mesh))
    return jax.jit(lambda key: random_params(config, key), out_shardings=shardings)(jax.random.key(seed))


def count_params(params: Params) -> int:
    """Number of scalars in a (possibly abstract) parameter tree."""
    return sum(x.size for x in jax.tree.leaves(params))
