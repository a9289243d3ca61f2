"""Values of policies against distributions pushed through the replies' text, closed forms and exhaustive comparison."""

import collections
import dataclasses
import itertools
import re
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from router_r1_jax.config import base_config
from router_r1_jax.data import reference
from router_r1_jax.data.world import COUNTS, DOMAINS, SPLITS, World, query_text

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Card:
    key: str
    price_in: float
    price_out: float
    performance: Mapping[str, float]

    @property
    def name(self):
        return self.key


WORLD = World({"seed": 3} | dict.fromkeys(COUNTS.values(), 9))
QUESTIONS = WORLD.questions("train")
CARDS = (  # in and out prices are in proportion, so that fewer dollars and a lower raw cost are the same
    Card("dear", 3.0, 12.0, dict.fromkeys(DOMAINS, 0.9)),
    Card("mixed", 0.25, 1.0, {"film": 0.95, "places": 0.4}),
    Card("cheap", 0.05, 0.2, dict.fromkeys(DOMAINS, 0.3)),
)
FOREST = reference.trees(WORLD, QUESTIONS, CARDS)


def hashed_choice(fact):
    """Some probabilities over the three cards that differ from fact to fact."""
    weights = 1 + np.array([len(fact.subject) % 3, len(fact.relation) % 4, ord(fact.object[0]) % 5])
    return weights / weights.sum()


def simulate(question, choose):
    """Expected (em, dollars, raw cost), by pushing a distribution over entities through the text of the replies."""
    entities, dollars, raw = {question.hops[0].subject: 1.0}, 0.0, 0.0
    for hop in question.hops:
        following = collections.Counter()
        for entity, mass in entities.items():
            query = query_text(hop.relation, entity)
            for card, chance in zip(CARDS, choose(WORLD.lookup(query)), strict=True):
                reply = WORLD.reply(query, card.performance)
                assert len(re.findall(r"\w+|[^\w\s]", query)) == 4  # "director of Velmora ?"
                assert len(re.findall(r"\w+|[^\w\s]", reply)) == 7  # "The director of Velmora is Kessan ."
                dollars += mass * chance * (4 * card.price_in + 7 * card.price_out) * 1e-6
                raw += mass * chance * 7 * card.price_out
                following[reply.removesuffix(".").split()[-1]] += mass * chance
        entities = following
    return sum(mass for entity, mass in entities.items() if entity in question.golds), dollars, raw


def test_policy_value_is_what_simulation_through_the_replies_gives():
    expected = np.mean([simulate(question, hashed_choice) for question in QUESTIONS], axis=0)
    value = reference.policy_value(FOREST, hashed_choice)
    np.testing.assert_allclose((value.em, value.dollars, value.raw_cost), expected, rtol=1e-12)
    assert value.calls == pytest.approx(np.mean([len(question.hops) for question in QUESTIONS]))


def test_a_wrong_first_reply_can_still_end_right():
    """The reason for walking the replies: with a wrong first hop the answer is right by coincidence now and then."""
    lucky = [
        path
        for question, tree in zip(QUESTIONS, FOREST, strict=True)
        for path in tree
        if path.em and len(path.facts) == 2 and path.facts[1] != question.hops[1]
    ]
    assert lucky


def test_one_model_alone_is_right_as_often_as_its_skill_on_one_hop_questions():
    one_hop = [q for split in SPLITS for q in WORLD.questions(split) if len(q.hops) == 1]
    for domain in DOMAINS:
        own = [question for question in one_hop if question.hops[0].domain == domain]
        forest = reference.trees(WORLD, own, CARDS)
        values = [reference.policy_value(forest, reference.always(CARDS, card.key)) for card in CARDS]
        for card, value in zip(CARDS, values, strict=True):
            assert abs(value.em - card.performance.get(domain, 0.0)) <= 0.5 / len(own) + 1e-9
            assert value.dollars == pytest.approx((4 * card.price_in + 7 * card.price_out) / 1e6)
        uniform = reference.policy_value(forest, reference.uniform(CARDS))
        assert uniform.em == pytest.approx(np.mean([value.em for value in values]))


def test_reward_is_the_published_one():
    right = dataclasses.replace(FOREST[0][0], em=1.0, raw_cost=25.0)
    assert reference.reward(right, 0.6, (3.0, 7.0)) == pytest.approx(0.4 + 0.6 * 0.5)
    assert reference.reward(right, 0.6, (6.0, 7.0)) == pytest.approx(1.0)
    assert reference.reward(right, 0.6, (1.0, 2.0)) == pytest.approx(0.4)
    assert reference.reward(right, 0.6, (5.0, 5.0)) == pytest.approx(0.4 + 0.6 * 0.5)
    assert reference.reward(right, 0.0, (3.0, 7.0)) == 1.0
    assert reference.reward(dataclasses.replace(right, em=0.0), 0.6, (3.0, 7.0)) == 0.0


