"""Parameters at rest: their shapes, their shardings, and a random start straight into them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from router_r1_jax.mesh import param_shardings
from router_r1_jax.model.attention import rope_frequencies
from router_r1_jax.model.config import ModelConfig
from router_r1_jax.model.transformer import Params, RouterLM

PREVIOUS_TOKEN_SCORE = 8.0  # nats, before the softmax, of the token before
PREVIOUS_TOKEN_FREQUENCY = 0.1  # radians per token


def _boxed(config: ModelConfig, key: jax.Array) -> Any:
    return RouterLM(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def random_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random stacked parameters, for use under `jax.jit`: what of them is not read is not made."""
    params = nn.meta.unbox(_boxed(config, key))
    return _with_previous_token_heads(config, params) if config.previous_token_heads else params


def _with_previous_token_heads(config: ModelConfig, params: Params) -> Params:
    """The first layer's first heads begin by attending to the token before, which copying and reading are built on.

    The biases of query and key do it, whatever the tokens are: a rotary pair of frequency f adds w^2 cos(f (d - 1)) to
    the score of a key d tokens back, where the query's bias is the key's, turned by f. Pairs that turn too little from
    one token to the next to tell them apart take no part. Such starts are called mimetic (Trockman and Kolter 2023,
    there of products of weights).
    """
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    turning = frequencies > PREVIOUS_TOKEN_FREQUENCY
    weight = turning * np.sqrt(PREVIOUS_TOKEN_SCORE * np.sqrt(config.head_dim) / turning.sum())
    key_bias = np.concatenate([weight, np.zeros_like(weight)])
    query_bias = np.concatenate([weight * np.cos(frequencies), -weight * np.sin(frequencies)])
    layers = dict(params["layers"])
    attention = dict(layers["attention"])
    group = config.num_heads // config.num_kv_heads
    for name, bias, heads in (("q", query_bias, group), ("k", key_bias, 1)):
        old = attention[name]["bias"]
        new = old.at[0, : heads * config.previous_token_heads].set(bias.astype(old.dtype))
        attention[name] = attention[name] | {"bias": new}
    return params | {"layers": layers | {"attention": attention}}


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
