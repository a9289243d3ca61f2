"""The losses. Each returns sums over tokens, so that micro-batches add up exactly and are divided once.

A loss is called with what the current policy says of some rows, arrays [m, T], and the rows. Its `divisor` makes the
sum over the whole batch the mean that it stands for; metrics are means, or maxima, over the tokens that carry loss.
"""

import dataclasses
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from router_r1_jax.learner.batch import Rows

Figures = dict[str, jax.Array]
RatioOf = Literal["token", "sequence"]
MeanOver = Literal["token", "sequence", "constant"]
KLEstimate = Literal["k1", "k2", "k3", "none"]


class Reading(NamedTuple):
    """What a model says of rows' tokens [m, T], each given all before it; values only where there is a critic."""

    logps: jax.Array
    entropy: jax.Array
    values: jax.Array | None = None


class Sums(NamedTuple):
    """Of some rows: the loss, metrics summed over tokens that carry loss, and metrics of which the maximum counts."""

    loss: jax.Array
    totals: Figures
    peaks: Figures


class Loss(Protocol):
    """What the learner minimises."""

    def __call__(self, now: Reading, rows: Rows) -> Sums:
        """Sums over some rows of a batch."""
        ...

    def divisor(self, tokens: jax.Array, rows: jax.Array) -> jax.Array:
        """What the loss of a whole batch is divided by, at least 1; `tokens` carry loss, `rows` have such tokens."""
        ...


def kl_estimate(kind: KLEstimate, apart: jax.Array) -> jax.Array:
    """Per token, of apart = reference - policy log-prob where the policy sampled (Schulman 2020).

    "k1" -apart is unbiased; "k2" half the square; "k3" exp(apart) - 1 - apart is unbiased and never negative. In a loss
    the gradient of k1 has mean zero, those of k2 and k3 bind; in a reward k1 is usual.
    """
    if kind == "k1":
        return -apart
    return 0.5 * apart * apart if kind == "k2" else jnp.exp(apart) - apart - 1


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """The clipped surrogate of PPO and its kin, with a KL penalty; `config.LOSSES` names the published choices.

    ratio: between this policy and the rows' own log-probs: of each "token" (GRPO; DeepSeekMath, equation 3), or one
      for the "sequence", the geometric mean over its tokens (GSPO, equation 7).
    mean_over: all loss tokens alike ("token", DAPO), first within each row ("sequence", GRPO), or the sum over a row
      over the "constant" `length` whatever the row's own (Dr. GRPO). A mean over rows takes those with loss tokens.
    clip_low, clip_high: the ratio is cut outside [1 - clip_low, 1 + clip_high].
    dual_clip: where the advantage is negative, its product with the ratio goes no lower than `dual_clip` times it
      (dual-clip PPO); 0: no bound.
    kl, kl_coef: `kl_estimate` of the KL to the reference, and its factor in the loss; "none": there is no reference.
    entropy_coef: factor of the policy's entropy, which is to stay high.
    value_coef: factor of the critic's loss, where there is one: half the squared distance of its values to the returns,
      or to them from values that moved by more than `value_clip`, whichever is larger (PPO2); 0: no clip.
    """

    clip_low: float
    clip_high: float
    kl_coef: float
    ratio: RatioOf = "token"
    mean_over: MeanOver = "token"
    length: int = 1
    dual_clip: float = 0.0
    kl: KLEstimate = "k3"
    entropy_coef: float = 0.0
    value_coef: float = 0.0
    value_clip: float = 0.0

    def __call__(self, now: Reading, rows: Rows) -> Sums:
        """Totals: kl, entropy (nats), clip_share, logp_diff_mean (policy and rows), value_loss; peak: logp_diff_max."""
        mask = rows.mask
        lengths = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)
        apart = jnp.where(mask > 0, now.logps - rows.logps, 0.0)
        surrogate, clipped = self._surrogate(apart, jnp.sum(apart, axis=1, keepdims=True) / lengths, rows.advantages)
        per_token = -rows.weights * surrogate
        totals = {"entropy": now.entropy, "clip_share": clipped, "logp_diff_mean": jnp.abs(apart)}
        if self.kl != "none":
            totals["kl"] = kl_estimate(self.kl, jnp.where(mask > 0, rows.reference_logps - now.logps, 0.0))
            per_token += self.kl_coef * totals["kl"]
        if self.entropy_coef:  # a factor of 0 would still cost the head a gradient
            per_token -= self.entropy_coef * now.entropy
        if now.values is not None:
            totals["value_loss"] = self._value_loss(jnp.where(mask > 0, now.values, 0.0), rows)
            per_token += self.value_coef * totals["value_loss"]
        shares = mask / lengths if self.mean_over == "sequence" else mask
        totals = {name: jnp.sum(mask * figure) for name, figure in totals.items()}
        return Sums(jnp.sum(shares * per_token), totals, {"logp_diff_max": jnp.max(jnp.abs(apart))})

    def _surrogate(self, apart: jax.Array, mean_apart: jax.Array, advantages: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The objective per token, and where the clip has cut it."""
        ratio = jnp.exp(apart if self.ratio == "token" else mean_apart)
        free = ratio * advantages
        surrogate = jnp.minimum(free, jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high) * advantages)
        if self.dual_clip:
            surrogate = jnp.where(advantages < 0, jnp.maximum(surrogate, self.dual_clip * advantages), surrogate)
        return surrogate, free > surrogate

    def _value_loss(self, values: jax.Array, rows: Rows) -> jax.Array:
        squared = (values - rows.returns) ** 2
        if self.value_clip:
            near = rows.values + jnp.clip(values - rows.values, -self.value_clip, self.value_clip)
            squared = jnp.maximum(squared, (near - rows.returns) ** 2)
        return 0.5 * squared

    def divisor(self, tokens: jax.Array, rows: jax.Array) -> jax.Array:
        """Loss tokens, rows, or rows x length."""
        if self.mean_over == "token":
            return jnp.maximum(tokens, 1.0)
        rows = jnp.maximum(rows, 1.0)
        return rows if self.mean_over == "sequence" else rows * self.length


@dataclasses.dataclass(frozen=True)
class SupervisedLoss:
    """Cross-entropy on the masked tokens, averaged over them."""

    def __call__(self, now: Reading, rows: Rows) -> Sums:
        """The loss and the sum of entropies (nats)."""
        return Sums(-jnp.sum(rows.mask * now.logps), {"entropy": jnp.sum(rows.mask * now.entropy)}, {})

    def divisor(self, tokens: jax.Array, rows: jax.Array) -> jax.Array:
        """Loss tokens."""
        return jnp.maximum(tokens, 1.0)
