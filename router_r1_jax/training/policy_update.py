"""Policy update: compute_advantages (KL in the reward, truncated importance sampling, GAE or groups), update_policy.

    rows ──▶ old policy, reference, critic ──▶ rewards less the KL ──▶ advantages ──▶ epochs of mini-batches

The learner knows nothing of episodes and rewards, and the rollout knows nothing of the learner. They meet here.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from router_r1_jax import learner as learning
from router_r1_jax.config import ConfigError
from router_r1_jax.distributed.mesh import row_shares
from router_r1_jax.learner import Layout, Learner, PolicyLoss, Row, TokenScores, TrainState
from router_r1_jax.model import Params
from router_r1_jax.reward import Rewards
from router_r1_jax.router import RolloutBatch
from router_r1_jax.setup.session import Session
from router_r1_jax.training.rollouts import compared_rewards


class Trainer(NamedTuple):
    """The learner of a run, and what makes and restores its state."""

    learner: Learner
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    critic_optimizer: optax.GradientTransformation | None  # if config.learner.advantage is "gae"
    session: Session

    def abstract_state(self) -> TrainState:
        """A TrainState of shapes and shardings, to restore into."""
        s, critic = self.session, None
        if self.critic_optimizer:
            critic = learning.abstract_critic(self.critic_optimizer, s.model.width, s.mesh)
        return learning.abstract_state(self.optimizer, s.abstract_params, s.mesh, critic)

    def fresh_state(self, params: Params) -> TrainState:
        """The state of a run that begins with `params`."""
        s, critic = self.session, None
        if self.critic_optimizer:
            critic = learning.init_critic(self.critic_optimizer, s.model.width, s.mesh)
        return learning.init_state(self.optimizer, params, s.abstract_params, s.mesh, critic)


def make_loss(config: ConfigDict) -> PolicyLoss:
    """The loss that `config.learner` describes."""
    c = config.learner
    same = "clip_low clip_high importance_level loss_agg dual_clip kl entropy_coef value_coef value_clip".split()
    kl_coef = c.kl_coef if c.kl_in == "loss" else 0.0
    return PolicyLoss(kl_coef=kl_coef, length=config.rollout.max_row_tokens, **{name: c[name] for name in same})


def rows_per_update(config: ConfigDict) -> int:
    """Rows of one mini-batch."""
    return config.rollout.prompts_per_step * config.rollout.num_generations // config.learner.minibatches


def learner_layout(config: ConfigDict, mesh: Mesh | AbstractMesh) -> Layout:
    """Shapes of the micro-batches in which a learner on this mesh takes a mini-batch."""
    c, rows = config.learner, rows_per_update(config)
    longest, shares = config.rollout.max_row_tokens, row_shares(mesh)
    return learning.make_layout(longest, buckets=c.length_buckets, tokens=c.micro_tokens, rows=rows, shares=shares)


def make_trainer(config: ConfigDict, session: Session) -> Trainer:
    """What `config.learner` describes, for the session's model and mesh. Nothing is compiled yet."""
    c, mesh = config.learner, session.mesh
    if session.model.dtype == "float16":
        raise ConfigError("model.dtype is 'float16', whose gradients vanish without a loss scale; train in 'bfloat16'")
    total = config.steps * c.minibatches * c.epochs
    settings = {"total": total} | {name: c[name] for name in ("warmup", "decay", "weight_decay", "max_grad_norm")}
    optimizer, schedule = learning.make_optimizer(learning_rate=c.learning_rate, **settings)
    critic_optimizer = None
    if c.advantage == "gae":
        critic_optimizer, _ = learning.make_optimizer(learning_rate=c.value_learning_rate, **settings)
    learner = Learner(
        session.model,
        optimizer,
        make_loss(config),
        mesh,
        session.abstract_params,
        layout=learner_layout(config, mesh),
        chunk=c.logit_chunk,
        temperature=config.rollout.temperature,
        critic_optimizer=critic_optimizer,
    )
    return Trainer(learner, optimizer, schedule, critic_optimizer, session)


