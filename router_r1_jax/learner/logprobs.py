"""What a model says of given tokens: log-probs, entropies, values, without ever holding logits [B, T, V].

The head runs over chunks of positions, with its gradient by hand: backward makes a chunk's logits anew and reads their
softmax off the sums that forward kept, so that each of the two holds one chunk's logits at a time.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from router_r1_jax.learner.critic import CriticParams, values_of
from router_r1_jax.learner.loss import Reading
from router_r1_jax.mesh import RULES
from router_r1_jax.model import KV, ModelConfig, Params, Prefix, RouterLM, head_logits, weight_gradient

# The prefix is one row, which cannot be split over devices: each repeats the work. A split would be padded with
# whatever memory holds, and in the gradient of the embedding that has been NaN.
PREFIX_RULES = tuple((dict(RULES) | {"batch": None}).items())


def prefix_kv(config: ModelConfig, params: Params, prefix: jax.Array) -> KV:
    """Keys and values [L, P, K, H] of the shared prefix [P]; padding behind its length is masked by its readers."""
    with nn.logical_axis_rules(PREFIX_RULES):
        _, kv = RouterLM(config).apply({"params": params}, prefix[None], method=RouterLM.hidden)
    return jax.tree.map(lambda x: x[:, 0], kv)


def read_rows(
    config: ModelConfig,
    params: Params,
    prefix: Prefix,
    tokens: jax.Array,
    *,
    chunk: int,
    temperature: float,
    critic: CriticParams | None = None,
) -> Reading:
    """Log-prob, entropy (nats) and, with a critic, value of each of tokens [B, T] given all before it; float32 or more.

    Logits are divided by `temperature` (that of the sampler), so that ratios compare like with like. Index 0, which
    only the prefix predicts, is 0: a row begins with its question, and no loss falls there. The last token predicts
    nothing and is not read.
    """
    model = RouterLM(config)
    hidden, _ = model.apply({"params": params}, tokens[:, :-1], prefix=prefix, method=RouterLM.hidden)
    logps, entropy = _head(config, params, hidden, tokens[:, 1:], chunk, temperature)
    values = None if critic is None else _behind_first(values_of(critic, hidden))
    return Reading(_behind_first(logps), _behind_first(entropy), values)


def _behind_first(x: jax.Array) -> jax.Array:
    """[B, T - 1] -> [B, T]: what the state before a token says stands at the token."""
    return jnp.pad(x, ((0, 0), (1, 0)))


def _head(
    config: ModelConfig, params: Params, hidden: jax.Array, targets: jax.Array, chunk: int, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Log-prob and entropy [B, T] of targets [B, T] after hidden states [B, T, D], `chunk` positions at a time."""
    B, T, D = hidden.shape
    n = -(-T // chunk)
    pad = n * chunk - T
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(B, n, chunk, D).swapaxes(0, 1)
    targets = jnp.pad(targets, ((0, 0), (0, pad))).reshape(B, n, chunk).swapaxes(0, 1)
    head = params["embed" if config.tie_embeddings else "head"]
    values = _chunks(temperature, hidden.reshape(n, B * chunk, D), head, targets.reshape(n, B * chunk))
    return tuple(x.reshape(n, B, chunk).swapaxes(0, 1).reshape(B, n * chunk)[:, :T] for x in values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunks(temperature: float, hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies [n, M], float32, of targets [n, M] by hidden [n, M, D] and head [V, D]; n chunks."""
    return _chunks_forward(temperature, hidden, head, targets)[0]


def _chunks_forward(temperature: float, hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[Any, Any]:
    def chunk(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        hidden, targets = xs
        logits = head_logits(hidden, head) / temperature
        norm = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        mean = jnp.sum(jnp.exp(logits - norm[:, None]) * logits, axis=-1)
        return chosen - norm, norm - mean, norm

    logps, entropy, norm = jax.lax.map(chunk, (hidden, targets))
    return (logps, entropy), (hidden, head, targets, norm, entropy)


def _chunks_backward(temperature: float, saved: Any, cotangents: Any) -> tuple[jax.Array, jax.Array, None]:
    hidden, head, targets, norm, entropy = saved

    def chunk(of_head: jax.Array, xs: Any) -> tuple[jax.Array, jax.Array]:
        hidden, targets, norm, entropy, *of_values = xs
        of_logp, of_entropy = (x[:, None] for x in of_values)
        # d logp / d logit is [it is the target] - p, and d entropy / d logit is -p (log p + entropy).
        logps = head_logits(hidden, head) / temperature - norm[:, None]
        chosen = jnp.arange(head.shape[0]) == targets[:, None]
        falls = jnp.exp(logps) * (of_logp + of_entropy * (logps + entropy[:, None]))
        of_logits = ((jnp.where(chosen, of_logp, 0) - falls) / temperature).astype(head.dtype)
        return of_head + weight_gradient(hidden, of_logits), of_logits @ head

    # Summed as [D, V], as the products lie, and turned once.
    of_head, of_hidden = jax.lax.scan(
        chunk, jnp.zeros(head.shape[::-1], head.dtype), (hidden, targets, norm, entropy, *cotangents)
    )
    return of_hidden, of_head.T, None


_chunks.defvjp(_chunks_forward, _chunks_backward)
