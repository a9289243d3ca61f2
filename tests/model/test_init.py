"""The random start: how wide it is drawn, and what `previous_token_heads` changes of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from router_r1_jax.model.attention import apply_rope
from router_r1_jax.model.config import ModelConfig
from router_r1_jax.model.init import random_params

QWEN2 = ModelConfig(
    vocab_size=96, num_layers=2, width=32, mlp=48, num_heads=4, num_kv_heads=2, head_dim=8, family="qwen2"
)
SHAPES = [(16, 100.0, 4, 4), (32, 100.0, 4, 2), (32, 10_000.0, 2, 2), (64, 1e6, 4, 1)]


@pytest.mark.parametrize(("head_dim", "theta", "heads", "kv_heads"), SHAPES)
def test_such_heads_attend_to_the_token_before_wherever_it_stands(head_dim, theta, heads, kv_heads):
    """From the parameters of the first layer, over random activations; the truth is the definition of attention."""
    config = dataclasses.replace(
        QWEN2, head_dim=head_dim, rope_theta=theta, num_heads=heads, num_kv_heads=kv_heads, previous_token_heads=1
    )
    attention = random_params(config, jax.random.key(0))["layers"]["attention"]
    x = jax.random.normal(jax.random.key(1), (1, 100, config.width))

    def rotated(name):
        y = jnp.einsum("btd,dnh->btnh", x, attention[name]["kernel"][0]) + attention[name]["bias"][0]
        return np.asarray(apply_rope(y, jnp.arange(100)[None], config))[0]

    q, k = rotated("q"), rotated("k")
    for head in range(config.num_heads // config.num_kv_heads):  # those of the first kv head
        scores = q[:, head] @ k[:, 0].T / np.sqrt(config.head_dim)
        scores[np.triu_indices(100, 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        assert (weights.argmax(-1)[1:] == np.arange(99)).mean() > 0.9
        near = sum(np.diag(weights, -back)[3 - back :] for back in range(4))
        assert near.min() > 0.5


def test_all_else_is_the_same_random_start():
    plain, with_heads = (
        random_params(dataclasses.replace(QWEN2, previous_token_heads=n), jax.random.key(0)) for n in (0, 1)
    )
    changed = {}
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(with_heads), strict=True):
        if not np.array_equal(a, b):
            heads = np.argwhere(np.any(np.asarray(a) != np.asarray(b), axis=-1))
            changed[jax.tree_util.keystr(path, simple=True, separator="/")] = heads.tolist()
    assert changed == {"layers/attention/q/bias": [[0, 0], [0, 1]], "layers/attention/k/bias": [[0, 0]]}


def test_embeddings_and_kernels_are_drawn_as_wide_as_the_configuration_says():
    config = dataclasses.replace(QWEN2, initializer_range=0.06, embedding_range=0.5, tie_embeddings=False)
    params = random_params(config, jax.random.key(0))
    for name in ("embed", "head"):
        assert np.std(params[name]) == pytest.approx(0.5, rel=0.05)
    for name in ("gate", "up", "down"):
        assert np.std(params["layers"]["mlp"][name]["kernel"]) == pytest.approx(0.06, rel=0.05)


def test_heads_that_no_bias_can_make_are_refused():
    with pytest.raises(ValueError, match="previous_token_heads is 1 with family 'qwen3'"):
        dataclasses.replace(QWEN2, family="qwen3", previous_token_heads=1)
    with pytest.raises(ValueError, match=f"there are {QWEN2.num_kv_heads}"):
        dataclasses.replace(QWEN2, previous_token_heads=QWEN2.num_kv_heads + 1)
