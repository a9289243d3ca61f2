"""What an episode is worth: format, outcome and cost, and the presets that join them. NumPy only."""

from router_r1_jax.reward.answers import exact_match, extract_answer, f1_score, normalize_answer, sub_exact_match
from router_r1_jax.reward.cost import COSTS, CostNormalizer, episode_cost
from router_r1_jax.reward.format import FAULTS, FormatReport, check_format
from router_r1_jax.reward.score import PRESETS, Rewards, score

__all__ = [
    "COSTS",
    "FAULTS",
    "PRESETS",
    "CostNormalizer",
    "FormatReport",
    "Rewards",
    "check_format",
    "episode_cost",
    "exact_match",
    "extract_answer",
    "f1_score",
    "normalize_answer",
    "score",
    "sub_exact_match",
]
