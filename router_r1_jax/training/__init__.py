"""Training: rollouts and their rewards, advantages, policy updates, the warm start, and the alarms."""
