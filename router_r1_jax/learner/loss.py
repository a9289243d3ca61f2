"""The losses. Each returns sums over tokens, so that micro-batches add up exactly and are divided once.

A loss is called with (logps, entropy, batch), arrays [B, T] of the current policy and the rows they belong to, and
returns (loss sum, metric sums). Its `divisor`, of the whole batch's mask, makes the sum the mean that it stands for;
metrics are means over the tokens that carry loss.
"""

import dataclasses
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from router_r1_jax.learner.batch import Batch

Sums = dict[str, jax.Array]
RatioOf = Literal["token", "sequence"]
MeanOver = Literal["token", "sequence", "constant"]
KLEstimate = Literal["k1", "k2", "k3"]


class Loss(Protocol):
    """What the learner minimises."""

    def __call__(self, logps: jax.Array, entropy: jax.Array, batch: Batch) -> tuple[jax.Array, Sums]:
        """Loss sum and metric sums of some rows of a batch."""
        ...

    def divisor(self, mask: jax.Array) -> jax.Array:
        """What the sums over a whole batch, mask [B, T], are divided by; at least 1."""
        ...


def count_tokens(mask: jax.Array) -> jax.Array:
    """Tokens that carry loss, at least 1."""
    return jnp.maximum(jnp.sum(mask), 1.0)


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """The clipped surrogate of PPO and its kin, with a KL penalty; `config.LOSSES` names the published choices.

    ratio: between this policy and the sampler's own log-probs: of each "token" (GRPO; DeepSeekMath, equation 3), or one
      for the "sequence", the geometric mean over its tokens (GSPO, equation 7).
    mean_over: all loss tokens alike ("token", DAPO), first within each row ("sequence", GRPO), or the sum over a row
      over the "constant" `length` whatever the row's own (Dr. GRPO). A mean over rows takes those with loss tokens.
    clip_low, clip_high: the ratio is cut outside [1 - clip_low, 1 + clip_high].
    dual_clip: where the advantage is negative, its product with the ratio goes no lower than `dual_clip` times it
      (dual-clip PPO); 0: no bound.
    kl: estimate of the KL to the reference: "k1" new - ref, "k2" half its square, "k3"
      exp(ref - new) - 1 - (ref - new), which is never negative. As a loss the gradient of k1 has
      mean zero, those of k2 and k3 bind.
    """

    clip_low: float
    clip_high: float
    kl_coef: float
    ratio: RatioOf = "token"
    mean_over: MeanOver = "token"
    length: int = 1
    dual_clip: float = 0.0
    kl: KLEstimate = "k3"

    def __call__(self, logps: jax.Array, entropy: jax.Array, batch: Batch) -> tuple[jax.Array, Sums]:
        """Loss sum and the sums of: kl (nats), entropy (nats), clipped tokens, |sampler - learner| log-prob."""
        mask = batch.mask
        lengths = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)
        apart = jnp.where(mask > 0, logps - batch.logps, 0.0)
        moved = apart if self.ratio == "token" else jnp.sum(apart, axis=1, keepdims=True) / lengths
        ratio = jnp.exp(moved)
        advantage = batch.advantages[:, None]
        free, cut = ratio * advantage, jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high) * advantage
        surrogate = jnp.minimum(free, cut)
        if self.dual_clip:
            surrogate = jnp.where(advantage < 0, jnp.maximum(surrogate, self.dual_clip * advantage), surrogate)
        kl = self._kl(jnp.where(mask > 0, batch.reference_logps - logps, 0.0))
        weights = mask / lengths if self.mean_over == "sequence" else mask
        loss = jnp.sum(weights * (self.kl_coef * kl - surrogate))
        sums = {
            "kl": jnp.sum(mask * kl),
            "entropy": jnp.sum(mask * entropy),
            "clip_share": jnp.sum(mask * (free > surrogate)),
            "logp_diff_mean": jnp.sum(mask * jnp.abs(apart)),
        }
        return loss, sums

    def _kl(self, apart: jax.Array) -> jax.Array:
        """Of ref - new, per token."""
        if self.kl == "k1":
            return -apart
        return 0.5 * apart * apart if self.kl == "k2" else jnp.exp(apart) - apart - 1

    def divisor(self, mask: jax.Array) -> jax.Array:
        """Loss tokens, rows, or rows x length."""
        if self.mean_over == "token":
            return count_tokens(mask)
        rows = count_tokens(jnp.max(mask, axis=1))
        return rows if self.mean_over == "sequence" else rows * self.length


@dataclasses.dataclass(frozen=True)
class SupervisedLoss:
    """Cross-entropy on the masked tokens, averaged over them."""

    def __call__(self, logps: jax.Array, entropy: jax.Array, batch: Batch) -> tuple[jax.Array, Sums]:
        """Loss sum and the sum of entropies (nats)."""
        return -jnp.sum(batch.mask * logps), {"entropy": jnp.sum(batch.mask * entropy)}

    def divisor(self, mask: jax.Array) -> jax.Array:
        """Loss tokens."""
        return count_tokens(mask)
