"""The critic of PPO: a linear head on the router's last hidden states, with an optimizer of its own.

The published system trains a second model of the router's size as critic. A head shares the router's body instead: its
gradient also reaches the body, times the loss' `value_coef`.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from router_r1_jax.mesh import place, replicated

CriticParams = dict[str, jax.Array]  # kernel [D] and bias [], float32


@flax.struct.dataclass
class Critic:
    """The head and its optimizer's state, on every device whole."""

    params: CriticParams
    opt_state: Any


def init_critic(optimizer: optax.GradientTransformation, width: int, mesh: Mesh) -> Critic:
    """A head that says 0 of every state."""
    params = {"kernel": np.zeros(width, np.float32), "bias": np.zeros((), np.float32)}
    critic = jax.device_get(Critic(params, optimizer.init(params)))
    return place(critic, jax.tree.map(lambda _: replicated(mesh), critic))


def abstract_critic(optimizer: optax.GradientTransformation, width: int, mesh: Mesh) -> Critic:
    """A Critic of `jax.ShapeDtypeStruct`s with shardings, for restoring."""
    params = {"kernel": jax.ShapeDtypeStruct((width,), jnp.float32), "bias": jax.ShapeDtypeStruct((), jnp.float32)}
    shapes = Critic(params, jax.eval_shape(optimizer.init, params))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), shapes)


def values_of(params: CriticParams, hidden: jax.Array) -> jax.Array:
    """Expected sum of later rewards [B, T], float32 at least, of hidden states [B, T, D]."""
    kernel = params["kernel"]
    return jnp.einsum("BTD,D->BT", hidden.astype(kernel.dtype), kernel) + params["bias"]
