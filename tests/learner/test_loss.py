"""The losses against a loop over tokens in float64."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_learner import together

from router_r1_jax.config import LOSSES, base_config, use_loss
from router_r1_jax.learner import PolicyLoss, Row, SupervisedLoss, TokenScores
from router_r1_jax.training.policy_update import make_loss

LOSS = PolicyLoss(clip_low=0.2, clip_high=0.28, kl_coef=0.05)


def make_case(seed, spread=0.4):
    """Ragged rows with injected tokens inside, and the scores by a policy and a critic that have moved."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(5):
        n = int(rng.integers(1, 60))
        mask = (rng.random(n) > 0.4).astype(float)
        targets = {name: rng.normal(size=n) for name in ("advantages", "values", "returns")}
        prompt, logps = [1] * int(rng.integers(1, 6)), -rng.exponential(size=n) * mask
        rows.append(Row(prompt, rng.integers(1, 99, n), mask, logps, rng.random(n), **targets))
    rows = together(rows)
    shape = rows.tokens.shape
    near = [(rows.logps + rng.normal(size=shape) * spread).astype(np.float32) for _ in range(2)]
    values = (rows.values + rng.normal(size=shape)).astype(np.float32)
    return rows.replace(reference_logps=near[0]), TokenScores(near[1], rng.random(shape).astype(np.float32), values)


def divided(loss, rows, x):
    """A sum over all rows as the mean that the loss stands for."""
    return float(x) / float(loss.divisor(rows.mask.sum(), (rows.mask.max(axis=1) > 0).sum()))


def kl_and_slope(kind, apart):
    """The estimate for apart = ref - new, and its derivative to new."""
    return {
        "k1": (-apart, 1.0),
        "k2": (apart * apart / 2, -apart),
        "k3": (math.exp(apart) - apart - 1, 1 - math.exp(apart)),
    }[kind]


def loop(loss, now, batch):
    """The loss' value, metric sums, and gradient to log-probs, entropies and values, one token at a time."""
    sums = dict.fromkeys(["kl", "entropy", "clip_share", "logp_diff_mean", "value_loss"], 0.0)
    value, gradient, peak = 0.0, [np.zeros(batch.tokens.shape) for _ in range(3)], 0.0
    places = [np.flatnonzero(row) for row in batch.mask]
    rows = sum(len(of_row) > 0 for of_row in places)
    total = {"token": sum(map(len, places)), "sequence": rows, "constant": rows * loss.length}[loss.loss_agg]
    for i, of_row in enumerate(places):
        n = len(of_row)
        share = 1 / max(total, 1) / (n if loss.loss_agg == "sequence" and n else 1)
        moved = {t: float(now.logps[i, t]) - float(batch.logps[i, t]) for t in of_row}
        mean = sum(moved.values()) / max(n, 1)
        for t in of_row:
            advantage, weight = float(batch.advantages[i, t]), float(batch.weights[i, t])
            ratio = math.exp(moved[t] if loss.importance_level == "token" else mean)
            clipped = min(max(ratio, 1 - loss.clip_low), 1 + loss.clip_high)
            cut = ratio * advantage > clipped * advantage
            surrogate = min(ratio * advantage, clipped * advantage)
            bound = loss.dual_clip and advantage < 0 and surrogate < loss.dual_clip * advantage
            if bound:
                surrogate = loss.dual_clip * advantage
            value -= share * (weight * surrogate + loss.entropy_coef * float(now.entropy[i, t]))
            gradient[1][i, t] -= share * loss.entropy_coef
            if loss.kl != "none":
                kl, slope = kl_and_slope(loss.kl, float(batch.reference_logps[i, t]) - float(now.logps[i, t]))
                value += share * loss.kl_coef * kl
                gradient[0][i, t] += share * loss.kl_coef * slope
                sums["kl"] += kl
            pull = 0.0 if cut or bound else share * weight * ratio * advantage
            if loss.importance_level == "token":
                gradient[0][i, t] -= pull
            else:
                gradient[0][i, of_row] -= pull / n
            error, slope = value_error(loss, *(float(x[i, t]) for x in (now.values, batch.values, batch.returns)))
            value += share * loss.value_coef * error
            gradient[2][i, t] += share * loss.value_coef * slope
            sums["value_loss"] += error
            sums["entropy"] += float(now.entropy[i, t])
            sums["clip_share"] += cut
            sums["logp_diff_mean"] += abs(moved[t])
            peak = max(peak, abs(moved[t]))
    if loss.kl == "none":
        del sums["kl"]
    return value, sums, peak, gradient


