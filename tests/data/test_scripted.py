"""Scripted episodes against the parser and the world, and the copying curriculum against a loop."""

import collections
import runpy
from pathlib import Path

import numpy as np

from router_r1_jax import protocol
from router_r1_jax.config import base_config
from router_r1_jax.data.scripted import recited_cards, repeating_sequences, scripted_episode
from router_r1_jax.data.world import World
from router_r1_jax.prompts import score_text

WORLD = World(base_config().data.world)
ROSTER = runpy.run_path(str(Path(__file__).parents[2] / "configs/pools/simulated.py"))["models"]()
CARDS = {card.name: card for card in ROSTER}


def first_question(hops):
    return next(question for question in WORLD.questions("train") if len(question.hops) == hops)


def test_layout_of_a_two_hop_episode():
    question = first_question(2)
    one, two = question.hops
    knows_all = next(card for card in ROSTER if card.name == "Aria").copy_and_resolve_references()
    with knows_all.performance.unlocked():
        knows_all.performance.update(dict.fromkeys((one.domain, two.domain), 1.0))
    first = f"{one.relation} of {one.subject}"
    second = f"{two.relation} of {one.object}"
    assert scripted_episode(question, WORLD, [knows_all], np.random.default_rng(0)) == [
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
        pieces = scripted_episode(question, WORLD, ROSTER, rng)
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
            protocol.parse_response(scripted_episode(question, WORLD, ROSTER, rng)[0][0])[0].text.split()[-1]
            for _ in range(2000)
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
    pieces = recited_cards(ROSTER, rng, 500)
    for (question, asked), (name, said) in zip(pieces[::2], pieces[1::2], strict=True):
        domain, score, colon = question.split()
        assert not asked and said and colon == ":"
        assert score_text(CARDS[name.strip()].performance[domain]) == score
        named[name.strip(), domain] += 1
    assert len(named) == 25 and min(named.values()) > 5
