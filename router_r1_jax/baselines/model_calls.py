"""Calls of the external models by baselines, and episodes that are scored by the same code as the router's.

A baseline's answer is written down as the router would have written it: a call, its reply, an answer. Records, metrics,
plots and the report page therefore work unchanged.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from router_r1_jax import protocol
from router_r1_jax.baselines.base import Baseline, Example, Trial
from router_r1_jax.baselines.decompose import PREVIOUS, Ask, Decompose
from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.pool.cards import Card
from router_r1_jax.pool.outcomes import Reply
from router_r1_jax.pool.pool import Pool
from router_r1_jax.reward import exact_match, f1_score
from router_r1_jax.rollout import Episode

THREADS = 32  # questions asked at a time


def answer_in(reply: str) -> str:
    """The answer in a model's reply: behind its last "Answer:", or behind "is" in one plain sentence, or the whole.

    External models answer in their own way. The router reads their replies; a baseline has only such a rule.
    """
    _, mark, behind = reply.rpartition("Answer:")
    if mark and behind.strip():
        return behind.strip().partition("\n")[0].strip().rstrip(".")
    sentence = reply.strip()
    if "\n" not in sentence and sentence.endswith(".") and sentence.count(" is ") == 1:
        return sentence.partition(" is ")[2].rstrip(".").strip()
    return sentence


def try_all_models(
    pool: Pool, cards: Sequence[Card], questions: Sequence[QuestionRecord], *, split: str
) -> Iterator[Example]:
    """Ask every model every question, and yield one example per question, in order. Baselines are fitted on them."""

    def try_question(question: QuestionRecord) -> Example:
        trials = {}
        for card in cards:
            ask = _asker(pool, cards, episode=f"{split}-try-{question.id}-{card.key}", split=split)
            reply = ask(card, question.question)
            answer = answer_in(reply.text)
            trials[card.key] = Trial(reply, exact_match(answer, question.golds), f1_score(answer, question.golds))
        return Example(question.question, trials)

    with ThreadPoolExecutor(THREADS) as threads:
        yield from threads.map(try_question, questions)


def run_baseline(
    pool: Pool,
    cards: Sequence[Card],
    baseline: Baseline,
    questions: Sequence[QuestionRecord],
    *,
    split: str,
    name: str,
    decompose: Decompose | None = None,
) -> Iterator[Episode]:
    """Yield one episode per question, in order.

    The baseline chooses a model for the question, or one for each part that `decompose` finds.
    """

    def answer(numbered: tuple[int, QuestionRecord]) -> Episode:
        number, question = numbered
        ask = _asker(pool, cards, episode=f"{split}-{name}-{question.id}", split=split)
        decomposing: list[Reply] = []  # these calls are charged, but they are no part of the answer

        def ask_for_parts(card: Card, query: str) -> Reply:
            decomposing.append(ask(card, query))
            return decomposing[-1]

        parts = decompose(question.question, ask_for_parts) if decompose else [question.question]
        replies, answer = [], ""
        for part in parts:
            replies += _until_accepted(baseline, part.replace(PREVIOUS, answer), cards, ask)
            answer = answer_in(replies[-1].text)
        episode = write_episode(number, replies, answer, cards, thought=name)
        episode.replies[:0] = decomposing
        return episode

    with ThreadPoolExecutor(THREADS) as threads:
        yield from threads.map(answer, enumerate(questions))


def write_episode(
    number: int, replies: Sequence[Reply], answer: str, cards: Sequence[Card], *, thought: str
) -> Episode:
    """Calls and an answer in the router's protocol. Replies are neutralised already; queries are neutralised here."""
    names = {card.key: card.name for card in cards}
    text = ""
    for reply in replies:
        query = protocol.neutralize(reply.query)
        text += f"<think> {thought} </think>\n<search> {names.get(reply.model, 'nobody')}: {query} </search>"
        text += protocol.information_block(reply.text)
    text += f"<think> {thought} </think>\n<answer> {answer} </answer>"
    return Episode(number, prompt=(), text=text, replies=list(replies), stop="answer")


def oracle_episodes(examples: Sequence[Example], cards: Sequence[Card]) -> list[Episode]:
    """The oracle of one call: per question the cheapest model that was right, or else the best by F1."""
    episodes = []
    for number, example in enumerate(examples):
        best = max(example.trials.values(), key=lambda trial: (trial.exact_match, trial.f1, -trial.reply.charged))
        episodes.append(write_episode(number, [best.reply], answer_in(best.reply.text), cards, thought="oracle"))
    return episodes


def _asker(pool: Pool, cards: Sequence[Card], *, episode: str, split: str) -> Ask:
    """A function that asks one model one question and waits; the calls of an episode are counted from 0."""
    call = itertools.count()

    def ask(card: Card, query: str) -> Reply:
        route = f"{card.name}: {query}"
        return pool.respond(route, cards=cards, episode=episode, call=next(call), step=0, split=split).result()

    return ask


def _until_accepted(baseline: Baseline, query: str, cards: Sequence[Card], ask: Ask) -> Iterator[Reply]:
    """Replies to one query, until the baseline accepts one or has asked every model."""
    left = list(cards)
    while left:
        key = baseline.choose(query, left)
        card = next(card for card in left if card.key == key)
        left.remove(card)
        reply = ask(card, query)
        yield reply
        if baseline.accept(query, key, reply.text):
            return
