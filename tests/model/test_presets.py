"""Presets against the checkpoints' own config.json, and their size against the published one and transformers'."""

import json

import pytest
import torch
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict
from transformers import AutoConfig, AutoModelForCausalLM

from router_r1_jax.config import base_config
from router_r1_jax.distributed.mesh import AXES
from router_r1_jax.model import abstract_params, count_params, from_arch, preset, preset_arch
from router_r1_jax.model.hf_config import config_from_hf

QWEN25 = {
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
QWEN3 = {
    "model_type": "qwen3",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
SCALING = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA3 = {
    "model_type": "llama",
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_scaling": SCALING,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}


def fields(base, layers, width, mlp, heads, **rest):
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": mlp, "num_attention_heads": heads}
    return base | sizes | rest


# Name -> config.json of the instruction-tuned checkpoint, and the number of parameters on its page. Qwen3's pages count
# the tied embedding twice where it is stored twice (0.6B and 1.7B); a tied head is one parameter here.
PUBLISHED = {
    "Qwen2.5-0.5B": (fields(QWEN25, 24, 896, 4864, 14), 494_032_768),
    "Qwen2.5-1.5B": (fields(QWEN25, 28, 1536, 8960, 12), 1_543_714_304),
    "Qwen2.5-3B": (fields(QWEN25, 36, 2048, 11008, 16), 3_085_938_688),
    "Qwen2.5-7B": (
        fields(QWEN25, 28, 3584, 18944, 28, num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
        7_615_616_512,
    ),
    "Qwen3-0.6B": (fields(QWEN3, 28, 1024, 3072, 16), 751_632_384 - 151_936 * 1024),
    "Qwen3-1.7B": (fields(QWEN3, 28, 2048, 6144, 16), 2_031_739_904 - 151_936 * 2048),
    "Qwen3-4B": (fields(QWEN3, 36, 2560, 9728, 32), 4_022_468_096),
    "Llama-3.2-1B": (fields(LLAMA3, 16, 2048, 8192, 32, head_dim=64), 1_235_814_400),
    "Llama-3.2-3B": (fields(LLAMA3, 28, 3072, 8192, 24, head_dim=128), 3_212_749_824),
    "Llama-3.1-8B": (
        fields(LLAMA3, 32, 4096, 14336, 32, rope_scaling=SCALING | {"factor": 8.0}, tie_word_embeddings=False),
        8_030_261_248,
    ),
}


def our_count(config):
    return count_params(abstract_params(config, AbstractMesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_is_the_published_model(name):
    published, count = PUBLISHED[name]
    config = preset(name)
    assert config == config_from_hf(published, source="config.json")
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**published))
    assert our_count(config) == theirs.num_parameters() == count


def test_hub_names_are_known_and_others_refused_with_a_list():
    assert preset("Qwen/Qwen2.5-3B-Instruct") == preset("qwen2.5-3b") == preset("Qwen2.5-3B")
    for name in ("Qwen2.5-Coder-3B", "Qwen/Qwen2.5-72B-Instruct", "3B", ""):
        with pytest.raises(ValueError) as caught:
            preset(name)
        assert repr(name) in str(caught.value) and all(known in str(caught.value) for known in PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_arch_of_a_configuration_comes_from_a_preset(name):
    """A random start: through a ConfigDict, which is saved as JSON, and back."""
    arch = ConfigDict(preset_arch(name))
    assert json.loads(arch.to_json()) == arch.to_dict()
    assert not set(arch) & set(base_config().model)  # one of the two would be read by nobody
    config = preset(name)
    assert from_arch(arch, 128_000, dtype="float32") == config
    with pytest.raises(ValueError, match="the tokenizer needs 152065"):
        from_arch(arch, 152_065, dtype="float32")
