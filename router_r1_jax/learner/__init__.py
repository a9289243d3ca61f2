"""The learner: advantages, losses and the sharded update. It knows nothing about routing."""

from router_r1_jax.learner.advantages import group_advantages
from router_r1_jax.learner.batch import Batch, Row, make_batch
from router_r1_jax.learner.loss import PolicyLoss, supervised_loss
from router_r1_jax.learner.update import Learner, TrainState, abstract_state, init_state, make_optimizer

__all__ = [
    "Batch", "Learner", "PolicyLoss", "Row", "TrainState", "abstract_state", "group_advantages", "init_state",
    "make_batch", "make_optimizer", "supervised_loss",
]  # fmt: skip
