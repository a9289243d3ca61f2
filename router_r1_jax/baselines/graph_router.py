"""GraphRouter (arXiv 2410.03834): a graph network over task, query and model nodes that predicts a model's utility.

Query-model edges carry what is known of an answer: right or wrong, and its cost. Query-task edges say which task a
query belongs to. Tasks are not given here; they are clusters of the questions' words. In each update a random part of
the queries hides its edges and is predicted from the rest. A new question is one more query with hidden edges. Model
nodes start from their cards, so a model without any edge can be chosen too.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from router_r1_jax.baselines.base import (
    TIE,
    Baseline,
    Example,
    exact_matches,
    informative,
    raw_costs,
    tried_models,
    utilities,
)
from router_r1_jax.baselines.features import WordFeatures
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


class GraphRouter(Baseline):
    """The baseline. `cards` are the models tried in training; `alpha` weighs cost in a model's utility."""

    def __init__(self, cards: Sequence[Card], alpha: float, seed: int) -> None:
        self._cards, self._alpha, self._seed = {card.key: card for card in cards}, alpha, seed
        self._topics = sorted({topic for card in cards for topic in card.performance})

    def fit(self, examples: Sequence[Example]) -> None:
        """STEPS updates; in each, other queries hide their edges."""
        examples = informative(examples)
        self._keys = tuple(key for key in tried_models(examples) if key in self._cards)
        texts = [example.question for example in examples]
        self._features = WordFeatures(texts)
        from sklearn.cluster import KMeans

        self._x = self._features(texts)
        self._clusters = KMeans(min(TASKS, len(texts)), n_init=1, random_state=self._seed).fit(self._x)
        costs = raw_costs(examples, self._keys)
        components = normalize_costs(costs, *cost_bounds(costs))
        self._edges = np.stack([exact_matches(examples, self._keys), components], axis=-1)
        # In [0, 1], as targets of a sigmoid.
        self._utility = utilities(examples, self._keys, self._alpha) / (1 + TIE)
        self._params = self._learn([self._cards[key] for key in self._keys])

    def choose(self, question: str, cards: Sequence[Card]) -> str:
        """The card of the greatest predicted utility, tried in training or not."""
        order = sorted(cards, key=lambda card: card.key)
        logits = np.asarray(self._score(self._params, self._graph(order, [question])))[-1]
        return order[int(logits.argmax())].key

    def _graph(self, cards: Sequence[Card], new: Sequence[str]) -> Graph:
        """The train questions with these model nodes, and behind them new questions with hidden edges."""
        x = np.concatenate([self._x, self._features(new)]) if new else self._x
        member = np.eye(self._clusters.n_clusters)[self._clusters.predict(x.astype(self._x.dtype))]
        edges, visible = np.zeros((len(x), len(cards), 2)), np.zeros((len(x), len(cards)))
        for i, card in enumerate(cards):
            if card.key in self._keys:
                edges[: len(self._x), i] = self._edges[:, self._keys.index(card.key)]
                visible[: len(self._x), i] = 1.0
        parts = (x, self._clusters.cluster_centers_, card_features(cards, self._topics), member, edges, visible)
        return Graph(*(np.asarray(part, np.float32) for part in parts))

    def _learn(self, cards: Sequence[Card]) -> Any:
        graph, net = jax.tree.map(jnp.asarray, self._graph(cards, [])), GraphNet()
        utility = jnp.asarray(self._utility)
        init_key, update_key = jax.random.split(jax.random.key(self._seed))
        self._score = jax.jit(net.apply)

        def loss(params: Any, key: jax.Array) -> jax.Array:
            hidden = jax.random.uniform(key, (len(utility),)) < HIDDEN_SHARE
            logits = net.apply(params, graph.replace(visible=graph.visible * ~hidden[:, None]))
            losses = optax.sigmoid_binary_cross_entropy(logits, utility)
            return jnp.sum(losses * hidden[:, None]) / jnp.maximum(jnp.sum(hidden) * losses.shape[1], 1)

        return minimize(loss, net.init(init_key, graph), optax.adamw(3e-3, weight_decay=1e-3), update_key, STEPS)


def card_features(cards: Sequence[Card], topics: Sequence[str]) -> np.ndarray:
    """Features of the cards [M, C]: logarithms of the prices, and the score of each topic (0 if the card has none)."""
    prices = np.log1p([[card.price_in, card.price_out] for card in cards])
    return np.concatenate([prices, [[card.performance.get(topic, 0.0) for topic in topics] for card in cards]], axis=1)
