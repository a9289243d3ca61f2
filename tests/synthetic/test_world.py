"""The world's promises: names, facts, questions, splits, and what a model of known skill replies."""

import collections
import re
import runpy
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_r1_jax.config import ConfigError, base_config
from router_r1_jax.synthetic.world import COUNTS, DOMAINS, RELATIONS, SPLITS, World, claim, query_text

SETTINGS = base_config().synthetic.world.to_dict()
WORLD = World(SETTINGS)
MODELS = runpy.run_path(str(Path(__file__).parents[2] / "configs/pools/simulated.py"))["models"]()
SKILLS = {card.name: card.performance.to_dict() for card in MODELS}
PRICES = {card.name: card.price_out for card in MODELS}
TYPE = {name: kind for kind, names in WORLD.names.items() for name in names}


def all_questions():
    return [question for split in SPLITS for question in WORLD.questions(split)]


def test_the_seed_decides_everything():
    again, other = World(dict(SETTINGS)), World(SETTINGS | {"seed": 8})
    assert again.facts == WORLD.facts
    assert all(again.questions(split) == WORLD.questions(split) for split in SPLITS)
    assert set(other.facts).isdisjoint(WORLD.facts)


def test_names_are_distinct_words_that_occur_in_no_prompt_and_hold_no_model_name():
    assert {kind: len(names) for kind, names in WORLD.names.items()} == {k: SETTINGS[f] for k, f in COUNTS.items()}
    names = [name for kind in WORLD.names.values() for name in kind]
    assert len({name.lower() for name in names}) == len(names)
    assert all(re.fullmatch(r"[A-Z][a-z]{4,}", name) for name in names)
    templates = resources.files("router_r1_jax") / "templates"
    words = {word for file in templates.iterdir() for word in re.findall(r"\w+", file.read_text().lower())}
    words |= {relation.name for relation in RELATIONS} | set(DOMAINS)
    assert words.isdisjoint(name.lower() for name in names)
    # A query that contains the name of the model it is sent to is malformed under the published format rule.
    assert not [name for name in names for model in SKILLS if model.lower() in name.lower()]


def test_facts_have_the_right_types_and_a_mistake_is_possible_but_wrong():
    relations = {relation.name: relation for relation in RELATIONS}
    asked = collections.Counter()
    for fact in WORLD.facts:
        relation = relations[fact.relation]
        kinds = (relation.domain, relation.subject, relation.object, relation.object)
        assert (fact.domain, TYPE[fact.subject], TYPE[fact.object], TYPE[fact.mistaken]) == kinds
        assert len({fact.object, fact.mistaken, fact.subject}) == 3
        asked[fact.relation, fact.subject] += 1
    expected = {(relation.name, subject) for relation in RELATIONS for subject in WORLD.names[relation.subject]}
    assert set(asked) == expected and set(asked.values()) == {1}


def test_questions_are_all_facts_and_all_compositions_across_domains():
    """Against a brute-force composition over all pairs of facts."""
    expected = {((fact.relation, fact.subject),): fact.object for fact in WORLD.facts}
    for first in WORLD.facts:
        for second in WORLD.facts:
            if first.object == second.subject and first.domain != second.domain:
                expected[(first.relation, first.subject), (second.relation, second.subject)] = second.object
    found = {tuple((f.relation, f.subject) for f in question.hops): question for question in all_questions()}
    assert {hops: question.golds for hops, question in found.items()} == {h: (gold,) for h, gold in expected.items()}
    assert len(found) == len(all_questions()) == len({question.id for question in found.values()})
    assert {len(hops) for hops in found} == {1, 2}


def test_question_text_names_the_relations_outside_in():
    for question in all_questions():
        *outer, inner = [fact.relation for fact in reversed(question.hops)]
        phrase = "".join(f"{relation} of the " for relation in outer)
        kind = TYPE[question.golds[0]]
        expected = f"{'Who' if kind == 'person' else 'What'} is the {phrase}{inner} of {question.hops[0].subject}?"
        assert question.text == expected


def test_splits_share_no_first_relation_and_entity_and_have_their_sizes():
    starts = {s: {(q.hops[0].relation, q.hops[0].subject) for q in WORLD.questions(s)} for s in SPLITS}
    assert sum(map(len, starts.values())) == len(set.union(*starts.values())) == len(WORLD.facts)
    for relation in RELATIONS:
        count = len(WORLD.names[relation.subject])
        for split, share in SPLITS.items():
            members = sum(name == relation.name for name, _ in starts[split])
            assert abs(members - share * count) <= 1, (relation.name, split)


@pytest.mark.parametrize("count", [3, 4, 5, 7, 10, 11, 60])
def test_every_entity_is_the_subject_of_a_train_question(count):
    """A router cannot copy a name that training never shows, since each name is one token."""
    world = World({"seed": 3} | dict.fromkeys(COUNTS.values(), count))
    subjects = {question.hops[0].subject for question in world.questions("train")}
    kinds = {relation.subject for relation in RELATIONS}
    assert subjects == {name for kind in kinds for name in world.names[kind]}


