"""The rollout: a jitted sampling loop that pauses rows at route tags and calls external models through the host."""

from router_r1_jax.rollout.engine import Engine, make_cut, make_limits
from router_r1_jax.rollout.episode import Episode, Prompt, PromptError, Respond, common_prefix
from router_r1_jax.rollout.exchange import Manners
from router_r1_jax.rollout.push import Spread
from router_r1_jax.rollout.trace import RolloutStats, joined

__all__ = [
    "Engine", "Episode", "Manners", "Prompt", "PromptError", "Respond", "RolloutStats", "Spread", "common_prefix",
    "joined", "make_cut", "make_limits",
]  # fmt: skip
