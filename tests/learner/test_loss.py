"""The losses against a loop over tokens in float64."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_r1_jax.learner import PolicyLoss, Row, SupervisedLoss, make_batch

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


def kl_and_slope(kind, apart):
    """The estimate for apart = ref - new, and its derivative to new."""
    return {
        "k1": (-apart, 1.0),
        "k2": (apart * apart / 2, -apart),
        "k3": (math.exp(apart) - apart - 1, 1 - math.exp(apart)),
    }[kind]


def loop(loss, logps, entropy, batch):
    """The loss' value, metric sums, and gradient to the log-probs, one token at a time, rows after one another."""
    sums = dict.fromkeys(["kl", "entropy", "clip_share", "logp_diff_mean"], 0.0)
    value, gradient = 0.0, np.zeros(batch.tokens.shape)
    places = [np.flatnonzero(row) for row in batch.mask]
    rows = sum(len(of_row) > 0 for of_row in places)
    total = {"token": sum(map(len, places)), "sequence": rows, "constant": rows * loss.length}[loss.mean_over]
    for i, of_row in enumerate(places):
        advantage, n = float(batch.advantages[i]), len(of_row)
        share = 1 / max(total, 1) / (n if loss.mean_over == "sequence" and n else 1)
        moved = {t: float(logps[i, t]) - float(batch.logps[i, t]) for t in of_row}
        mean = sum(moved.values()) / max(n, 1)
        for t in of_row:
            ratio = math.exp(moved[t] if loss.ratio == "token" else mean)
            clipped = min(max(ratio, 1 - loss.clip_low), 1 + loss.clip_high)
            cut = ratio * advantage > clipped * advantage
            surrogate = min(ratio * advantage, clipped * advantage)
            bound = loss.dual_clip and advantage < 0 and surrogate < loss.dual_clip * advantage
            if bound:
                surrogate = loss.dual_clip * advantage
            kl, slope = kl_and_slope(loss.kl, float(batch.reference_logps[i, t]) - float(logps[i, t]))
            value += share * (loss.kl_coef * kl - surrogate)
            gradient[i, t] += share * loss.kl_coef * slope
            pull = 0.0 if cut or bound else share * ratio * advantage
            if loss.ratio == "token":
                gradient[i, t] -= pull
            else:
                gradient[i, of_row] -= pull / n
            sums["kl"] += kl
            sums["entropy"] += float(entropy[i, t])
            sums["clip_share"] += cut
            sums["logp_diff_mean"] += abs(moved[t])
    return value, sums, gradient


VARIANTS = [
    LOSS,
    PolicyLoss(0.2, 0.2, 0.04, mean_over="sequence"),
    PolicyLoss(0.2, 0.2, 0.0, mean_over="constant", length=50),
    PolicyLoss(0.05, 0.1, 0.01, ratio="sequence", mean_over="sequence", kl="k2"),
    PolicyLoss(0.2, 0.28, 0.02, dual_clip=1.2, kl="k1"),
    PolicyLoss(1.0, 1e9, 0.0),
]


@pytest.mark.parametrize("policy_loss", VARIANTS, ids=["token", "rows alike", "constant", "gspo", "dual clip", "free"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.0, 0.05, 0.4, 2.0]))
def test_sums_and_gradient_are_those_of_a_loop(policy_loss, seed, spread):
    batch, logps, entropy = make_case(seed, spread)
    divisor = float(policy_loss.divisor(batch.mask))
    of = jax.value_and_grad(lambda x: policy_loss(x, entropy, batch), has_aux=True)
    (loss, sums), gradient = of(logps)
    expected_loss, expected, expected_gradient = loop(policy_loss, logps, entropy, batch)
    np.testing.assert_allclose(float(loss) / divisor, expected_loss, rtol=1e-6, atol=1e-6)
    scale = max(batch.mask.sum(), 1.0)
    assert set(sums) == set(expected)
    for name in expected:
        np.testing.assert_allclose(float(sums[name]) / scale, expected[name] / scale, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient * divisor, rtol=1e-5, atol=1e-6)


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
    loss, sums = SupervisedLoss()(logps, entropy, batch)
    inside = batch.mask > 0
    np.testing.assert_allclose(float(loss), -logps.astype(np.float64)[inside].sum(), rtol=1e-6)
    np.testing.assert_allclose(float(sums["entropy"]), entropy.astype(np.float64)[inside].sum(), rtol=1e-6)