@pytest.mark.parametrize("split", [None, *SPLITS])
def test_the_share_of_known_facts_is_the_skill_in_every_domain_and_split(split):
    """Over a whole domain to half a fact; in a split to a fact and a half per relation."""
    starts = all_questions() if split is None else WORLD.questions(split)
    facts = {question.hops[0] for question in starts}
    for skill in np.linspace(0, 1, 38):
        for domain in DOMAINS:
            members = [fact for fact in facts if fact.domain == domain]
            known = sum(claim(fact, {domain: skill}) == fact.object for fact in members)
            slack = 0.5 if split is None else 1.5 * len({fact.relation for fact in members})
            assert abs(known - skill * len(members)) <= slack + 1e-9, (domain, skill)


def test_a_better_model_knows_what_a_worse_one_knows():
    for fact in WORLD.facts:
        answers = [claim(fact, {fact.domain: skill}) == fact.object for skill in (0.0, 0.2, 0.5, 0.9, 1.0)]
        assert answers == sorted(answers)
        assert answers[0] is False and answers[-1] is True
        assert claim(fact, {}) == fact.mistaken


def test_reply_states_the_claim_for_any_wording_of_the_query():
    for fact in WORLD.facts[::7]:
        for skill in (0.0, 1.0):
            expected = f"The {fact.relation} of {fact.subject} is {claim(fact, {fact.domain: skill})}."
            for query in (
                query_text(fact.relation, fact.subject),
                f"who or what is the {fact.relation.upper()} of {fact.subject.lower()}",
                f"{fact.subject}: {fact.relation}, please!",
            ):
                assert WORLD.lookup(query) == fact
                assert WORLD.reply(query, {fact.domain: skill}) == expected


def test_queries_that_ask_for_no_single_fact_find_nothing():
    film, song, city = (WORLD.names[kind][0] for kind in ("film", "song", "city"))
    two_hop = next(question.text for question in all_questions() if len(question.hops) == 2)
    for query in (
        two_hop,
        "",
        f"director of {film} and {song}",  # two entities
        f"director {film} setting",  # two relations
        f"director of {city}",  # an entity of another type
        f"directors of {film}",  # not the exact word
        f"director of {film}x",
        "director of nobody",
        film,
    ):
        assert WORLD.lookup(query) is None, query
        assert WORLD.reply(query, dict.fromkeys(DOMAINS, 1.0)) == "I do not know."


WORDS = st.sampled_from(
    [*sorted(TYPE)[:40], *(relation.name for relation in RELATIONS), "of", "the", "?", ":", "é", "\x00"]
)


@given(st.lists(WORDS, max_size=6), st.text(max_size=20))
def test_lookup_of_any_words_agrees_with_a_scan_of_all_facts(words, noise):
    query = " ".join([*words, noise])
    present = set(re.findall(r"\w+", query.lower()))
    relations = [relation.name for relation in RELATIONS if relation.name in present]
    entities = [name for name in TYPE if name.lower() in present]
    single = len(relations) == len(entities) == 1
    expected = [f for f in WORLD.facts if single and (f.relation, f.subject) == (relations[0], entities[0])]
    assert WORLD.lookup(query) == (expected[0] if expected else None)


def test_texts_hold_every_word_that_the_world_can_say():
    said = {word for text in WORLD.texts() for word in text.replace(".", " ").replace("?", " ").split()}
    assert set(TYPE) <= said
    for question in all_questions()[::50]:
        assert set(question.text.rstrip("?").split()) <= said
    assert set("I do not know".split()) <= said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"films": 2}, r"synthetic\.world\.films is 2; at least 3"),
        ({"rivers": 10**6}, r"synthetic\.world asks for 1000340 entities; there are \d+ names"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        World(SETTINGS | change)


def test_the_smallest_world_stands():
    world = World({"seed": 0} | dict.fromkeys(COUNTS.values(), 3))
    assert len(world.facts) == 3 * len(RELATIONS)
    assert all(fact.mistaken != fact.object for fact in world.facts)


def test_simulated_pool_keeps_its_rule():
    """One best model per domain by 7 points; a cheap one within 10 points if it is expensive; all others below .3."""
    expensive = max(PRICES, key=PRICES.get)
    assert PRICES[expensive] >= 5 * sorted(PRICES.values())[-2]
    for domain in DOMAINS:
        ranked = sorted(SKILLS, key=lambda name: -SKILLS[name][domain])
        scores = [SKILLS[name][domain] for name in ranked]
        assert scores[0] - scores[1] >= 0.07
        if ranked[0] == expensive:
            assert scores[0] - scores[1] <= 0.10
            assert max(scores[2:]) < 0.3
        else:
            assert max(scores[1:]) < 0.3
    assert sum(max(SKILLS, key=lambda name: SKILLS[name][domain]) == expensive for domain in DOMAINS) == 2
    cheapest = min(PRICES, key=PRICES.get)
    assert max(SKILLS[cheapest].values()) < 0.3
