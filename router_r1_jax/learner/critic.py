"""The critic of PPO: a linear value head on the router's last hidden states, with its own optimizer state.

The published system trains a second model of the router's size as critic. A head shares the router's body instead: its
gradient also reaches the body, multiplied by the `value_coef` of the loss.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from router_r1_jax.distributed.mesh import replicated

CriticParams = dict[str, jax.Array]  # kernel [D] and bias [], float32


@flax.struct.dataclass
class Critic:
    """The head and the state of its optimizer, complete on every device."""

    params: CriticParams
    opt_state: Any


def init_critic(optimizer: optax.GradientTransformation, width: int, mesh: Mesh) -> Critic:
    """A critic whose value of every state is 0."""
    return jax.jit(lambda: _zero_critic(optimizer, width), out_shardings=replicated(mesh))()


def abstract_critic(optimizer: optax.GradientTransformation, width: int, mesh: Mesh) -> Critic:
    """A Critic of `jax.ShapeDtypeStruct`s with shardings, for restoring."""
    shapes = jax.eval_shape(lambda: _zero_critic(optimizer, width))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), shapes)


def _zero_critic(optimizer: optax.GradientTransformation, width: int) -> Critic:
    params = {"kernel": jnp.zeros(width, jnp.float32), "bias": jnp.zeros((), jnp.float32)}
    return Critic(params, optimizer.init(params))


def critic_values(params: CriticParams, hidden: jax.Array) -> jax.Array:
    """Values [B, T] of hidden states [B, T, D], that is the expected sum of later rewards; float32 at least."""
    kernel = params["kernel"]
    return jnp.einsum("BTD,D->BT", hidden.astype(kernel.dtype), kernel) + params["bias"]
