"""Presets: published architectures by name, for random initial weights and for memory plans without a download.

The numbers come from config.json of the instruction-tuned checkpoints. The base models have the same shapes; some have
a longer context (`max_positions`), which changes only the exported config.json.
"""

import dataclasses
from typing import Any

from router_r1_jax.model.config import ModelConfig, RopeScaling

_QWEN25 = {"family": "qwen2", "vocab_size": 151_936, "head_dim": 128, "rope_theta": 1e6}
_QWEN3 = _QWEN25 | {"family": "qwen3", "max_positions": 40_960}
_LLAMA3 = {
    "family": "llama",
    "vocab_size": 128_256,
    "head_dim": 128,
    "rope_theta": 5e5,
    "rms_eps": 1e-5,
    "max_positions": 131_072,
    "rope_scaling": RopeScaling(32.0, 1.0, 4.0, original_max_positions=8192),
}

# Name -> layers, width, mlp, heads, KV heads, and the remaining fields.
_TABLE: dict[str, tuple[int, int, int, int, int, dict[str, Any]]] = {
    "Qwen2.5-0.5B": (24, 896, 4864, 14, 2, _QWEN25 | {"head_dim": 64}),
    "Qwen2.5-1.5B": (28, 1536, 8960, 12, 2, _QWEN25),
    "Qwen2.5-3B": (36, 2048, 11_008, 16, 2, _QWEN25),
    "Qwen2.5-7B": (28, 3584, 18_944, 28, 4, _QWEN25 | {"vocab_size": 152_064, "tie_embeddings": False}),
    "Qwen3-0.6B": (28, 1024, 3072, 16, 8, _QWEN3),
    "Qwen3-1.7B": (28, 2048, 6144, 16, 8, _QWEN3),
    "Qwen3-4B": (36, 2560, 9728, 32, 8, _QWEN3),
    "Llama-3.2-1B": (16, 2048, 8192, 32, 8, _LLAMA3 | {"head_dim": 64}),
    "Llama-3.2-3B": (28, 3072, 8192, 24, 8, _LLAMA3),
    "Llama-3.1-8B": (
        32,
        4096,
        14_336,
        32,
        8,
        _LLAMA3 | {"tie_embeddings": False, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, original_max_positions=8192)},
    ),
}


def preset(name: str) -> ModelConfig:
    """The architecture of a published model, in float32 and with full remat.

    Args:
      name: as on the Hugging Face hub, in any case; owner and "-Instruct" may be left out: "Qwen2.5-3B",
        "meta-llama/Llama-3.2-3B-Instruct".

    Raises:
      ValueError: there is no such preset; the message lists all presets.
    """
    wanted = name.lower().rpartition("/")[2].removesuffix("-instruct")
    for known, (num_layers, width, mlp, num_heads, num_kv_heads, rest) in _TABLE.items():
        if known.lower() == wanted:
            return ModelConfig(
                num_layers=num_layers, width=width, mlp=mlp, num_heads=num_heads, num_kv_heads=num_kv_heads, **rest
            )
    raise ValueError(f"{name!r} is not a preset; there are {', '.join(_TABLE)}")


def preset_arch(name: str) -> dict[str, Any]:
    """A preset as the fields of `config.model.arch`: plain values, without the fields that `config.model` has."""
    fields = dataclasses.asdict(preset(name))
    return {field: value for field, value in fields.items() if field not in ("dtype", "remat", "attention", "lora")}
