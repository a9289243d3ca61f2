"""The losses against a loop over tokens in float64."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_r1_jax.learner import PolicyLoss, Row, make_batch, supervised_loss

LOSS = PolicyLoss(clip_low=0.2, clip_high=0.28, kl_coef=0.05)


def make_case(seed, spread=0.4):
    """A ragged batch with injected tokens inside, and the log-probs and entropies of a policy that has moved."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(5):
        n = int(rng.integers(1, 60))
        mask = rng.random(n) > 0.4
        prompt = [1] * int(rng.integers(1, 6))
        rows.append(Row(prompt, rng.integers(1, 99, n), mask, -rng.exponential(size=n) * mask, float(rng.normal())))
    batch = make_batch([], rows)
    shape = batch.tokens.shape
    old = batch.logps
    batch = batch.replace(reference_logps=(old + rng.normal(size=shape) * spread).astype(np.float32))
    return batch, (old + rng.normal(size=shape) * spread).astype(np.float32), rng.random(shape).astype(np.float32)


def loop(loss, logps, entropy, batch):
    """Sums over tokens of the GRPO objective, one token at a time, with its gradient to the log-probs."""
    sums = dict.fromkeys(["loss", "kl", "entropy", "clip_share", "logp_diff_mean"], 0.0)
    gradient = np.zeros(batch.tokens.shape)
    for i, t in zip(*np.nonzero(batch.mask), strict=True):
        new, old, ref = (float(x[i, t]) for x in (logps, batch.logps, batch.reference_logps))
        advantage, ratio = float(batch.advantages[i]), math.exp(new - old)
        clipped = min(max(ratio, 1 - loss.clip_low), 1 + loss.clip_high)
        cut = ratio * advantage > clipped * advantage
        kl = math.exp(ref - new) - (ref - new) - 1
        sums["loss"] += loss.kl_coef * kl - (clipped if cut else ratio) * advantage
        sums["kl"] += kl
        sums["entropy"] += float(entropy[i, t])
        sums["clip_share"] += cut
        sums["logp_diff_mean"] += abs(new - old)
        gradient[i, t] = loss.kl_coef * (1 - math.exp(ref - new)) - (0.0 if cut else ratio * advantage)
    return sums, gradient


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.05, 0.4, 2.0]))
def test_sums_and_gradient_are_those_of_a_loop(seed, spread):
    batch, logps, entropy = make_case(seed, spread)
    (loss, sums), gradient = jax.value_and_grad(lambda x: LOSS(x, entropy, batch), has_aux=True)(logps)
    expected, expected_gradient = loop(LOSS, logps, entropy, batch)
    assert float(loss) == float(sums["loss"])
    scale = max(batch.mask.sum(), 1.0)
    assert set(sums) == set(expected)
    for name in expected:
        np.testing.assert_allclose(float(sums[name]) / scale, expected[name] / scale, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hostile", [np.inf, -np.inf, np.nan, 1e30])
def test_what_stands_outside_the_mask_never_matters(hostile):
    """Padding may hold anything: neither the sums nor the gradient see it."""
    batch, logps, entropy = make_case(0)
    outside = batch.mask == 0
    expected = jax.value_and_grad(lambda x: LOSS(x, entropy, batch), has_aux=True)(logps)
    batch = batch.replace(
        tokens=np.where(outside, 77, batch.tokens), logps=np.where(outside, np.float32(-1e30), batch.logps)
    )
    if np.isfinite(hostile):
        logps = np.where(outside, np.float32(-hostile), logps)
    else:
        batch = batch.replace(reference_logps=np.where(outside, np.float32(hostile), batch.reference_logps))
    found = jax.value_and_grad(lambda x: LOSS(x, entropy, batch), has_aux=True)(logps)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_at_the_samplers_policy_the_gradient_is_reinforces():
    batch, _, entropy = make_case(1)
    batch = batch.replace(reference_logps=batch.logps)
    gradient = jax.grad(lambda x: LOSS(x, entropy, batch)[0])(batch.logps)
    np.testing.assert_allclose(gradient, -batch.mask * batch.advantages[:, None], atol=1e-6)


def test_asymmetric_clipping_cuts_at_its_own_bounds():
    """An advantage above 0 is cut at 1 + clip_high only, one below 0 at 1 - clip_low only."""
    batch = make_batch([], [Row([1], [2] * 4, [1] * 4, [0.0] * 4, 1.0), Row([1], [2] * 4, [1] * 4, [0.0] * 4, -1.0)])
    logps = np.zeros(batch.tokens.shape, np.float32)
    logps[:, 1:5] = np.log([0.79, 0.81, 1.27, 1.29])
    batch = batch.replace(reference_logps=logps)
    gradient = np.asarray(jax.grad(lambda x: LOSS(x, logps, batch)[0])(logps))[:, 1:5]
    np.testing.assert_array_equal(gradient != 0, [[True, True, True, False], [False, True, True, True]])
    _, sums = dataclasses.replace(LOSS, kl_coef=0.0)(logps, logps, batch)
    assert float(sums["clip_share"]) == 2


def test_supervised_loss_is_cross_entropy_on_the_mask():
    batch, logps, entropy = make_case(2)
    loss, sums = supervised_loss(logps, entropy, batch)
    inside = batch.mask > 0
    np.testing.assert_allclose(float(loss), -logps.astype(np.float64)[inside].sum(), rtol=1e-6)
    assert float(loss) == float(sums["loss"])
    np.testing.assert_allclose(float(sums["entropy"]), entropy.astype(np.float64)[inside].sum(), rtol=1e-6)
