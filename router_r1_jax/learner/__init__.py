"""The learner: advantages, losses and the sharded update. It knows nothing about routing."""

from router_r1_jax.learner.advantages import component_advantages, group_advantages
from router_r1_jax.learner.batch import Batch, Row, make_batch
from router_r1_jax.learner.loss import PolicyLoss, SupervisedLoss
from router_r1_jax.learner.update import Learner, TrainState, abstract_state, init_state, make_optimizer

__all__ = [
    "Batch", "Learner", "PolicyLoss", "Row", "SupervisedLoss", "TrainState", "abstract_state", "component_advantages",
    "group_advantages", "init_state", "make_batch", "make_optimizer",
]  # fmt: skip
