"""Scripted episodes against the parser and the world, and the exercises of the curriculum against loops."""

import collections
import runpy
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from router_r1_jax import protocol
from router_r1_jax.config import base_config
from router_r1_jax.prompts import score_text
from router_r1_jax.synthetic.scripted_episodes import (
    recited_cards,
    recited_lines,
    repeating_sequences,
    scripted_episode,
)
from router_r1_jax.synthetic.world import World

WORLD = World(base_config().synthetic.world)
MODELS = runpy.run_path(str(Path(__file__).parents[2] / "configs/pools/simulated.py"))["models"]()
CARDS = {card.name: card for card in MODELS}
LINES, TABLE = "{cards}{question}", "{table}{question}"  # templates


def first_question(hops):
    return next(question for question in WORLD.questions("train") if len(question.hops) == hops)


def test_layout_of_a_two_hop_episode():
    question = first_question(2)
    one, two = question.hops
    knows_all = next(card for card in MODELS if card.name == "Aria").copy_and_resolve_references()
    with knows_all.performance.unlocked():
        knows_all.performance.update(dict.fromkeys((one.domain, two.domain), 1.0))
    first = f"{one.relation} of {one.subject}"
    second = f"{two.relation} of {one.object}"
    assert scripted_episode(question, WORLD, [knows_all], np.random.default_rng(0), template=LINES) == [
        (f"<think> {first} : {one.domain} 100 : Aria </think>\n<search> Aria: {first}? </search>", True),
        (f"\n\n<information> The {first} is {one.object}. </information>\n\n", False),
        (f"<think> {second} : {two.domain} 100 : Aria </think>\n<search> Aria: {second}? </search>", True),
        (f"\n\n<information> The {second} is {two.object}. </information>\n\n", False),
        (f"<think> {two.object} </think>\n<answer> {two.object} </answer>", True),
    ]


def test_every_episode_follows_from_what_the_chosen_models_reply():
    """Re-reads each episode with the protocol's parser and asks the world again."""
    rng = np.random.default_rng(1)
    right = collections.Counter()
    for question in WORLD.questions("train")[::3]:
        pieces = scripted_episode(question, WORLD, MODELS, rng, template=LINES)
        segments = protocol.parse_response("".join(text for text, _ in pieces))
        segments = [segment for segment in segments if segment.kind != "text" or segment.text.strip()]
        assert [segment.kind for segment in segments] == ["think", "search", "information"] * len(question.hops) + [
            "think",
            "answer",
        ]
        assert [sampled for _, sampled in pieces] == [True, False] * len(question.hops) + [True]
        entity = question.hops[0].subject
        for hop, (think, search, information) in zip(
            question.hops, zip(*[iter(segments)] * 3, strict=False), strict=True
        ):
            call = protocol.parse_route(search.text, list(CARDS))
            assert call.query == f"{hop.relation} of {entity}?"
            score = f"{100 * CARDS[call.name].performance[hop.domain]:.0f}"
            assert think.text.strip() == f"{hop.relation} of {entity} : {hop.domain} {score} : {call.name}"
            assert information.text.strip() == WORLD.reply(call.query, CARDS[call.name].performance)
            entity = information.text.strip().removesuffix(".").split()[-1]
        answer = segments[-1].text.strip()
        assert answer == segments[-2].text.strip() == entity
        right[answer in question.golds] += 1
    assert min(right[True], right[False]) > 20  # the replies are not always right, and not always wrong


def test_the_choice_of_model_is_uniform_whatever_the_domain():
    """Chi-square over 2,000 draws per domain; the bound is the 99.99 % point for 4 degrees of freedom."""
    rng = np.random.default_rng(2)
    for domain in ("film", "places"):
        question = next(q for q in WORLD.questions("train") if len(q.hops) == 1 and q.hops[0].domain == domain)
        counts = collections.Counter(
            protocol.parse_response(episode[0][0])[0].text.split()[-1]
            for episode in (scripted_episode(question, WORLD, MODELS, rng, template=LINES) for _ in range(2000))
        )
        assert set(counts) == set(CARDS)
        assert sum((count - 400) ** 2 / 400 for count in counts.values()) < 23.5


def test_repeating_sequences_are_periodic_and_the_mask_is_the_repeats():
    tokens, mask = repeating_sequences(np.random.default_rng(0), 200, 100, 500, periods=(8, 40))
    assert tokens.shape == mask.shape == (200, 100)
    assert tokens.dtype == np.int32 and mask.dtype == bool
    assert 0 <= tokens.min() and tokens.max() < 500
    periods = collections.Counter()
    for row, repeats in zip(tokens.tolist(), mask.tolist(), strict=True):
        period = repeats.index(True)
        assert repeats == [position >= period for position in range(100)]
        assert all(row[position] == row[position - period] for position in range(period, 100))
        assert len(set(row)) > period / 2  # random within a period
        periods[period] += 1
    assert min(periods) == 8 and max(periods) == 40 and len(periods) > 25


def test_recited_cards_name_a_card_that_states_the_score():
    rng = np.random.default_rng(0)
    named = collections.Counter()
    pieces = recited_cards(MODELS, rng, 500, template=LINES)
    for (domain, asked), (entry, said) in zip(pieces[::2], pieces[1::2], strict=True):
        score, colon, name = entry.split()
        assert not asked and said and colon == ":"
        assert score_text(CARDS[name].performance[domain.strip()]) == score
        named[name, domain] += 1
    assert len(named) == 25 and min(named.values()) > 5


def test_where_the_prompt_has_a_table_a_name_follows_its_score_directly():
    question = first_question(1)
    domain = question.hops[0].domain
    (thought, _), *_ = scripted_episode(question, WORLD, [CARDS["Aria"]], np.random.default_rng(0), template=TABLE)
    score = score_text(CARDS["Aria"].performance[domain])
    assert f": {domain} {score} Aria </think>" in thought
    (topic, asked), (entry, said) = recited_cards([CARDS["Pico"]], np.random.default_rng(0), 1, template=TABLE)
    assert (asked, said, entry) == (False, True, f" {score_text(CARDS['Pico'].performance[topic.strip()])} Pico")


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 8))
def test_what_an_exercise_recites_can_be_read_in_its_lines(seed, models, lines):
    """The lines are read back from their text. A value that occurs twice in a line is never asked for."""
    (text, shown), *recited = recited_lines(MODELS[:models], np.random.default_rng(seed), lines=lines, count=12)
    assert not shown and text.endswith("\n")
    table = {}
    for line in text.splitlines():
        dash, *words = line.split()
        (label,), values, names = set(words[::3]), words[1::3], words[2::3]
        assert dash == "-" and label not in table and len(words) == 3 * models
        table[label] = list(zip(values, names, strict=True))
    assert len(table) == min(lines, 7)  # five topics, then price and latency
    assert len({"price", "latency"} & set(table)) == max(min(lines, 7) - 5, 0)
    clear = sum([v for v, _ in line].count(value) == 1 for line in table.values() for value, _ in line)
    assert len(recited) == (24 if clear else 0)
    for (question, asked), (name, said) in zip(recited[::2], recited[1::2], strict=True):
        label, value = question.split()
        assert not asked and said
        assert [n for v, n in table[label] if v == value] == [name.strip()]
