"""Advantages, in NumPy: each episode against the others that answered the same question, or tokens against a critic."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

# A group whose rewards spread less than this carries no signal; dividing by its spread would only blow up rounding.
SAME = 1e-8

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
      weights: [B] in [0, 1], factors of the advantages; an episode of weight 0 (its provider failed) also leaves the
        group's mean and standard deviation.

    Returns:
      advantages [B] float32, and the number of groups without a spread, whose advantages are 0 but for "reinforce".
    """
    weights = np.ones(len(rewards)) if weights is None else np.asarray(weights, float)
    advantages = np.zeros(len(rewards), np.float32)
    without_spread = 0
    for group in np.unique(groups):
        members = np.flatnonzero((groups == group) & (weights > 0))
        spread = rewards[members].std() if len(members) else 0.0
        if spread < SAME:
            without_spread += 1
            continue
        apart = rewards[members] - rewards[members].mean()
        scale = {"grpo": 1 / spread, "dr_grpo": 1.0, "rloo": len(members) / (len(members) - 1), "reinforce": 0.0}[kind]
        advantages[members] = weights[members] * apart * scale
    if kind == "reinforce" and weights.any():
        advantages = (weights * (rewards - rewards[weights > 0].mean())).astype(np.float32)
    return advantages, without_spread


def groups_with_spread(rewards: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The groups, ascending, whose rewards [B] differ among episodes of a weight above 0."""
    counted = {group: rewards[(groups == group) & (weights > 0)] for group in np.unique(groups)}
    return np.array([group for group, own in counted.items() if len(own) and np.ptp(own) >= SAME], int)


def component_advantages(
    components: Mapping[str, np.ndarray],
    shares: Mapping[str, float],
    groups: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    kind: GroupKind = "grpo",
) -> tuple[np.ndarray, int]:
    """Advantages of several rewards, each compared within its group by itself, then added with their shares.

    A component with few and small differences, such as a cost among right answers, would vanish beside another in the
    standard deviation of their sum.

    Args:
      components: name -> rewards [B].
      shares: name -> factor of its advantages; components without one are left out.
      groups, weights, kind: as for `group_advantages`.

    Returns:
      advantages [B] float32, and the number of groups without a spread in any component that has a share.
    """
    total = np.zeros(len(groups), np.float32)
    alive: set[int] = set()
    for name, share in shares.items():
        advantages, _ = group_advantages(components[name], groups, weights, kind=kind)
        total += np.float32(share) * advantages
        alive |= set(np.unique(groups[advantages != 0]).tolist()) if share else set()
    return total, len(np.unique(groups)) - len(alive)


def gae(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, *, discount: float = 1.0, gae_lambda: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation over one episode's sampled tokens (Schulman et al. 2016, equation 16).

    Injected tokens are no actions and no states: the state that follows a sampled token is the one before the next
    sampled token, whatever was injected in between.

    Args:
      rewards: [T] given for each token; only those of sampled ones count.
      values: [T] the critic's values of the states before the tokens.
      mask: [T] bool, sampled.
      discount: gamma, per sampled token.
      gae_lambda: lambda.

    Returns:
      advantages [T] and the critic's targets (advantage + value) [T], both 0 on injected tokens.
    """
    at = np.flatnonzero(mask)
    advantages, running, following = np.zeros(len(mask)), 0.0, 0.0
    for t in at[::-1]:
        running = rewards[t] + discount * following - values[t] + discount * gae_lambda * running
        advantages[t], following = running, values[t]
    return advantages, np.where(mask, advantages + values, 0.0)


def whiten(advantages: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Advantages of several episodes with mean 0 and standard deviation 1 over all their sampled tokens, 0 elsewhere.

    Without a spread they are all 0.
    """
    sampled = np.concatenate([a[np.asarray(m, bool)] for a, m in zip(advantages, masks, strict=True)])
    if not len(sampled) or sampled.std() < SAME:
        return [np.zeros(len(a)) for a in advantages]
    return [np.where(m, (a - sampled.mean()) / sampled.std(), 0.0) for a, m in zip(advantages, masks, strict=True)]
