"""config.json: what real files say is read, and each setting that the model does not compute is refused by name."""

import json
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from router_r1_jax.distributed.mesh import make_mesh
from router_r1_jax.model import ModelConfig, WeightsError, abstract_params, count_params
from router_r1_jax.model.config import RopeScaling
from router_r1_jax.model.hf_config import config_from_hf, config_to_hf
from router_r1_jax.model.rotary_embedding import rope_frequencies

# As the checkpoints' own config.json have them (the settings that matter here).
QWEN25_3B_INSTRUCT = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 32768,
    "max_window_layers": 70,
    "model_type": "qwen2",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA32_3B_INSTRUCT = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 24,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def read(fields):
    return config_from_hf(fields, source="config.json")


def test_qwen25_3b_instruct():
    assert read(QWEN25_3B_INSTRUCT) == ModelConfig(
        vocab_size=151936,
        num_layers=36,
        width=2048,
        mlp=11008,
        num_heads=16,
        num_kv_heads=2,
        head_dim=128,
        family="qwen2",
        rope_theta=1e6,
        rms_eps=1e-6,
        tie_embeddings=True,
        max_positions=32768,
    )


def test_llama32_3b_instruct():
    assert read(LLAMA32_3B_INSTRUCT) == ModelConfig(
        vocab_size=128256,
        num_layers=28,
        width=3072,
        mlp=8192,
        num_heads=24,
        num_kv_heads=8,
        head_dim=128,
        family="llama",
        rope_theta=5e5,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
        rms_eps=1e-5,
        tie_embeddings=True,
        max_positions=131072,
    )


@pytest.mark.parametrize(
    ("fields", "published"),
    [
        (QWEN25_3B_INSTRUCT, 3_085_938_688),
        (LLAMA32_3B_INSTRUCT, 3_212_749_824),
        (QWEN3_4B, 4_022_468_096),
    ],
)
def test_parameter_counts_are_the_published_ones(fields, published):
    assert count_params(abstract_params(read(fields), make_mesh(1, 1, 1, jax.devices()[:1]))) == published


@pytest.mark.parametrize("fields", [QWEN25_3B_INSTRUCT, LLAMA32_3B_INSTRUCT, QWEN3_4B])
def test_written_file_is_read_back_by_us_and_by_transformers(fields, tmp_path):
    config = read(fields)
    written = json.loads(json.dumps(config_to_hf(config)))
    assert read(written) == config
    # Readers of one generation only: transformers 4 knows none of rope_parameters, later ones may drop the older pair.
    old = {k: v for k, v in written.items() if k != "rope_parameters"}
    new = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling")}
    assert read(old) == read(new) == config
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs, original = AutoConfig.from_pretrained(tmp_path), AutoConfig.for_model(**fields)
    assert theirs.rope_parameters == original.rope_parameters
    for name in (
        "architectures",
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "tie_word_embeddings",
        "max_position_embeddings",
    ):
        assert getattr(theirs, name) == getattr(original, name), name
    assert theirs.head_dim == getattr(original, "head_dim", 128)


LLAMA_BASE = {k: v for k, v in LLAMA32_3B_INSTRUCT.items() if k not in ("rope_theta", "rope_scaling")}


@st.composite
def rope_entries(draw):
    """The rotary settings of a config.json as either generation writes them, with what may be left out left out."""
    theta = draw(st.sampled_from([1e4, 5e5, 1e6]))
    fields = {"max_position_embeddings": draw(st.sampled_from([128, 2048, 131072]))}
    rope = {}
    if draw(st.booleans()):
        low = draw(st.sampled_from([0.5, 1.0]))
        rope = {"factor": draw(st.sampled_from([2.0, 8.0, 32.0])), "low_freq_factor": low, "high_freq_factor": 4 * low}
        rope[draw(st.sampled_from(["rope_type", "type"]))] = "llama3"
        if draw(st.booleans()):
            rope["original_max_position_embeddings"] = 64
        elif draw(st.booleans()):
            fields["original_max_position_embeddings"] = 96
    elif draw(st.booleans()):
        rope = {"rope_type": "default"}
    if draw(st.booleans()):
        return fields | {"rope_parameters": rope | draw(st.sampled_from([{}, {"rope_theta": theta}]))}
    return fields | {"rope_scaling": rope or None} | draw(st.sampled_from([{}, {"rope_theta": theta}]))


@settings(max_examples=60, deadline=None)
@given(entries=rope_entries())
def test_rotary_frequencies_are_those_of_transformers_for_every_way_to_write_them(entries):
    config = read(LLAMA_BASE | entries)
    theirs = LlamaRotaryEmbedding(AutoConfig.for_model(**LLAMA_BASE | entries)).inv_freq.numpy()
    ours = rope_frequencies(config)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert ours.dtype == np.float32