def make_rows(config: ConfigDict, rollouts: RolloutBatch) -> list[Row]:
    """The learner's rows: token ids exactly as they were sampled, never text that is tokenised again.

    An episode with weight 0 carries no loss: its sampled tokens are masked as injected ones are.
    """
    weights = rollouts.weights(config.pool)
    return [
        Row(e.prompt[rollouts.prefix_length :], e.tokens, np.array(e.sampled, float) * (weight > 0), e.logps)
        for e, weight in zip(rollouts.episodes, weights, strict=True)
    ]


def compute_advantages(
    config: ConfigDict,
    learner: Learner,
    state: TrainState,
    reference: Params | None,
    rollouts: RolloutBatch,
    rewards: Rewards,
) -> tuple[Sequence[int], list[Row], dict[str, float]]:
    """Rows with everything that the loss compares with: old log-probs, reference log-probs, advantages.

    Args:
      reference: parameters of the KL reference. None: the state's own parameters without their LoRA adapters, which no
        update changes.

    Returns:
      The token ids of the shared prefix, a row per episode, and metrics. `logp_diff_mean` and `logp_diff_max` are there
      if learner.old_logps is "learner".
    """
    c = config.learner
    prefix, rows = rollouts.episodes[0].prompt[: rollouts.prefix_length], make_rows(config, rollouts)
    metrics: dict[str, float] = {}
    scores = None
    if c.old_logps == "learner" or state.critic:
        scores = learner.score(state.params, prefix, rows, critic=state.critic and state.critic.params)
    if c.old_logps == "learner":
        metrics |= _logp_difference([score.logps for score in scores], rows)
        rows = [row._replace(logps=score.logps) for row, score in zip(rows, scores, strict=True)]
    if c.tis_cap:
        rows, tis_metrics = _with_importance_weights(rows, rollouts, c.tis_cap)
        metrics |= tis_metrics
    if c.kl != "none":
        found = learner.score(state.params if reference is None else reference, prefix, rows, base=True)
        rows = [row._replace(reference_logps=score.logps) for row, score in zip(rows, found, strict=True)]
    rows, advantage_metrics = _with_advantages(config, rows, scores, rollouts, rewards)
    return prefix, rows, metrics | advantage_metrics


def update_policy(
    config: ConfigDict, learner: Learner, state: TrainState, prefix: Sequence[int], rows: list[Row]
) -> tuple[TrainState, dict[str, float]]:
    """`learner.epochs` passes over a rollout's rows, one update per mini-batch; returns the new state and metrics.

    Metrics are means over the updates, with these exceptions: `skipped_updates` is a sum, `compiled_programs` is the
    last value, and `logp_diff_mean` and `logp_diff_max` are those of the first update, in which sampler and learner
    have the same parameters (one step apart with rollout.one_step_off_policy).
    """
    c = config.learner
    size, updates = len(rows) // c.minibatches, []
    for _ in range(c.epochs):
        for start in range(0, len(rows), size):
            state, metrics = learner.update(state, prefix, rows[start : start + size])
            updates.append(metrics)
    means = {name: float(np.mean([metrics[name] for metrics in updates])) for name in updates[0]}
    first = {name: value for name, value in updates[0].items() if name.startswith("logp_diff")}
    skipped = sum(metrics["skipped_updates"] for metrics in updates)
    counts = {"skipped_updates": skipped, "compiled_programs": updates[-1]["compiled_programs"]}
    return state, means | first | counts


def _logp_difference(logps: list[np.ndarray], rows: list[Row]) -> dict[str, float]:
    """Mean and maximum over sampled tokens of |learner's - sampler's| log-prob, in nats."""
    apart = np.concatenate([np.abs(x - row.logps)[row.mask > 0] for x, row in zip(logps, rows, strict=True)])
    return {"logp_diff_mean": float(np.mean(apart)), "logp_diff_max": float(np.max(apart))} if len(apart) else {}


