"""The rollout: a jitted sampling loop that pauses rows at route tags and calls external models through the host."""

from router_r1_jax.rollout.engine import Engine, make_limits
from router_r1_jax.rollout.episode import Episode, Prompt, PromptError, Respond, RolloutStats, common_prefix

__all__ = ["Engine", "Episode", "Prompt", "PromptError", "Respond", "RolloutStats", "common_prefix", "make_limits"]
