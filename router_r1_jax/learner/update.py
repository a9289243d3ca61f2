"""The update: gradients over micro-batches with the shared prefix read once, then one optimizer step, sharded.

The prefix (instructions and cards) is the same for all rows. Its keys and values are computed once per mini-batch;
each micro-batch yields a cotangent for them; the sum goes back through the prefix once:

    kv, back = vjp(prefix_kv, params)
    for each micro-batch:  g_params += dL/dparams,  g_kv += dL/dkv
    g_params += back(g_kv)

That is the exact gradient of the whole batch at the price of one prefix instead of one per row. The loop over a
bucket's micro-batches runs as often as there are some with rows, so that one program serves every batch of a run.

With LoRA (`model.lora`) gradients and optimizer state exist for the adapters only. Parameters of half precision are
trained on float32 copies, which are part of the optimizer's state; gradients are summed in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from router_r1_jax.learner.batch import Batch, Bucket, Layout, Row, Rows, make_batch, unpack
from router_r1_jax.learner.critic import Critic, CriticParams
from router_r1_jax.learner.logprobs import prefix_kv, read_rows
from router_r1_jax.learner.loss import Figures, Loss, Reading
from router_r1_jax.mesh import RULES, place, replicated, rows_sharding
from router_r1_jax.model import ModelConfig, Params, Prefix, join, split_trainable


@flax.struct.dataclass
class TrainState:
    """All parameters, the optimizer state of those that are trained, the number of updates made, and PPO's critic."""

    params: Params
    opt_state: Any
    step: jax.Array
    critic: Critic | None = None


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


class Copies(NamedTuple):
    """Optimizer state of half-precision parameters: their float32 copies, and the state around these."""

    params: Params
    inner: Any


def on_copies(optimizer: optax.GradientTransformation, abstract: Params) -> optax.GradientTransformation:
    """The optimizer on float32 copies where parameters that are trained are of half precision; else itself.

    Around a weight of 0.02 the values of bfloat16 lie 1e-4 apart: a step of 1e-6, added to the parameter itself, would
    be rounded away, however often it is made. Here it adds up in the copy, which the parameter rounds.
    """
    if all(jnp.dtype(x.dtype).itemsize >= 4 for x in jax.tree.leaves(split_trainable(abstract)[0])):
        return optimizer

    def init(params: Params) -> Copies:
        copies = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        return Copies(copies, optimizer.init(copies))

    def update(grads: Params, state: Copies, params: Params) -> tuple[Params, Copies]:
        updates, inner = optimizer.update(grads, state.inner, state.params)
        copies = optax.apply_updates(state.params, updates)
        rounded = jax.tree.map(lambda copy, p: copy.astype(p.dtype).astype(copy.dtype) - p, copies, params)
        return rounded, Copies(copies, inner)

    return optax.GradientTransformation(init, update)


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


def init_state(
    optimizer: optax.GradientTransformation, params: Params, abstract: Params, mesh: Mesh, critic: Critic | None = None
) -> TrainState:
    """A fresh TrainState around parameters that are already on the mesh."""
    optimizer = on_copies(optimizer, abstract)
    shardings = state_shardings(optimizer, abstract, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(split_trainable(params)[0])
    return TrainState(params, opt_state, place(np.int32(0), replicated(mesh)), critic)


def abstract_state(
    optimizer: optax.GradientTransformation, abstract: Params, mesh: Mesh, critic: Critic | None = None
) -> TrainState:
    """A TrainState of `jax.ShapeDtypeStruct`s with shardings, for restoring; `critic` is one of them, or None."""
    optimizer = on_copies(optimizer, abstract)
    shardings = state_shardings(optimizer, abstract, mesh)
    opt = jax.eval_shape(optimizer.init, split_trainable(abstract)[0])
    shapes = TrainState(abstract, opt, jax.ShapeDtypeStruct((), jnp.int32))
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return state.replace(critic=critic)


def over_rows(batch: Batch, function: Callable[[Any, Rows], Any], carry: Any) -> Any:
    """`carry` after function(carry, micro-batch) for all micro-batches in use."""
    for bucket in batch.buckets:

        def body(i: jax.Array, carry: Any, bucket: Bucket = bucket) -> Any:
            return function(carry, micro_batch(bucket, i))

        carry = jax.lax.fori_loop(0, bucket.count, body, carry)
    return carry


def micro_batch(bucket: Bucket, i: jax.Array) -> Rows:
    """The bucket's micro-batch number `i` (int32 scalar).

    The barrier ties rows to `i`. Of a bucket with room for a single one XLA would see that `i` chooses nothing, and
    would move the whole of forward and backward before the loop, which computes it also where no row is in the bucket.
    """
    rows, i = jax.lax.optimization_barrier((bucket.rows, i))
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), rows)


