"""LoRA against transformers: adapters act as the sum of two matrices does, beside the base and merged into it."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from tiny_models import forward, random_tokens, relative_error, torch_logits
from transformers import AutoModelForCausalLM

from router_r1_jax.distributed.mesh import make_mesh
from router_r1_jax.model import (
    LoRA,
    abstract_params,
    add_adapters,
    count_params,
    init_params,
    join,
    load_hf,
    merge_adapters,
    preset,
    save_hf,
    split_trainable,
)

ONE = make_mesh(1, 1, 1, jax.devices()[:1])
ALL = LoRA(rank=3, alpha=5.0)
NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def adapted(config, params, lora=ALL, seed=0):
    """The model with random adapters, B too."""
    config = dataclasses.replace(config, lora=lora)
    adapters, base = split_trainable(add_adapters(config, params, ONE, seed))
    rng = np.random.default_rng(seed)
    return config, join(jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(x.dtype), adapters), base)


@pytest.fixture(params=["qwen2_tied", "qwen3_wide_heads", "llama_wide_heads_scaled"])
def trained(request, checkpoint):
    """A checkpoint, its model with random adapters, and the logits of transformers with W + alpha / rank B A."""
    c = checkpoint(request.param)
    config, params = adapted(c.config, c.params)
    model = AutoModelForCausalLM.from_pretrained(c.folder, attn_implementation="eager").eval()
    for target, theirs in NAMES.items():
        block = params["layers"]["attention" if target in "qkvo" else "mlp"][target]
        for i in range(config.num_layers):
            a, b = (np.asarray(block[name][i], np.float64) for name in ("lora_a", "lora_b"))
            delta = 5.0 / 3.0 * a.reshape(-1, 3) @ b.reshape(3, -1)
            weight = model.get_submodule(f"model.layers.{i}.{theirs}").weight
            with torch.no_grad():
                weight.copy_(torch.tensor(weight.numpy().astype(np.float64) + delta.T))
    tokens = random_tokens(2, 24)
    return config, params, tokens, torch_logits(model, tokens), torch_logits(c.model, tokens)


def test_adapters_beside_the_base(trained):
    config, params, tokens, expected, _ = trained
    assert relative_error(forward(config, params, tokens), expected) < 1e-4


def test_merged(trained):
    config, params, tokens, expected, _ = trained
    merged = jax.jit(merge_adapters, static_argnums=0)(config, params)
    assert jax.tree.map(np.shape, merged) == jax.tree.map(np.shape, abstract_params(config.base, ONE))
    logits = forward(config.base, merged, tokens)
    assert relative_error(logits, expected) < 1e-4
    assert relative_error(logits, forward(config, params, tokens)) < 1e-4


def test_export_is_merged(trained, tmp_path):
    config, params, tokens, expected, _ = trained
    save_hf(tmp_path / "export", config, params)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", attn_implementation="eager").eval()
    assert relative_error(torch_logits(model, tokens), expected) < 1e-4
    assert load_hf(tmp_path / "export")[0] == config.base


def test_the_base_passes_adapters_by(trained):
    config, params, tokens, expected, base = trained
    logits = forward(config.base, params, tokens)
    assert relative_error(logits, base) < 1e-4 < 0.05 < relative_error(base, expected)


def test_fresh_adapters_change_nothing(checkpoint):
    c = checkpoint("qwen2_tied")
    config = dataclasses.replace(c.config, lora=ALL)
    params = add_adapters(config, c.params, ONE, seed=1)
    np.testing.assert_array_equal(
        forward(config, params, random_tokens(2, 8)), forward(c.config, c.params, random_tokens(2, 8))
    )
    other = add_adapters(config, c.params, ONE, seed=2)
    a, b = (x["layers"]["mlp"]["down"]["lora_a"] for x in (params, other))
    assert np.abs(a - b).max() > 0 and np.std(a) == pytest.approx(c.config.mlp**-0.5 / 3**0.5, rel=0.15)
    assert add_adapters(c.config, c.params, ONE, seed=1) is c.params


def test_targets_and_rank_say_what_is_trained(checkpoint):
    c = checkpoint("qwen2_tied")
    config, params = adapted(c.config, c.params, LoRA(4, 8.0, ("k", "up")))
    adapters, base = split_trainable(params)
    L, D, K, H, F = config.num_layers, config.width, config.num_kv_heads, config.head_dim, config.mlp
    assert jax.tree.map(np.shape, adapters) == {
        "layers": {
            "attention": {"k": {"lora_a": (L, D, 4), "lora_b": (L, 4, K, H)}},
            "mlp": {"up": {"lora_a": (L, D, 4), "lora_b": (L, 4, F)}},
        }
    }
    jax.tree.map(np.testing.assert_array_equal, base, c.params)
    everything, nothing = split_trainable(base)
    assert everything is base and nothing == {}
    assert jax.tree.structure(params) == jax.tree.structure(abstract_params(config, ONE))


def test_adapters_of_a_half_precision_model_are_float32(checkpoint):
    """A step of 1e-5 on a weight of 0.1 would be rounded away; merged kernels are rounded once."""
    base = dataclasses.replace(checkpoint("qwen3_tied").config, dtype="bfloat16")
    params = init_params(base, ONE, 0)
    config, params = adapted(base, params)
    adapters, _ = split_trainable(params)
    assert {str(x.dtype) for x in jax.tree.leaves(adapters)} == {"float32"}
    block = params["layers"]["mlp"]["gate"]
    exact = np.asarray(block["kernel"], np.float64) + 5 / 3 * np.einsum(
        "ldr,lrf->ldf", *(np.asarray(block[name], np.float64) for name in ("lora_a", "lora_b"))
    )
    merged = merge_adapters(config, params)["layers"]["mlp"]["gate"]["kernel"]
    assert merged.dtype == base.dtype
    np.testing.assert_allclose(np.asarray(merged, np.float64), exact, rtol=2**-8, atol=1e-6)
    single = dataclasses.replace(config, dtype="float32")
    truth = forward(single, jax.tree.map(lambda x: x.astype(np.float32), params), random_tokens(2, 8))
    for model, weights in ((config, params), (base, merge_adapters(config, params))):
        half = forward(model, weights, random_tokens(2, 8))
        assert half.dtype == np.float32 and relative_error(half, truth) < 0.1


def test_few_parameters_are_trained():
    """The count of the paper's section 4.2: r (inputs + outputs) for each adapted kernel."""
    config = dataclasses.replace(preset("Qwen2.5-3B"), lora=LoRA(rank=16, alpha=32.0))
    D, N, K, H, F = config.width, config.num_heads, config.num_kv_heads, config.head_dim, config.mlp
    sizes = 2 * (D + N * H) + 2 * (D + K * H) + 3 * (D + F)
    assert count_params(split_trainable(abstract_params(config, ONE))[0]) == config.num_layers * 16 * sizes
