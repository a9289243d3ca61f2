"""Random initial parameters: their standard deviations, and the behaviour of induction heads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from router_r1_jax.model.config import ModelConfig
from router_r1_jax.model.init_params import random_params
from router_r1_jax.model.rotary_embedding import apply_rope
from router_r1_jax.model.transformer import RouterLM

QWEN2 = ModelConfig(
    vocab_size=96, num_layers=2, width=32, mlp=48, num_heads=4, num_kv_heads=2, head_dim=8, family="qwen2"
)
SHAPES = [(16, 200.0, 4, 4), (32, 1000.0, 4, 2), (32, 10_000.0, 2, 2), (64, 1e6, 4, 1)]


@pytest.mark.parametrize(("head_dim", "theta", "heads", "kv_heads"), SHAPES)
def test_such_heads_attend_to_the_token_before_wherever_it_stands(head_dim, theta, heads, kv_heads):
    """From the parameters of the first layer, over random activations; the truth is the definition of attention."""
    config = dataclasses.replace(
        QWEN2, head_dim=head_dim, rope_theta=theta, num_heads=heads, num_kv_heads=kv_heads, induction_heads=1
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


@pytest.mark.parametrize(("head_dim", "theta", "heads", "kv_heads"), SHAPES[1:])
def test_what_stood_behind_a_token_before_is_foreseen_without_any_training(head_dim, theta, heads, kv_heads):
    """Of sequences that repeat after 30 random tokens; without such heads a start says nothing of them."""
    config = dataclasses.replace(
        QWEN2,
        vocab_size=500,
        width=128,
        head_dim=head_dim,
        rope_theta=theta,
        num_heads=heads,
        num_kv_heads=kv_heads,
        initializer_range=0.03,
        embedding_range=0.1,
    )
    tokens = np.tile(np.random.default_rng(0).integers(500, size=(16, 30)), (1, 4))

    def foreseen(induction_heads):
        """Share of the repeated tokens among the ten most probable of 500; the one read last is left out."""
        with_heads = dataclasses.replace(config, induction_heads=induction_heads)
        params = random_params(with_heads, jax.random.key(0))
        logits = np.array(RouterLM(with_heads).apply({"params": params}, jnp.asarray(tokens)))[:, 30:-1]
        np.put_along_axis(logits, tokens[:, 30:-1, None], -np.inf, axis=-1)
        ten = np.argpartition(logits, -10, axis=-1)[..., -10:]
        return (ten == tokens[:, 31:, None]).any(-1).mean()

    found = foreseen(0), foreseen(kv_heads)
    assert found[0] < 0.05 and found[1] > 0.2, found


def test_all_else_is_the_same_random_start():
    plain, with_heads = (
        random_params(dataclasses.replace(QWEN2, induction_heads=n), jax.random.key(0)) for n in (0, 1)
    )
    changed = {}
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(with_heads), strict=True):
        if not np.array_equal(a, b):
            layers = [not np.array_equal(x, y) for x, y in zip(a, b, strict=True)]
            changed[jax.tree_util.keystr(path, simple=True, separator="/")] = layers
    kernels = {"v": [True, False], "o": [True, True], "q": [False, True], "k": [False, True]}
    assert changed == {f"layers/attention/{name}/kernel": layers for name, layers in kernels.items()} | {
        f"layers/attention/{name}/bias": [True, False] for name in "qk"
    }
    kept = [np.asarray(p["layers"]["attention"]["v"]["kernel"][0, :, 1]) for p in (plain, with_heads)]
    np.testing.assert_array_equal(*kept)  # the first layer's other heads


def test_embeddings_and_kernels_have_the_configured_deviations():
    config = dataclasses.replace(QWEN2, initializer_range=0.06, embedding_range=0.5, tie_embeddings=False)
    params = random_params(config, jax.random.key(0))
    for name in ("embed", "head"):
        assert np.std(params[name]) == pytest.approx(0.5, rel=0.05)
    for name in ("gate", "up", "down"):
        assert np.std(params["layers"]["mlp"][name]["kernel"]) == pytest.approx(0.06, rel=0.05)


def test_heads_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match="induction_heads is 1 with family 'qwen3'"):
        dataclasses.replace(QWEN2, family="qwen3", induction_heads=1)
    with pytest.raises(ValueError, match=f"there are {QWEN2.num_kv_heads}"):
        dataclasses.replace(QWEN2, induction_heads=QWEN2.num_kv_heads + 1)
    with pytest.raises(ValueError, match="num_layers=1; they take two layers"):
        dataclasses.replace(QWEN2, induction_heads=1, num_layers=1)
    with pytest.raises(ValueError, match="rope_theta=100 and head_dim=8; no rotary pair .* raise rope_theta"):
        random_params(dataclasses.replace(QWEN2, induction_heads=1, rope_theta=100.0), jax.random.key(0))
