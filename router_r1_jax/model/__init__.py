"""The language model: RouterLM, ModelConfig, parameters, KV cache, LoRA, presets, Hugging Face checkpoints."""

from router_r1_jax.model.attention import check_attention
from router_r1_jax.model.config import LoRA, ModelConfig, from_arch, lora_from
from router_r1_jax.model.hf_config import WeightsError
from router_r1_jax.model.hf_load import load_hf, load_hf_config
from router_r1_jax.model.hf_save import check_export_folder, save_hf
from router_r1_jax.model.init_params import abstract_params, count_params, init_params
from router_r1_jax.model.kv_cache import KV, Cache, Prefix, empty_cache, pad_prefix
from router_r1_jax.model.lora import add_adapters, join, merge_adapters, split_trainable
from router_r1_jax.model.presets import preset, preset_arch
from router_r1_jax.model.transformer import Params, RouterLM, unroll

__all__ = [
    "KV",
    "Cache",
    "LoRA",
    "ModelConfig",
    "Params",
    "Prefix",
    "RouterLM",
    "WeightsError",
    "abstract_params",
    "add_adapters",
    "check_attention",
    "check_export_folder",
    "count_params",
    "empty_cache",
    "from_arch",
    "init_params",
    "join",
    "load_hf",
    "load_hf_config",
    "lora_from",
    "merge_adapters",
    "pad_prefix",
    "preset",
    "preset_arch",
    "save_hf",
    "split_trainable",
    "unroll",
]
