"""Scripted episodes for the warm start, and the copying and reading curriculum that comes before them.

The script shows the format, the splitting of a two-hop question and the copying of replies. Its choice of model is
uniformly random and its replies are right or wrong as the chosen model is, so that whom to ask is left to RL.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from router_r1_jax import prompts, protocol
from router_r1_jax.data.world import Question, World, claim, query_text


class RosterCard(Protocol):
    """A model as the router sees it: the shown name and the skill by domain."""

    name: str
    performance: Mapping[str, float]


def scripted_episode(
    question: Question, world: World, roster: Sequence[RosterCard], rng: np.random.Generator, *, template: str
) -> list[tuple[str, bool]]:
    """The response to a question in pieces: True where the router speaks (loss), False where a reply is injected.

    Each think segment names the relation, the entity, the domain, a score that some card states for that domain, and
    then that card's model, as the cards of the prompt's `template` do. With the entity in the query alone a small
    router learnt nothing in 600 steps; and with the model named directly behind the domain, RL had to learn a table of
    names instead of what the scores say. A wrong reply is carried on as it is.
    """
    pieces = []
    entity = question.hops[0].subject
    for hop in question.hops:
        fact = world.fact(hop.relation, entity)
        card = roster[rng.integers(len(roster))]
        query = query_text(fact.relation, entity)
        stated, name = prompts.looked_up(template, fact.domain, card)
        thought = f"<think> {fact.relation} of {entity} :{stated}{name} </think>\n"
        pieces.append((f"{thought}<search> {card.name}: {query} </search>", True))
        pieces.append((protocol.information_block(world.reply(query, card.performance)), False))
        entity = claim(fact, card.performance)
    pieces.append((f"<think> {entity} </think>\n<answer> {entity} </answer>", True))
    return pieces


def recited_cards(
    roster: Sequence[RosterCard], rng: np.random.Generator, count: int, *, template: str
) -> list[tuple[str, bool]]:
    """`count` times " film 97 : Titan" about random domains of random cards, in pieces: True where the router speaks.

    What a think segment says of a model once the domain is named, many times over: an episode looks up one or two
    models only.
    """
    pieces = []
    for _ in range(count):
        card = roster[rng.integers(len(roster))]
        domain = list(card.performance)[rng.integers(len(card.performance))]
        stated, name = prompts.looked_up(template, domain, card)
        pieces += [(f" {domain}", False), (stated.removeprefix(f" {domain}") + name, True)]
    return pieces


def recited_lines(
    roster: Sequence[RosterCard], rng: np.random.Generator, *, lines: int, count: int
) -> list[tuple[str, bool]]:
    """`lines` random lines of the roster's table and `count` of their entries, in pieces: True where a name is said.

    A lesson in reading that can be made as short as one line of two models. Prices and latencies stand in it only
    where there are more lines than topics: models often share one, and then it tells no name. Entries are drawn with
    replacement: one that was said before can be read on from there, which is the same motion over a shorter way.
    Entries whose value stands twice in their line are left out.
    """
    table = prompts.card_table(roster)
    topics = {topic for card in roster for topic in card.performance}
    drawn = sorted(rng.permutation(len(table)), key=lambda i: table[i].label not in topics)[:lines]
    shown = [table[i] for i in rng.permutation(drawn)]
    clear = [
        (line.label, value, name)
        for line in shown
        for value, name in line.entries
        if [other for other, _ in line.entries].count(value) == 1
    ]
    pieces = [("\n".join(map(str, shown)) + "\n", False)]
    for i in rng.integers(len(clear), size=count if clear else 0):
        label, value, name = clear[i]
        pieces += [(f" {label} {value}", False), (f" {name}", True)]
    return pieces


def repeating_sequences(
    rng: np.random.Generator, batch: int, length: int, vocab_size: int, *, periods: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Random token sequences, each repeating with its own period, drawn from `periods` (both ends included).

    Returns tokens int32 [batch, length] and mask bool [batch, length], True where the token repeats an earlier one:
    only those can be predicted, and predicting them is copying.
    """
    period = rng.integers(periods[0], periods[1], size=(batch, 1), endpoint=True)
    pattern = rng.integers(vocab_size, size=(batch, periods[1]))
    position = np.arange(length)[None, :]
    tokens = np.take_along_axis(pattern, position % period, axis=1)
    return tokens.astype(np.int32), position >= period
