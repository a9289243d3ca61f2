"""Training loop of the baselines that are learned by gradient descent with Optax."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax


def minimize(
    loss: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    steps: int,
) -> Any:
    """The parameters after `steps` updates; `loss(params, key)` draws its own batch from the update's key."""

    def update(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state, params)
        return (optax.apply_updates(params, updates), state), None

    @partial(jax.jit, donate_argnums=0)
    def run(carry: Any) -> Any:
        return jax.lax.scan(update, carry, jax.random.split(key, steps))[0]

    return run((params, optimizer.init(params)))[0]
