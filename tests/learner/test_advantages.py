"""Group-relative advantages against a loop over episodes in exact arithmetic."""

import math
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from router_r1_jax.learner import group_advantages

episodes = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([-1.0, 0.0, 0.25, 1.0]), st.sampled_from([0, 1, 1])), max_size=20
)


def naive(rows):
    """Advantages and the number of groups without a spread, by one pass over all episodes per episode."""
    advantages, dead = [], set()
    for group, reward, weight in rows:
        members = [Fraction(r) for g, r, w in rows if g == group and w]
        mean = sum(members) / len(members) if members else Fraction(0)
        variance = sum((r - mean) ** 2 for r in members) / len(members) if members else Fraction(0)
        if variance == 0:
            dead.add(group)
        advantages.append(float(Fraction(reward) - mean) / math.sqrt(variance) if variance and weight else 0.0)
    return advantages, len(dead)


@given(episodes)
def test_against_a_loop(rows):
    groups, rewards, weights = [np.array([row[i] for row in rows]) for i in range(3)]
    advantages, dead = group_advantages(rewards, groups, weights)
    expected, expected_dead = naive(rows)
    assert advantages.dtype == np.float32 and dead == expected_dead
    np.testing.assert_allclose(advantages, expected, atol=1e-6)


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
