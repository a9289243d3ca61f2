"""The update: gradient accumulation over micro-batches, the shared prefix read once, and one optimizer step, sharded.

The prefix (instructions and cards) is the same for all rows. Its keys and values are computed once per mini-batch. Each
micro-batch adds to their gradient, and the sum goes back through the prefix once:

    kv, back = vjp(prefix_kv, params)
    for each micro-batch:  g_params += dL/dparams,  g_kv += dL/dkv
    g_params += back(g_kv)

That is the exact gradient of the whole batch, at the price of one prefix instead of one per row. The loop over the
micro-batches of a bucket runs as often as there are micro-batches with rows, so that one compiled program serves every
batch of a run.

With LoRA (`model.lora`), only the adapters have gradients and optimizer state. If the parameters have half precision,
the optimizer's state holds float32 copies on which they are trained. Gradients are summed in float32.
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

from router_r1_jax.distributed.mesh import RULES, place, replicated, rows_sharding
from router_r1_jax.learner.critic import Critic, CriticParams
from router_r1_jax.learner.logprobs import prefix_kv, score_rows
from router_r1_jax.learner.loss import Loss, Metrics, TokenScores
from router_r1_jax.learner.micro_batches import Batch, Bucket, Layout, Row, Rows, make_batch, unpack
from router_r1_jax.model import ModelConfig, Params, Prefix, join, split_trainable


@flax.struct.dataclass
class TrainState:
    """All parameters, the optimizer state of the trainable ones, the number of updates, and the critic of PPO."""

    params: Params
    opt_state: Any
    step: jax.Array
    critic: Critic | None = None


def make_optimizer(
    *, learning_rate: float, warmup: int, total: int, decay: bool, weight_decay: float, max_grad_norm: float
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW behind a global-norm clip, and its schedule: linear warm-up, then constant or cosine decay to a tenth."""
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


class Float32Copies(NamedTuple):
    """Optimizer state of half-precision parameters: their float32 copies, and the optimizer state of the copies."""

    params: Params
    inner: Any


def with_float32_copies(optimizer: optax.GradientTransformation, abstract: Params) -> optax.GradientTransformation:
    """The optimizer on float32 copies if trainable parameters have half precision; otherwise the optimizer itself.

    Around a weight of 0.02 the values of bfloat16 are 1e-4 apart. A step of 1e-6 that is added to the parameter itself
    is rounded away, however often it is made. In the copy the steps add up, and the parameter is the rounded copy.
    """
    if all(jnp.dtype(x.dtype).itemsize >= 4 for x in jax.tree.leaves(split_trainable(abstract)[0])):
        return optimizer

    def init(params: Params) -> Float32Copies:
        copies = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        return Float32Copies(copies, optimizer.init(copies))

    def update(grads: Params, state: Float32Copies, params: Params) -> tuple[Params, Float32Copies]:
        updates, inner = optimizer.update(grads, state.inner, state.params)
        copies = optax.apply_updates(state.params, updates)
        rounded = jax.tree.map(lambda copy, p: copy.astype(p.dtype).astype(copy.dtype) - p, copies, params)
        return rounded, Float32Copies(copies, inner)

    return optax.GradientTransformation(init, update)


