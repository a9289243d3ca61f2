"""The router model: RouterLM, its configuration, its parameters."""

from router_r1_jax.model.attention import KV, check_attention
from router_r1_jax.model.config import ModelConfig, RopeScaling, from_arch
from router_r1_jax.model.hf import load_hf, save_hf
from router_r1_jax.model.hf_config import WeightsError
from router_r1_jax.model.init import abstract_params, count_params, init_params
from router_r1_jax.model.presets import preset, preset_arch
from router_r1_jax.model.transformer import Params, Prefix, RouterLM, empty_cache, unroll

__all__ = [
    "KV", "ModelConfig", "Params", "Prefix", "RopeScaling", "RouterLM", "WeightsError", "abstract_params",
    "check_attention", "count_params", "empty_cache", "from_arch", "init_params", "load_hf", "preset", "preset_arch",
    "save_hf", "unroll",
]  # fmt: skip