@pytest.mark.parametrize(
    ("base", "head_dim"), [(QWEN25_3B_INSTRUCT, 2048 // 16), (LLAMA32_3B_INSTRUCT, 3072 // 24), (QWEN3_4B, 128)]
)
def test_head_dim_left_out(base, head_dim):
    """D/N for Qwen2 and Llama; Qwen3's class has 128 of its own (D/N would be 80)."""
    fields = {k: v for k, v in base.items() if k != "head_dim"}
    assert read(fields).head_dim == head_dim
    theirs = AutoConfig.for_model(**fields)
    assert getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads) == head_dim


def test_kv_heads_left_out_are_as_many_as_heads():
    assert read(LLAMA32_3B_INSTRUCT | {"num_key_value_heads": None}).num_kv_heads == 24


# Sliding windows


@pytest.mark.parametrize(
    "fields",
    [
        dict(use_sliding_window=False, sliding_window=4096, max_window_layers=0),
        dict(use_sliding_window=True, sliding_window=None, max_window_layers=0),
        dict(use_sliding_window=True, sliding_window=4096, max_window_layers=36),
        dict(use_sliding_window=True, sliding_window=4096, layer_types=["full_attention"] * 36),
    ],
)
def test_window_that_applies_to_no_layer_is_passed_over(fields):
    assert "sliding_attention" not in AutoConfig.for_model(**QWEN3_4B | fields).layer_types
    assert read(QWEN3_4B | fields) == read(QWEN3_4B)


@pytest.mark.parametrize(
    "fields",
    [
        dict(use_sliding_window=True, sliding_window=4096, max_window_layers=35),
        dict(use_sliding_window=True, sliding_window=4096, max_window_layers=0),
        dict(use_sliding_window=True, sliding_window=4096, layer_types=["full_attention", "sliding_attention"] * 18),
    ],
)
def test_window_that_applies_is_refused(fields):
    assert "sliding_attention" in AutoConfig.for_model(**QWEN3_4B | fields).layer_types
    with pytest.raises(WeightsError, match="use_sliding_window is True with sliding_window 4096"):
        read(QWEN3_4B | fields)


# Everything else that is refused: (changes, what the one line says)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(model_type="mixtral"), "config.json: model_type is 'mixtral'; supported are qwen2, qwen3, llama"),
        (dict(model_type=None), "config.json: model_type is None"),
        (dict(model_type=["qwen3"]), "config.json: model_type is ['qwen3']"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'; only 'silu'"),
        (dict(attention_bias=True), "attention_bias is True; only False"),
        (dict(tie_word_embeddings="false"), "tie_word_embeddings is 'false'; write true or false, without quotes"),
        (dict(mlp_bias=True), "mlp_bias is True; only False"),
        (dict(quantization_config={"quant_method": "awq", "bits": 4}), "quantization_config is {'quant_method': 'awq'"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
        (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope_scaling.rope_type is 'yarn'"),
        (dict(rope_scaling={"type": "linear", "factor": 4.0}), "rope_scaling.rope_type is 'linear'"),
        (dict(rope_parameters={"rope_type": "dynamic"}), "rope_parameters.rope_type is 'dynamic'"),
        (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "only one setting for all layers"),
        (dict(rope_scaling="llama3"), "rope_scaling is 'llama3'"),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "rope_scaling.low_freq_factor is None"),
        (
            dict(rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 1}),
            "rope_scaling.high_freq_factor is 1.0; it must be above low_freq_factor, 4.0",
        ),
        (dict(rope_theta="big"), "rope_theta is 'big'"),
        (dict(rope_theta=-1.0), "rope_theta is -1.0"),
        (dict(hidden_size="wide"), "hidden_size is 'wide'; it must be a positive integer"),
        (dict(num_hidden_layers=0), "num_hidden_layers is 0"),
        (dict(vocab_size=True), "vocab_size is True"),
        (dict(vocab_size=None), "vocab_size is None"),
        (dict(head_dim=12.5), "head_dim is 12.5"),
        (dict(head_dim=15), "head_dim is 15"),
        (dict(num_key_value_heads=3), "num_kv_heads is 3"),
        (dict(num_key_value_heads=-8), "num_key_value_heads is -8"),
        (dict(max_position_embeddings="long"), "max_position_embeddings is 'long'"),
        (dict(rms_norm_eps="tiny"), "rms_norm_eps is 'tiny'"),
        (dict(rms_norm_eps=math.nan), "rms_norm_eps is nan"),
        (dict(use_sliding_window=True, sliding_window=8, max_window_layers="all"), "max_window_layers is 'all'"),
        (dict(use_sliding_window=True, sliding_window=8, layer_types=3), "layer_types is 3"),
    ],
)
def test_refusal_names_field_and_value(fields, message):
    with pytest.raises(WeightsError) as caught:
        read(QWEN3_4B | fields)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("config.json: ")
