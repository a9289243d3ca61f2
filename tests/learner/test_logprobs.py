"""Chunked log-probs behind a shared prefix against float64 log-softmax of the full logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny_learner import QUICK_COMPILE, make_config, make_params, make_rows, together

from router_r1_jax.learner.logprobs import _score_chunks, prefix_kv, score_rows
from router_r1_jax.model import Prefix, RouterLM

CONFIG = make_config()


@pytest.fixture(scope="module")
def params():
    return make_params(CONFIG)


def chunked(params, prefix, tokens, chunk, temperature, critic):
    padded = np.array(prefix + [0] * (128 - len(prefix)))

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(params, tokens):
        shared = Prefix(prefix_kv(CONFIG, params, padded), len(prefix))
        return score_rows(CONFIG, params, shared, tokens, chunk=chunk, temperature=temperature, critic=critic)

    return map(np.asarray, run(params, tokens))


@pytest.mark.parametrize(
    ("prefix", "chunk", "temperature"),
    [(7, 5, 1.0), (0, 32, 1.0), (70, 64, 0.6)],
    ids=["chunks that do not divide", "no prefix", "one long chunk"],
)
def test_row_by_row_with_the_prefix_written_out(params, prefix, chunk, temperature):
    prefix, rows = make_rows(prefix=prefix)
    tokens, rng = together(rows).tokens, np.random.default_rng(1)
    critic = {"kernel": rng.normal(size=CONFIG.width), "bias": np.float32(0.3)}
    logps, entropy, values = chunked(params, prefix, tokens, chunk, temperature, critic)
    model = RouterLM(CONFIG)

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def forward(tokens):
        hidden, _ = model.apply({"params": params}, tokens, method=RouterLM.hidden)
        return hidden, model.apply({"params": params}, hidden, method=RouterLM.logits)

    for b, row in enumerate(tokens):
        hidden, logits = (np.asarray(x[0], np.float64) for x in forward(np.array([*prefix, *row])[None]))
        for t in range(1, len(row)):
            before = logits[len(prefix) + t - 1] / temperature
            distribution = before - before.max() - np.log(np.sum(np.exp(before - before.max())))
            assert abs(logps[b, t] - distribution[row[t]]) < 1e-4
            assert abs(entropy[b, t] + np.sum(np.exp(distribution) * distribution)) < 1e-4
            assert abs(values[b, t] - (hidden[len(prefix) + t - 1] @ critic["kernel"] + 0.3)) < 1e-4
    assert not logps[:, 0].any() and not entropy[:, 0].any() and not values[:, 0].any()


def test_gradient_by_hand_is_that_of_a_log_softmax(monkeypatch):
    """Of both results, each position with weights of its own, in float64."""
    monkeypatch.setattr(jnp, "float32", jnp.float64)  # where the head raises precision
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((3, 4, 5)), rng.standard_normal((11, 5))
    targets, weights = rng.integers(11, size=(3, 4)), rng.standard_normal((2, 3, 4))

    def chunked(hidden, head):
        logps, entropy = _score_chunks(0.7, hidden, head, targets)
        return jnp.sum(weights[0] * logps + weights[1] * entropy)

    def whole(hidden, head):
        every = jax.nn.log_softmax(hidden @ head.T / 0.7)
        logps = jnp.take_along_axis(every, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(weights[0] * logps - weights[1] * jnp.sum(jnp.exp(every) * every, axis=-1))

    with jax.enable_x64(True):
        found, expected = (jax.grad(f, argnums=(0, 1))(hidden, head) for f in (chunked, whole))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_full_logits_are_never_held():
    """At a vocabulary of 152k the gradient takes a third of the memory, or less, of one through the full head."""
    B, T, V = 8, 1024, 152_064
    config = dataclasses.replace(make_config(num_layers=1), vocab_size=V)
    model = RouterLM(config)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 1), np.int32)))["params"]

    def chunked(params, tokens):
        return jnp.sum(score_rows(config, params, None, tokens, chunk=16, temperature=1.0).logps)

    def full(params, tokens):
        logps = jax.nn.log_softmax(model.apply({"params": params}, tokens[:, :-1]))
        return jnp.sum(jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1))

    def temporary(total):
        lowered = jax.jit(jax.grad(total)).lower(nn.meta.unbox(params), jax.ShapeDtypeStruct((B, T + 1), np.int32))
        return lowered.compile(QUICK_COMPILE).memory_analysis().temp_size_in_bytes

    assert 3 * temporary(chunked) < temporary(full)
