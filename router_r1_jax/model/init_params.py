"""Parameter initialisation on a mesh: abstract shapes with shardings, random parameters, and induction heads."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from router_r1_jax.distributed.mesh import param_shardings
from router_r1_jax.model.config import MATCH_FREQUENCY, ModelConfig
from router_r1_jax.model.rotary_embedding import rope_frequencies
from router_r1_jax.model.transformer import Params, RouterLM

# The first layer of induction heads: the score of the previous token before the softmax, in nats, and the lowest
# frequency, in radians per token, of the rotary pairs that find it.
PREVIOUS_TOKEN_SCORE, PREVIOUS_TOKEN_FREQUENCY = 8.0, 0.1
# The second layer of induction heads: how strongly it matches and copies.
MATCH_GAIN, COPY_GAIN = 16.0, 6.0


def abstract_params(config: ModelConfig, mesh: Mesh | AbstractMesh) -> Params:
    """Stacked parameters as `jax.ShapeDtypeStruct`s with their shardings: no memory is used."""
    boxed = jax.eval_shape(lambda key: _boxed(config, key), jax.random.key(0))
    shardings = param_shardings(boxed, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.meta.unbox(boxed), shardings
    )


def init_params(config: ModelConfig, mesh: Mesh, seed: int) -> Params:
    """Random stacked parameters, created shard by shard on the mesh; the values are the same on every mesh."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_params(config, mesh))
    return jax.jit(lambda key: random_params(config, key), out_shardings=shardings)(jax.random.key(seed))


def count_params(params: Params) -> int:
    """Number of scalars in a parameter tree, which may be abstract."""
    return sum(x.size for x in jax.tree.leaves(params))


def random_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random stacked parameters, for use under `jax.jit`, which makes only those that are read."""
    params = nn.meta.unbox(_boxed(config, key))
    return _with_induction_heads(config, params, jax.random.fold_in(key, 1)) if config.induction_heads else params


def _boxed(config: ModelConfig, key: jax.Array) -> Any:
    """Random parameters with the logical names of their axes."""
    return RouterLM(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def _with_induction_heads(config: ModelConfig, params: Params, key: jax.Array) -> Params:
    """Parameters whose first two layers begin as induction heads (Olsson et al. 2022).

    An induction head predicts the token that followed an earlier occurrence of the current token. Copying and looking
    up are built on it. Pretrained transformers have such heads, but a small one that starts at random finds them late
    or never (experiments/studies/README.md). A start that imitates trained weights is called mimetic (Trockman and
    Kolter 2023).

    Heads of the first layer carry the previous token into the residual stream, in a subspace of their own. Keys of the
    second layer read that subspace as queries read the current token, so that a token finds its earlier successor.
    Values of the second layer are written back as they were read.
    """
    layers = dict(params["layers"])
    attention = {name: dict(projection) for name, projection in layers["attention"].items()}
    width, heads = config.width, config.induction_heads
    group, kv_heads, head_dim = config.num_heads // config.num_kv_heads, config.num_kv_heads, config.head_dim
    dtype = attention["q"]["kernel"].dtype

    def orthonormal(i: int, columns: int) -> jax.Array:
        """Random [D, columns], orthonormal in blocks of D columns."""
        normal = jax.random.normal(jax.random.fold_in(key, i), (width, columns))
        blocks = [normal[:, j : j + width] for j in range(0, columns, width)]
        return jnp.concatenate([jnp.linalg.qr(block)[0] for block in blocks], axis=1)

    def put(name: str, field: str, layer: int, value: jax.Array, count: int) -> None:
        old = attention[name][field]
        attention[name][field] = old.at[layer, ..., :count, :].set(value.astype(dtype))

    # First layer: biases that attend to the previous token; a subspace to read it from, and one to write it to.
    for name, bias, per_kv_head in zip(("q", "k"), _previous_token_biases(config), (group, 1), strict=True):
        put(name, "bias", 0, jnp.asarray(bias), heads * per_kv_head)
    read, written = (orthonormal(i, heads * head_dim).reshape(width, heads, head_dim) for i in range(2))
    # The written vector is as large as the embeddings; the norm gives the input of the layer the length sqrt(width).
    scale = np.sqrt(config.embedding_range * np.sqrt(width / (heads * head_dim)))
    out = jnp.repeat(written.transpose(1, 2, 0), group, axis=0) / group
    put("v", "kernel", 0, read * scale, heads)
    attention["o"]["kernel"] = attention["o"]["kernel"].at[0, : heads * group].set((out * scale).astype(dtype))
    # Second layer: queries in rotary pairs of low frequency, keys that are queries of the carried token, values that
    # are written back.
    low = np.flatnonzero(rope_frequencies(config) < MATCH_FREQUENCY)
    low = np.concatenate([low, low + head_dim // 2])
    random = orthonormal(2, kv_heads * low.size).reshape(width, kv_heads, low.size) * np.sqrt(MATCH_GAIN)
    query = jnp.zeros((width, kv_heads, head_dim)).at[..., low].set(random)
    carried = jnp.einsum("DJH,EJH->DE", written, read)
    put("q", "kernel", 1, jnp.repeat(query, group, axis=1), config.num_heads)
    put("k", "kernel", 1, jnp.einsum("DE,EKH->DKH", carried, query), kv_heads)
    value = jnp.repeat(attention["v"]["kernel"][1].transpose(1, 2, 0), group, axis=0) / group
    attention["o"]["kernel"] = attention["o"]["kernel"].at[1].set((COPY_GAIN * value).astype(dtype))
    return params | {"layers": layers | {"attention": attention}}


def _previous_token_biases(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Biases [H] of query and key with which a head attends to the previous token, whatever the tokens are.

    The query's bias is the key's, rotated by one position. A rotary pair of frequency f then adds w^2 cos(f (d - 1)) to
    the score of a key d tokens back. Pairs that rotate too little per token to tell neighbours apart have weight 0.
    """
    frequencies = rope_frequencies(config)
    fast = frequencies > PREVIOUS_TOKEN_FREQUENCY
    weight = fast * np.sqrt(PREVIOUS_TOKEN_SCORE * np.sqrt(config.head_dim) / fast.sum())
    key = np.concatenate([weight, np.zeros_like(weight)])
    query = np.concatenate([weight * np.cos(frequencies), -weight * np.sin(frequencies)])
    return query, key
