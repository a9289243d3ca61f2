"""Whole rewards against the published values and the rule written out case by case."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_values import NAMES, REWARDS

from router_r1_jax.config import ConfigError, base_config, model_card, provider
from router_r1_jax.config_checks import validate
from router_r1_jax.reward import CostNormalizer, check_format, extract_answer, f1_score, score
from router_r1_jax.reward.cost import COSTS
from router_r1_jax.reward.score import PRESETS
from router_r1_jax.rollout import Episode
from router_r1_jax.router import RolloutBatch, compute_rewards

GOOD = "<think>a</think><answer>Paris</answer>"


def test_published_values_row_by_row():
    """One window for all rows, in order; alpha and metric differ by row."""
    normalizer = CostNormalizer()
    for row in REWARDS:
        rewards = score(
            [row["response"]],
            [row["golds"]],
            np.array([row["raw_cost"]]),
            NAMES,
            alpha=row["alpha"],
            metric=row["metric"],
            normalizer=normalizer,
        )
        assert extract_answer(row["response"]) == row["extracted_answer"]
        assert rewards.cost[0] == pytest.approx(row["cost_reward"], abs=1e-12)
        assert rewards.total[0] == pytest.approx(row["reward"], abs=1e-12)


def test_published_values_in_one_batch():
    """The same rows at once, at one alpha and metric: the rows that have these must come out as published."""
    columns = [[row[key] for row in REWARDS] for key in ("response", "golds")]
    raw_costs = np.array([row["raw_cost"] for row in REWARDS])
    compared = 0
    for alpha in {row["alpha"] for row in REWARDS}:
        for metric in ("em", "f1"):
            rewards = score(*columns, raw_costs, NAMES, alpha=alpha, metric=metric, normalizer=CostNormalizer())
            rows = [i for i, row in enumerate(REWARDS) if (row["alpha"], row["metric"]) == (alpha, metric)]
            np.testing.assert_allclose(rewards.total[rows], [REWARDS[i]["reward"] for i in rows], rtol=0, atol=1e-12)
            compared += len(rows)
    assert compared == len(REWARDS)


@given(st.lists(st.tuples(st.sampled_from(REWARDS), st.floats(0, 1e4)), max_size=8), st.floats(0, 1))
def test_total_case_by_case(rows, alpha):
    responses, golds = [row["response"] for row, _ in rows], [row["golds"] for row, _ in rows]
    raw_costs = np.array([cost for _, cost in rows])
    rewards = score(responses, golds, raw_costs, NAMES, alpha=alpha, metric="f1", normalizer=CostNormalizer(4))
    np.testing.assert_array_equal(rewards.cost, CostNormalizer(4)(raw_costs))
    for i, response in enumerate(responses):
        report = check_format(response, NAMES)
        answer = extract_answer(response)
        f1 = 0.0 if answer is None else f1_score(answer, golds[i])
        if not report.ok:
            expected = -1.0
        elif f1 == 0:
            expected = 0.0
        else:
            expected = (1 - alpha) * f1 + alpha * rewards.cost[i]
        assert rewards.total[i] == pytest.approx(expected, abs=1e-12)
        assert (rewards.format[i], rewards.f1[i], rewards.faults[i]) == (-float(not report.ok), f1, report.faults)


def test_components_judge_the_answer_of_a_malformed_response_too():
    rewards = score(
        ["x" + GOOD, GOOD, "nothing"],
        [["paris"], ["paris in France"], ["x"]],
        np.zeros(3),
        NAMES,
        alpha=0.0,
        metric="f1",
        normalizer=CostNormalizer(),
    )
    np.testing.assert_array_equal(rewards.format, [-1, 0, -1])
    np.testing.assert_array_equal(rewards.exact_match, [1, 0, 0])
    np.testing.assert_array_equal(rewards.f1, [1, 0.5, 0])
    np.testing.assert_array_equal(rewards.outcome, rewards.f1)
    np.testing.assert_array_equal(rewards.total, [-1, 0.5, -1])
    assert rewards.faults[0] == ("wrong_start",)


def test_rows_whose_pool_failed_stay_out_of_the_window():
    """A failed call's cost, which here is no number, changes no other row and is neither rewarded nor punished."""
    costs = np.array([1.0, np.nan, 9.0, 4.0])
    valid = np.array([True, False, True, True])
    with_failure, without = CostNormalizer(), CostNormalizer()
    kwargs = dict(alpha=0.5, metric="em")
    rewards = score([GOOD] * 4, [["Paris"]] * 4, costs, NAMES, normalizer=with_failure, valid=valid, **kwargs)
    others = score([GOOD] * 3, [["Paris"]] * 3, costs[valid], NAMES, normalizer=without, **kwargs)
    assert rewards.cost[1] == 0.5
    np.testing.assert_array_equal(rewards.cost[valid], others.cost)
    np.testing.assert_array_equal(rewards.total[valid], others.total)
    assert with_failure.state() == without.state()


def test_no_episodes_have_no_rewards():
    rewards = score([], [], np.array([]), NAMES, alpha=0.0, metric="em", normalizer=CostNormalizer())
    assert rewards.total.shape == (0,)
    assert rewards.faults == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(preset="best"), "reward.preset is 'best'"),
        (dict(metric="bleu"), "reward.metric is 'bleu'"),
        (dict(alpha=1.5), "reward.alpha is 1.5"),
        (dict(alpha=float("nan")), "reward.alpha is nan"),
        (dict(golds=[]), "golds"),
        (dict(raw_costs=np.zeros(2)), "raw_costs"),
        (dict(valid=np.ones((1, 1), bool)), "valid"),
    ],
)
def test_a_bad_argument_is_named_and_leaves_the_window_alone(change, message):
    normalizer = CostNormalizer()
    arguments = dict(responses=[GOOD], golds=[["Paris"]], raw_costs=np.ones(1), names=NAMES, alpha=0.0, metric="em")
    with pytest.raises(ValueError, match=message):
        score(**{**arguments, **change}, normalizer=normalizer)
    assert normalizer.state()["sqrt_costs"] == []


