"""RouterDC: a query encoder and an embedding per model, learnt by two contrastive losses (arXiv 2409.19886).

Cosine of query and model embedding is the score. The sample-model loss draws a query to the models that answered it
best and away from those that failed; the sample-sample loss draws queries of one cluster together, which keeps the
encoder's training stable. Here the encoder is a two-layer net over TF-IDF vectors in place of a pre-trained one.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from router_r1_jax.baselines.features import WordFeatures, scikit_learn
from router_r1_jax.baselines.interface import ScoringBaseline, TrainRecord, instructive, known_keys, utilities

TEMPERATURE = 0.1  # of the cosines in both losses
TOP = 3  # models drawn to a query, where as many answered it
STEPS, BATCH = 300, 64


class QueryEncoder(nn.Module):
    """Question features [B, F] -> unit embeddings [B, D]."""

    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """See the class."""
        x = nn.Dense(self.width)(nn.relu(nn.Dense(self.width)(x)))
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def sample_model_loss(cosines: jax.Array, worth: jax.Array) -> jax.Array:
    """Mean over queries and their best models of -log p(model | model and all that failed). cosines, worth: [B, M]."""
    logits = cosines / TEMPERATURE
    best = jax.lax.top_k(worth, min(TOP, worth.shape[1]))[0][:, -1:]
    good = (worth >= best) & (worth > 0)
    failed = jnp.sum(jnp.where(worth > 0, 0.0, jnp.exp(logits)), axis=1, keepdims=True)
    losses = jnp.log(jnp.exp(logits) + failed) - logits
    return jnp.sum(jnp.where(good, losses * worth, 0.0)) / jnp.maximum(jnp.sum(good * worth), 1e-6)


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


class RouterDC(ScoringBaseline):
    """The baseline. `alpha` weighs cost in a model's worth; `clustering` weighs the sample-sample loss."""

    def __init__(self, alpha: float, seed: int, *, clustering: float = 0.3, clusters: int = 8) -> None:
        self._alpha, self._seed, self._clustering, self._clusters = alpha, seed, clustering, clusters

    def fit(self, records: Sequence[TrainRecord]) -> None:
        """STEPS Adam updates on random batches."""
        scikit_learn()
        from sklearn.cluster import KMeans

        records = instructive(records)
        self._keys = known_keys(records)
        texts = [record.question for record in records]
        self._features = WordFeatures().fit(texts)
        x, worth = self._features(texts), utilities(records, self._keys, self._alpha).astype(np.float32)
        cluster = KMeans(min(self._clusters, len(texts)), n_init=1, random_state=self._seed).fit_predict(x)
        self._params = self._learn(x, worth, cluster)
        self._score = jax.jit(_cosines)

    def _learn(self, x: np.ndarray, worth: np.ndarray, cluster: np.ndarray) -> Any:
        start, draws = jax.random.split(jax.random.key(self._seed))
        one, two = jax.random.split(start)
        encoder = QueryEncoder()
        params = {
            "encoder": encoder.init(one, x[:1]),
            "models": jax.random.normal(two, (worth.shape[1], encoder.width)),
        }
        optimizer = optax.adam(3e-3)
        x, worth, cluster = jnp.asarray(x), jnp.asarray(worth), jnp.asarray(cluster)

        def loss(params: Any, rows: jax.Array) -> jax.Array:
            queries = encoder.apply(params["encoder"], x[rows])
            pull = sample_sample_loss(queries, cluster[rows])
            return sample_model_loss(_cosines(params, x[rows]), worth[rows]) + self._clustering * pull

        def update(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            rows = jax.random.randint(key, (BATCH,), 0, len(x))
            updates, state = optimizer.update(jax.grad(loss)(params, rows), state)
            return (optax.apply_updates(params, updates), state), None

        @partial(jax.jit, donate_argnums=0)
        def learn(carry: Any) -> Any:
            return jax.lax.scan(update, carry, jax.random.split(draws, STEPS))[0]

        return learn((params, optimizer.init(params)))[0]

    def _predict(self, question: str) -> np.ndarray:
        return np.asarray(self._score(self._params, self._features([question])))[0]


def _cosines(params: Any, x: jax.Array) -> jax.Array:
    """Cosine of each query with each model, [B, M]."""
    models = params["models"] / jnp.linalg.norm(params["models"], axis=-1, keepdims=True)
    return QueryEncoder().apply(params["encoder"], x) @ models.T
