"""Attention of every implementation against a loop in NumPy, and against each other in value and gradient."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import forward, random_tokens, relative_error

from router_r1_jax.config import ConfigError, base_config
from router_r1_jax.model import KV, Cache, ModelConfig, attention, check_attention
from router_r1_jax.model.attention import attend
from router_r1_jax.setup import model as setup_model

B, T, S, P, LENGTH, H = 3, 7, 12, 5, 3, 4
HEADS = [(4, 4), (4, 2), (4, 1)]  # queries, keys
USES = [
    "causal",
    "causal in blocks",
    "causal in parts",
    "causal in blocks in parts",
    "any order",
    "any order in parts",
    "chunk",
    "decode",
]
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def make_case(use, heads, prefixed):
    """Arguments of `attend`: arrays that have gradients, then the rest."""
    rng = np.random.default_rng(0)
    (N, K), t, s = heads, 1 if use == "decode" else T, T if use in ("causal", "any order") else S

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    arrays = (normal(B, t, N, H), KV(normal(B, s, K, H), normal(B, s, K, H)))
    arrays += (KV(normal(P, K, H), normal(P, K, H)) if prefixed else None,)
    if use == "causal":
        positions = key_positions = np.arange(T)[None]
    elif use == "any order":
        positions = key_positions = np.stack([5 + rng.permutation(T) for _ in range(B)])
    else:  # each row at its own place in a cache
        positions, key_positions = np.array([[0], [2], [4]]) + np.arange(t), np.arange(S)[None]
    return arrays, positions, key_positions, use == "causal"


def run(arrays, positions, key_positions, causal, implementation):
    q, own, prefix = arrays
    if not causal and positions.shape != key_positions.shape:  # a cache
        own = Cache(own.k.transpose(0, 2, 3, 1), own.v.swapaxes(1, 2))
    length = jnp.int32(0 if prefix is None else LENGTH)
    return attend(q, own, positions, key_positions, prefix, length, causal=causal, implementation=implementation)


def by_loop(arrays, positions, key_positions, causal):
    """float64, one query and head at a time, over a list of the keys that it sees."""
    q, own, prefix = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
    out = np.zeros(q.shape)
    for b, t, n in itertools.product(*map(range, q.shape[:3])):
        k = n // (q.shape[2] // own.k.shape[2])
        places = np.broadcast_to(key_positions, own.k.shape[:2])[b] <= np.broadcast_to(positions, q.shape[:2])[b, t]
        keys, values = own.k[b, places, k], own.v[b, places, k]
        if prefix is not None:
            keys = np.concatenate([prefix.k[:LENGTH, k], keys])
            values = np.concatenate([prefix.v[:LENGTH, k], values])
        scores = np.exp(keys @ q[b, t, n] / np.sqrt(q.shape[3]))
        out[b, t, n] = scores @ values / scores.sum()
    return out


@pytest.mark.parametrize("prefixed", [False, True], ids=["alone", "behind a prefix"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("use", USES)
def test_implementations_are_the_loop_and_have_one_gradient(monkeypatch, use, heads, prefixed):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 3 if "in blocks" in use else 128)
    if "in parts" in use:  # a row at a time
        monkeypatch.setattr(attention, "SCORE_ROWS", 1)
    arrays, *rest = case = make_case(use.partition(" in ")[0], heads, prefixed)
    direction = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.float32)

    def values_and_gradients(implementation):
        out, back = jax.vjp(lambda arrays: run(arrays, *rest, implementation), arrays)
        return out, back(direction)[0]

    both = jax.jit(lambda: [values_and_gradients(name) for name in ("einsum", "xla")], compiler_options=QUICK_COMPILE)
    (out, gradients), (other, other_gradients) = both()
    np.testing.assert_allclose(out, by_loop(*case), atol=1e-5)
    np.testing.assert_allclose(other, out, atol=1e-5)
    assert all(float(jnp.abs(x).max()) > 0.01 for x in jax.tree.leaves(gradients))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), other_gradients, gradients)


def test_the_model_takes_its_configs_attention(checkpoint, monkeypatch):
    c = checkpoint("qwen3_tied")
    tokens = random_tokens(2, 9)
    expected = forward(c.config, c.params, tokens)
    asked, original = [], jax.nn.dot_product_attention

    def spy(*args, **kwargs):
        asked.append(kwargs["implementation"])
        return original(*args, **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    found = forward(dataclasses.replace(c.config, attention="xla"), c.params, tokens)
    assert set(asked) == {"xla"}
    assert relative_error(found, expected) < 1e-5


SHAPE = dict(vocab_size=8, num_layers=1, width=16, mlp=16, num_heads=2, num_kv_heads=1, head_dim=64, dtype="bfloat16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "cudnn", "dtype": "float32"}, "attention is 'cudnn' with dtype 'float32'; .* bfloat16"),
        ({"attention": "cudnn", "head_dim": 36}, "attention is 'cudnn' with head_dim 36; .* choose attention 'einsum'"),
        ({"attention": "cudnn", "head_dim": 264}, "attention is 'cudnn' with head_dim 264; .* up to 128"),
    ],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**(SHAPE | changes))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuDNN may be here")
def test_cudnn_is_refused_without_a_gpu(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"attention is 'cudnn', which needs an NVIDIA GPU; this is cpu: choose"):
        check_attention(ModelConfig(**SHAPE, attention="cudnn"))
    config = base_config()
    config.model.attention, config.model.dtype = "cudnn", "bfloat16"
    monkeypatch.setattr(setup_model, "_load_tokenizer", lambda *_: range(8))
    with pytest.raises(ConfigError, match=r"^model\.attention is 'cudnn', which needs"):
        setup_model.open_model(config, tmp_path, None, load_source=False)


def test_the_warm_starts_arch_has_no_attention():
    """The warm start's hash holds `model.arch`; the implementation of attention must not change it."""
    config = base_config()
    assert config.model.attention == "einsum" and "attention" not in config.model.arch
