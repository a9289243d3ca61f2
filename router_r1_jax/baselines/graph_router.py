"""GraphRouter (arXiv 2410.03834): a graph network over task, query and model nodes that predicts a model's utility.

Query-model edges carry what is known of an answer: right or wrong, and its cost. Query-task edges say which task a
query belongs to. Tasks are not given here; they are clusters of the questions' words. In each update a random part of
the queries hides its edges and is predicted from the rest. A new question is one more query with hidden edges.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from router_r1_jax.baselines.base import TIE, Example, UtilityBaseline, exact_matches, raw_costs, utilities
from router_r1_jax.baselines.optimize import minimize
from router_r1_jax.pool.cards import Card
from router_r1_jax.reward import cost_bounds, normalize_costs

TASKS = 8  # clusters of the questions
STEPS, HIDDEN_SHARE = 200, 0.3
WIDTH, ROUNDS = 32, 2  # of the messages in GraphNet


@flax.struct.dataclass
class Graph:
    """Q queries, T tasks and M models; all arrays float32."""

    queries: jax.Array  # [Q, F] question features
    tasks: jax.Array  # [T, F] cluster centres
    models: jax.Array  # [M, C] card features
    member: jax.Array  # [Q, T] 1 if the query belongs to the task
    edges: jax.Array  # [Q, M, 2] exact match and cost component of an answer
    visible: jax.Array  # [Q, M] 1 if the edge is known


class GraphNet(nn.Module):
    """Rounds of messages along the edges, then a score for every query-model pair."""

    @nn.compact
    def __call__(self, graph: Graph) -> jax.Array:
        """Logits [Q, M] of a model's utility for a query."""

        def dense(x: jax.Array) -> jax.Array:
            return nn.Dense(WIDTH)(x)

        q, t, m = nn.relu(dense(graph.queries)), nn.relu(dense(graph.tasks)), nn.relu(dense(graph.models))
        seen = graph.visible[..., None]
        per_model, per_query = jnp.maximum(seen.sum(0), 1.0), jnp.maximum(seen.sum(1), 1.0)  # [M, 1], [Q, 1]
        per_task = jnp.maximum(graph.member.sum(0), 1.0)[:, None]
        for _ in range(ROUNDS):
            to_model = jnp.einsum("QD,QMD->MD", dense(q), dense(graph.edges) * seen) / per_model
            to_query = jnp.einsum("MD,QMD->QD", dense(m), dense(graph.edges) * seen) / per_query
            to_task = graph.member.T @ dense(q) / per_task
            from_task = graph.member @ dense(t)
            q = q + nn.relu(dense(q) + to_query + from_task)
            m = m + nn.relu(dense(m) + to_model)
            t = t + nn.relu(dense(t) + to_task)
        return dense(q + graph.member @ t) @ dense(m).T / np.sqrt(WIDTH)


class GraphRouter(UtilityBaseline):
    """The baseline: STEPS updates; in each, other queries hide their edges."""

    def __init__(self, cards: Sequence[Card], alpha: float, seed: int) -> None:
        """`cards` are the models of the examples, in the same order."""
        super().__init__(alpha, seed)
        self._cards = cards

    def _learn(self, features: np.ndarray, examples: Sequence[Example]) -> None:
        from sklearn.cluster import KMeans

        self._x = features
        self._clusters = KMeans(min(TASKS, len(features)), n_init=1, random_state=self._seed).fit(features)
        costs = raw_costs(examples)
        components = normalize_costs(costs, *cost_bounds(costs))
        self._edges = np.stack([exact_matches(examples), components], axis=-1)
        self._utility = utilities(examples, self._alpha) / (1 + TIE)  # in [0, 1], as targets of a sigmoid
        graph = jax.tree.map(jnp.asarray, self._graph(features[:0], range(len(self._keys))))
        net = GraphNet()
        utility = jnp.asarray(self._utility)
        init_key, update_key = jax.random.split(jax.random.key(self._seed))
        self._score = jax.jit(net.apply)

        def loss(params: Any, key: jax.Array) -> jax.Array:
            hidden = jax.random.uniform(key, (len(utility),)) < HIDDEN_SHARE
            logits = net.apply(params, graph.replace(visible=graph.visible * ~hidden[:, None]))
            losses = optax.sigmoid_binary_cross_entropy(logits, utility)
            return jnp.sum(losses * hidden[:, None]) / jnp.maximum(jnp.sum(hidden) * losses.shape[1], 1)

        optimizer = optax.adamw(3e-3, weight_decay=1e-3)
        self._params = minimize(loss, net.init(init_key, graph), optimizer, update_key, STEPS)

    def _predict(self, features: np.ndarray) -> np.ndarray:
        """New questions of one call share the task nodes, so their logits depend on each other."""
        order = np.argsort(self._keys)  # in another order, sums over models would be rounded in another way
        logits = np.asarray(self._score(self._params, self._graph(features, order)))[-len(features) :]
        return logits[:, np.argsort(order)]

    def _graph(self, new: np.ndarray, order: Sequence[int]) -> Graph:
        """The train questions, and behind them new questions with hidden edges; model nodes in this order."""
        x = np.concatenate([self._x, new])
        member = np.eye(self._clusters.n_clusters)[self._clusters.predict(x)]
        edges, visible = np.zeros((len(x), len(order), 2)), np.zeros((len(x), len(order)))
        edges[: len(self._x)], visible[: len(self._x)] = self._edges[:, order], 1.0
        models = card_features([self._cards[i] for i in order])
        parts = (x, self._clusters.cluster_centers_, models, member, edges, visible)
        return Graph(*(np.asarray(part, np.float32) for part in parts))


def card_features(cards: Sequence[Card]) -> np.ndarray:
    """Features of the cards [M, C]: logarithms of the prices, and the score of each topic (0 if the card has none)."""
    topics = sorted({topic for card in cards for topic in card.performance})
    prices = np.log1p([[card.price_in, card.price_out] for card in cards])
    return np.concatenate([prices, [[card.performance.get(topic, 0.0) for topic in topics] for card in cards]], axis=1)
