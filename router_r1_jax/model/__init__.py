"""The router model: RouterLM, its configuration, its parameters."""

from router_r1_jax.model.attention import KV, Cache, check_attention
from router_r1_jax.model.config import LoRA, ModelConfig, RopeScaling, from_arch, lora_from
from router_r1_jax.model.hf import check_export_folder, load_hf, load_hf_config, save_hf
from router_r1_jax.model.hf_config import WeightsError
from router_r1_jax.model.init import abstract_params, count_params, init_params
from router_r1_jax.model.lora import add_adapters, join, merge_adapters, split_trainable
from router_r1_jax.model.presets import preset, preset_arch
from router_r1_jax.model.transformer import (
    Params,
    Prefix,
    RouterLM,
    empty_cache,
    head_logits,
    unroll,
    weight_gradient,
)

__all__ = [
    "KV", "Cache", "LoRA", "ModelConfig", "Params", "Prefix", "RopeScaling", "RouterLM", "WeightsError",
    "abstract_params", "add_adapters", "check_attention", "check_export_folder", "count_params", "empty_cache",
    "from_arch", "head_logits", "init_params", "join", "load_hf", "load_hf_config", "lora_from", "merge_adapters",
    "preset", "preset_arch", "save_hf", "split_trainable", "unroll", "weight_gradient",
]  # fmt: skip
