"""Baselines that choose a model by the question's text: each beats a random choice if domains tell whom to ask."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_world import CARDS, WORLD, WorldPool, mean_em, questions, train_examples
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from router_r1_jax.baselines.base import Example, Trial, informative, utilities
from router_r1_jax.baselines.cascade import Cascade, search
from router_r1_jax.baselines.features import RouterFeatures, WordFeatures
from router_r1_jax.baselines.graph_router import GraphRouter
from router_r1_jax.baselines.model_calls import oracle_episodes, try_all_models
from router_r1_jax.baselines.router_dc import TEMPERATURE, RouterDC, sample_model_loss, sample_sample_loss
from router_r1_jax.baselines.simple_routers import (
    KNNRouter,
    LinearClassifier,
    MLPRouter,
    RandomModel,
    SingleModel,
    largest,
)
from router_r1_jax.distributed.mesh import make_mesh
from router_r1_jax.model import ModelConfig, RouterLM, init_params
from router_r1_jax.pool.outcomes import Outcome, Reply
from router_r1_jax.reward import exact_match, extract_answer


@functools.cache
def router_features() -> RouterFeatures:
    """Of a small router with random weights, over a vocabulary of the questions' words."""
    words = sorted({word for q in questions("train", None) + questions("test", None) for word in q.question.split()})
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = ModelConfig(
        vocab_size=len(vocabulary), num_layers=2, width=32, mlp=48, num_heads=2, num_kv_heads=1, head_dim=16
    )
    params = init_params(config, make_mesh(1, 1, 1, jax.devices()[:1]), 0)
    return RouterFeatures(config, params, PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"))


LEARNED = {
    "knn": lambda: KNNRouter(0.0),
    "mlp": lambda: MLPRouter(0.0, 0),
    "classifier": lambda: LinearClassifier(0.0, make_features=lambda _: router_features()),
    "routerdc": lambda: RouterDC(0.0, 0),
    "graphrouter": lambda: GraphRouter(CARDS, 0.0, 0),
    "cascade": lambda: Cascade(CARDS, 0.0),
}


@pytest.fixture(scope="module")
def by_chance() -> float:
    return mean_em(RandomModel(0), questions("test"))


@pytest.mark.parametrize("name", LEARNED)
def test_beats_a_random_choice_and_every_single_model(name, by_chance):
    """One model alone is right in at most two of five domains; a random one in about a third of all."""
    baseline = LEARNED[name]()
    baseline.fit(train_examples())
    em = mean_em(baseline, questions("test"))
    alone = max(mean_em(SingleModel(card.key), questions("test")) for card in CARDS)
    assert em > by_chance + 0.2 and em > alone + 0.05, (em, by_chance, alone)


def test_graph_router_learns_from_the_edges_where_cards_say_nothing(by_chance):
    """To it the models then differ only in how they answered; without these edges it asks one of them always."""
    blank = tuple(dataclasses.replace(card, price_in=1.0, price_out=1.0, performance={}) for card in CARDS)
    baseline = GraphRouter(blank, 0.0, 0)
    baseline.fit(train_examples())
    em = mean_em(baseline, questions("test"))
    alone = max(mean_em(SingleModel(card.key), questions("test")) for card in CARDS)
    assert em > by_chance + 0.2 and em > alone + 0.1, (em, by_chance, alone)


def test_the_largest_and_the_oracle_of_one_call_beat_a_random_choice(by_chance):
    """Titan, the most expensive, is good in two of five domains; the oracle is right wherever any model is."""
    asked, pool = questions("test"), WorldPool()
    alone = mean_em(SingleModel(largest(CARDS).key), asked)
    tried = try_all_models(pool, CARDS, asked, split="test")
    chosen = [extract_answer(episode.text) for episode in oracle_episodes(tried, CARDS)]
    em = np.mean([exact_match(answer, q.golds) for answer, q in zip(chosen, asked, strict=True)])
    known = [any(WORLD.reply(q.question, c.performance).endswith(f" {q.golds[0]}.") for c in CARDS) for q in asked]
    assert em == np.mean(known) > alone + 0.2 and alone > by_chance + 0.05, (em, alone, by_chance)


@pytest.mark.parametrize("name", [name for name in LEARNED if name != "cascade"])
def test_choices_are_repeatable_and_among_the_cards(name):
    one, other = LEARNED[name](), LEARNED[name]()
    for baseline in (one, other):
        baseline.fit(train_examples())
    asked = [q.question for q in questions("test")[:20]]
    assert [one.choose(q, CARDS) for q in asked] == [other.choose(q, CARDS[::-1]) for q in asked]
    assert {one.choose(q, CARDS[1:3]) for q in asked} <= {"Reel", "Aria"}


def test_random_and_single_models():
    asked = [q.question for q in questions("train", None)]
    chosen = [RandomModel(0).choose(q, CARDS) for q in asked]
    assert (
        chosen == [RandomModel(0).choose(q, CARDS) for q in asked] != [RandomModel(1).choose(q, CARDS) for q in asked]
    )
    assert min(chosen.count(card.key) for card in CARDS) > 0.8 * len(asked) / len(CARDS)
    assert largest(CARDS).key == "Titan" and SingleModel("Aria").choose("?", CARDS) == "Aria"


# What they learn from.


def test_graph_router_s_targets_prefer_the_cheaper_of_equals():
    """Also where cost does not count, and both are utility all there is."""
    graph = GraphRouter(CARDS, 0.0, 0)
    costs = dict(zip((card.key for card in CARDS), (1.0, 4.0, 9.0), strict=False))
    right = {key: trial(1, cost) for key, cost in costs.items()} | {CARDS[3].key: trial(0, 2.0)}
    graph.fit([Example(f"Who is the {word} of Velmora?", right) for word in ("director", "writer", "singer")])
    assert graph._utility.min() >= 0 and graph._utility.max() <= 1
    assert np.all(graph._utility[:, 0] > graph._utility[:, 1]) and np.all(graph._utility[:, 1] > graph._utility[:, 2])


def trial(em: float, cost: float) -> Trial:
    return Trial(Reply("r", Outcome.OK, raw_cost=cost), em, em)


def test_utilities_are_the_published_reward_and_prefer_the_cheaper_of_equals():
    rows = [[(1, 1), (1, 100)], [(0, 1), (1, 100)], [(0, 1), (0, 100)]]
    examples = [Example("q", {k: trial(*t) for k, t in zip("ab", row, strict=True)}) for row in rows]
    for alpha in (0.0, 0.6):
        utility = utilities(examples, alpha)
        # The cheap model's cost is the 5th percentile of all, the expensive one's the 95th: components 1 and 0.
        assert utility == pytest.approx(np.array([[1.0, 1 - alpha], [0, 1 - alpha], [0, 0]]), abs=2e-3)
        assert utility[0, 0] > utility[0, 1]
    assert informative(examples) == [examples[1]]
    assert informative(examples[:1]) == examples[:1]


def test_the_cascade_s_search_finds_the_best_list_of_a_brute_force():
    """Over all lists of at most three of four models and thresholds of a tenth, written as a plain loop."""
    rng = np.random.default_rng(0)
    n, M, alpha = 40, 4, 0.3
    em = (rng.random((n, M)) < [0.3, 0.4, 0.6, 0.8]).astype(float)
    raw = rng.uniform(1, 2, (n, M)) * [1, 3, 10, 40]
    scores = np.clip(em * 0.6 + rng.random((n, M)) * 0.5, 0, 1)
    low, high = np.quantile(np.sqrt(raw), [0.05, 0.95])

    def value(models, thresholds):
        rewards, costs = [], []
        for i in range(n):
            cost, right = 0.0, 0.0
            for model, threshold in zip(models, thresholds, strict=True):
                cost += raw[i, model]
                if scores[i, model] >= threshold:
                    right = em[i, model]
                    break
            cheap = 1 - min(max((np.sqrt(cost) - low) / (high - low), 0), 1)
            rewards.append(right * (1 - alpha + alpha * cheap))
            costs.append(cost)
        return np.mean(rewards) - 1e-6 * np.mean(costs)

    grid = [i / 10 for i in range(1, 11)]
    best = max(
        value(models, (*thresholds, 0.0))
        for length in (1, 2)
        for models in itertools.combinations(range(M), length)
        for thresholds in itertools.product(grid, repeat=length - 1)
    )
    found = search(em, raw, scores, alpha)
    assert value(*zip(*found, strict=True)) >= best - 1e-12
    assert [model for model, _ in found] == sorted(model for model, _ in found) and found[-1][1] == 0.0


def test_the_cascade_stops_at_a_reply_that_its_scorer_believes():
    """A model that says it does not know is not believed, and the next one is asked."""
    cascade = Cascade(CARDS, 0.0)
    cascade.fit(train_examples())
    em = mean_em(cascade, questions("test"))
    assert em > 0.6
    first = cascade.choose("Who is the director of Nobody?", CARDS)
    left = [card for card in CARDS if card.key != first]
    assert len(cascade._thresholds) == 1 or cascade.choose("Who is the director of Nobody?", left) != first


# Losses and features against plain loops.


def test_router_dc_s_losses_are_those_of_a_plain_loop():
    rng = np.random.default_rng(1)
    cosines, utility = rng.uniform(-1, 1, (5, 4)), np.round(rng.uniform(0, 1, (5, 4)), 1) * (rng.random((5, 4)) < 0.6)
    queries, cluster = rng.normal(size=(5, 3)), np.array([0, 1, 0, 1, 1])
    total = weight = 0.0
    for c, w in zip(cosines / TEMPERATURE, utility, strict=True):
        least = sorted(w)[-3]  # three are chosen to the query, or as many as are utility anything
        failed = [j for j in range(4) if w[j] == 0]
        for i in (i for i in range(4) if w[i] >= least and w[i] > 0):
            total -= w[i] * (c[i] - np.log(np.exp(c[i]) + sum(np.exp(c[j]) for j in failed)))
            weight += w[i]
    assert float(sample_model_loss(jnp.asarray(cosines), jnp.asarray(utility))) == pytest.approx(
        total / weight, rel=1e-4
    )
    logits, losses = queries @ queries.T / TEMPERATURE, []
    for i, j in itertools.permutations(range(5), 2):
        if cluster[i] == cluster[j]:
            others = sum(np.exp(logits[i, k]) for k in range(5) if cluster[k] != cluster[i])
            losses.append(np.log(np.exp(logits[i, j]) + others) - logits[i, j])
    value = sample_sample_loss(jnp.asarray(queries), jnp.asarray(cluster))
    assert float(value) == pytest.approx(np.mean(losses), rel=1e-4)


def test_router_features_are_means_of_hidden_states():
    """One by one without padding, and in a padded batch."""
    features = router_features()
    texts = [q.question for q in questions("test", None)[:40]]
    together = features(texts)
    for text, row in zip(texts[:3], together, strict=False):
        ids = jnp.asarray([features._tokenizer.encode(text, add_special_tokens=False)])
        config = ModelConfig(
            vocab_size=features._params["embed"].shape[0],
            num_layers=2,
            width=32,
            mlp=48,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
        )
        hidden, _ = RouterLM(config).apply({"params": features._params}, ids, method="hidden")
        assert row == pytest.approx(np.asarray(hidden[0].mean(0)), abs=1e-4)
        assert features([text])[0] == pytest.approx(row, abs=1e-4)


def test_word_features_know_nothing_of_what_they_have_not_read():
    features = WordFeatures(["Who is the director of Velmora?"])
    assert features(["Zorbik!"]).sum() == 0 and np.linalg.norm(features(["the director?"])) == pytest.approx(1.0)
