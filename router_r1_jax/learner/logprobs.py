"""Log-probs in chunks: log-probs, entropies and values of given tokens, without ever holding logits [B, T, V].

The head runs over chunks of positions, with its gradient by hand. The backward pass recomputes a chunk's logits, and
their softmax from the normalisers that the forward pass kept, so that both passes hold one chunk's logits at a time.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from router_r1_jax.distributed.mesh import RULES
from router_r1_jax.learner.critic import CriticParams, critic_values
from router_r1_jax.learner.loss import TokenScores
from router_r1_jax.model import KV, ModelConfig, Params, Prefix, RouterLM
from router_r1_jax.model.transformer import head_logits, weight_gradient

# The prefix is one row, which cannot be split over devices, so each device repeats the work. A split would be padded
# with uninitialised memory, which can put NaN into the gradient of the embedding.
PREFIX_RULES = tuple((dict(RULES) | {"batch": None}).items())


def prefix_kv(config: ModelConfig, params: Params, prefix: jax.Array) -> KV:
    """Keys and values [L, P, K, H] of the shared prefix [P]. Attention ignores the padding behind its length."""
    with nn.logical_axis_rules(PREFIX_RULES):
        _, kv = RouterLM(config).apply({"params": params}, prefix[None], method=RouterLM.hidden)
    return jax.tree.map(lambda x: x[:, 0], kv)


def score_rows(
    config: ModelConfig,
    params: Params,
    prefix: Prefix,
    tokens: jax.Array,
    *,
    chunk: int,
    temperature: float,
    critic: CriticParams | None = None,
) -> TokenScores:
    """Log-prob, entropy (nats) and, with a critic, value of tokens [B, T], each given all before it; float32 at least.

    Logits are divided by `temperature`, that of the sampler, so that the log-probs can be compared. Index 0 is 0: only
    the prefix predicts it, and no loss falls on it, because a row begins with its question. The last token predicts
    nothing and is not read.
    """
    model = RouterLM(config)
    hidden, _ = model.apply({"params": params}, tokens[:, :-1], prefix=prefix, method=RouterLM.hidden)
    logps, entropy = _score_targets(config, params, hidden, tokens[:, 1:], chunk, temperature)
    values = None if critic is None else critic_values(critic, hidden)
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (1, 0))), TokenScores(logps, entropy, values))


def _score_targets(
    config: ModelConfig, params: Params, hidden: jax.Array, targets: jax.Array, chunk: int, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Log-prob and entropy [B, T] of targets [B, T] after hidden states [B, T, D], `chunk` positions at a time."""
    B, T, D = hidden.shape
    n = -(-T // chunk)
    pad = n * chunk - T
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(B, n, chunk, D).swapaxes(0, 1)
    targets = jnp.pad(targets, ((0, 0), (0, pad))).reshape(B, n, chunk).swapaxes(0, 1)
    head = params["embed" if config.tie_embeddings else "head"]
    scores = _score_chunks(temperature, hidden.reshape(n, B * chunk, D), head, targets.reshape(n, B * chunk))
    return tuple(x.reshape(n, B, chunk).swapaxes(0, 1).reshape(B, n * chunk)[:, :T] for x in scores)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score_chunks(
    temperature: float, hidden: jax.Array, head: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies [n, M], float32, of targets [n, M] by hidden [n, M, D] and head [V, D]; n chunks."""
    return _score_forward(temperature, hidden, head, targets)[0]


def _score_forward(temperature: float, hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[Any, Any]:
    def score_chunk(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        hidden, targets = xs
        logits = head_logits(hidden, head) / temperature
        norm = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        mean = jnp.sum(jnp.exp(logits - norm[:, None]) * logits, axis=-1)
        return chosen - norm, norm - mean, norm

    logps, entropy, norm = jax.lax.map(score_chunk, (hidden, targets))
    return (logps, entropy), (hidden, head, targets, norm, entropy)


def _score_backward(temperature: float, saved: Any, grads: Any) -> tuple[jax.Array, jax.Array, None]:
    hidden, head, targets, norm, entropy = saved

    def chunk_gradients(grad_head: jax.Array, xs: Any) -> tuple[jax.Array, jax.Array]:
        hidden, targets, norm, entropy, *grads = xs
        grad_logp, grad_entropy = (x[:, None] for x in grads)
        # d logp / d logit is [it is the target] - p, and d entropy / d logit is -p (log p + entropy).
        logps = head_logits(hidden, head) / temperature - norm[:, None]
        chosen = jnp.arange(head.shape[0]) == targets[:, None]
        common = jnp.exp(logps) * (grad_logp + grad_entropy * (logps + entropy[:, None]))
        grad_logits = ((jnp.where(chosen, grad_logp, 0) - common) / temperature).astype(head.dtype)
        return grad_head + weight_gradient(hidden, grad_logits), grad_logits @ head

    # The sum has the products' layout [D, V] and is transposed once.
    grad_head, grad_hidden = jax.lax.scan(
        chunk_gradients, jnp.zeros(head.shape[::-1], head.dtype), (hidden, targets, norm, entropy, *grads)
    )
    return grad_hidden, grad_head.T, None


_score_chunks.defvjp(_score_forward, _score_backward)
