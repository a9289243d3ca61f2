"""The update: gradients over micro-batches with the shared prefix read once, then one optimizer step, sharded.

The prefix (instructions and cards) is the same for all rows. Its keys and values are computed once per mini-batch;
each micro-batch yields a cotangent for them; the sum goes back through the prefix once:

    kv, back = vjp(prefix_kv, params)
    for each micro-batch:  g_params += dL/dparams,  g_kv += dL/dkv
    g_params += back(g_kv)

That is the exact gradient of the whole batch at the price of one prefix instead of one per row.

With LoRA (`model.lora`) gradients and optimizer state exist for the adapters only.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from router_r1_jax.learner.batch import Batch
from router_r1_jax.learner.logprobs import prefix_kv, token_logprobs
from router_r1_jax.learner.loss import Loss, Sums, count_tokens
from router_r1_jax.mesh import RULES, place, replicated, rows_sharding
from router_r1_jax.model import ModelConfig, Params, Prefix, join, split_trainable


@flax.struct.dataclass
class TrainState:
    """All parameters, the optimizer state of those that are trained, and the number of updates made."""

    params: Params
    opt_state: Any
    step: jax.Array


def make_optimizer(
    *, learning_rate: float, warmup: int, total: int, decay: bool, weight_decay: float, max_grad_norm: float
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW behind a global-norm clip; linear warm-up, then constant or cosine to a tenth; and the schedule itself."""
    if decay:
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, learning_rate, warmup, max(total, warmup + 1), learning_rate / 10
        )
    else:
        schedule = optax.linear_schedule(learning_rate / max(warmup, 1), learning_rate, max(warmup - 1, 1))
    optimizer = optax.chain(
        optax.clip_by_global_norm(max_grad_norm), optax.adamw(schedule, b2=0.95, weight_decay=weight_decay)
    )
    return optimizer, schedule


