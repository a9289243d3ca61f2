"""RouterDC: a query encoder and one embedding per model, learned by two contrastive losses (arXiv 2409.19886).

The score of a model is the cosine of query and model embedding. The sample-model loss pulls a query to the models that
answered it best and pushes it away from those that failed. The sample-sample loss pulls queries of one cluster
together, which keeps the encoder's training stable. Here the encoder is a two-layer net over TF-IDF vectors instead of
a pre-trained language model.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from router_r1_jax.baselines.base import Example, UtilityBaseline, utilities
from router_r1_jax.baselines.optimize import minimize

TEMPERATURE = 0.1  # of the cosines in both losses
TOP = 3  # at most so many models attract a query
STEPS, BATCH = 300, 64
CLUSTERS, CLUSTER_WEIGHT = 8, 0.3  # of the sample-sample loss


class QueryEncoder(nn.Module):
    """Question features [B, F] -> unit embeddings [B, D]."""

    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """See the class."""
        x = nn.Dense(self.width)(nn.relu(nn.Dense(self.width)(x)))
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def sample_model_loss(cosines: jax.Array, utility: jax.Array) -> jax.Array:
    """Mean over queries and their best models of -log p(model | model and all that failed). Both arrays are [B, M]."""
    logits = cosines / TEMPERATURE
    best = jax.lax.top_k(utility, min(TOP, utility.shape[1]))[0][:, -1:]
    good = (utility >= best) & (utility > 0)
    failed = jnp.sum(jnp.where(utility > 0, 0.0, jnp.exp(logits)), axis=1, keepdims=True)
    losses = jnp.log(jnp.exp(logits) + failed) - logits
    return jnp.sum(jnp.where(good, losses * utility, 0.0)) / jnp.maximum(jnp.sum(good * utility), 1e-6)


def sample_sample_loss(queries: jax.Array, cluster: jax.Array) -> jax.Array:
    """Mean over pairs of a cluster of -log p(the other | it and all of other clusters).

    queries: [B, D] unit vectors; cluster: [B] int.
    """
    logits = queries @ queries.T / TEMPERATURE
    same = cluster[:, None] == cluster[None, :]
    pairs = same & ~jnp.eye(len(queries), dtype=bool)
    others = jnp.sum(jnp.where(same, 0.0, jnp.exp(logits)), axis=1, keepdims=True)
    losses = jnp.log(jnp.exp(logits) + others) - logits
    return jnp.sum(jnp.where(pairs, losses, 0.0)) / jnp.maximum(jnp.sum(pairs), 1)


class RouterDC(UtilityBaseline):
    """The baseline: STEPS Adam updates on random batches."""

    def _learn(self, features: np.ndarray, examples: Sequence[Example]) -> None:
        from sklearn.cluster import KMeans

        clusters = KMeans(min(CLUSTERS, len(features)), n_init=1, random_state=self._seed)
        x, cluster = jnp.asarray(features), jnp.asarray(clusters.fit_predict(features))
        utility = jnp.asarray(utilities(examples, self._alpha), jnp.float32)
        init_key, update_key = jax.random.split(jax.random.key(self._seed))
        encoder_key, models_key = jax.random.split(init_key)
        encoder = QueryEncoder()
        params = {
            "encoder": encoder.init(encoder_key, x[:1]),
            "models": jax.random.normal(models_key, (utility.shape[1], encoder.width)),
        }

        def loss(params: Any, key: jax.Array) -> jax.Array:
            rows = jax.random.randint(key, (BATCH,), 0, len(x))
            clustering = sample_sample_loss(encoder.apply(params["encoder"], x[rows]), cluster[rows])
            return sample_model_loss(_cosines(params, x[rows]), utility[rows]) + CLUSTER_WEIGHT * clustering

        self._params = minimize(loss, params, optax.adam(3e-3), update_key, STEPS)

    def _predict(self, features: np.ndarray) -> np.ndarray:
        return np.asarray(_cosines(self._params, features))


@jax.jit
def _cosines(params: Any, x: jax.Array) -> jax.Array:
    """Cosine of each query with each model, [B, M]."""
    models = params["models"] / jnp.linalg.norm(params["models"], axis=-1, keepdims=True)
    return QueryEncoder().apply(params["encoder"], x) @ models.T
