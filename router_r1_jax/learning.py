"""From scored episodes to new parameters: what a training step does around the learner's update.

    rows ──▶ old policy, reference, critic ──▶ rewards less the KL ──▶ advantages ──▶ epochs of mini-batches

The learner knows nothing of episodes and rewards, and the episodes' makers nothing of the learner: they meet here.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from router_r1_jax.config import ConfigError
from router_r1_jax.learner import (
    Layout,
    Learner,
    PolicyLoss,
    Reading,
    Row,
    TrainState,
    abstract_critic,
    abstract_state,
    component_advantages,
    gae,
    group_advantages,
    init_critic,
    init_state,
    kl_estimate,
    make_layout,
    make_optimizer,
    whiten,
)
from router_r1_jax.model import Params
from router_r1_jax.reward import Rewards
from router_r1_jax.router import Answers
from router_r1_jax.session import Session


class Trainer(NamedTuple):
    """The learner of a run, and what makes and restores its state."""

    learner: Learner
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    critic_optimizer: optax.GradientTransformation | None  # where config.learner.advantage is "gae"
    session: Session

    def abstract_state(self) -> TrainState:
        """A TrainState to restore into."""
        s, critic = self.session, None
        if self.critic_optimizer:
            critic = abstract_critic(self.critic_optimizer, s.model.width, s.mesh)
        return abstract_state(self.optimizer, s.abstract_params, s.mesh, critic)

    def fresh_state(self, params: Params) -> TrainState:
        """The state of a run that begins with `params`."""
        s, critic = self.session, None
        if self.critic_optimizer:
            critic = init_critic(self.critic_optimizer, s.model.width, s.mesh)
        return init_state(self.optimizer, params, s.abstract_params, s.mesh, critic)


def make_loss(config: ConfigDict) -> PolicyLoss:
    """The loss that `config.learner` describes."""
    c = config.learner
    return PolicyLoss(
        clip_low=c.clip_low, clip_high=c.clip_high, kl_coef=c.kl_coef if c.kl_in == "loss" else 0.0, ratio=c.ratio,
        mean_over=c.mean_over, length=config.rollout.max_tokens, dual_clip=c.dual_clip, kl=c.kl,
        entropy_coef=c.entropy_coef, value_coef=c.value_coef, value_clip=c.value_clip,
    )  # fmt: skip


def learner_layout(config: ConfigDict, mesh: Mesh, *, rows: int) -> Layout:
    """Shapes of the micro-batches in which a learner on this mesh takes batches of so many rows."""
    c, shares = config.learner, mesh.shape["data"] * mesh.shape["fsdp"]
    longest = config.rollout.max_tokens
    return make_layout(longest, buckets=c.length_buckets, tokens=c.micro_tokens, rows=rows, shares=shares)


def make_trainer(config: ConfigDict, session: Session) -> Trainer:
    """What `config.learner` describes, for the session's model and mesh. Nothing is compiled yet."""
    c, mesh = config.learner, session.mesh
    if session.model.dtype == "float16":
        raise ConfigError("model.dtype is 'float16', whose gradients vanish without a loss scale; train in 'bfloat16'")
    rows = config.rollout.questions * config.rollout.group // c.minibatches
    settings = dict(
        warmup=c.warmup, total=config.steps * c.minibatches * c.epochs, decay=c.decay, weight_decay=c.weight_decay,
        max_grad_norm=c.max_grad_norm,
    )  # fmt: skip
    optimizer, schedule = make_optimizer(learning_rate=c.learning_rate, **settings)
    critic_optimizer = None
    if c.advantage == "gae":
        critic_optimizer, _ = make_optimizer(learning_rate=c.value_learning_rate, **settings)
    learner = Learner(
        session.model, optimizer, make_loss(config), mesh, session.abstract_params,
        layout=learner_layout(config, mesh, rows=rows), chunk=c.logit_chunk,
        temperature=config.rollout.temperature, critic_optimizer=critic_optimizer,
    )  # fmt: skip
    return Trainer(learner, optimizer, schedule, critic_optimizer, session)


def compared(config: ConfigDict, rewards: Rewards) -> dict[str, np.ndarray]:
    """The rewards [B] that the update compares: the components that have weights, or else the total."""
    shares = config.learner.component_weights
    return {name: getattr(rewards, name) for name, share in shares.items() if share} or {"total": rewards.total}


def compare(config: ConfigDict, answers: Answers, rewards: Rewards) -> tuple[np.ndarray, int]:
    """Advantages [B] of the total reward, or of its components where they have weights; groups without a spread."""
    weights, parts = answers.weights(config.pool), compared(config, rewards)
    kind = config.learner.advantage
    if "total" in parts:
        return group_advantages(parts["total"], answers.groups, weights, kind=kind)
    shares = {name: config.learner.component_weights[name] for name in parts}
    return component_advantages(parts, shares, answers.groups, weights, kind=kind)


def make_rows(config: ConfigDict, answers: Answers) -> list[Row]:
    """The learner's rows: sampled ids as they were sampled, never text tokenised again.

    An episode of weight 0 carries no loss at all: its tokens are as good as injected.
    """
    weights = answers.weights(config.pool)
    return [
        Row(e.prompt[answers.prefix_length :], e.tokens, np.array(e.sampled, float) * (weight > 0), e.logps)
        for e, weight in zip(answers.episodes, weights, strict=True)
    ]


