"""Supervised fine-tuning (SFT): next-token training on rows from any source, in phases with one schedule."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from router_r1_jax.distributed.mesh import row_shares
from router_r1_jax.learner import Learner, Row, SupervisedLoss, init_state, make_layout, make_optimizer
from router_r1_jax.model import ModelConfig, Params

MAX_GRAD_NORM = 1.0


class Phase(NamedTuple):
    """Updates whose rows share one layout.

    Attributes:
      updates: how many.
      batch: number of the update, counted over all phases -> the tokens that all rows share, and the rows.
      longest: tokens of the longest row.
      buckets: lengths that rows are padded to, at most.
      rows: rows of an update.
    """

    updates: int
    batch: Callable[[int], tuple[Sequence[int], list[Row]]]
    longest: int
    buckets: int
    rows: int


def train_supervised(
    model: ModelConfig,
    mesh: Mesh,
    abstract: Params,
    params: Params,
    phases: Iterable[Phase],
    *,
    learning_rate: float,
    warmup: int,
    decay: bool,
    micro_tokens: int,
    logit_chunk: int,
    weight_decay: float = 0.0,
    first_step: int = 0,
    on_update: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
) -> Params:
    """Train on all phases, one after the other, under one learning-rate schedule; returns the new parameters.

    Args:
      abstract: shapes and shardings of `params`, whose arrays are donated.
      micro_tokens, logit_chunk: as config.learner has them.
      first_step: number of the first update.
      on_update: called with the number of updates made so far (over all phases) and the update's metrics.
    """
    phases = list(phases)
    optimizer, _ = make_optimizer(
        learning_rate=learning_rate,
        warmup=warmup,
        total=sum(phase.updates for phase in phases),
        decay=decay,
        weight_decay=weight_decay,
        max_grad_norm=MAX_GRAD_NORM,
    )
    state, step = init_state(optimizer, params, abstract, mesh), first_step
    shares = row_shares(mesh)
    for phase in phases:
        layout = make_layout(phase.longest, buckets=phase.buckets, tokens=micro_tokens, rows=phase.rows, shares=shares)
        learner = Learner(model, optimizer, SupervisedLoss(), mesh, abstract, layout=layout, chunk=logit_chunk)
        for _ in range(phase.updates):
            state, metrics = learner.update(state, *phase.batch(step))
            step += 1
            on_update(step, metrics)
    return state.params
