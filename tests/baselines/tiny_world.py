"""A small world whose models answer at once: baselines are fitted and scored on it, without HTTP."""

import functools
from concurrent.futures import Future
from typing import Any

from router_r1_jax.baselines.model_calls import answer_in, run_baseline, try_all_models
from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.pool.cards import Card, route_names
from router_r1_jax.pool.outcomes import Outcome, Reply
from router_r1_jax.protocol import parse_route
from router_r1_jax.reward import exact_match
from router_r1_jax.synthetic.world import World

WORLD = World(dict(seed=3, films=40, songs=40, clubs=40, persons=40, cities=40, countries=8, rivers=8))
SKILLS = {
    "Titan": (12.0, dict(film=0.95, music=0.95, people=0.2, places=0.2, sport=0.2)),
    "Reel": (0.9, dict(film=0.2, music=0.1, people=0.1, places=0.1, sport=0.95)),
    "Aria": (1.2, dict(film=0.1, music=0.1, people=0.95, places=0.1, sport=0.1)),
    "Atlas": (0.6, dict(film=0.1, music=0.1, people=0.1, places=0.95, sport=0.1)),
}


def make_card(name: str) -> Card:
    price, skill = SKILLS[name]
    return Card(name, name, "p", name.lower(), price / 4, price, 0.1, skill, "", ())


CARDS = tuple(map(make_card, SKILLS))


class WorldPool:
    """Answers calls from the world at the card's skill, and keeps them."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def respond(self, route_text: str, *, cards, **where) -> Future:
        self.calls.append({"route": route_text} | where)
        route = parse_route(route_text, route_names(cards))
        card = next(card for card in cards if card.name == route.name)
        text = WORLD.reply(route.query, card.performance)
        tokens = len(text.split())
        future: Future = Future()
        future.set_result(
            Reply(
                text,
                Outcome.OK,
                card.key,
                route.query,
                5,
                tokens,
                tokens * card.price_out,
                (5 * card.price_in + tokens * card.price_out) / 1e6,
            )
        )
        return future


def questions(split: str, hops: int | None = 1) -> list[QuestionRecord]:
    """Questions of a split, as a data set gives them: one hop, which one call can answer, or all for None."""
    return [
        QuestionRecord(q.id, "synthetic", q.text, q.golds, len(q.hops), (), ())
        for q in WORLD.questions(split)
        if hops in (None, len(q.hops))
    ]


@functools.cache
def train_examples():
    return list(try_all_models(WorldPool(), CARDS, questions("train"), split="train"))


def mean_em(baseline, asked, decompose=None) -> float:
    """Mean exact match of a baseline's answers."""
    episodes = run_baseline(WorldPool(), CARDS, baseline, asked, split="test", name="b", decompose=decompose)
    answers = [e.text.rpartition("<answer> ")[2].removesuffix(" </answer>") for e in episodes]
    return sum(exact_match(a, q.golds) for a, q in zip(answers, asked, strict=True)) / len(asked)


__all__ = ["CARDS", "WORLD", "WorldPool", "answer_in", "mean_em", "questions", "train_examples"]
