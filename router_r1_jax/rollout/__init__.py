"""Rollout: jitted sampling with continuous batching; rows pause at route tags, and the host calls external models."""

from router_r1_jax.rollout.engine import Engine, make_truncation, static_shapes
from router_r1_jax.rollout.episode import Episode, Prompt, PromptError, Respond, common_prefix
from router_r1_jax.rollout.host_callback import EpisodeLimits
from router_r1_jax.rollout.row_state import StaticShapes
from router_r1_jax.rollout.telemetry import RolloutStats, concat_stats
from router_r1_jax.rollout.weight_sync import WeightSync

__all__ = [
    "Engine",
    "Episode",
    "EpisodeLimits",
    "Prompt",
    "PromptError",
    "Respond",
    "RolloutStats",
    "StaticShapes",
    "WeightSync",
    "common_prefix",
    "concat_stats",
    "make_truncation",
    "static_shapes",
]
