"""Losses: PPO's clipped surrogate with dual clip, KL estimators k1 k2 k3, entropy bonus, value loss; supervised.

A loss is called with the current policy's scores of some rows, arrays [m, T], and the rows. It returns sums over
tokens, so that micro-batches add up exactly. `divisor` gives the number by which the sum over the whole batch is
divided once (loss aggregation). Metrics are means, or maxima, over the tokens that carry loss.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from router_r1_jax.learner.micro_batches import Rows

Metrics = dict[str, jax.Array]
ImportanceLevel = Literal["token", "sequence"]
LossAgg = Literal["token", "sequence", "constant"]
KLEstimator = Literal["k1", "k2", "k3", "none"]


class TokenScores(NamedTuple):
    """Log-probs, entropies (nats) and values of the tokens of rows [m, T], each given all tokens before it.

    Values exist only if there is a critic. Each is the value of the state before the token.
    """

    logps: jax.Array
    entropy: jax.Array
    values: jax.Array | None = None


class LossSums(NamedTuple):
    """The loss of some rows, metrics summed over the tokens that carry loss, and metrics that are maxima over them."""

    loss: jax.Array
    totals: Metrics
    maxima: Metrics


def kl_estimate(kind: KLEstimator, log_ratio: jax.Array) -> jax.Array:
    """KL estimate per token from log_ratio = reference - policy log-prob at the sampled token (Schulman 2020).

    "k1", -log_ratio, is unbiased. "k2" is half the square. "k3", exp(log_ratio) - 1 - log_ratio, is unbiased and never
    negative. In a loss, use k2 or k3, because the gradient of k1 has mean zero. In a reward, k1 is usual.
    """
    if kind == "k1":
        return -log_ratio
    return 0.5 * log_ratio * log_ratio if kind == "k2" else jnp.exp(log_ratio) - log_ratio - 1


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """PPO's clipped surrogate and its variants, with a KL penalty; `config.LOSSES` has the published combinations.

    importance_level: the probability ratio between this policy and the log-probs in the rows is taken of each "token"
      (GRPO; DeepSeekMath, equation 3), or of the "sequence", as the geometric mean over its tokens (GSPO, equation 7).
    loss_agg: "token" is the mean over all loss tokens (DAPO); "sequence" is the mean over rows of each row's mean
      (GRPO); "constant" is the mean over rows of each row's sum over `length` (Dr. GRPO). Rows without loss tokens do
      not count.
    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
    dual_clip: for a negative advantage, the surrogate is at least `dual_clip` times the advantage (dual-clip PPO); 0:
      no bound.
    kl, kl_coef: kind of `kl_estimate` to the reference, and its factor in the loss; "none": there is no reference.
    entropy_coef: factor of the entropy bonus.
    value_coef: factor of the value loss of the critic, half the squared distance of its values to the returns.
    value_clip: the value loss is at least that of values that moved by at most `value_clip` (PPO2); 0: no clip.
    """

    clip_low: float
    clip_high: float
    kl_coef: float
    importance_level: ImportanceLevel = "token"
    loss_agg: LossAgg = "token"
    length: int = 1
    dual_clip: float = 0.0
    kl: KLEstimator = "k3"
    entropy_coef: float = 0.0
    value_coef: float = 0.0
    value_clip: float = 0.0

    def __call__(self, scores: TokenScores, rows: Rows) -> LossSums:
        """Totals: kl, entropy (nats), clip_share, logp_diff_mean (policy and rows), value_loss. Maximum: logp_diff_max.

        Positions outside the mask may hold any values.
        """
        mask = rows.mask
        lengths = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)
        log_ratio = jnp.where(mask > 0, scores.logps - rows.logps, 0.0)
        sequence_log_ratio = jnp.sum(log_ratio, axis=1, keepdims=True) / lengths
        ratio = jnp.exp(log_ratio if self.importance_level == "token" else sequence_log_ratio)
        surrogate, clipped = self._surrogate(ratio, rows.advantages)
        per_token = -rows.weights * surrogate
        totals = {"entropy": scores.entropy, "clip_share": clipped, "logp_diff_mean": jnp.abs(log_ratio)}
        if self.kl != "none":
            totals["kl"] = kl_estimate(self.kl, jnp.where(mask > 0, rows.reference_logps - scores.logps, 0.0))
            per_token += self.kl_coef * totals["kl"]
        if self.entropy_coef:  # a factor of 0 would still cost the head a gradient
            per_token -= self.entropy_coef * scores.entropy
        if scores.values is not None:
            totals["value_loss"] = self._value_loss(jnp.where(mask > 0, scores.values, 0.0), rows)
            per_token += self.value_coef * totals["value_loss"]
        shares = mask / lengths if self.loss_agg == "sequence" else mask
        totals = {name: jnp.sum(mask * metric) for name, metric in totals.items()}
        return LossSums(jnp.sum(shares * per_token), totals, {"logp_diff_max": jnp.max(jnp.abs(log_ratio))})

    def _surrogate(self, ratio: jax.Array, advantages: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The objective per token, and whether the clip has changed it."""
        unclipped = ratio * advantages
        surrogate = jnp.minimum(unclipped, jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high) * advantages)
        if self.dual_clip:
            surrogate = jnp.where(advantages < 0, jnp.maximum(surrogate, self.dual_clip * advantages), surrogate)
        return surrogate, unclipped > surrogate

    def _value_loss(self, values: jax.Array, rows: Rows) -> jax.Array:
        squared = (values - rows.returns) ** 2
        if self.value_clip:
            clipped = rows.values + jnp.clip(values - rows.values, -self.value_clip, self.value_clip)
            squared = jnp.maximum(squared, (clipped - rows.returns) ** 2)
        return 0.5 * squared

    def divisor(self, tokens: jax.Array, rows: jax.Array) -> jax.Array:
        """The divisor of a batch's loss, at least 1; `tokens` tokens carry loss, and `rows` rows have such tokens."""
        if self.loss_agg == "token":
            return jnp.maximum(tokens, 1.0)
        rows = jnp.maximum(rows, 1.0)
        return rows if self.loss_agg == "sequence" else rows * self.length


@dataclasses.dataclass(frozen=True)
class SupervisedLoss:
    """Cross-entropy on the masked tokens, averaged over them."""

    def __call__(self, scores: TokenScores, rows: Rows) -> LossSums:
        """The loss, and the total of entropies (nats)."""
        return LossSums(-jnp.sum(rows.mask * scores.logps), {"entropy": jnp.sum(rows.mask * scores.entropy)}, {})

    def divisor(self, tokens: jax.Array, rows: jax.Array) -> jax.Array:
        """The number of loss tokens, at least 1."""
        return jnp.maximum(tokens, 1.0)


Loss = PolicyLoss | SupervisedLoss