def abstract_state(
    optimizer: optax.GradientTransformation, abstract: Params, mesh: Mesh, critic: Critic | None = None
) -> TrainState:
    """A TrainState of `jax.ShapeDtypeStruct`s, for restoring. `abstract` and `critic` are such structs too.

    The moments of the optimizer are sharded like their parameters; counters are on every device.
    """

    def struct(x: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    optimizer, trainable = with_float32_copies(optimizer, abstract), split_trainable(abstract)[0]
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda moment, param: struct(moment, param.sharding),
        jax.eval_shape(optimizer.init, trainable),
        trainable,
        transform_non_params=lambda x: struct(x, replicated(mesh)),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    return TrainState(abstract, opt_state, step, critic)


def init_state(
    optimizer: optax.GradientTransformation, params: Params, abstract: Params, mesh: Mesh, critic: Critic | None = None
) -> TrainState:
    """A new TrainState around parameters that are already on the mesh."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(optimizer, abstract, mesh).opt_state)
    init = jax.jit(with_float32_copies(optimizer, abstract).init, out_shardings=shardings)
    return TrainState(params, init(split_trainable(params)[0]), place(np.int32(0), replicated(mesh)), critic)


def fold_micro_batches(batch: Batch, function: Callable[[Any, Rows], Any], carry: Any) -> Any:
    """The `carry` after carry = function(carry, micro-batch) for all micro-batches in use."""
    for bucket in batch.buckets:

        def body(i: jax.Array, carry: Any, bucket: Bucket = bucket) -> Any:
            return function(carry, micro_batch(bucket, i))

        carry = jax.lax.fori_loop(0, bucket.count, body, carry)
    return carry


def micro_batch(bucket: Bucket, i: jax.Array) -> Rows:
    """Micro-batch number `i` (int32 scalar) of the bucket.

    The barrier ties the rows to `i`. If a bucket has room for one micro-batch only, XLA sees that `i` selects nothing.
    Without the barrier it would move the whole forward and backward pass out of the loop, and so compute it even if the
    bucket is empty.
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
) -> tuple[tuple[Params, CriticParams | None], Metrics]:
    """Gradients of the loss, and its metrics: "loss", and means and maxima over the masked tokens (module docstring).

    The gradients have the trees of the trainable parameters (`split_trainable`) and of the critic's parameters.
    """
    masks = [bucket.rows.mask for bucket in batch.buckets]
    tokens = sum(jnp.sum(mask) for mask in masks)
    divisor = loss.divisor(tokens, sum(jnp.sum(jnp.max(mask, axis=-1)) for mask in masks))
    trainable, frozen = split_trainable(params)
    kv, back = jax.vjp(lambda part: prefix_kv(config, join(part, frozen), batch.prefix), trainable)

    def micro_loss(trained: Any, kv: Any, rows: Rows) -> tuple[jax.Array, tuple[Metrics, Metrics]]:
        trainable, critic = trained
        params, prefix = join(trainable, frozen), Prefix(kv, batch.prefix_length)
        scores = score_rows(config, params, prefix, rows.tokens, chunk=chunk, temperature=temperature, critic=critic)
        sums = loss(scores, rows)
        mean = sums.loss / divisor
        totals = {name: x / jnp.maximum(tokens, 1.0) for name, x in sums.totals.items()}
        return mean, ({"loss": mean} | totals, sums.maxima)

    def gradients(rows: Rows) -> tuple[Any, tuple[Metrics, Metrics]]:
        return jax.grad(micro_loss, argnums=(0, 1), has_aux=True)((trainable, critic), kv, rows)

    def accumulate(carry: Any, rows: Rows) -> Any:
        grads, (totals, maxima) = gradients(rows)
        sums = jax.tree.map(jnp.add, carry[0], grads), jax.tree.map(jnp.add, carry[1], totals)
        return *sums, jax.tree.map(jnp.maximum, carry[2], maxima)

    def zero(x: jax.Array) -> jax.Array:
        return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))

    shapes = jax.eval_shape(lambda bucket: gradients(micro_batch(bucket, bucket.count)), batch.buckets[0])
    start = jax.tree.map(zero, ((trainable, critic), kv)), *jax.tree.map(zero, shapes[1])
    ((grads, critic_grads), kv_grads), totals, maxima = fold_micro_batches(batch, accumulate, start)
    (through_prefix,) = back(jax.tree.map(lambda g, x: g.astype(x.dtype), kv_grads, kv))
    return (jax.tree.map(jnp.add, grads, through_prefix), critic_grads), totals | maxima