def state_shardings(optimizer: optax.GradientTransformation, abstract: Params, mesh: Mesh) -> TrainState:
    """Where a TrainState lives: optimizer moments beside their parameters, counters on every device."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    opt = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, split_trainable(abstract)[0]),
        split_trainable(shardings)[0],
        transform_non_params=lambda _: replicated(mesh),
    )
    return TrainState(shardings, opt, replicated(mesh))


def init_state(optimizer: optax.GradientTransformation, params: Params, abstract: Params, mesh: Mesh) -> TrainState:
    """A fresh TrainState around parameters that are already on the mesh."""
    shardings = state_shardings(optimizer, abstract, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(split_trainable(params)[0])
    return TrainState(params, opt_state, place(np.int32(0), replicated(mesh)))


def abstract_state(optimizer: optax.GradientTransformation, abstract: Params, mesh: Mesh) -> TrainState:
    """A TrainState of `jax.ShapeDtypeStruct`s with shardings, for restoring."""
    shardings = state_shardings(optimizer, abstract, mesh)
    opt = jax.eval_shape(optimizer.init, split_trainable(abstract)[0])
    shapes = TrainState(abstract, opt, jax.ShapeDtypeStruct((), jnp.int32))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def batch_gradients(
    config: ModelConfig, loss: Loss, params: Params, batch: Batch, *, micro_batch: int, chunk: int, temperature: float
) -> tuple[Params, Sums]:
    """Gradient of the loss, and its metrics: "loss" and means over the masked tokens (see the module docstring).

    The gradient has the tree of what is trained, the first of `split_trainable(params)`.
    """
    divisor, tokens = loss.divisor(batch.mask), count_tokens(batch.mask)
    trainable, frozen = split_trainable(params)
    kv, back = jax.vjp(lambda part: prefix_kv(config, join(part, frozen), batch.prefix), trainable)
    rows = ("tokens", "mask", "logps", "reference_logps", "advantages")

    def split(x: jax.Array) -> jax.Array:
        # Strided, so that each micro-batch takes rows from every device's share.
        return x.reshape(-1, x.shape[0] // micro_batch, *x.shape[1:]).swapaxes(0, 1)

    micro = {name: split(getattr(batch, name)) for name in rows}

    def micro_loss(trainable: Params, kv: Any, part: Batch) -> tuple[jax.Array, Sums]:
        params, prefix = join(trainable, frozen), Prefix(kv, batch.prefix_length)
        logps, entropy = token_logprobs(config, params, prefix, part.tokens, chunk=chunk, temperature=temperature)
        total, sums = loss(logps, entropy, part)
        mean = total / divisor
        return mean, {"loss": mean} | {name: x / tokens for name, x in sums.items()}

    def accumulate(carry: Any, fields: dict[str, jax.Array]) -> tuple[Any, Sums]:
        grads, sums = jax.grad(micro_loss, argnums=(0, 1), has_aux=True)(trainable, kv, batch.replace(**fields))
        return jax.tree.map(jnp.add, carry, grads), sums

    zeros = jax.tree.map(jnp.zeros_like, (trainable, kv))
    (grads, kv_grads), sums = jax.lax.scan(accumulate, zeros, micro)
    (through_prefix,) = back(kv_grads)
    return jax.tree.map(jnp.add, grads, through_prefix), {name: jnp.sum(x) for name, x in sums.items()}


class Learner:
    """Compiled update and log-prob functions for one model, one mesh and one loss."""

    def __init__(
        self,
        config: ModelConfig,
        optimizer: optax.GradientTransformation,
        loss: Loss,
        mesh: Mesh,
        abstract: Params,
        *,
        micro_batch: int,
        chunk: int,
        temperature: float = 1.0,
    ) -> None:
        """`abstract` gives the parameters' shapes and shardings; nothing is compiled before the first call.

        Raises ValueError if a micro-batch does not divide over the devices that share its rows.
        """
        shares = mesh.shape["data"] * mesh.shape["fsdp"]
        if micro_batch % shares:
            raise ValueError(
                f"learner.micro_batch is {micro_batch}; it must be a multiple of mesh.data x mesh.fsdp ({shares}), "
                "so that each device takes as many rows"
            )
        self._config, self._optimizer, self._loss, self._mesh = config, optimizer, loss, mesh
        self._micro_batch, self._chunk, self._temperature = micro_batch, chunk, temperature
        shardings = state_shardings(optimizer, abstract, mesh)
        whole, rows = replicated(mesh), rows_sharding(mesh)
        self._batch_sharding = Batch(whole, whole, rows, rows, rows, rows, rows)
        self._update = jax.jit(self._update_fn, donate_argnums=0, out_shardings=(shardings, whole))
        self._reference_logprobs = jax.jit(self._reference_logprobs_fn, out_shardings=whole)

    def update(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, float]]:
        """One optimizer step; `state` is donated. Metrics are means over masked tokens, and `grad_norm`."""
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(RULES):
            state, metrics = self._update(state, place(batch, self._batch_sharding))
        return state, {name: float(value) for name, value in jax.device_get(metrics).items()}

    def reference_logprobs(self, params: Params, batch: Batch) -> Any:
        """Log-probs [B, T] of the batch's tokens under `params` without their adapters, as a NumPy array."""
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(RULES):
            return jax.device_get(self._reference_logprobs(params, place(batch, self._batch_sharding)))

    def _update_fn(self, state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        grads, metrics = batch_gradients(
            self._config, self._loss, state.params, batch,
            micro_batch=self._micro_batch, chunk=self._chunk, temperature=self._temperature,
        )  # fmt: skip
        trainable, frozen = split_trainable(state.params)
        updates, opt_state = self._optimizer.update(grads, state.opt_state, trainable)
        params = join(optax.apply_updates(trainable, updates), frozen)
        return TrainState(params, opt_state, state.step + 1), metrics | {"grad_norm": optax.global_norm(grads)}

    def _reference_logprobs_fn(self, params: Params, batch: Batch) -> jax.Array:
        config = self._config.base
        prefix = Prefix(prefix_kv(config, params, batch.prefix), batch.prefix_length)
        chunk = {"chunk": self._chunk, "temperature": self._temperature}
        parts = batch.tokens.reshape(-1, batch.tokens.shape[0] // self._micro_batch, batch.tokens.shape[1])
        logps = jax.lax.map(
            lambda tokens: token_logprobs(config, params, prefix, tokens, **chunk)[0], parts.swapaxes(0, 1)
        )
        return logps.swapaxes(0, 1).reshape(batch.tokens.shape)
