"""Advantages in NumPy: GRPO, Dr. GRPO, RLOO and REINFORCE within groups, GAE with a critic, whitening.

A group holds the episodes of one question.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

# A smaller spread is rounding. It carries no signal, and dividing by it would only amplify the rounding.
MIN_SPREAD = 1e-8

GroupKind = Literal["grpo", "dr_grpo", "rloo", "reinforce"]


def group_advantages(
    rewards: np.ndarray, groups: np.ndarray, weights: np.ndarray | None = None, *, kind: GroupKind = "grpo"
) -> tuple[np.ndarray, int]:
    """Rewards above a baseline.

    - "grpo": minus the group's mean, over its standard deviation (DeepSeekMath, section 4.1.2);
    - "dr_grpo": minus the group's mean (Dr. GRPO, section 3.2);
    - "rloo": minus the mean of the group's other episodes (Ahmadian et al. 2024, section 3.3);
    - "reinforce": minus the mean of all episodes, whatever their group.

    Args:
      rewards: [B] float.
      groups: [B] int, equal for episodes of the same question.
      weights: [B] in [0, 1], factors of the advantages. An episode of weight 0 (its provider failed) is also left out
        of the group's mean and standard deviation.

    Returns:
      advantages [B] float32, and the number of groups whose rewards have no spread. The advantages of such groups are
      0, except with "reinforce".
    """
    weights = np.ones(len(rewards)) if weights is None else np.asarray(weights, float)
    advantages = np.zeros(len(rewards), np.float32)
    with_spread = groups_with_spread(rewards, groups, weights)
    for group in with_spread:
        members = np.flatnonzero((groups == group) & (weights > 0))
        centred, n = rewards[members] - rewards[members].mean(), len(members)
        scale = {"grpo": 1 / rewards[members].std(), "rloo": n / (n - 1)}.get(kind, 1.0)
        advantages[members] = weights[members] * centred * scale
    if kind == "reinforce" and weights.any():
        advantages = (weights * (rewards - rewards[weights > 0].mean())).astype(np.float32)
    return advantages, len(np.unique(groups)) - len(with_spread)


def groups_with_spread(rewards: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The groups, ascending, whose rewards [B] differ among episodes with a weight above 0."""
    counted = {group: rewards[(groups == group) & (weights > 0)] for group in np.unique(groups)}
    return np.array(
        [group for group, members in counted.items() if len(members) and np.ptp(members) >= MIN_SPREAD], int
    )


def component_advantages(
    components: Mapping[str, np.ndarray],
    shares: Mapping[str, float],
    groups: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    kind: GroupKind = "grpo",
) -> tuple[np.ndarray, int]:
    """Sum of the advantages of several rewards, each normalised within its group by itself and times its share.

    If the rewards were added first, a component with small differences, such as the cost among right answers, would
    vanish in the standard deviation of the sum.

    Args:
      components: name -> rewards [B].
      shares: name -> factor of its advantages. Components without a share are ignored.
      groups: [B] int, equal for episodes of the same question.
      weights: [B] factors, as for `group_advantages`.
      kind: as for `group_advantages`.

    Returns:
      advantages [B] float32, and the number of groups without a spread in any component that has a share.
    """
    total = np.zeros(len(groups), np.float32)
    with_signal: set[int] = set()
    for name, share in shares.items():
        advantages, _ = group_advantages(components[name], groups, weights, kind=kind)
        total += np.float32(share) * advantages
        with_signal |= set(np.unique(groups[advantages != 0]).tolist()) if share else set()
    return total, len(np.unique(groups)) - len(with_signal)


def gae(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, *, discount: float = 1.0, gae_lambda: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation over one episode's sampled tokens (Schulman et al. 2016, equation 16).

    Injected tokens are neither actions nor states: the state after a sampled token is the one before the next sampled
    token, whatever was injected between them.

    Args:
      rewards: [T] of the tokens; only those of sampled tokens count.
      values: [T] the critic's values of the states before the tokens.
      mask: [T] bool, True for sampled tokens.
      discount: gamma, per sampled token.
      gae_lambda: lambda.

    Returns:
      advantages [T] and the critic's targets (advantage + value) [T], both 0 on injected tokens.
    """
    advantages, running, next_value = np.zeros(len(mask)), 0.0, 0.0
    for t in np.flatnonzero(mask)[::-1]:
        running = rewards[t] + discount * next_value - values[t] + discount * gae_lambda * running
        advantages[t], next_value = running, values[t]
    return advantages, np.where(mask, advantages + values, 0.0)


def whiten(advantages: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Advantages of several episodes with mean 0 and standard deviation 1 over all sampled tokens, 0 elsewhere.

    Without a spread all of them become 0.
    """
    sampled = np.concatenate([a[np.asarray(m, bool)] for a, m in zip(advantages, masks, strict=True)])
    if not len(sampled) or sampled.std() < MIN_SPREAD:
        return [np.zeros(len(a)) for a in advantages]
    return [np.where(m, (a - sampled.mean()) / sampled.std(), 0.0) for a, m in zip(advantages, masks, strict=True)]