def by_hand(preset, alpha, formed, outcome, cost):
    """The total of one episode, case by case, from the presets' descriptions."""
    if not formed:
        return -1.0
    if preset == "paper":
        return (1 - alpha) * outcome + alpha * cost
    if outcome == 0:
        return 0.0
    return outcome - alpha * (1 - cost) if preset == "success_gated" else (1 - alpha) * outcome + alpha * cost


def cost_in_group(i, raw_costs, groups, valid):
    """An episode's cost component by looking at every other one."""
    if not valid[i]:
        return 0.5
    others = [cost for cost, group, ok in zip(raw_costs, groups, valid, strict=True) if ok and group == groups[i]]
    spread = max(others) - min(others)
    return 0.5 if spread < 1e-8 else 1 - (raw_costs[i] - min(others)) / spread


RESPONSES = {
    (True, 1.0): GOOD,
    (True, 0.5): "<think>a</think><answer>Paris Texas Paris</answer>",
    (True, 0.0): "<think>a</think><answer>Rome</answer>",
    (False, 1.0): "<answer>Paris</answer>",
}
episodes = st.lists(
    st.tuples(st.sampled_from(sorted(RESPONSES)), st.floats(0, 1e3), st.integers(0, 2), st.booleans()), max_size=12
)


@given(episodes, st.sampled_from(sorted(PRESETS)), st.floats(0, 1))
def test_presets_case_by_case(rows, preset, alpha):
    cases, raw_costs, groups, valid = ([row[i] for row in rows] for i in range(4))
    rewards = score(
        [RESPONSES[case] for case in cases],
        [["Paris"]] * len(rows),
        np.array(raw_costs),
        NAMES,
        preset=preset,
        alpha=alpha,
        metric="f1",
        normalizer=CostNormalizer(5),
        groups=np.array(groups),
        valid=np.array(valid, bool),
    )
    window = CostNormalizer(5)
    for i, (formed, outcome) in enumerate(cases):
        if preset == "group":
            cost = cost_in_group(i, raw_costs, groups, valid)
        else:
            cost = window(np.array(raw_costs[i : i + 1]))[0] if valid[i] else 0.5
        assert rewards.cost[i] == pytest.approx(cost, abs=1e-9)
        assert rewards.outcome[i] == outcome
        assert rewards.total[i] == pytest.approx(by_hand(preset, alpha, formed, outcome, cost), abs=1e-9)


def test_only_parity_forbids_later_colons():
    response = (
        f"<think>a</think><search>{NAMES[0]}: at 10:30?</search><information>b</information><answer>Paris</answer>"
    )
    totals = {
        preset: score(
            [response],
            [["Paris"]],
            np.ones(1),
            NAMES,
            preset=preset,
            alpha=0.0,
            metric="em",
            normalizer=CostNormalizer(),
            groups=np.zeros(1, int),
        ).total[0]
        for preset in PRESETS
    }
    assert totals == {"official": -1.0, "paper": 1.0, "group": 1.0, "success_gated": 1.0}


def test_costs_within_a_group_leave_the_window_alone():
    normalizer = CostNormalizer()
    arguments = dict(responses=[GOOD] * 2, golds=[["Paris"]] * 2, raw_costs=np.array([1.0, 2.0]), names=NAMES)
    settings = dict(preset="group", alpha=0.5, metric="em", normalizer=normalizer)
    np.testing.assert_array_equal(score(**arguments, **settings, groups=np.zeros(2, int)).cost, [1.0, 0.0])
    assert normalizer.state()["sqrt_costs"] == []
    with pytest.raises(ValueError, match="pass their groups"):
        score(**arguments, **settings)
    with pytest.raises(ValueError, match=r"groups has shape \(3,\)"):
        score(**arguments, **settings, groups=np.zeros(3, int))


def test_a_rollout_batch_is_scored_as_the_configuration_says():
    costs, valid = np.array([1.0, 9.0, np.nan, 4.0]), np.array([True, True, False, True])
    replies = [SimpleNamespace(raw_cost=cost) for cost in costs]
    texts = [GOOD, "nothing", GOOD, GOOD]
    batch = RolloutBatch(
        questions=[SimpleNamespace(golds=["Paris"])] * 4,
        episodes=[Episode(i, (), text=texts[i], replies=[replies[i]]) for i in range(4)],
        num_generations=2,
        candidates=(),
        prefix_length=0,
        valid=valid,
        stats=None,
    )
    config = base_config().reward
    config.preset, config.alpha, config.metric = "group", 0.5, "f1"
    rewards = compute_rewards(batch, config, CostNormalizer())
    np.testing.assert_array_equal(rewards.total, [1.0, -1.0, 0.75, 0.75])
    config.preset = "official"
    rewards, window = compute_rewards(batch, config, CostNormalizer()), CostNormalizer()
    np.testing.assert_array_equal(rewards.cost[valid], window(costs[valid]))


@pytest.mark.parametrize(("field", "known"), [("preset", PRESETS), ("cost", COSTS)])
def test_the_configuration_knows_all_there_are(field, known):
    config = base_config()
    config.pool.providers, config.pool.models = (provider(name="p"),), (model_card(name="M", provider="p", model="m"),)
    for name in known:
        config.reward[field] = name
        validate(config)
    config.reward[field] = "other"
    with pytest.raises(ConfigError, match=f"reward.{field} is 'other'; choose one of {', '.join(known)}"):
        validate(config)
