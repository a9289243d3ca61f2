"""Values of policies against distributions over the replies' text, closed forms and exhaustive comparison."""

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
from router_r1_jax.synthetic import oracle
from router_r1_jax.synthetic.world import COUNTS, DOMAINS, SPLITS, World, query_text

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Card:
    key: str
    price_in: float
    price_out: float
    performance: Mapping[str, float]

    def dollars(self, prompt_tokens, completion_tokens):
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6

    def raw_cost(self, completion_tokens):
        return completion_tokens * self.price_out


WORLD = World({"seed": 3} | dict.fromkeys(COUNTS.values(), 9))
QUESTIONS = WORLD.questions("train")
CARDS = (  # in and out prices are in proportion, so that fewer dollars and a lower raw cost are the same
    Card("expensive", 3.0, 12.0, dict.fromkeys(DOMAINS, 0.9)),
    Card("mixed", 0.25, 1.0, {"film": 0.95, "places": 0.4}),
    Card("cheap", 0.05, 0.2, dict.fromkeys(DOMAINS, 0.3)),
)
FOREST = oracle.trees(WORLD, QUESTIONS, CARDS)


def hashed_choice(fact):
    """Some probabilities over the three cards that differ from fact to fact."""
    weights = 1 + np.array([len(fact.subject) % 3, len(fact.relation) % 4, ord(fact.object[0]) % 5])
    return weights / weights.sum()


def simulate(question, choose):
    """Expected (em, dollars, raw cost): a distribution over entities follows the text of the replies."""
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
    value = oracle.policy_value(FOREST, hashed_choice)
    np.testing.assert_allclose(value[:3], expected, rtol=1e-12)
    assert value.calls_per_question == pytest.approx(np.mean([len(question.hops) for question in QUESTIONS]))


def test_a_wrong_first_reply_can_still_end_right():
    """The reason to follow the replies: after a wrong first hop the answer is sometimes right by coincidence."""
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
        asked = [question for question in one_hop if question.hops[0].domain == domain]
        forest = oracle.trees(WORLD, asked, CARDS)
        values = [oracle.policy_value(forest, oracle.always(CARDS, card.key)) for card in CARDS]
        for card, value in zip(CARDS, values, strict=True):
            assert abs(value.em - card.performance.get(domain, 0.0)) <= 0.5 / len(asked) + 1e-9
            assert value.dollars_per_question == pytest.approx((4 * card.price_in + 7 * card.price_out) / 1e6)
        uniform = oracle.policy_value(forest, oracle.uniform(CARDS))
        assert uniform.em == pytest.approx(np.mean([value.em for value in values]))


def test_reward_is_the_published_one():
    right = FOREST[0][0]._replace(em=1.0, raw_cost=25.0)
    assert oracle.path_reward(right, 0.6, (3.0, 7.0)) == pytest.approx(0.4 + 0.6 * 0.5)
    assert oracle.path_reward(right, 0.6, (6.0, 7.0)) == pytest.approx(1.0)
    assert oracle.path_reward(right, 0.6, (1.0, 2.0)) == pytest.approx(0.4)
    assert oracle.path_reward(right, 0.6, (5.0, 5.0)) == pytest.approx(0.4 + 0.6 * 0.5)
    assert oracle.path_reward(right, 0.0, (3.0, 7.0)) == 1.0
    assert oracle.path_reward(right._replace(em=0.0), 0.6, (3.0, 7.0)) == 0.0


def test_cost_bounds_are_the_percentiles_of_a_long_window_of_random_episodes():
    window = []
    for tree in FOREST:
        window += [path.raw_cost for path in tree] * (len(CARDS) ** 2 // len(tree))  # each question equally often
    expected = np.percentile(np.sqrt(window), [5, 95])
    np.testing.assert_allclose(oracle.random_cost_bounds(FOREST), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 0.9])
def test_no_policy_that_knows_the_domains_beats_the_best_one(alpha):
    bounds = oracle.random_cost_bounds(FOREST)
    groups = collections.defaultdict(list)
    for question, tree in zip(QUESTIONS, FOREST, strict=True):
        groups[tuple(fact.domain for fact in question.hops)].append(tree)
    total = collections.Counter()
    for domains, members in groups.items():
        best = -np.inf
        for cards in itertools.product(range(len(CARDS)), repeat=len(domains)):
            taken = [path for tree in members for path in tree if path.cards == cards]
            assert len(taken) == len(members)
            reward = np.mean([oracle.path_reward(path, alpha, bounds) for path in taken])
            if reward > best:
                best, chosen = reward, taken
        total.update(em=sum(path.em for path in chosen), dollars=sum(path.dollars for path in chosen))
    value = oracle.best_by_domain(FOREST, alpha, bounds)
    assert value.em == pytest.approx(total["em"] / len(QUESTIONS))
    assert value.dollars_per_question == pytest.approx(total["dollars"] / len(QUESTIONS))


@pytest.mark.parametrize("alpha", [0.0, 0.6, 0.9])
def test_the_oracle_answers_in_the_cheapest_right_way_whatever_alpha(alpha):
    """A right path always gets more reward than a wrong one, and a cheaper right path never less than another one."""
    value = oracle.oracle(FOREST, alpha, oracle.random_cost_bounds(FOREST))
    right = [[path.dollars for path in tree if path.em] for tree in FOREST]
    assert value.em == pytest.approx(np.mean([bool(dollars) for dollars in right]))
    cheapest = [min(dollars or [path.dollars for path in tree]) for dollars, tree in zip(right, FOREST, strict=True)]
    assert value.dollars_per_question == pytest.approx(np.mean(cheapest))


def test_the_simulated_pool_pays_for_routing_and_for_thrift():
    """Routing beats every model alone, and at alpha 0.6 the best policy is much cheaper and hardly worse."""
    config = base_config()
    world = World(config.synthetic.world)
    cards = [
        Card(card.name, card.price_in, card.price_out, card.performance.to_dict())
        for card in runpy.run_path(str(ROOT / "configs/pools/simulated.py"))["models"]()
    ]
    questions = world.questions("test")
    assert len(questions) >= 300
    values = oracle.reference_policies(world, questions, cards)
    plain, thrifty = values["best by domain (alpha 0)"], values["best by domain (alpha 0.6)"]
    alone = [value.em for name, value in values.items() if name.endswith(" alone")]
    assert len(alone) == 5
    assert plain.em > 2 * max(alone) and plain.em > 3 * values["random choice"].em
    assert plain.em - thrifty.em < 0.05 and thrifty.dollars_per_question < 0.7 * plain.dollars_per_question
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
        "router_r1_jax.synthetic.oracle",
        f"--config={config}",
        "--config.synthetic.world.films=9",
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    first, *rows = output.splitlines()
    assert re.fullmatch(r"\d+ questions of the test split", first)
    values = {name: cells for name, *cells in (re.split(r"  +", row) for row in rows[1:])}
    assert set(values) == {
        *(f"{name} (alpha {alpha})" for name in ("oracle", "best by domain") for alpha in (0, 0.6)),
        *("One alone", "Two alone", "random choice"),
    }
    assert float(values["One alone"][2]) == pytest.approx(2 * float(values["Two alone"][2]), rel=0.05)
