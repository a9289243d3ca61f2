"""The learner: advantages, losses, log-probs, and the sharded update. It knows nothing about routing."""

from router_r1_jax.learner.advantages import component_advantages, gae, group_advantages, groups_with_spread, whiten
from router_r1_jax.learner.critic import abstract_critic, init_critic
from router_r1_jax.learner.loss import PolicyLoss, SupervisedLoss, TokenScores, kl_estimate
from router_r1_jax.learner.micro_batches import ROW_MULTIPLE, Layout, Row, make_batch, make_layout
from router_r1_jax.learner.update import Learner, TrainState, abstract_state, init_state, make_optimizer

__all__ = [
    "ROW_MULTIPLE",
    "Layout",
    "Learner",
    "PolicyLoss",
    "Row",
    "SupervisedLoss",
    "TokenScores",
    "TrainState",
    "abstract_critic",
    "abstract_state",
    "component_advantages",
    "gae",
    "group_advantages",
    "groups_with_spread",
    "init_critic",
    "init_state",
    "kl_estimate",
    "make_batch",
    "make_layout",
    "make_optimizer",
    "whiten",
]