def batch_gradients(
    config: ModelConfig,
    loss: Loss,
    params: Params,
    batch: Batch,
    *,
    chunk: int,
    temperature: float,
    critic: CriticParams | None = None,
) -> tuple[tuple[Params, CriticParams | None], Figures]:
    """Gradients of the loss, and its metrics: "loss", and means and maxima over the masked tokens (module docstring).

    The gradients have the trees of what is trained: the first of `split_trainable(params)`, and the critic's.
    """
    masks = [bucket.rows.mask for bucket in batch.buckets]
    tokens = sum(jnp.sum(mask) for mask in masks)
    divisor = loss.divisor(tokens, sum(jnp.sum(jnp.max(mask, axis=-1)) for mask in masks))
    trainable, frozen = split_trainable(params)
    kv, back = jax.vjp(lambda part: prefix_kv(config, join(part, frozen), batch.prefix), trainable)

    def micro_loss(trained: Any, kv: Any, rows: Rows) -> tuple[jax.Array, tuple[Figures, Figures]]:
        trainable, critic = trained
        params, prefix = join(trainable, frozen), Prefix(kv, batch.prefix_length)
        now = read_rows(config, params, prefix, rows.tokens, chunk=chunk, temperature=temperature, critic=critic)
        sums = loss(now, rows)
        mean = sums.loss / divisor
        totals = {name: x / jnp.maximum(tokens, 1.0) for name, x in sums.totals.items()}
        return mean, ({"loss": mean} | totals, sums.peaks)

    def gradients(rows: Rows) -> tuple[Any, tuple[Figures, Figures]]:
        return jax.grad(micro_loss, argnums=(0, 1), has_aux=True)((trainable, critic), kv, rows)

    def accumulate(carry: Any, rows: Rows) -> Any:
        grads, (totals, peaks) = gradients(rows)
        new = (jax.tree.map(jnp.add, carry[0], grads), jax.tree.map(jnp.add, carry[1], totals))
        return *new, jax.tree.map(jnp.maximum, carry[2], peaks)

    shapes = jax.eval_shape(lambda bucket: gradients(micro_batch(bucket, bucket.count)), batch.buckets[0])
    figures = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[1])

    def zero(x: jax.Array) -> jax.Array:
        return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))

    zeros = jax.tree.map(zero, ((trainable, critic), kv))
    ((grads, critic_grads), kv_grads), totals, peaks = over_rows(batch, accumulate, (zeros, *figures))
    (through_prefix,) = back(jax.tree.map(lambda g, x: g.astype(x.dtype), kv_grads, kv))
    return (jax.tree.map(jnp.add, grads, through_prefix), critic_grads), totals | peaks


