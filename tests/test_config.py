"""Losses by their names, and what the checks of a configuration say of the loss' fields and of the rollout's lanes."""

import pytest

from router_r1_jax.config import LOSSES, ConfigError, base_config, model_card, use_loss, validate
from router_r1_jax.learner import PolicyLoss
from router_r1_jax.learning import make_loss


@pytest.fixture
def config():
    config = base_config()
    config.pool.models = (model_card(name="A", provider="p", model="a", price_in=0.1, price_out=0.1, description="a"),)
    return config


def test_every_named_loss_is_a_configuration_that_can_run(config):
    """Each by its published choices; what an earlier one set does not stay."""
    losses = {}
    for name in LOSSES:
        use_loss(config, name)
        validate(config)
        losses[name] = config.learner.advantage, make_loss(config)
    T = config.rollout.max_tokens
    assert losses == {
        "grpo": ("grpo", PolicyLoss(0.2, 0.2, 0.04, mean_over="sequence", length=T)),
        "dr_grpo": ("dr_grpo", PolicyLoss(0.2, 0.2, 0.0, mean_over="constant", length=T)),
        "dapo": ("grpo", PolicyLoss(0.2, 0.28, 0.0, length=T)),
        "gspo": ("grpo", PolicyLoss(3e-4, 4e-4, 0.0, ratio="sequence", mean_over="sequence", length=T)),
        "rloo": ("rloo", PolicyLoss(1.0, 1e9, 0.0, mean_over="constant", length=T)),
        "reinforce": ("reinforce", PolicyLoss(1.0, 1e9, 0.0, length=T)),
        "ppo": (
            "gae",
            PolicyLoss(0.2, 0.2, 0.0, kl="k1", length=T, entropy_coef=0.001, value_coef=0.1, value_clip=0.5),
        ),
    }
    assert config.learner.kl_in == "reward" and config.learner.kl_coef == 0.001
    with pytest.raises(ConfigError, match="loss is 'grop'; choose one of grpo, dr_grpo"):
        use_loss(config, "grop")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("advantage", "a2c", "learner.advantage is 'a2c'; choose one of grpo"),
        ("advantage", "gae", "learner.value_coef is 0; with learner.advantage 'gae' the critic learns by it"),
        ("value_coef", 0.1, "learner.value_coef is 0.1, but learner.advantage 'grpo' has no critic"),
        ("gae_lambda", 1.5, r"learner.gae_lambda is 1.5; it lies in \[0, 1\]"),
        ("kl_in", "both", "learner.kl_in is 'both'; choose one of loss, reward"),
        ("old_logps", "both", "learner.old_logps is 'both'; choose one of sampler, learner"),
        ("minibatches", 7, "learner.minibatches is 7; it must divide the 128 episodes of a step"),
        ("ratio", "row", "learner.ratio is 'row'; choose one of token, sequence"),
        ("mean_over", "row", "learner.mean_over is 'row'; choose one of token, sequence, constant"),
        ("kl", "k4", "learner.kl is 'k4'; choose one of k1, k2, k3, none"),
        ("dual_clip", 0.5, "learner.dual_clip is 0.5; it is greater than 1"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(config, field, value, message):
    validate(config)
    config.learner[field] = value
    with pytest.raises(ConfigError, match=message):
        validate(config)


def test_a_kl_in_the_reward_would_be_lost_beside_component_weights(config):
    config.learner.kl_in = "reward"
    validate(config)
    config.learner.component_weights.outcome = 1.0
    with pytest.raises(ConfigError, match="learner.kl_in is 'reward', but learner.component_weights compare"):
        validate(config)
    config.learner.kl = "none"
    validate(config)


def test_a_prompt_cannot_show_more_cards_than_there_are(config):
    config.pool.shown = len(config.pool.models)
    validate(config)
    config.pool.shown += 1
    with pytest.raises(ConfigError, match="pool.shown is 2, and pool.models are 1; 0 shows them all"):
        validate(config)


@pytest.mark.parametrize(
    "lesson",
    [
        (),
        ("sing", 1, 1, 1),
        ("copy", 10, 5, 4),
        ("copy", 10, 2),
        ("read", 0, 2, 1),
        ("read", 5, 2.0, 1),
        ("read", 5, 2, 0),
    ],
)
def test_a_lesson_is_of_a_known_kind_and_takes_whole_numbers(config, lesson):
    config.warmstart.lessons = (("copy", 10, 4, 4), ("read", 1, 2, 1))
    validate(config)
    config.warmstart.lessons = (("copy", 10, 4, 4), lesson)
    with pytest.raises(ConfigError, match=r"warmstart.lessons\[1\] is .*write \('copy', updates, shortest period"):
        validate(config)


@pytest.mark.parametrize(
    ("lanes", "message"),
    [
        (65, r"rollout.lanes is 65, more than rollout.slots \(64\); lanes are .* lower it, or 0 for all"),
        (-1, "rollout.lanes is -1; it must be at least 0"),
    ],
)
def test_lanes_that_cannot_be_are_refused(config, lanes, message):
    config.rollout.lanes = 64
    validate(config)
    config.rollout.lanes = lanes
    with pytest.raises(ConfigError, match=message):
        validate(config)
