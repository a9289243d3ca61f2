"""Group-relative advantages against a loop over episodes in exact arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_r1_jax.learner import component_advantages, group_advantages, groups_with_spread

episodes = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([-1.0, 0.0, 0.25, 1.0]), st.sampled_from([0, 1, 1])), max_size=20
)


def naive(rows, kind="grpo"):
    """Advantages and the number of groups without a spread, by one pass over all episodes per episode."""
    counted = [Fraction(r) for _, r, w in rows if w]
    advantages, dead = [], set()
    for group, reward, weight in rows:
        members = [Fraction(r) for g, r, w in rows if g == group and w]
        mean = sum(members) / len(members) if members else Fraction(0)
        variance = sum((r - mean) ** 2 for r in members) / len(members) if members else Fraction(0)
        if variance == 0:
            dead.add(group)
        others, n = sum(members) - Fraction(reward), len(members) - 1
        advantage = 0.0
        if weight and kind == "reinforce":
            advantage = float(Fraction(reward) - sum(counted) / len(counted))
        elif weight and variance:
            baseline = others / n if kind == "rloo" else mean
            advantage = float(Fraction(reward) - baseline) / (math.sqrt(variance) if kind == "grpo" else 1)
        advantages.append(advantage)
    return advantages, len(dead)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "reinforce"])
@given(rows=episodes)
def test_against_a_loop(kind, rows):
    groups, rewards, weights = [np.array([row[i] for row in rows]) for i in range(3)]
    advantages, dead = group_advantages(rewards, groups, weights, kind=kind)
    expected, expected_dead = naive(rows, kind)
    assert advantages.dtype == np.float32 and dead == expected_dead
    np.testing.assert_allclose(advantages, expected, atol=1e-6)


@given(rows=episodes)
def test_groups_with_a_spread_are_those_that_have_advantages(rows):
    """Also where all episodes of a group failed."""
    groups, rewards, weights = [np.array([row[i] for row in rows]) for i in range(3)]
    advantages = np.array(naive(rows)[0])
    assert list(groups_with_spread(rewards, groups, weights)) == sorted(set(groups[advantages != 0].tolist()))


def test_weights_may_be_booleans_or_missing():
    rewards, groups = np.array([1.0, 0.0, 1.0, 5.0]), np.array([0, 0, 1, 1])
    without = group_advantages(rewards, groups)
    np.testing.assert_array_equal(without[0], [1, -1, -1, 1])
    valid, dead = group_advantages(rewards, groups, np.array([True, True, True, False]))
    np.testing.assert_array_equal(valid, [1, -1, 0, 0])
    assert (without[1], dead) == (0, 1)


def test_rounding_is_no_spread():
    """Rewards that differ by rounding only (0.1 * 3 and 0.3) are equal: no noise is blown up to advantage 1."""
    advantages, dead = group_advantages(np.array([0.1 * 3, 0.3, 0.1 * 3]), np.zeros(3, int))
    assert dead == 1 and not advantages.any()


def test_a_weight_between_scales_the_advantage_and_stays_in_the_group():
    rewards, groups = np.array([0.0, 1.0, 2.0]), np.zeros(3, int)
    whole, _ = group_advantages(rewards, groups)
    advantages, _ = group_advantages(rewards, groups, np.array([1.0, 1.0, 0.25]))
    np.testing.assert_allclose(advantages, whole * [1, 1, 0.25])


@given(episodes, st.lists(st.sampled_from([-1.0, 0.0, 0.5]), min_size=20, max_size=20), st.floats(0, 3))
def test_components_are_normalised_each_by_itself(rows, costs, share):
    groups, outcomes, weights = [np.array([row[i] for row in rows]) for i in range(3)]
    costs = np.array(costs[: len(rows)])
    shares = {"outcome": 1.0, "cost": share}
    advantages, dead = component_advantages({"outcome": outcomes, "cost": costs}, shares, groups, weights)
    one, _ = naive(rows)
    other, _ = naive([(group, cost, weight) for (group, _, weight), cost in zip(rows, costs, strict=True)])
    np.testing.assert_allclose(advantages, np.array(one) + share * np.array(other), atol=1e-5)
    assert advantages.dtype == np.float32
    signals = {group for group, a, b in zip(groups.tolist(), one, other, strict=True) if a or (share and b)}
    assert dead == len(set(groups.tolist()) - signals)


def test_a_component_without_a_share_counts_for_nothing():
    rewards, groups = {"outcome": np.array([1.0, 0.0]), "cost": np.array([0.3, 0.9])}, np.zeros(2, int)
    advantages, dead = component_advantages(rewards, {"outcome": 0.0, "cost": 2.0}, groups)
    np.testing.assert_allclose(advantages, [-2.0, 2.0], rtol=1e-6)
    assert dead == 0
    assert component_advantages(rewards, {"outcome": 0.0}, groups)[1] == 1
