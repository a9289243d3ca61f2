"""GraphRouter (arXiv 2410.03834): a graph net over task, query and model nodes that predicts a model's worth.

Query-model edges carry what is known of an answer (right or wrong, cheap or dear); query-task edges say which task a
query belongs to. Tasks are not told here: they are clusters of the questions' words. In training a random part of the
queries hides its edges and is predicted from the rest; a new question is one more query whose edges are hidden. Model
nodes begin as their cards, so a model without any edge can be chosen too.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from router_r1_jax.baselines.features import WordFeatures, scikit_learn
from router_r1_jax.baselines.interface import (
    TIE,
    Baseline,
    TrainRecord,
    cheapness,
    cost_bounds,
    instructive,
    known_keys,
    utilities,
)
from router_r1_jax.pool.cards import Card

STEPS, HIDDEN_SHARE = 200, 0.3


@flax.struct.dataclass
class Graph:
    """Q queries, T tasks and M models; all arrays float32."""

    queries: jax.Array  # [Q, F] question features
    tasks: jax.Array  # [T, F] cluster centres
    models: jax.Array  # [M, C] card features
    member: jax.Array  # [Q, T] 1 where the query belongs to the task
    edges: jax.Array  # [Q, M, 2] exact match and cheapness of an answer
    visible: jax.Array  # [Q, M] 1 where the edge is known


class GraphNet(nn.Module):
    """Two rounds of messages along the edges, then a score for every query-model pair."""

    width: int = 32
    rounds: int = 2

    @nn.compact
    def __call__(self, graph: Graph) -> jax.Array:
        """Logits [Q, M] of a model's worth on a query."""

        def dense(x: jax.Array) -> jax.Array:
            return nn.Dense(self.width)(x)

        q, t, m = nn.relu(dense(graph.queries)), nn.relu(dense(graph.tasks)), nn.relu(dense(graph.models))
        seen = graph.visible[..., None]
        per_model, per_query = jnp.maximum(seen.sum(0), 1.0), jnp.maximum(seen.sum(1), 1.0)  # [M, 1], [Q, 1]
        per_task = jnp.maximum(graph.member.sum(0), 1.0)[:, None]
        for _ in range(self.rounds):
            to_model = jnp.einsum("QD,QMD->MD", dense(q), dense(graph.edges) * seen) / per_model
            to_query = jnp.einsum("MD,QMD->QD", dense(m), dense(graph.edges) * seen) / per_query
            to_task = graph.member.T @ dense(q) / per_task
            from_task = graph.member @ dense(t)
            q = q + nn.relu(dense(q) + to_query + from_task)
            m = m + nn.relu(dense(m) + to_model)
            t = t + nn.relu(dense(t) + to_task)
        return dense(q + graph.member @ t) @ dense(m).T / np.sqrt(self.width)


class GraphRouter(Baseline):
    """The baseline. `cards` hold the models tried in training; `alpha` weighs cost; `tasks` are clusters."""

    def __init__(self, cards: Sequence[Card], alpha: float, seed: int, *, tasks: int = 8) -> None:
        self._cards, self._alpha, self._seed, self._tasks = {card.key: card for card in cards}, alpha, seed, tasks
        self._topics = sorted({topic for card in cards for topic in card.performance})

    def fit(self, records: Sequence[TrainRecord]) -> None:
        """STEPS updates, each on another choice of the queries whose edges are hidden."""
        scikit_learn()
        from sklearn.cluster import KMeans

        records = instructive(records)
        self._keys = tuple(key for key in known_keys(records) if key in self._cards)
        texts = [record.question for record in records]
        self._features = WordFeatures().fit(texts)
        self._x = self._features(texts)
        self._clusters = KMeans(min(self._tasks, len(texts)), n_init=1, random_state=self._seed).fit(self._x)
        raw = np.array([[r.trials[key].reply.raw_cost for key in self._keys] for r in records])
        em = np.array([[r.trials[key].exact_match for key in self._keys] for r in records])
        self._edges = np.stack([em, cheapness(raw, cost_bounds(raw))], axis=-1)
        self._worth = utilities(records, self._keys, self._alpha) / (1 + TIE)  # in [0, 1]: targets of a sigmoid
        self._params = self._learn([self._cards[key] for key in self._keys])

    def choose(self, question: str, cards: Sequence[Card]) -> str:
        """The card of the greatest predicted worth, known or not."""
        order = sorted(cards, key=lambda card: card.key)
        logits = np.asarray(self._score(self._params, self._graph(order, [question])))[-1]
        return order[int(logits.argmax())].key

    def _graph(self, cards: Sequence[Card], new: Sequence[str]) -> Graph:
        """The train part with these model nodes, and new questions behind the train questions, their edges hidden."""
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
        worth = jnp.asarray(self._worth)
        start, draws = jax.random.split(jax.random.key(self._seed))
        params, optimizer = net.init(start, graph), optax.adamw(3e-3, weight_decay=1e-3)
        self._score = jax.jit(net.apply)

        def loss(params: Any, hidden: jax.Array) -> jax.Array:
            logits = net.apply(params, graph.replace(visible=graph.visible * ~hidden[:, None]))
            losses = optax.sigmoid_binary_cross_entropy(logits, worth)
            return jnp.sum(losses * hidden[:, None]) / jnp.maximum(jnp.sum(hidden) * losses.shape[1], 1)

        def update(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            hidden = jax.random.uniform(key, (len(worth),)) < HIDDEN_SHARE
            updates, state = optimizer.update(jax.grad(loss)(params, hidden), state, params)
            return (optax.apply_updates(params, updates), state), None

        @partial(jax.jit, donate_argnums=0)
        def learn(carry: Any) -> Any:
            return jax.lax.scan(update, carry, jax.random.split(draws, STEPS))[0]

        return learn((params, optimizer.init(params)))[0]


def card_features(cards: Sequence[Card], topics: Sequence[str]) -> np.ndarray:
    """What a card says, [M, C]: logarithms of the prices, and the score of each topic (0 where it states none)."""
    prices = np.log1p([[card.price_in, card.price_out] for card in cards])
    return np.concatenate([prices, [[card.performance.get(topic, 0.0) for topic in topics] for card in cards]], axis=1)
