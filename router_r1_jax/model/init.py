"""Parameters at rest: their shapes, their shardings, and a random start straight into them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from router_r1_jax.mesh import param_shardings
from router_r1_jax.model.config import ModelConfig
from router_r1_jax.model.transformer import Params, RouterLM


def _boxed(config: ModelConfig, key: jax.Array) -> Any:
    return RouterLM(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def random_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random stacked parameters, for use under `jax.jit`: what of them is not read is not made."""
    return nn.meta.unbox(_boxed(config, key))


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
