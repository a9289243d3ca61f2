"""Losses by name, the checks of a configuration, and its hash."""

import contextlib
import math

import pytest

from router_r1_jax import config_checks
from router_r1_jax.config import LOSSES, ConfigError, base_config, config_hash, model_card, use_loss
from router_r1_jax.config_checks import validate
from router_r1_jax.learner import PolicyLoss
from router_r1_jax.model import LoRA
from router_r1_jax.training.policy_update import make_loss


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
    T = config.rollout.max_row_tokens
    assert losses == {
        "grpo": ("grpo", PolicyLoss(0.2, 0.2, 0.04, loss_agg="sequence", length=T)),
        "dr_grpo": ("dr_grpo", PolicyLoss(0.2, 0.2, 0.0, loss_agg="constant", length=T)),
        "dapo": ("grpo", PolicyLoss(0.2, 0.28, 0.0, length=T)),
        "gspo": ("grpo", PolicyLoss(3e-4, 4e-4, 0.0, importance_level="sequence", loss_agg="sequence", length=T)),
        "rloo": ("rloo", PolicyLoss(1.0, 1e9, 0.0, loss_agg="constant", length=T)),
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
        ("importance_level", "row", "learner.importance_level is 'row'; choose one of token, sequence"),
        ("loss_agg", "row", "learner.loss_agg is 'row'; choose one of token, sequence, constant"),
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
    config.pool.candidates = len(config.pool.models)
    validate(config)
    config.pool.candidates += 1
    with pytest.raises(ConfigError, match="pool.candidates is 2, and pool.models are 1; 0 shows them all"):
        validate(config)


@pytest.mark.parametrize(
    "phase",
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
def test_a_phase_of_the_curriculum_has_a_known_kind_and_whole_numbers(config, phase):
    config.synthetic.curriculum = (("copy", 10, 4, 4), ("read", 1, 2, 1))
    validate(config)
    config.synthetic.curriculum = (("copy", 10, 4, 4), phase)
    with pytest.raises(ConfigError, match=r"synthetic.curriculum\[1\] is .*write \('copy', updates, shortest period"):
        validate(config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.attention", "flash", "model.attention is 'flash'; choose one of einsum, xla, cudnn"),
        ("model.remat", "some", "model.remat is 'some'; choose one of none, dots, full"),
        ("model.lora.rank", -1, "model.lora.rank is -1; it must be at least 0"),
        ("model.lora.alpha", 0.0, "model.lora.alpha is 0.0; it must be greater than 0"),
        ("model.lora.alpha", math.nan, "model.lora.alpha is nan"),
        ("model.lora.targets", (), r"model.lora.targets is \(\); name one or more of q, k, v, o, gate, up, down"),
        ("model.lora.targets", ("q", "query"), "'query'"),
    ],
)
def test_settings_of_the_model_are_checked(config, field, value, message):
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=message):
        validate(config)


def test_every_projection_may_have_adapters(config):
    config.model.lora.targets = LoRA(rank=1, alpha=1.0).targets
    validate(config)


@pytest.mark.parametrize(
    ("decode_batch", "message"),
    [
        (65, r"rollout.decode_batch is 65, more than rollout.slots \(64\); lower it, or 0 for all"),
        (-1, "rollout.decode_batch is -1; it must be at least 0"),
    ],
)
def test_a_decode_batch_holds_at_most_all_slots(config, decode_batch, message):
    config.rollout.decode_batch = 64
    validate(config)
    config.rollout.decode_batch = decode_batch
    with pytest.raises(ConfigError, match=message):
        validate(config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", -1, "steps is -1; it must be at least 0"),
        ("rollout.slots", 0, "rollout.slots is 0; it must be at least 1"),
        ("pool.deadline", 0.0, "pool.deadline is 0.0; it must be greater than 0"),
        ("rollout.top_p", 0.0, r"rollout.top_p is 0.0; it lies in \(0, 1\], and 1 keeps all"),
        ("learner.clip_high", math.inf, "learner.clip_high is inf; it must be at least 0"),
        ("reward.alpha", math.nan, r"reward.alpha is nan; it lies in \[0, 1\]"),
        ("mesh.data", -1, None),
        ("alarms.kl", math.inf, None),
    ],
)
def test_numbers_have_a_range(config, field, value, message):
    section, _, name = field.rpartition(".")
    (config[section] if section else config)[name] = value
    with pytest.raises(ConfigError, match=f"^{message}$") if message else contextlib.nullcontext():
        validate(config)


def test_every_field_with_a_range_or_with_choices_exists():
    fields = dict(config_checks._leaves(base_config()))
    assert set(config_checks._RANGE_OF) | set(config_checks._CHOICES) <= set(fields)
    for field, allowed in config_checks._CHOICES.items():
        assert fields[field] in allowed.split()


def test_the_hash_leaves_out_how_many_processes_run(config):
    before = config_hash(config)
    config.distributed.processes = 2
    assert config_hash(config) == before
    config.seed = 1
    assert config_hash(config) != before