def value_error(loss, new, old, target):
    """The critic's loss of one token and its derivative to the new value."""
    free, slope = (new - target) ** 2 / 2, new - target
    if loss.value_clip:
        near = min(max(new, old - loss.value_clip), old + loss.value_clip)
        if (near - target) ** 2 / 2 > free:
            return (near - target) ** 2 / 2, 0.0 if near != new else slope
    return free, slope


def preset(name):
    """The loss that a configuration of this name trains with."""
    config = base_config()
    use_loss(config, name)
    config.rollout.max_row_tokens = 50
    return make_loss(config)


VARIANTS = {name: preset(name) for name in LOSSES} | {
    "dual clip, k1": PolicyLoss(0.2, 0.28, 0.02, dual_clip=1.2, kl="k1"),
    "sequence ratio, k2": PolicyLoss(0.05, 0.1, 0.01, importance_level="sequence", loss_agg="sequence", kl="k2"),
    "critic without a clip": PolicyLoss(0.2, 0.2, 0.0, value_coef=0.3, entropy_coef=0.1),
}


@pytest.mark.parametrize("policy_loss", VARIANTS.values(), ids=VARIANTS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.0, 0.05, 0.4, 2.0]))
def test_sums_and_gradient_are_those_of_a_loop(policy_loss, seed, spread):
    rows, now = make_case(seed, spread)

    def total(now):
        sums = policy_loss(now, rows)
        return sums.loss, sums

    (_, sums), gradient = jax.value_and_grad(total, has_aux=True)(now)
    loss, totals, peak, expected = loop(policy_loss, now, rows)
    np.testing.assert_allclose(divided(policy_loss, rows, sums.loss), loss, rtol=1e-6, atol=1e-6)
    scale = max(rows.mask.sum(), 1.0)
    assert set(sums.totals) == set(totals)
    for name in totals:
        np.testing.assert_allclose(float(sums.totals[name]) / scale, totals[name] / scale, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(sums.maxima["logp_diff_max"], peak, rtol=1e-6)
    for found, one in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(divided(policy_loss, rows, 1) * found, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hostile", [np.inf, -np.inf, np.nan, 1e30])
def test_what_stands_outside_the_mask_never_matters(hostile):
    """Padding may hold anything: neither the sums nor the gradient see it."""
    rows, now = make_case(0)
    outside = rows.mask == 0
    of = jax.value_and_grad(lambda x, rows: LOSS(now._replace(logps=x), rows).loss)
    expected = of(now.logps, rows)
    logps = now.logps
    rows = rows.replace(
        tokens=np.where(outside, 77, rows.tokens), logps=np.where(outside, np.float32(-1e30), rows.logps)
    )
    if np.isfinite(hostile):
        logps = np.where(outside, np.float32(-hostile), logps)
    else:
        rows = rows.replace(reference_logps=np.where(outside, np.float32(hostile), rows.reference_logps))
    jax.tree.map(np.testing.assert_array_equal, of(logps, rows), expected)


def test_at_the_samplers_policy_the_gradient_is_reinforces():
    rows, now = make_case(1)
    rows = rows.replace(reference_logps=rows.logps)
    gradient = jax.grad(lambda x: LOSS(TokenScores(x, now.entropy), rows).loss)(rows.logps)
    np.testing.assert_allclose(gradient, -rows.mask * rows.weights * rows.advantages, atol=1e-6)


def test_asymmetric_clipping_cuts_at_its_own_bounds():
    """An advantage above 0 is cut at 1 + clip_high only, one below 0 at 1 - clip_low only."""
    rows = together([Row([1], [2] * 4, advantages=sign) for sign in (1.0, -1.0)])
    logps = np.zeros(rows.tokens.shape, np.float32)
    logps[:, 1:5] = np.log([0.79, 0.81, 1.27, 1.29])
    rows = rows.replace(reference_logps=logps)
    gradient = np.asarray(jax.grad(lambda x: LOSS(TokenScores(x, logps), rows).loss)(logps))[:, 1:5]
    np.testing.assert_array_equal(gradient != 0, [[True, True, True, False], [False, True, True, True]])
    assert float(LOSS(TokenScores(logps, logps), rows).totals["clip_share"]) == 2


def test_supervised_loss_is_cross_entropy_on_the_mask():
    rows, now = make_case(2)
    sums, inside = SupervisedLoss()(now, rows), rows.mask > 0
    np.testing.assert_allclose(float(sums.loss), -now.logps.astype(np.float64)[inside].sum(), rtol=1e-6)
    np.testing.assert_allclose(float(sums.totals["entropy"]), now.entropy.astype(np.float64)[inside].sum(), rtol=1e-6)
