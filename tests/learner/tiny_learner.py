"""A small model, ragged batches behind a shared prefix, and log-probs by the plainest means."""

import jax
import jax.numpy as jnp
import numpy as np

from router_r1_jax.distributed.mesh import make_mesh
from router_r1_jax.learner import PolicyLoss, Row, TokenScores, make_batch, make_layout
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


def make_rows(rows=6, prefix=7, seed=0):
    """A prefix, and ragged rows of a question, then sampled and injected tokens."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        n = int(rng.integers(1, 24))
        question = rng.integers(VOCABULARY, size=rng.integers(1, 7)).tolist()
        mask = (rng.random(n) > 0.3).astype(float)
        made.append(Row(question, rng.integers(VOCABULARY, size=n), mask, advantages=float(rng.normal())))
    return rng.integers(VOCABULARY, size=prefix).tolist(), made


def together(rows):
    """All rows as one micro-batch."""
    layout = make_layout(max(row.length for row in rows), buckets=1, tokens=10**6, rows=len(rows))
    [bucket] = make_batch([], rows, layout).buckets
    order = np.argsort([row.length for row in rows], kind="stable")
    return jax.tree.map(lambda x: x[0][np.argsort(order)], bucket.rows)


def full_scores(config, params, prefix, tokens, temperature=1.0, critic=None):
    """Log-probs, entropies and values [B, T] of tokens from full logits, the prefix written out before each row."""
    P, T = len(prefix), tokens.shape[1]
    whole = jnp.concatenate([jnp.tile(jnp.array(prefix, int), (len(tokens), 1)), tokens], axis=1)
    model = RouterLM(config)
    hidden, _ = model.apply({"params": params}, whole, method=RouterLM.hidden)
    hidden = hidden[:, P : P + T - 1]  # predicts the row's tokens 1 .. T-1
    logps = jax.nn.log_softmax(model.apply({"params": params}, hidden, method=RouterLM.logits) / temperature, axis=-1)
    chosen = jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(logps) * logps, axis=-1)
    values = None if critic is None else hidden @ critic["kernel"] + critic["bias"]
    return TokenScores(*(None if x is None else jnp.pad(x, ((0, 0), (1, 0))) for x in (chosen, entropy, values)))


_full_scores = jax.jit(full_scores, static_argnames=("config",), compiler_options=QUICK_COMPILE)


def with_old_policies(config, params, prefix, rows, temperature=1.0, spread=0.3):
    """The rows with log-probs of a sampler and a reference that lie near those of `params`."""
    rng = np.random.default_rng(5)
    now = np.asarray(_full_scores(config, params, prefix, together(rows).tokens, temperature).logps)
    near = [now + spread * rng.normal(size=now.shape) for _ in range(2)]
    made = []
    for i, row in enumerate(rows):
        own = slice(len(row.prompt), row.length)
        made.append(row._replace(logps=near[0][i, own] * row.mask, reference_logps=near[1][i, own]))
    return made
