"""Baselines at work: questions to the real pool, and episodes that are scored by the very code that scores the router.

A baseline's answer is written down as the router would have written it (a call, its reply, an answer), so that records,
figures, plots and the report page apply as they are.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from router_r1_jax import protocol
from router_r1_jax.baselines.decompose import PREVIOUS, Decompose
from router_r1_jax.baselines.interface import Baseline, TrainRecord, Trial
from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.pool.cards import Card
from router_r1_jax.pool.outcomes import Reply
from router_r1_jax.pool.pool import Pool
from router_r1_jax.reward import exact_match, f1_score

THREADS = 32  # questions asked at a time

Ask = Callable[[Card, str], Reply]


@dataclasses.dataclass(frozen=True)
class CalledEpisode:
    """What `evaluation.records.make_records` reads of an episode."""

    text: str
    replies: tuple[Reply, ...]
    stop: str = "answer"


def answer_in(reply: str) -> str:
    """The answer that a model's reply gives: behind its last "Answer:", or behind "is" in one plain sentence, or all.

    External models answer in their own way; the router reads their replies, and a baseline has only such a rule.
    """
    _, mark, behind = reply.rpartition("Answer:")
    if mark and behind.strip():
        return behind.strip().partition("\n")[0].strip().rstrip(".")
    sentence = reply.strip()
    if "\n" not in sentence and sentence.endswith(".") and sentence.count(" is ") == 1:
        return sentence.partition(" is ")[2].rstrip(".").strip()
    return sentence


def asker(pool: Pool, cards: Sequence[Card], *, episode: str, split: str) -> Ask:
    """A function that asks one model one question and waits; calls of an episode are counted from 0."""
    count = iter(range(1_000_000))

    def ask(card: Card, query: str) -> Reply:
        route = f"{card.name}: {query}"
        return pool.respond(route, cards=cards, episode=episode, call=next(count), step=0, split=split).result()

    return ask


def try_all(
    pool: Pool,
    cards: Sequence[Card],
    questions: Sequence[QuestionRecord],
    *,
    split: str,
    on_finish: Callable[[], Any] = lambda: None,
) -> list[TrainRecord]:
    """Put every question to every model: what baselines are fitted on. `on_finish` hears of every question."""

    def tried(question: QuestionRecord) -> TrainRecord:
        trials = {}
        for card in cards:
            reply = asker(pool, cards, episode=f"{split}-try-{question.id}-{card.key}", split=split)(
                card, question.question
            )
            answer = answer_in(reply.text)
            trials[card.key] = Trial(reply, exact_match(answer, question.golds), f1_score(answer, question.golds))
        on_finish()
        return TrainRecord(question.question, trials)

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(tried, questions))


def answer_all(
    pool: Pool,
    cards: Sequence[Card],
    baseline: Baseline,
    questions: Sequence[QuestionRecord],
    *,
    split: str,
    name: str,
    decompose: Decompose | None = None,
    on_finish: Callable[[], Any] = lambda: None,
) -> list[CalledEpisode]:
    """An episode per question: one choice of the baseline, or one for each part that `decompose` finds."""

    def answered(question: QuestionRecord) -> CalledEpisode:
        ask = asker(pool, cards, episode=f"{split}-{name}-{question.id}", split=split)
        asked: list[Reply] = []  # the calls of the decomposition: paid, but no part of the answer

        def ask_aside(card: Card, query: str) -> Reply:
            asked.append(ask(card, query))
            return asked[-1]

        parts = decompose(question.question, ask_aside) if decompose else [question.question]
        calls, answer = [], ""
        for part in parts:
            query = part.replace(PREVIOUS, answer)
            replies = list(_until_accepted(baseline, query, cards, ask))
            calls += replies
            answer = answer_in(replies[-1].text)
        on_finish()
        episode = write_episode(calls, answer, cards, thought=name)
        return dataclasses.replace(episode, replies=(*asked, *episode.replies))

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(answered, questions))


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


def write_episode(replies: Sequence[Reply], answer: str, cards: Sequence[Card], *, thought: str) -> CalledEpisode:
    """Calls and an answer as a response of the router's protocol; replies come neutralised, queries are made so."""
    names = {card.key: card.name for card in cards}
    text = ""
    for reply in replies:
        query = protocol.neutralize(reply.query)
        text += f"<think> {thought} </think>\n<search> {names.get(reply.model, 'nobody')}: {query} </search>"
        text += protocol.information_block(reply.text)
    text += f"<think> {thought} </think>\n<answer> {answer} </answer>"
    return CalledEpisode(text, tuple(replies))


def hindsight(records: Sequence[TrainRecord], cards: Sequence[Card], *, thought: str = "oracle") -> list[CalledEpisode]:
    """The oracle of one call: per question the cheapest of the models that were right, else of the best by F1."""
    episodes = []
    for record in records:
        best = max(record.trials.values(), key=lambda trial: (trial.exact_match, trial.f1, -trial.reply.charged))
        episodes.append(write_episode([best.reply], answer_in(best.reply.text), cards, thought=thought))
    return episodes
