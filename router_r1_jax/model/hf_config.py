"""config.json of a Hugging Face checkpoint: read into a ModelConfig or refused with the reason, and written.

Both generations are read: `rope_theta` and `rope_scaling` side by side (transformers 4) and `rope_parameters` (5).
"""

import functools
import math
import os
from typing import Any

from transformers import PreTrainedTokenizerBase

from router_r1_jax.model.config import ModelConfig, RopeScaling

_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
_DEFAULT_THETA = 10_000.0  # of all three families in transformers
_ORIGINAL = "original_max_position_embeddings"
_QWEN3_HEAD_DIM = 128  # what transformers' Qwen3Config has where the field is absent

# Settings that change the computation, and the only value that this model computes; absent means that value.
_REQUIRED_VALUES = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


class WeightsError(ValueError):
    """A checkpoint that cannot be read or written. The message names the file or field, what it holds and the fix."""


def config_from_hf(fields: dict[str, Any], *, source: str | os.PathLike[str]) -> ModelConfig:
    """The ModelConfig of a config.json, but for its dtype, which is that of the weights themselves.

    Args:
      fields: the parsed file.
      source: the file, for messages.

    Raises:
      WeightsError: another family, or a setting that RouterLM does not compute (rope types other than default and
        llama3, sliding windows, extra biases, quantised weights).
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
    width, num_layers, num_heads = count("hidden_size"), count("num_hidden_layers"), count("num_attention_heads")
    _refuse_sliding_window(fields, num_layers, source)
    theta, scaling = _read_rope(fields, source)
    tied = False if fields.get("tie_word_embeddings") is None else fields["tie_word_embeddings"]
    if not isinstance(tied, bool):
        raise WeightsError(f"{source}: tie_word_embeddings is {_short(tied)}; write true or false, without quotes")
    settings = dict(
        vocab_size=count("vocab_size"),
        num_layers=num_layers,
        width=width,
        mlp=count("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=count("num_key_value_heads", default=num_heads),
        head_dim=count("head_dim", default=_QWEN3_HEAD_DIM if family == "qwen3" else width // num_heads),
        family=family,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_eps=_positive(fields, "rms_norm_eps", kind=float, where=f"{source}: ", default=1e-6),
        tie_embeddings=tied,
        max_positions=count("max_position_embeddings", default=ModelConfig.max_positions),
    )
    try:
        return ModelConfig(**settings)
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
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
        "attention_bias": False,  # Qwen2's query, key and value biases are not what this field means
        "rope_parameters": rope,
        # transformers 4 does not know rope_parameters and would fall back to 10,000 without a word.
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "dtype": config.dtype,
        # Written also where unknown: the families' own defaults are ids of other vocabularies.
        **{name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def _positive(
    fields: dict[str, Any], name: str, *, kind: type[int] | type[float], where: str, default: float | None = None
) -> Any:
    """The field as a positive number of this kind; `default` where it is absent or null."""
    value = default if fields.get(name) is None else fields[name]
    kinds = int if kind is int else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < math.inf:
        noun = "integer" if kind is int else "number"
        raise WeightsError(f"{where}{name} is {_short(value)}; it must be a positive {noun}")
    return kind(value)


def _read_rope(fields: dict[str, Any], source: str | os.PathLike[str]) -> tuple[float, RopeScaling | None]:
    """Base wavelength and scaling. Of both generations' fields the older one counts, as in transformers."""
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
    # A length beside the rotary settings counts first, the whole model's last.
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
    """Qwen's files name a window also where it is switched off, or where no layer is above `max_window_layers`."""
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
