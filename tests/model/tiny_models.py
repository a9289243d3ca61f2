"""Small random models of every family, made by transformers: the truth that RouterLM is compared with."""

import functools

import jax
import numpy as np
import torch
import transformers
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from router_r1_jax.model import RouterLM

torch.set_num_threads(1)  # tiny matrices: a second thread only waits

VOCAB = 96
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    max_position_embeddings=65_536,
    bos_token_id=None,
    eos_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)


def _plain(theta):
    return dict(rope_type="default", rope_theta=theta)


def _config(cls, heads, kv_heads, rope, tied, **fields):
    return cls(
        **COMMON,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        **fields,
    )


# Heads, kv heads, rope and tying differ within a family; the last of each has a head_dim other than D/N.
CONFIGS = {
    "qwen2_tied": lambda: _config(Qwen2Config, 4, 2, _plain(1e6), True),
    "qwen2_untied_one_kv_head": lambda: _config(Qwen2Config, 4, 1, _plain(1e4), False, rms_norm_eps=1e-3),
    "qwen2_wide_heads": lambda: _config(Qwen2Config, 2, 2, _plain(1e4), True, head_dim=24),
    "qwen3_tied": lambda: _config(Qwen3Config, 4, 2, _plain(1e6), True, head_dim=8),
    "qwen3_untied_one_kv_head": lambda: _config(Qwen3Config, 8, 1, _plain(1e4), False, head_dim=4, rms_norm_eps=1e-3),
    "qwen3_wide_heads": lambda: _config(Qwen3Config, 6, 3, _plain(1e6), True, head_dim=16),
    "llama_tied_scaled": lambda: _config(LlamaConfig, 4, 2, LLAMA3, True),
    "llama_untied": lambda: _config(LlamaConfig, 4, 4, _plain(1e4), False, rms_norm_eps=1e-3),
    "llama_wide_heads_scaled": lambda: _config(LlamaConfig, 4, 1, LLAMA3, False, head_dim=24),
}


def random_model(config, dtype=torch.float32):
    """A transformers model with every parameter random: biases of 0 and norms of 1 would hide that they were lost."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.25 * noise)
    return model.to(dtype)


def torch_logits(model, tokens, positions=None):
    """Logits [B, T, V] of a transformers model; the mask of ones keeps gaps in `positions` from meaning new texts."""
    tokens = torch.tensor(np.asarray(tokens))
    positions = None if positions is None else torch.tensor(np.asarray(positions))
    with torch.no_grad():
        mask = torch.ones_like(tokens)
        return model(tokens, attention_mask=mask, position_ids=positions).logits.float().numpy()


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, tokens, positions=None, prefix=None):
    """Logits [B, T, V] without a cache, from stacked parameters."""
    return RouterLM(config).apply({"params": params}, tokens, positions=positions, prefix=prefix)


def relative_error(a, b):
    """max|a - b| / max|b|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.abs(a - b).max() / np.abs(b).max()


def random_tokens(*shape, seed=0):
    """int32 token ids."""
    return np.random.default_rng(seed).integers(VOCAB, size=shape, dtype=np.int32)
