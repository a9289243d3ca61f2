"""Group-relative advantages, in NumPy: each episode against the others that answered the same question."""

import numpy as np

# A group whose rewards spread less than this carries no signal; dividing by its spread would only blow up rounding.
SAME = 1e-8


def group_advantages(
    rewards: np.ndarray, groups: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, int]:
    """GRPO's advantages (DeepSeekMath, section 4.1.2): reward minus the group's mean, over its standard deviation.

    Args:
      rewards: [B] float.
      groups: [B] int, equal for episodes of the same question.
      weights: [B] in [0, 1], factors of the advantages; an episode of weight 0 (its provider failed) also leaves the
        group's mean and standard deviation.

    Returns:
      advantages [B] float32, and the number of groups without a spread, whose advantages are 0.
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
        advantages[members] = weights[members] * (rewards[members] - rewards[members].mean()) / spread
    return advantages, without_spread
