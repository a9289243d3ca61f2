"""What an episode is worth: format, outcome and cost, and the presets that join them. NumPy only."""

from router_r1_jax.reward.answers import exact_match, extract_answer, f1_score, normalize_answer, sub_exact_match
from router_r1_jax.reward.cost import CostNormalizer
from router_r1_jax.reward.format import FAULTS, FormatReport, check_format
from router_r1_jax.reward.score import Rewards, score

__all__ = [
    "FAULTS",
    "CostNormalizer",
    "FormatReport",
    "Rewards",
    "check_format",
    "exact_match",
    "extract_answer",
    "f1_score",
    "normalize_answer",
    "score",
    "sub_exact_match",
]