def improve(
    config: ConfigDict,
    learner: Learner,
    state: TrainState,
    reference: Params | None,
    answers: Answers,
    rewards: Rewards,
) -> tuple[TrainState, dict[str, float]]:
    """`learner.epochs` passes over a rollout's rows, one update per mini-batch; the new state, and metrics.

    Metrics are means over the updates, but for `skipped`, their sum, `programs`, and `logp_diff_mean` and
    `logp_diff_max`, those of the first update: sampler and learner are compared at the same parameters, but with
    rollout.ahead a step apart.

    `reference` None: the state's own parameters without their adapters, which no update changes.
    """
    c = config.learner
    prefix, rows = answers.episodes[0].prompt[: answers.prefix_length], make_rows(config, answers)
    metrics: dict[str, float] = {}
    readings = None
    if c.old_logps == "learner" or state.critic:
        readings = learner.read(state.params, prefix, rows, critic=state.critic and state.critic.params)
    if c.old_logps == "learner":
        metrics |= distance([reading.logps for reading in readings], rows)
        rows = [row._replace(logps=reading.logps) for row, reading in zip(rows, readings, strict=True)]
    if c.importance_cap:
        rows, figures = weigh(rows, answers, c.importance_cap)
        metrics |= figures
    if c.kl != "none":
        found = learner.read(state.params if reference is None else reference, prefix, rows, base=True)
        rows = [row._replace(reference_logps=reading.logps) for row, reading in zip(rows, found, strict=True)]
    rows, figures = with_advantages(config, rows, readings, answers, rewards)
    metrics |= figures

    size, updates = len(rows) // c.minibatches, []
    for _ in range(c.epochs):
        for start in range(0, len(rows), size):
            state, figures = learner.update(state, prefix, rows[start : start + size])
            updates.append(figures)
    means = {name: float(np.mean([figures[name] for figures in updates])) for name in updates[0]}
    first = {name: value for name, value in updates[0].items() if name.startswith("logp_diff")}
    counts = {"skipped": sum(figures["skipped"] for figures in updates), "programs": updates[-1]["programs"]}
    return state, means | first | metrics | counts


def distance(logps: list[np.ndarray], rows: list[Row]) -> dict[str, float]:
    """Mean and maximum over sampled tokens of |learner's - sampler's| log-prob, in nats."""
    apart = np.concatenate([np.abs(x - row.logps)[row.mask > 0] for x, row in zip(logps, rows, strict=True)])
    return {"logp_diff_mean": float(np.mean(apart)), "logp_diff_max": float(np.max(apart))} if len(apart) else {}


def weigh(rows: list[Row], answers: Answers, cap: float) -> tuple[list[Row], dict[str, float]]:
    """Rows with importance weights: old policy's over the sampler's probability of each token, truncated at `cap`.

    The sampler's is that of the distribution it drew from, cut by top-k, top-p and min-p (Yao et al. 2025; IMPALA's
    truncation).
    """
    made = [
        row._replace(weights=np.minimum(np.exp(np.where(row.mask > 0, np.subtract(row.logps, e.drawn_logps), 0)), cap))
        for row, e in zip(rows, answers.episodes, strict=True)
    ]
    weights = np.concatenate([row.weights[row.mask > 0] for row in made])
    return made, {"importance_mean": float(np.mean(weights)), "importance_capped": float(np.mean(weights >= cap))}


def with_advantages(
    config: ConfigDict, rows: list[Row], readings: list[Reading] | None, answers: Answers, rewards: Rewards
) -> tuple[list[Row], dict[str, float]]:
    """Rows with their advantages, and for a critic its values and targets.

    With learner.kl_in "reward" each token's reward is less by kl_coef times the estimated KL at it.
    """
    c = config.learner
    penalties = [np.zeros(len(row.tokens)) for row in rows]
    if c.kl_in == "reward" and c.kl != "none":
        for penalty, row in zip(penalties, rows, strict=True):
            apart = np.where(row.mask > 0, np.subtract(row.reference_logps, row.logps), 0.0)
            penalty += c.kl_coef * np.asarray(kl_estimate(c.kl, apart))
    if c.advantage == "gae":
        return _against_critic(config, rows, readings, penalties, rewards.total, answers.weights(config.pool))
    less = dataclasses.replace(rewards, total=rewards.total - np.array([penalty.sum() for penalty in penalties]))
    advantages, without_spread = compare(config, answers, less)
    made = [row._replace(advantages=float(x)) for row, x in zip(rows, advantages, strict=True)]
    return made, {"zero_variance_groups": without_spread}


def _against_critic(
    config: ConfigDict,
    rows: list[Row],
    readings: list[Reading],
    penalties: list[np.ndarray],
    totals: np.ndarray,
    weights: np.ndarray,
) -> tuple[list[Row], dict[str, float]]:
    """Rows with the advantages of GAE, whitened over all sampled tokens; an episode's reward falls to its last one.

    The episodes' `weights` [B] are factors of what is whitened; the critic learns from each alike.
    """
    c, made = config.learner, []
    for row, reading, penalty, total in zip(rows, readings, penalties, totals, strict=True):
        given, at = -penalty, np.flatnonzero(row.mask)
        given[at[-1:]] += total
        advantages, returns = gae(given, reading.values, row.mask > 0, discount=c.discount, gae_lambda=c.gae_lambda)
        made.append(row._replace(advantages=advantages, values=reading.values, returns=returns))
    white = whiten([row.advantages for row in made], [row.mask for row in made])
    returns = np.concatenate([row.returns[row.mask > 0] for row in made])
    values = np.concatenate([row.values[row.mask > 0] for row in made])
    unexplained = np.var(returns - values) / np.var(returns) if np.var(returns) > 0 else 1.0
    figures = {"value_mean": float(np.mean(values)), "value_explained": float(1 - unexplained)}
    return [row._replace(advantages=w * x) for row, w, x in zip(made, weights, white, strict=True)], figures