class Learner:
    """Compiled update and reading of rows for one model, one mesh and one loss."""

    def __init__(
        self,
        config: ModelConfig,
        optimizer: optax.GradientTransformation,
        loss: Loss,
        mesh: Mesh,
        abstract: Params,
        *,
        layout: Layout,
        chunk: int,
        temperature: float = 1.0,
        critic_optimizer: optax.GradientTransformation | None = None,
    ) -> None:
        """`abstract` gives the parameters' shapes and shardings; nothing is compiled before the first call.

        Raises ValueError if a micro-batch does not divide over the devices that share its rows.
        """
        shares = mesh.shape["data"] * mesh.shape["fsdp"]
        if any(rows % shares for rows in layout.rows):
            raise ValueError(
                f"micro-batches have {layout.rows} rows; each must be a multiple of mesh.data x mesh.fsdp ({shares}), "
                "so that each device takes as many rows"
            )
        optimizer = on_copies(optimizer, abstract)
        self._config, self._optimizer, self._loss, self._mesh = config, optimizer, loss, mesh
        self._layout, self._reading = layout, {"chunk": chunk, "temperature": temperature}
        self._critic_optimizer = critic_optimizer
        self._compiled: set[tuple[int, ...]] = set()  # shapes of the batches updated with so far
        self._whole = replicated(mesh)
        self._cut_rows = rows_sharding(mesh, axis=1)
        shardings = state_shardings(optimizer, abstract, mesh).replace(critic=self._whole)
        self._update = jax.jit(self._update_fn, donate_argnums=0, out_shardings=(shardings, self._whole))
        self._read = jax.jit(self._read_fn, static_argnames="base", out_shardings=self._whole)

    def place(self, prefix: Sequence[int], rows: Sequence[Row]) -> Batch:
        """Rows behind their prefix on the mesh, each micro-batch's rows split over data and fsdp."""
        batch = make_batch(prefix, rows, self._layout)
        cut = tuple(Bucket(jax.tree.map(lambda _: self._cut_rows, b.rows), self._whole) for b in batch.buckets)
        return place(batch, Batch(self._whole, self._whole, cut))

    def update(
        self, state: TrainState, prefix: Sequence[int], rows: Sequence[Row]
    ) -> tuple[TrainState, dict[str, float]]:
        """One optimizer step; `state` is donated. A loss or gradient that is not finite leaves it as it was.

        Metrics are means (logp_diff_max: the maximum) over masked tokens, `grad_norm`, `skipped`, 1 where no step was
        made, and `programs`, how many were compiled so far: one for each number of rows and padded length of prefix.
        """
        batch = self.place(prefix, rows)
        self._compiled.add((len(batch.prefix), len(rows)))
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(RULES):
            state, metrics = self._update(state, batch)
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        return state, metrics | {"programs": float(len(self._compiled))}

    def read(
        self,
        params: Params,
        prefix: Sequence[int],
        rows: Sequence[Row],
        *,
        base: bool = False,
        critic: CriticParams | None = None,
    ) -> list[Reading]:
        """What `params` say of each row's tokens, NumPy [len(row.tokens)]; with `base` without their adapters."""
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(RULES):
            found = jax.device_get(self._read(params, critic, self.place(prefix, rows), base=base))
        fields = (unpack(field, rows, self._layout) for field in found if field is not None)
        return [Reading(*of_row) for of_row in zip(*fields, strict=True)]

    def _update_fn(self, state: TrainState, batch: Batch) -> tuple[TrainState, Figures]:
        critic = state.critic and state.critic.params
        (grads, critic_grads), metrics = batch_gradients(
            self._config, self._loss, state.params, batch, critic=critic, **self._reading
        )
        trainable, frozen = split_trainable(state.params)
        updates, opt_state = self._optimizer.update(grads, state.opt_state, trainable)
        params = join(optax.apply_updates(trainable, updates), frozen)
        new = TrainState(params, opt_state, state.step + 1)
        if state.critic:
            updates, opt_state = self._critic_optimizer.update(critic_grads, state.critic.opt_state, critic)
            new = new.replace(critic=Critic(optax.apply_updates(critic, updates), opt_state))
        whole = jnp.isfinite(metrics["loss"] + optax.global_norm((grads, critic_grads)))
        state = jax.tree.map(lambda new, old: jnp.where(whole, new, old), new, state)
        return state, metrics | {"grad_norm": optax.global_norm(grads), "skipped": 1.0 - whole}

    def _read_fn(self, params: Params, critic: CriticParams | None, batch: Batch, *, base: bool) -> Sequence[Any]:
        """Fields of a Reading, each a list of [n, m, T] per bucket."""
        config = self._config.base if base else self._config
        prefix = Prefix(prefix_kv(config, params, batch.prefix), batch.prefix_length)

        def of_bucket(bucket: Bucket) -> Reading:
            def body(i: jax.Array, found: Reading) -> Reading:
                tokens = micro_batch(bucket, i).tokens
                now = read_rows(config, params, prefix, tokens, critic=critic, **self._reading)
                return jax.tree.map(lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, i, 0), found, now)

            empty = jnp.zeros(bucket.rows.tokens.shape, jnp.float32)
            return jax.lax.fori_loop(0, bucket.count, body, Reading(empty, empty, None if critic is None else empty))

        found = [of_bucket(bucket) for bucket in batch.buckets]
        return [None if fields[0] is None else list(fields) for fields in zip(*found, strict=True)]
