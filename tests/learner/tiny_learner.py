"""A small model, ragged batches behind a shared prefix, and log-probs by the plainest means."""

import jax
import jax.numpy as jnp
import numpy as np

from router_r1_jax.learner import PolicyLoss, Row, make_batch
from router_r1_jax.mesh import make_mesh
from router_r1_jax.model import ModelConfig, RouterLM, abstract_params

VOCABULARY = 48
# These programs run for milliseconds and compile for seconds: LLVM need not try hard.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
LOSS = PolicyLoss(clip_low=0.2, clip_high=0.28, kl_coef=0.1)


def make_config(**changes) -> ModelConfig:
    """Two layers of width 16."""
    fields = dict(num_layers=2, width=16, mlp=24, num_heads=4, num_kv_heads=2, head_dim=4) | changes
    return ModelConfig(vocab_size=VOCABULARY, **fields)


def make_params(config):
    """Random NumPy parameters, large enough that log-probs differ between tokens; no two scales are equal."""
    rng = np.random.default_rng(3)
    shapes = abstract_params(config, make_mesh(1, 1, 1, jax.devices()[:1]))

    def leaf(path, shape):
        centre, spread = (1.0, 0.1) if "scale" in str(path) else (0.0, 0.2)
        return (centre + spread * rng.normal(size=shape.shape)).astype(shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def make_rows_batch(rows=6, prefix=7, seed=0):
    """Ragged rows of a question, then sampled and injected tokens; the policy has moved since they were sampled."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        n = int(rng.integers(1, 24))
        mask = rng.random(n) > 0.3
        question = rng.integers(VOCABULARY, size=rng.integers(1, 7)).tolist()
        made.append(Row(question, rng.integers(VOCABULARY, size=n), mask, np.zeros(n), float(rng.normal())))
    return make_batch(rng.integers(VOCABULARY, size=prefix).tolist(), made)


def full_logprobs(config, params, batch, P, temperature=1.0):
    """Log-probs and entropies [B, T] from full logits, the P tokens of the prefix written out before each row."""
    T = batch.tokens.shape[1]
    whole = jnp.concatenate([jnp.tile(batch.prefix[:P], (len(batch.tokens), 1)), batch.tokens], axis=1)
    logits = RouterLM(config).apply({"params": params}, whole) / temperature
    logps = jax.nn.log_softmax(logits[:, P : P + T - 1], axis=-1)  # predict the row's tokens 1 .. T-1
    chosen = jnp.take_along_axis(logps, batch.tokens[:, 1:, None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(logps) * logps, axis=-1)
    return jnp.pad(chosen, ((0, 0), (1, 0))), jnp.pad(entropy, ((0, 0), (1, 0)))


_full_logprobs = jax.jit(full_logprobs, static_argnames=("config", "P"), compiler_options=QUICK_COMPILE)


def with_old_policies(config, params, batch, temperature=1.0, spread=0.3):
    """The batch with log-probs of a sampler and a reference that lie near those of `params`."""
    rng = np.random.default_rng(5)
    now = np.asarray(_full_logprobs(config, params, batch, int(batch.prefix_length), temperature)[0])
    near = [(now + spread * rng.normal(size=now.shape)).astype(np.float32) for _ in range(2)]
    return batch.replace(logps=near[0] * batch.mask, reference_logps=near[1])
