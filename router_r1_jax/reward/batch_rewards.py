"""Rewards of a rollout batch, as `config.reward` asks for them."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from ml_collections import ConfigDict

from router_r1_jax.reward.cost import CostNormalizer
from router_r1_jax.reward.score import Rewards, score


class Batch(Protocol):
    """What scoring reads of a rollout batch of B episodes; `router.RolloutBatch` has it.

    Attributes:
      texts: [B] responses, replies included.
      golds: [B] gold answers.
      groups: [B] int, equal for episodes of the same question.
      route_names: every name that a call may use -> the name that the prompt shows.
      valid: [B] bool, False if a provider failed.
    """

    texts: Sequence[str]
    golds: Sequence[Sequence[str]]
    groups: np.ndarray
    route_names: Mapping[str, str]
    valid: np.ndarray

    def raw_costs(self, reward_config: ConfigDict) -> np.ndarray:
        """[B] raw costs of the kind that `config.reward.cost` chooses."""


def compute_rewards(batch: Batch, reward_config: ConfigDict, normalizer: CostNormalizer) -> Rewards:
    """Rewards of a rollout batch. The valid costs enter the normaliser's window in the order of the episodes."""
    return score(
        batch.texts,
        batch.golds,
        batch.raw_costs(reward_config),
        batch.route_names,
        preset=reward_config.preset,
        alpha=reward_config.alpha,
        metric=reward_config.metric,
        normalizer=normalizer,
        groups=batch.groups,
        valid=batch.valid,
    )