def _with_importance_weights(rows: list[Row], rollouts: RolloutBatch, cap: float) -> tuple[list[Row], dict[str, float]]:
    """Rows with truncated importance sampling (TIS) weights: old policy / sampler's distribution, at most `cap`.

    The sampler's distribution is the one that it drew from, truncated by top-k, top-p and min-p (Yao et al. 2025; the
    truncation of weights is IMPALA's).
    """
    weighted = []
    for row, episode in zip(rows, rollouts.episodes, strict=True):
        log_ratio = np.where(row.mask > 0, np.subtract(row.logps, episode.sampler_logps), 0)
        weighted.append(row._replace(weights=np.minimum(np.exp(log_ratio), cap)))
    weights = np.concatenate([row.weights[row.mask > 0] for row in weighted])
    return weighted, {"tis_mean": float(np.mean(weights)), "tis_capped": float(np.mean(weights >= cap))}


def _with_advantages(
    config: ConfigDict, rows: list[Row], scores: list[TokenScores] | None, rollouts: RolloutBatch, rewards: Rewards
) -> tuple[list[Row], dict[str, float]]:
    """Rows with their advantages and, if there is a critic, its values and targets.

    With learner.kl_in "reward" the estimated KL at each token, times kl_coef, is subtracted from the token's reward.
    """
    c = config.learner
    penalties = [np.zeros(len(row.tokens)) for row in rows]
    if c.kl_in == "reward" and c.kl != "none":
        for penalty, row in zip(penalties, rows, strict=True):
            apart = np.where(row.mask > 0, np.subtract(row.reference_logps, row.logps), 0.0)
            penalty += c.kl_coef * np.asarray(learning.kl_estimate(c.kl, apart))
    weights = rollouts.weights(config.pool)
    if c.advantage == "gae":
        return _gae_advantages(config, rows, scores, penalties, rewards.total, weights)
    totals = rewards.total - np.array([penalty.sum() for penalty in penalties])
    parts = compared_rewards(config, dataclasses.replace(rewards, total=totals))
    if "total" in parts:
        found = learning.group_advantages(parts["total"], rollouts.groups, weights, kind=c.advantage)
    else:
        shares = {name: c.component_weights[name] for name in parts}
        found = learning.component_advantages(parts, shares, rollouts.groups, weights, kind=c.advantage)
    advantages, without_spread = found
    rows = [row._replace(advantages=float(x)) for row, x in zip(rows, advantages, strict=True)]
    return rows, {"zero_variance_groups": without_spread}


def _gae_advantages(
    config: ConfigDict,
    rows: list[Row],
    scores: list[TokenScores],
    penalties: list[np.ndarray],
    totals: np.ndarray,
    weights: np.ndarray,
) -> tuple[list[Row], dict[str, float]]:
    """Rows with GAE advantages, whitened over all sampled tokens. An episode's reward belongs to its last token.

    `weights` [B] are factors of the whitened advantages. The critic learns from each episode alike.
    """
    c, made = config.learner, []
    for row, score, penalty, total in zip(rows, scores, penalties, totals, strict=True):
        token_rewards, sampled_at = -penalty, np.flatnonzero(row.mask)
        token_rewards[sampled_at[-1:]] += total
        advantages, returns = learning.gae(
            token_rewards, score.values, row.mask > 0, discount=c.discount, gae_lambda=c.gae_lambda
        )
        made.append(row._replace(advantages=advantages, values=score.values, returns=returns))
    white = learning.whiten([row.advantages for row in made], [row.mask for row in made])
    returns = np.concatenate([row.returns[row.mask > 0] for row in made])
    values = np.concatenate([row.values[row.mask > 0] for row in made])
    unexplained = np.var(returns - values) / np.var(returns) if np.var(returns) > 0 else 1.0
    metrics = {"value_mean": float(np.mean(values)), "value_explained": float(1 - unexplained)}
    return [row._replace(advantages=w * x) for row, w, x in zip(made, weights, white, strict=True)], metrics
