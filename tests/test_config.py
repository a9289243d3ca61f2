"""Losses by their names, and what the checks of a configuration say of the loss' fields."""

import pytest

from router_r1_jax.config import LOSSES, ConfigError, base_config, model_card, use_loss, validate
from router_r1_jax.learner import PolicyLoss
from router_r1_jax.train import make_loss


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
    }
    with pytest.raises(ConfigError, match="loss is 'grop'; choose one of grpo, dr_grpo"):
        use_loss(config, "grop")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("advantage", "gae", "learner.advantage is 'gae'; choose one of grpo"),
        ("ratio", "row", "learner.ratio is 'row'; choose one of token, sequence"),
        ("mean_over", "row", "learner.mean_over is 'row'; choose one of token, sequence, constant"),
        ("kl", "k4", "learner.kl is 'k4'; choose one of k1, k2, k3"),
        ("dual_clip", 0.5, "learner.dual_clip is 0.5; it is greater than 1"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(config, field, value, message):
    validate(config)
    config.learner[field] = value
    with pytest.raises(ConfigError, match=message):
        validate(config)
