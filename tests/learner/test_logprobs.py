"""Chunked log-probs behind a shared prefix against float64 log-softmax of the full logits."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from tiny_learner import QUICK_COMPILE, make_config, make_params, make_rows_batch

from router_r1_jax.learner.logprobs import prefix_kv, token_logprobs
from router_r1_jax.model import Prefix, RouterLM

CONFIG = make_config()


@pytest.fixture(scope="module")
def params():
    return make_params(CONFIG)


def chunked(params, batch, chunk, temperature):
    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(params, batch):
        prefix = Prefix(prefix_kv(CONFIG, params, batch.prefix), batch.prefix_length)
        return token_logprobs(CONFIG, params, prefix, batch.tokens, chunk=chunk, temperature=temperature)

    return map(np.asarray, run(params, batch))


@pytest.mark.parametrize(
    ("prefix", "chunk", "temperature"),
    [(7, 5, 1.0), (0, 32, 1.0), (70, 64, 0.6)],
    ids=["chunks that do not divide", "no prefix", "one long chunk"],
)
def test_row_by_row_with_the_prefix_written_out(params, prefix, chunk, temperature):
    batch = make_rows_batch(prefix=prefix)
    logps, entropy = chunked(params, batch, chunk, temperature)
    forward = jax.jit(lambda tokens: RouterLM(CONFIG).apply({"params": params}, tokens), compiler_options=QUICK_COMPILE)
    for b, row in enumerate(batch.tokens):
        whole = np.concatenate([batch.prefix[:prefix], row])
        logits = np.asarray(forward(whole[None]))[0].astype(np.float64) / temperature
        for t in range(1, len(row)):
            before = logits[prefix + t - 1]
            distribution = before - before.max() - np.log(np.sum(np.exp(before - before.max())))
            assert abs(logps[b, t] - distribution[row[t]]) < 1e-4
            assert abs(entropy[b, t] + np.sum(np.exp(distribution) * distribution)) < 1e-4
    assert not logps[:, 0].any() and not entropy[:, 0].any()


def test_full_logits_are_never_held():
    """With a wide vocabulary the compiled gradient needs far less memory than one [B, T, V] array."""
    B, T, V = 4, 256, 32_768
    config = dataclasses.replace(make_config(num_layers=1), vocab_size=V)
    params = jax.eval_shape(lambda: RouterLM(config).init(jax.random.key(0), np.zeros((1, 1), np.int32)))["params"]

    def total(params, prefix, tokens):
        kv = prefix_kv(config, params, prefix)
        logps, _ = token_logprobs(config, params, Prefix(kv, 7), tokens, chunk=16, temperature=1.0)
        return logps.sum()

    shapes = [jax.ShapeDtypeStruct(shape, np.int32) for shape in ((64,), (B, T))]
    compiled = jax.jit(jax.grad(total)).lower(nn.meta.unbox(params), *shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * B * T * V * 4
