"""Scripted episodes of the warm start, and the exercises of its curriculum: recited cards, read tables, copying.

All of them but the copied sequences are lists of pieces (text, trained). The router is trained to say the pieces whose
`trained` is True; the other pieces are given to it.

Scripted episodes teach the format, the decomposition of two-hop questions and the copying of replies. They choose
models uniformly at random, and a reply is right or wrong as the chosen model is. RL decides which model to ask.
"""

from collections.abc import Sequence

import numpy as np

from router_r1_jax import prompts, protocol
from router_r1_jax.pool.cards import Card
from router_r1_jax.synthetic.world import Question, World, claim, query_text

Pieces = list[tuple[str, bool]]


def scripted_episode(
    question: Question, world: World, candidates: Sequence[Card], rng: np.random.Generator, *, template: str
) -> Pieces:
    """The response to a question: the router thinks, calls, gets a reply, and so on, and at last answers.

    A think segment names the relation, the entity, the domain, a score that a card states for the domain, and then the
    model of that card, as the cards in the prompt `template` do. A small router needs all of them. If it only saw the
    entity in the query, it would not learn to ask. If the model stood directly behind the domain, RL would have to
    learn a table of names, instead of reading the scores. If a reply is wrong, the episode goes on with it.
    """
    pieces = []
    entity = question.hops[0].subject
    for hop in question.hops:
        fact = world.fact(hop.relation, entity)
        card = candidates[rng.integers(len(candidates))]
        query = query_text(fact.relation, entity)
        score, name = prompts.looked_up(template, fact.domain, card)
        thought = f"<think> {fact.relation} of {entity} :{score}{name} </think>\n"
        pieces.append((f"{thought}<search> {card.name}: {query} </search>", True))
        pieces.append((protocol.information_block(world.reply(query, card.performance)), False))
        entity = claim(fact, card.performance)
    pieces.append((f"<think> {entity} </think>\n<answer> {entity} </answer>", True))
    return pieces


def recited_cards(candidates: Sequence[Card], rng: np.random.Generator, count: int, *, template: str) -> Pieces:
    """`count` texts such as " film 97 : Titan", with random cards and random domains. The domain is given.

    This is what a think segment says of a model after the domain. An episode looks up one or two models only.
    """
    pieces = []
    for _ in range(count):
        card = candidates[rng.integers(len(candidates))]
        domain = list(card.performance)[rng.integers(len(card.performance))]
        score, name = prompts.looked_up(template, domain, card)
        pieces += [(f" {domain}", False), (score.removeprefix(f" {domain}") + name, True)]
    return pieces


def recited_lines(candidates: Sequence[Card], rng: np.random.Generator, *, lines: int, count: int) -> Pieces:
    """`lines` random lines of the candidates' table, and `count` of their entries. The names are to be said.

    This exercise in reading can be as short as one line of two models. Prices and latencies are among its lines only if
    there are more lines than topics, because models often share a price, and then it tells no name. For the same reason
    an entry is left out if its value occurs twice in its line. Entries are sampled with replacement: a name that was
    said before can also be read there, which is the same skill over a shorter distance.
    """
    table = prompts.card_table(candidates)
    topics = {topic for card in candidates for topic in card.performance}
    chosen = sorted(rng.permutation(len(table)), key=lambda i: table[i].label not in topics)[:lines]
    shown = [table[i] for i in rng.permutation(chosen)]
    unique = [
        (line.label, value, name)
        for line in shown
        for value, name in line.entries
        if [other for other, _ in line.entries].count(value) == 1
    ]
    pieces = [("\n".join(map(str, shown)) + "\n", False)]
    for i in rng.integers(len(unique), size=count if unique else 0):
        label, value, name = unique[i]
        pieces += [(f" {label} {value}", False), (f" {name}", True)]
    return pieces


def repeating_sequences(
    rng: np.random.Generator, batch: int, length: int, vocab_size: int, *, periods: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Random token sequences that repeat themselves, each with a random period from `periods` (both ends included).

    Returns tokens int32 [batch, length] and mask bool [batch, length], which is True if the token repeats an earlier
    one. Only these tokens can be predicted, and predicting them is copying.
    """
    period = rng.integers(periods[0], periods[1], size=(batch, 1), endpoint=True)
    pattern = rng.integers(vocab_size, size=(batch, periods[1]))
    position = np.arange(length)[None, :]
    tokens = np.take_along_axis(pattern, position % period, axis=1)
    return tokens.astype(np.int32), position >= period
