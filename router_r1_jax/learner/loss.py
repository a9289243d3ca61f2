"""The losses. Each returns sums over tokens, so that micro-batches add up exactly and are divided once.

A loss is a function of (logps, entropy, batch), arrays [B, T] of the current policy and the rows they belong to, and
returns (loss sum, metric sums). The divisor is the number of tokens that carry loss.
"""

import dataclasses

import jax
import jax.numpy as jnp

from router_r1_jax.learner.batch import Batch

Sums = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """GRPO's clipped surrogate with a KL penalty (DeepSeekMath, equation 3), averaged over sampled tokens.

    The ratio compares with the sampler's own log-probs. The KL to the reference is the k3 estimate
    exp(ref - new) - (ref - new) - 1, which is never negative.
    """

    clip_low: float
    clip_high: float
    kl_coef: float

    def __call__(self, logps: jax.Array, entropy: jax.Array, batch: Batch) -> tuple[jax.Array, Sums]:
        """Loss sum and the sums of: loss, kl (nats), entropy (nats), clipped tokens, |sampler - learner| log-prob."""
        moved = logps - batch.logps
        ratio = jnp.exp(jnp.where(batch.mask > 0, moved, 0.0))
        clipped = jnp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high)
        advantage = batch.advantages[:, None]
        surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
        apart = jnp.where(batch.mask > 0, batch.reference_logps - logps, 0.0)
        kl = jnp.exp(apart) - apart - 1
        loss = jnp.sum(batch.mask * (self.kl_coef * kl - surrogate))
        sums = {
            "loss": loss,
            "kl": jnp.sum(batch.mask * kl),
            "entropy": jnp.sum(batch.mask * entropy),
            "clip_share": jnp.sum(batch.mask * (ratio * advantage > clipped * advantage)),
            "logp_diff_mean": jnp.sum(batch.mask * jnp.abs(moved)),
        }
        return loss, sums


def supervised_loss(logps: jax.Array, entropy: jax.Array, batch: Batch) -> tuple[jax.Array, Sums]:
    """Cross-entropy on the masked tokens: loss sum and the sums of loss and entropy (nats)."""
    loss = -jnp.sum(batch.mask * logps)
    return loss, {"loss": loss, "entropy": jnp.sum(batch.mask * entropy)}
