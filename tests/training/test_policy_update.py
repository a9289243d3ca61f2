"""From scored episodes to the learner's rows: advantages, penalties and weights against plain loops in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_r1_jax.config import base_config, use_loss
from router_r1_jax.distributed.mesh import abstract_mesh
from router_r1_jax.learner import TokenScores, gae, whiten
from router_r1_jax.reward import Rewards
from router_r1_jax.rollout import Episode
from router_r1_jax.router import RolloutBatch
from router_r1_jax.training.policy_update import (
    _logp_difference,
    _with_advantages,
    _with_importance_weights,
    learner_layout,
    make_rows,
)


def make_rollouts(seed=0, questions=3, group=4, failed=()):
    """Episodes of random tokens, and rewards that differ within the groups."""
    rng = np.random.default_rng(seed)
    episodes = []
    for i in range(questions * group):
        n = int(rng.integers(2, 12))
        sampled = rng.random(n) > 0.3
        sampled[rng.integers(n)] = True
        logps = -rng.random(n) * sampled
        episodes.append(
            Episode(
                i, (7, 7, 8), list(range(n)), list(logps), list(logps - 0.5 * rng.random(n) * sampled), list(sampled)
            )
        )
    B = len(episodes)
    valid = np.array([i not in failed for i in range(B)])
    asked = [SimpleNamespace(id=str(i // group)) for i in range(B)]
    zeros = np.zeros(B)
    rewards = Rewards(rng.normal(size=B), zeros, zeros, zeros, zeros, zeros, ((),) * B)
    return RolloutBatch(asked, episodes, group, (), 2, valid, stats=None), rewards


@given(
    st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2), st.booleans()), max_size=30),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_gae_is_the_sum_of_discounted_errors_over_sampled_tokens(tokens, discount, gae_lambda):
    rewards, values, mask = (np.array([token[i] for token in tokens]) for i in range(3))
    mask = mask.astype(bool)
    advantages, returns = gae(rewards, values, mask, discount=discount, gae_lambda=gae_lambda)
    at = np.flatnonzero(mask)
    for j, t in enumerate(at):
        expected = 0.0
        for k in range(j, len(at)):
            after = values[at[k + 1]] if k + 1 < len(at) else 0.0
            error = rewards[at[k]] + discount * after - values[at[k]]
            expected += (discount * gae_lambda) ** (k - j) * error
        assert advantages[t] == pytest.approx(expected, abs=1e-9)
        assert returns[t] == pytest.approx(expected + values[t], abs=1e-9)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_without_a_discount_a_return_is_the_sum_of_later_rewards():
    rewards, mask = np.array([1.0, 5.0, 2.0, 4.0]), np.array([True, False, True, True])
    _, returns = gae(rewards, np.array([0.3, 9.0, -1.0, 2.0]), mask)
    np.testing.assert_allclose(returns, [7, 0, 6, 4])


def test_whitening_is_over_all_sampled_tokens():
    rng = np.random.default_rng(0)
    masks = [rng.random(n) > 0.4 for n in (5, 9, 3)]
    found = whiten([rng.normal(3, 2, len(mask)) for mask in masks], masks)
    sampled = np.concatenate([x[mask] for x, mask in zip(found, masks, strict=True)])
    assert sampled.mean() == pytest.approx(0, abs=1e-12) and sampled.std() == pytest.approx(1)
    assert all(not x[~mask].any() for x, mask in zip(found, masks, strict=True))
    assert not np.any(np.concatenate(whiten([np.ones(4)], [np.ones(4)])))


def test_rows_hold_what_was_sampled_and_an_episode_of_weight_0_carries_no_loss():
    rollouts, _ = make_rollouts(failed={1})
    config = base_config()
    rows = make_rows(config, rollouts)
    for i, (row, episode) in enumerate(zip(rows, rollouts.episodes, strict=True)):
        assert list(row.prompt) == [8] and list(row.tokens) == episode.tokens and row.logps == episode.logps
        assert list(row.mask) == [float(s and i != 1) for s in episode.sampled]
    config.pool.fault_weight = 0.5
    assert make_rows(config, rollouts)[1].mask.any()


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_ppo_gives_each_token_the_reward_of_the_rest_less_the_kl_and_the_critic(seed):
    config = base_config()
    use_loss(config, "ppo")
    config.learner.kl_coef = 0.3
    rollouts, rewards = make_rollouts(seed, failed={2})
    rng = np.random.default_rng(seed)
    rows = [row._replace(reference_logps=-rng.random(len(row.tokens))) for row in make_rows(config, rollouts)]
    scores = [TokenScores(None, None, rng.normal(size=len(row.tokens))) for row in rows]
    made, metrics = _with_advantages(config, rows, scores, rollouts, rewards)
    raw, returns, values = [], [], []
    for i, row in enumerate(rows):
        at = np.flatnonzero(row.mask)
        for j, t in enumerate(at):
            rest = rewards.total[i] - sum(0.3 * (row.logps[u] - row.reference_logps[u]) for u in at[j:])
            raw.append(rest - scores[i].values[t])
            returns.append(rest)
            values.append(scores[i].values[t])
            assert made[i].returns[t] == pytest.approx(rest) and made[i].values[t] == scores[i].values[t]
    found = np.concatenate([row.advantages[row.mask > 0] for row in made])
    np.testing.assert_allclose(found, (raw - np.mean(raw)) / np.std(raw), atol=1e-9)
    assert metrics["value_explained"] == pytest.approx(1 - np.var(np.subtract(returns, values)) / np.var(returns))
    assert not made[2].mask.any() and not np.any(made[2].advantages)


def test_a_weight_between_scales_what_ppo_learns_from_a_failed_episode():
    config = base_config()
    use_loss(config, "ppo")
    rollouts, rewards = make_rollouts(failed={2})
    made = {}
    for weight in (1.0, 0.25):
        config.pool.fault_weight = weight
        rows = [row._replace(reference_logps=np.array(row.logps)) for row in make_rows(config, rollouts)]
        scores = [TokenScores(None, None, np.zeros(len(row.tokens))) for row in rows]
        made[weight], _ = _with_advantages(config, rows, scores, rollouts, rewards)
    for i, (row, whole) in enumerate(zip(made[0.25], made[1.0], strict=True)):
        np.testing.assert_allclose(row.advantages, whole.advantages * (0.25 if i == 2 else 1.0))
    assert np.any(made[0.25][2].advantages)


def test_the_kl_in_the_reward_of_groups_is_summed_over_an_episode():
    config = base_config()
    config.learner.update(dict(kl_in="reward", kl="k1", kl_coef=0.2, advantage="dr_grpo"))
    rollouts, rewards = make_rollouts(3)
    rng = np.random.default_rng(4)
    rows = [row._replace(reference_logps=-rng.random(len(row.tokens))) for row in make_rows(config, rollouts)]
    made, metrics = _with_advantages(config, rows, None, rollouts, rewards)
    less = [
        rewards.total[i] - 0.2 * sum(row.logps[t] - row.reference_logps[t] for t in np.flatnonzero(row.mask))
        for i, row in enumerate(rows)
    ]
    for i, row in enumerate(made):
        assert row.advantages == pytest.approx(less[i] - np.mean(less[i // 4 * 4 : i // 4 * 4 + 4]), abs=1e-6)
    assert metrics == {"zero_variance_groups": 0}


def test_importance_weights_are_old_policy_over_sampler_and_truncated():
    rollouts, _ = make_rollouts(5)
    config = base_config()
    rows = make_rows(config, rollouts)
    made, metrics = _with_importance_weights(rows, rollouts, 1.2)
    weights = []
    for row, episode in zip(made, rollouts.episodes, strict=True):
        for t in np.flatnonzero(row.mask):
            weights.append(min(np.exp(episode.logps[t] - episode.sampler_logps[t]), 1.2))
            assert row.weights[t] == pytest.approx(weights[-1])
    assert 0 < metrics["tis_capped"] < 1
    assert metrics["tis_mean"] == pytest.approx(np.mean(weights))
    assert metrics["tis_capped"] == pytest.approx(np.mean(np.equal(weights, 1.2)))
    found = _logp_difference([np.array(e.logps) + 0.25 for e in rollouts.episodes], rows)
    assert found == {"logp_diff_mean": pytest.approx(0.25), "logp_diff_max": pytest.approx(0.25)}


def test_the_layout_follows_the_configuration():
    config = base_config()
    config.rollout.update(dict(prompts_per_step=4, num_generations=4, max_row_tokens=513))
    config.learner.update(dict(micro_tokens=1024, length_buckets=2, minibatches=2))
    assert learner_layout(config, abstract_mesh(1, 1, 1, 1)) == ((256, 512), (4, 2))
    assert learner_layout(config, abstract_mesh(2, 2, 1, 4)) == ((256, 512), (8, 8))  # two rows on each device
