"""Configuration checks: `validate` refuses what has the right type and still cannot run.

A message names the field, the value and what to write instead.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from router_r1_jax.config import SPLITS, SYNTHETIC, ConfigError, model_card, provider

# Ranges of numbers by their texts: a test, and the fields. All other numbers are finite and at least 0.
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "is any number": (
        lambda x: True,
        """mesh.data mesh.fsdp mesh.tensor alarms.kl alarms.malformed alarms.length alarms.one_model alarms.logp_diff
        alarms.skipped""",
    ),
    "must be at least 1": (
        lambda x: 1 <= x < math.inf,
        """rollout.prompts_per_step rollout.num_generations rollout.tensor rollout.slots rollout.max_turn_tokens
        rollout.reply_tokens rollout.max_row_tokens rollout.prefill_chunk rollout.prefill_rows prompt.question_tokens
        pool.concurrency pool.max_tokens learner.micro_tokens learner.length_buckets learner.epochs learner.minibatches
        learner.logit_chunk reward.window checkpoint.every checkpoint.keep validation.every logging.episodes_every
        alarms.patience evaluation.questions evaluation.bootstrap warmstart.batch model.arch.num_layers model.arch.width
        model.arch.mlp model.arch.num_heads model.arch.num_kv_heads model.arch.head_dim distributed.processes""",
    ),
    "must be greater than 0": (
        lambda x: 0 < x < math.inf,
        """pool.deadline pool.request_timeout pool.backoff pool.backoff_max pool.circuit_breaker.pause
        pool.circuit_breaker.pause_max evaluation.temperature learner.max_grad_norm model.arch.rope_theta
        model.arch.initializer_range model.arch.embedding_range model.lora.alpha""",
    ),
    "lies in [0, 1]": (
        lambda x: 0 <= x <= 1,
        "reward.alpha rollout.min_p pool.fault_weight learner.discount learner.gae_lambda",
    ),
    "lies in (0, 1], and 1 keeps all": (lambda x: 0 < x <= 1, "rollout.top_p"),
}
_RANGE_OF = {field: (text, test) for text, (test, fields) in _RANGES.items() for field in fields.split()}
_NOT_NEGATIVE = ("must be at least 0", lambda x: 0 <= x < math.inf)

_CHOICES = {
    "reward.metric": "em f1",
    "reward.preset": "official paper group success_gated",
    "reward.cost": "output tokens all seconds",
    "learner.advantage": "grpo dr_grpo rloo reinforce gae",
    "learner.importance_level": "token sequence",
    "learner.loss_agg": "token sequence constant",
    "learner.kl": "k1 k2 k3 none",
    "learner.kl_in": "loss reward",
    "learner.old_logps": "sampler learner",
    "rollout.driver": "jit host",
    "pool.call_cache.mode": "off record replay strict",
    "model.attention": "einsum xla cudnn",
    "model.remat": "none dots full",
    "model.dtype": "float32 bfloat16 float16",
    "model.arch.family": "qwen2 qwen3 llama",
    "evaluation.split": " ".join(SPLITS),
}
_LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


def validate(config: ConfigDict) -> None:
    """Raise ConfigError for a configuration that cannot run. Cards are checked where they are built (`pool.cards`)."""
    for field, value in _leaves(config):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            text, test = _RANGE_OF.get(field, _NOT_NEGATIVE)
            _require(test(value), f"{field} is {value}; it {text}")
        if field in _CHOICES:
            _check_choice(field, value, _CHOICES[field].split())
    _check_entries("pool.providers", config.pool.providers, provider)
    _check_entries("pool.models", config.pool.models, model_card)
    _check_model(config)
    _check_data(config)
    _check_rollout(config)
    _check_learner(config)


def _leaves(section: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full name and value of every field."""
    for name, value in section.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _require(holds: object, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _check_choice(field: str, value: str, allowed: Sequence[str]) -> None:
    _require(value in allowed, f"{field} is {value!r}; choose one of {', '.join(allowed)}")


def _check_entries(field: str, entries: Sequence[object], made_by: Callable[..., ConfigDict]) -> None:
    """Every entry of the tuple has the fields that `made_by` gives it."""
    for i, entry in enumerate(entries):
        made = isinstance(entry, ConfigDict) and set(entry) == set(made_by())
        _require(made, f"{field}[{i}] is {entry!r}; make it with {made_by.__name__}(...) in a configuration file")


def _check_model(config: ConfigDict) -> None:
    """LoRA's targets are projections of the model."""
    targets = config.model.lora.targets
    _require(
        targets and set(targets) <= set(_LORA_TARGETS),
        f"model.lora.targets is {targets!r}; name one or more of {', '.join(_LORA_TARGETS)}",
    )


def _check_data(config: ConfigDict) -> None:
    """Each split names its sets, none twice; simulated models only know the synthetic world."""
    for split in SPLITS:
        sets = config.data[split]
        named = sets and len(set(sets)) == len(sets) and all(isinstance(name, str) and name for name in sets)
        _require(named, f"data.{split} is {sets!r}; name one or more sets, none twice, such as ('nq', 'hotpotqa')")
    _require(
        not config.synthetic.simulate_models or any(SYNTHETIC in config.data[split] for split in SPLITS),
        "synthetic.simulate_models is True, but the simulated models only know the set 'synthetic'. Set it to False "
        "and declare providers, for instance with use_pool(c, 'configs/pools/current.py')",
    )
    for i, phase in enumerate(config.synthetic.curriculum):
        kind, *numbers = phase or ("",)
        whole = len(numbers) == 3 and all(isinstance(number, int) and number >= 1 for number in numbers)
        _require(
            whole and (kind == "read" or kind == "copy" and numbers[1] <= numbers[2]),
            f"synthetic.curriculum[{i}] is {phase!r}; write ('copy', updates, shortest period, longest period) or "
            "('read', updates, models, lines), whole numbers from 1 on",
        )


def _check_rollout(config: ConfigDict) -> None:
    """The models, the batch of a step and the processes fit together."""
    c, d, models = config.rollout, config.distributed, len(config.pool.models)
    _require(models, "pool.models is empty; declare at least one model with model_card(...)")
    _require(
        config.pool.candidates <= models,
        f"pool.candidates is {config.pool.candidates}, and pool.models are {models}; 0 shows them all",
    )
    _require(
        c.decode_batch <= c.slots,
        f"rollout.decode_batch is {c.decode_batch}, more than rollout.slots ({c.slots}); lower it, or 0 for all slots",
    )
    _require(
        d.coordinator in ("", "auto") or re.fullmatch(r"\S+:\d+", d.coordinator),
        f"distributed.coordinator is {d.coordinator!r}; write host:port of process 0, auto, or nothing",
    )
    _require(
        d.process < d.processes,
        f"distributed.process is {d.process} of distributed.processes={d.processes}; processes count from 0",
    )


def _check_learner(config: ConfigDict) -> None:
    """Advantages, critic, KL and mini-batches fit together."""
    c, generations = config.learner, config.rollout.num_generations
    critic, components = c.advantage == "gae", any(c.component_weights.values())
    _require(
        critic or not c.value_coef,
        f"learner.value_coef is {c.value_coef}, but learner.advantage {c.advantage!r} has no critic; set one of them "
        "to 0 or 'gae'",
    )
    _require(
        not (critic and components),
        "learner.component_weights compare within groups; learner.advantage 'gae' takes none of them",
    )
    _require(
        c.value_coef or not critic,
        "learner.value_coef is 0; with learner.advantage 'gae' the critic learns by it, 0.1 is usual",
    )
    _require(
        not (components and c.kl_in == "reward" and c.kl != "none"),
        "learner.kl_in is 'reward', but learner.component_weights compare components of the reward, none of which "
        "holds the KL; set it to 'loss', or learner.kl to 'none'",
    )
    _require(
        not 0.0 < c.dual_clip <= 1.0,
        f"learner.dual_clip is {c.dual_clip}; it is greater than 1 (3 is usual), or 0 for no bound",
    )
    _require(
        generations >= 2 or c.advantage in ("gae", "reinforce") and not c.dynamic_sampling,
        f"rollout.num_generations is {generations}; learner.advantage {c.advantage!r} and learner.dynamic_sampling "
        "compare at least 2 episodes per question",
    )
    episodes = config.rollout.prompts_per_step * generations
    _require(
        episodes % c.minibatches == 0,
        f"learner.minibatches is {c.minibatches}; it must divide the {episodes} episodes of a step "
        "(rollout.prompts_per_step x rollout.num_generations)",
    )
