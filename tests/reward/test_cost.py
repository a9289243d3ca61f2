"""The cost window against the published values and NumPy's percentile of an explicit list."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_values import COSTS as PUBLISHED

from router_r1_jax.reward import CostNormalizer, cost_bounds, episode_cost, make_normalizer, normalize_costs
from router_r1_jax.reward.cost import COSTS

RAW = np.array([row["raw_cost"] for row in PUBLISHED])
EXPECTED = np.array([row["cost_reward"] for row in PUBLISHED])

# Costs are a cent or more apart, or so close that a window of them is flat. At the edge of flatness the last bit of a
# percentile would decide.
costs = st.lists(
    st.sampled_from([0.0, 0.0, 1.0, 1.0 + 1e-9, 4.0]) | st.integers(0, 10**8).map(lambda cents: cents / 100),
    max_size=40,
)


def test_published_values_in_one_batch():
    assert len(RAW) > 1000  # the window slides
    np.testing.assert_allclose(CostNormalizer()(RAW), EXPECTED, rtol=0, atol=1e-12)


@given(costs, st.integers(1, 12))
def test_agrees_with_numpy_on_an_explicit_window(raw_costs, window):
    expected = []
    for i in range(len(raw_costs)):
        latest = np.sqrt(raw_costs[max(0, i + 1 - window) : i + 1])
        low, high = np.percentile(latest, [5, 95])
        expected.append(0.5 if high - low < 1e-8 else 1 - np.clip((latest[-1] - low) / (high - low), 0, 1))
    np.testing.assert_allclose(CostNormalizer(window)(np.array(raw_costs)), expected, rtol=0, atol=1e-6)


@given(costs, st.integers(0, 40), st.integers(1, 12))
def test_resumed_equals_uninterrupted(raw_costs, stop, window):
    whole = CostNormalizer(window)
    first = CostNormalizer(window)
    expected = whole(np.array(raw_costs))
    before = first(np.array(raw_costs[:stop]))
    second = CostNormalizer(window)
    second.restore(json.loads(json.dumps(first.state())))
    after = second(np.array(raw_costs[stop:]))
    np.testing.assert_array_equal(np.concatenate([before, after]), expected)
    assert second.state() == whole.state()


@given(costs.filter(len), costs, costs, st.integers(1, 12))
def test_a_frozen_window_normalizes_each_cost_by_itself(first, one, other, window):
    sliding = CostNormalizer(window)
    sliding(np.array(first))
    frozen = make_normalizer(1000, sliding.state())
    components = [frozen(np.array(side)) for side in (one, other)]
    together = make_normalizer(1000, sliding.state())(np.array([*other, *one]))
    np.testing.assert_array_equal(together, np.concatenate(components[::-1]))
    low, high = np.percentile(np.sqrt(first[-window:]), [5, 95])
    expected = 1 - np.clip((np.sqrt(one) - low) / (high - low), 0, 1) if high - low >= 1e-8 else np.full(len(one), 0.5)
    np.testing.assert_allclose(components[0], expected, rtol=0, atol=1e-6)
    assert frozen.state() == sliding.state()


@pytest.mark.parametrize("frozen", [None, {}])
def test_without_a_frozen_window_a_new_one_slides(frozen):
    np.testing.assert_array_equal(make_normalizer(7, frozen)(RAW[:100]), CostNormalizer(7)(RAW[:100]))


def test_a_frozen_window_without_costs_is_refused():
    with pytest.raises(ValueError, match="holds no sqrt_costs"):
        make_normalizer(3, CostNormalizer(3).state())


def test_bounds_weighted_by_counts_are_those_of_repeated_costs():
    rng = np.random.default_rng(0)
    raw_costs, counts = rng.gamma(1, 100, 300), rng.integers(1, 5, 300)
    repeated = np.repeat(raw_costs, counts)
    assert cost_bounds(repeated) == tuple(np.percentile(np.sqrt(repeated), [5, 95]))
    weighted = np.percentile(np.sqrt(repeated), [5, 95], method="inverted_cdf")
    assert cost_bounds(raw_costs, counts) == tuple(weighted)


def test_costs_are_normalized_by_one_pair_of_bounds_or_one_for_each():
    raw_costs, low, high = np.array([0.0, 16.0, 25.0, 100.0]), np.array([2.0, 2.0, 4.0, 3.0]), np.array([6.0, 6, 8, 3])
    np.testing.assert_allclose(normalize_costs(raw_costs, 2.0, 6.0), [1.0, 0.5, 0.25, 0.0])
    np.testing.assert_allclose(normalize_costs(raw_costs, low, high), [1.0, 0.5, 0.75, 0.5])


def test_a_full_window_resumes_to_the_published_values():
    first, second = CostNormalizer(), CostNormalizer()
    first(RAW[:1200])
    second.restore(first.state())
    np.testing.assert_allclose(second(RAW[1200:]), EXPECTED[1200:], rtol=0, atol=1e-12)


def test_a_state_is_a_copy():
    normalizer = CostNormalizer()
    normalizer(np.array([1.0]))
    state = normalizer.state()
    normalizer(np.array([4.0]))
    assert state == {"window": 1000, "sqrt_costs": [1.0]}


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_an_impossible_cost_is_refused_and_leaves_the_window_alone(bad):
    normalizer = CostNormalizer()
    normalizer(np.array([1.0, 2.0]))
    before = normalizer.state()
    with pytest.raises(ValueError, match=r"raw_costs\[1\]"):
        normalizer(np.array([3.0, bad]))
    assert normalizer.state() == before


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"window": 2, "sqrt_costs": []}, "reward.window=2"),
        ({"window": 3, "sqrt_costs": [1.0] * 4}, "holds 4"),
        ({"window": 3, "sqrt_costs": [1.0, math.nan]}, "nan"),
        ({"window": 3, "sqrt_costs": [-1.0]}, "-1.0"),
        ({"window": 3}, "fields"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(state, message):
    normalizer = CostNormalizer(3)
    normalizer(np.array([1.0, 2.0]))
    before = normalizer.state()
    with pytest.raises(ValueError, match=message):
        normalizer.restore(state)
    assert normalizer.state() == before


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_without_room_is_refused(window):
    with pytest.raises(ValueError, match=f"window is {window}"):
        CostNormalizer(window)


def test_costs_of_a_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        CostNormalizer()(np.ones((1, 2)))


def test_what_a_raw_cost_counts():
    """Two calls of 10 and 20 output tokens at 2 dollars per million, 3e-5 and 6e-5 dollars in all, 0.5 and 1.5 s."""
    replies = [SimpleNamespace(raw_cost=20.0, charged=3e-5, latency=0.5)]
    replies += [SimpleNamespace(raw_cost=40.0, charged=6e-5, latency=1.5)]
    costs = {kind: episode_cost(kind, replies, sampled_tokens=100, router_price=0.4) for kind in COSTS}
    assert costs == pytest.approx({"output": 60.0, "tokens": 90.0, "all": 130.0, "seconds": 2.0})
    assert [episode_cost(kind, [], 100, 0.4) for kind in COSTS] == pytest.approx([0.0, 0.0, 40.0, 0.0])
