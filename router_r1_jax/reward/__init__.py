"""Rule-based rewards of episodes: format, outcome and cost, and the presets that combine them. NumPy only."""

from router_r1_jax.reward.answers import exact_match as exact_match
from router_r1_jax.reward.answers import extract_answer as extract_answer
from router_r1_jax.reward.answers import f1_score as f1_score
from router_r1_jax.reward.answers import normalize_answer as normalize_answer
from router_r1_jax.reward.answers import sub_exact_match as sub_exact_match
from router_r1_jax.reward.cost import CostNormalizer as CostNormalizer
from router_r1_jax.reward.cost import cost_bounds as cost_bounds
from router_r1_jax.reward.cost import episode_cost as episode_cost
from router_r1_jax.reward.cost import make_normalizer as make_normalizer
from router_r1_jax.reward.cost import normalize_costs as normalize_costs
from router_r1_jax.reward.format import FAULTS as FAULTS
from router_r1_jax.reward.format import check_format as check_format
from router_r1_jax.reward.score import Rewards as Rewards
from router_r1_jax.reward.score import score as score
