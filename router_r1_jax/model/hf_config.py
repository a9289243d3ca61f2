"""Hugging Face checkpoints: config.json, read into a ModelConfig or refused with the reason, and written.

Both generations are read: `rope_theta` with `rope_scaling` (transformers 4), and `rope_parameters` (transformers 5).
"""

import functools
import math
import os
from typing import Any

from transformers import PreTrainedTokenizerBase

from router_r1_jax.errors import UserError
from router_r1_jax.model.config import ModelConfig, RopeScaling

_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
_DEFAULT_THETA = 10_000.0  # of all three families in transformers
_ORIGINAL = "original_max_position_embeddings"
_QWEN3_HEAD_DIM = 128  # transformers' default for Qwen3

# Field of a ModelConfig -> field of config.json.
_SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "width": "hidden_size",
    "mlp": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_positions": "max_position_embeddings",
}
# Settings that change the computation, and the only value that this model supports. Absent fields have that value.
_REQUIRED_VALUES = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


class WeightsError(UserError, ValueError):
    """A checkpoint cannot be read or written. The message names the file or field, its content and the fix."""


def config_from_hf(fields: dict[str, Any], *, source: str | os.PathLike[str]) -> ModelConfig:
    """The ModelConfig of a config.json. Its dtype is not read, because the weights have it.

    Args:
      fields: the parsed file.
      source: the file, for messages.

    Raises:
      WeightsError: the family is not supported, or a setting is not (rope types other than default and llama3, sliding
        windows, extra biases, quantised weights).
    """
    family = fields.get("model_type")
    if not isinstance(family, str) or family not in _ARCHITECTURES:
        raise WeightsError(f"{source}: model_type is {_short(family)}; supported are {', '.join(_ARCHITECTURES)}")
    for field, value in _REQUIRED_VALUES.items():
        if fields.get(field) not in (None, value):
            raise WeightsError(
                f"{source}: {field} is {_short(fields[field])}; only {value!r} is supported, take another checkpoint"
            )
    count = functools.partial(_positive, fields, kind=int, where=f"{source}: ")
    num_heads = count("num_attention_heads")
    defaults = {
        "num_key_value_heads": num_heads,
        "head_dim": _QWEN3_HEAD_DIM if family == "qwen3" else count("hidden_size") // num_heads,
        "max_position_embeddings": ModelConfig.max_positions,
    }
    sizes = {ours: count(theirs, default=defaults.get(theirs)) for ours, theirs in _SIZES.items()}
    _refuse_sliding_window(fields, sizes["num_layers"], source)
    theta, scaling = _read_rope(fields, source)
    tied = False if fields.get("tie_word_embeddings") is None else fields["tie_word_embeddings"]
    if not isinstance(tied, bool):
        raise WeightsError(f"{source}: tie_word_embeddings is {_short(tied)}; write true or false, without quotes")
    eps = _positive(fields, "rms_norm_eps", kind=float, where=f"{source}: ", default=1e-6)
    settings = dict(family=family, rope_theta=theta, rope_scaling=scaling, rms_eps=eps, tie_embeddings=tied)
    try:
        return ModelConfig(**sizes, **settings)
    except ValueError as error:  # numbers that do not fit together
        raise WeightsError(f"{source}: {error}") from error


def config_to_hf(config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
    """The config.json of a model; `tokenizer` gives the special tokens' ids."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_positions,
        }
    return {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,  # Qwen2's biases of query, key and value do not count here
        "rope_parameters": rope,
        # transformers 4 does not know rope_parameters and would silently fall back to 10,000.
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "dtype": config.dtype,
        # Unknown ids are written as null, because the families' defaults are ids of other vocabularies.
        **{name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def _positive(
    fields: dict[str, Any], name: str, *, kind: type[int] | type[float], where: str, default: float | None = None
) -> Any:
    """The field as a positive number of this kind; `default` if it is absent or null."""
    value = default if fields.get(name) is None else fields[name]
    kinds = int if kind is int else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < math.inf:
        noun = "integer" if kind is int else "number"
        raise WeightsError(f"{where}{name} is {_short(value)}; it must be a positive {noun}")
    return kind(value)


def _read_rope(fields: dict[str, Any], source: str | os.PathLike[str]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling. If a file has the fields of both generations, the older one counts, as in transformers."""
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = fields.get(name) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise WeightsError(f"{source}: {name} is {_short(rope)}; only one setting for all layers is supported")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise WeightsError(
            f"{source}: {name}.partial_rotary_factor is {rope['partial_rotary_factor']}; only 1.0 is supported"
        )
    theta = _positive(fields, "rope_theta", kind=float, where=f"{source}: ", default=_DEFAULT_THETA)
    number = functools.partial(_positive, rope, kind=float, where=f"{source}: {name}.")
    theta = number("rope_theta", default=theta)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise WeightsError(
            f"{source}: {name}.rope_type is {kind!r}; supported are 'default' and 'llama3'. If the scaling only serves "
            f"longer contexts than you need, remove it"
        )
    # The first of these lengths that is present counts, as in transformers.
    lengths = fields.get(_ORIGINAL), rope.get(_ORIGINAL), fields.get("max_position_embeddings")
    original = {_ORIGINAL: next((length for length in lengths if length is not None), None)}
    low, high = number("low_freq_factor"), number("high_freq_factor")
    if high <= low:
        raise WeightsError(f"{source}: {name}.high_freq_factor is {high}; it must be above low_freq_factor, {low}")
    return theta, RopeScaling(
        factor=number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=_positive(original, _ORIGINAL, kind=int, where=f"{source}: {name}."),
    )


def _refuse_sliding_window(fields: dict[str, Any], num_layers: int, source: str | os.PathLike[str]) -> None:
    """Raise WeightsError if a window is in use. Qwen's files also name one that is off, or that no layer uses."""
    if not fields.get("use_sliding_window") or fields.get("sliding_window") is None:
        return
    first = fields.get("max_window_layers", 28)  # transformers' default
    if not isinstance(first, int):
        raise WeightsError(f"{source}: max_window_layers is {_short(first)}; it must be an integer")
    layer_types = fields.get("layer_types")
    if not isinstance(layer_types, list | None):
        raise WeightsError(f"{source}: layer_types is {_short(layer_types)}; it must be a list with a name per layer")
    if first < num_layers if layer_types is None else "sliding_attention" in layer_types:
        raise WeightsError(
            f"{source}: use_sliding_window is True with sliding_window {fields['sliding_window']}; windows are not "
            f"supported. If no sequence is longer than the window, set use_sliding_window to false"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