def test_cost_range_is_the_percentiles_of_a_long_window_of_random_episodes():
    window = []
    for tree in FOREST:
        window += [path.raw_cost for path in tree] * (len(CARDS) ** 2 // len(tree))  # each question equally often
    expected = np.percentile(np.sqrt(window), [5, 95])
    np.testing.assert_allclose(reference.cost_range(FOREST), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 0.9])
def test_no_policy_that_knows_the_domains_beats_the_best_one(alpha):
    bounds = reference.cost_range(FOREST)
    groups = collections.defaultdict(list)
    for question, tree in zip(QUESTIONS, FOREST, strict=True):
        groups[tuple(fact.domain for fact in question.hops)].append(tree)
    value, called = reference.best_by_domain(FOREST, CARDS, alpha, bounds)
    assert set(called) == set(groups)
    total = collections.Counter()
    for domains, members in groups.items():
        means = {}
        for keys in itertools.product([card.key for card in CARDS], repeat=len(domains)):
            taken = [path for tree in members for path in tree if tuple(CARDS[i].key for i in path.cards) == keys]
            assert len(taken) == len(members)
            means[keys] = np.mean([reference.reward(path, alpha, bounds) for path in taken])
            if keys == called[domains]:
                total.update(em=sum(path.em for path in taken), dollars=sum(path.dollars for path in taken))
        assert means[called[domains]] == pytest.approx(max(means.values()))
    assert value.em == pytest.approx(total["em"] / len(QUESTIONS))
    assert value.dollars == pytest.approx(total["dollars"] / len(QUESTIONS))


@pytest.mark.parametrize("alpha", [0.0, 0.6, 0.9])
def test_the_oracle_answers_in_the_cheapest_right_way_whatever_alpha(alpha):
    """A right way always pays more than a wrong one, and a cheaper right way never less than a dearer one."""
    value = reference.oracle(FOREST, alpha, reference.cost_range(FOREST))
    right = [[path.dollars for path in tree if path.em] for tree in FOREST]
    assert value.em == pytest.approx(np.mean([bool(dollars) for dollars in right]))
    cheapest = [min(dollars or [path.dollars for path in tree]) for dollars, tree in zip(right, FOREST, strict=True)]
    assert value.dollars == pytest.approx(np.mean(cheapest))


def test_the_simulated_pool_pays_for_routing_and_for_thrift():
    """Routing beats every model alone, and at alpha 0.6 the best policy is much cheaper and hardly worse."""
    config = base_config()
    world = World(config.data.world)
    cards = [
        Card(card.name, card.price_in, card.price_out, card.performance.to_dict())
        for card in runpy.run_path(str(ROOT / "configs/pools/simulated.py"))["models"]()
    ]
    questions = world.questions("test")
    assert len(questions) >= 300
    values = reference.references(world, questions, cards)
    plain, thrifty = values["best by domain (alpha 0)"], values["best by domain (alpha 0.6)"]
    alone = [value.em for name, value in values.items() if name.endswith(" alone")]
    assert len(alone) == 5
    assert plain.em > 2 * max(alone) and plain.em > 3 * values["random choice"].em
    assert plain.em - thrifty.em < 0.05 and thrifty.dollars < 0.7 * plain.dollars
    assert plain.em <= values["oracle (alpha 0)"].em


def test_the_command_prints_the_table(tmp_path):
    config = tmp_path / "tiny.py"
    config.write_text(
        "from router_r1_jax.config import base_config, model_card, provider\n"
        "def get_config():\n"
        "    c = base_config()\n"
        "    c.pool.providers = (provider(name='simulated'),)\n"
        "    c.pool.models = tuple(\n"
        "        model_card(name=name, provider='simulated', model=name, price_out=price, performance={'film': 0.5})\n"
        "        for name, price in (('One', 2.0), ('Two', 1.0))\n"
        "    )\n"
        "    return c\n"
    )
    command = [
        sys.executable,
        "-m",
        "router_r1_jax.data.reference",
        f"--config={config}",
        "--config.data.world.films=9",
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    first, *rows = output.splitlines()
    assert re.fullmatch(r"\d+ questions of the test split", first)
    values = {row[:28].strip(): row[28:].split() for row in rows[1:]}
    assert set(values) == {
        *(f"{name} (alpha {alpha})" for name in ("oracle", "best by domain") for alpha in (0, 0.6)),
        *("One alone", "Two alone", "random choice"),
    }
    assert float(values["One alone"][2]) == pytest.approx(2 * float(values["Two alone"][2]), rel=0.05)