class Learner:
    """Compiled update and scoring of rows for one model, one mesh and one loss."""

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
        """`abstract` gives the shapes and shardings of the parameters; nothing is compiled before the first call."""
        self._config, self._loss, self._mesh, self._layout = config, loss, mesh, layout
        self._optimizer, self._critic_optimizer = with_float32_copies(optimizer, abstract), critic_optimizer
        self._scoring = {"chunk": chunk, "temperature": temperature}
        self._batch_shapes: set[tuple[int, ...]] = set()  # of all updates so far: one compiled program each
        self._replicated = replicated(mesh)
        shardings = jax.tree.map(lambda x: x.sharding, abstract_state(optimizer, abstract, mesh))
        shardings = shardings.replace(critic=self._replicated)
        self._update = jax.jit(self._update_fn, donate_argnums=0, out_shardings=(shardings, self._replicated))
        self._score = jax.jit(self._score_fn, static_argnames="base", out_shardings=self._replicated)

    def place(self, prefix: Sequence[int], rows: Sequence[Row]) -> Batch:
        """Rows behind their prefix on the mesh; the rows of each micro-batch are split over data and fsdp."""
        batch, split = make_batch(prefix, rows, self._layout), rows_sharding(self._mesh, axis=1)
        buckets = tuple(Bucket(jax.tree.map(lambda _: split, b.rows), self._replicated) for b in batch.buckets)
        return place(batch, Batch(self._replicated, self._replicated, buckets))

    def update(
        self, state: TrainState, prefix: Sequence[int], rows: Sequence[Row]
    ) -> tuple[TrainState, dict[str, float]]:
        """One optimizer step; `state` is donated. If loss or gradient are not finite, the state is returned unchanged.

        Metrics are those of the loss (means over masked tokens; logp_diff_max is the maximum), `grad_norm`,
        `skipped_updates` (1 if no step was made), and `compiled_programs`, the number of programs compiled so far: one
        for each number of rows and padded length of the prefix.
        """
        batch = self.place(prefix, rows)
        self._batch_shapes.add((len(batch.prefix), len(rows)))
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(RULES):
            state, metrics = self._update(state, batch)
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        return state, metrics | {"compiled_programs": float(len(self._batch_shapes))}

    def score(
        self,
        params: Params,
        prefix: Sequence[int],
        rows: Sequence[Row],
        *,
        base: bool = False,
        critic: CriticParams | None = None,
    ) -> list[TokenScores]:
        """The scores of each row's tokens by `params`, NumPy [len(row.tokens)]; with `base`, without the adapters."""
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(RULES):
            scores = jax.device_get(self._score(params, critic, self.place(prefix, rows), base=base))
        fields = (unpack(field, rows, self._layout) for field in zip(*scores, strict=True) if field[0] is not None)
        return [TokenScores(*of_row) for of_row in zip(*fields, strict=True)]

    def _update_fn(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        critic = state.critic and state.critic.params
        (grads, critic_grads), metrics = batch_gradients(
            self._config, self._loss, state.params, batch, critic=critic, **self._scoring
        )
        trainable, frozen = split_trainable(state.params)
        updates, opt_state = self._optimizer.update(grads, state.opt_state, trainable)
        params = join(optax.apply_updates(trainable, updates), frozen)
        new = TrainState(params, opt_state, state.step + 1)
        if state.critic:
            updates, opt_state = self._critic_optimizer.update(critic_grads, state.critic.opt_state, critic)
            new = new.replace(critic=Critic(optax.apply_updates(critic, updates), opt_state))
        finite = jnp.isfinite(metrics["loss"] + optax.global_norm((grads, critic_grads)))
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        return state, metrics | {"grad_norm": optax.global_norm(grads), "skipped_updates": 1.0 - finite}

    def _score_fn(self, params: Params, critic: CriticParams | None, batch: Batch, *, base: bool) -> list[TokenScores]:
        """Scores [n, m, T] of each bucket."""
        config = self._config.base if base else self._config
        prefix = Prefix(prefix_kv(config, params, batch.prefix), batch.prefix_length)

        def score_bucket(bucket: Bucket) -> TokenScores:
            def body(i: jax.Array, scores: TokenScores) -> TokenScores:
                tokens = micro_batch(bucket, i).tokens
                new = score_rows(config, params, prefix, tokens, critic=critic, **self._scoring)
                return jax.tree.map(lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, i, 0), scores, new)

            empty = jnp.zeros(bucket.rows.tokens.shape, jnp.float32)
            return jax.lax.fori_loop(
                0, bucket.count, body, TokenScores(empty, empty, None if critic is None else empty)
            )

        return [score_bucket(bucket) for bucket in batch.buckets]
