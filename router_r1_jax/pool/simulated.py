"""What simulated models say: the world's replies at each card's skill, with token counts, faults and latency."""

import hashlib
import math
import random
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from router_r1_jax.config import ConfigError
from router_r1_jax.pool.cards import Card

_TOKEN = re.compile(r"\w+|[^\w\s]")
_LATENCY_SPREAD = 0.3  # standard deviation of the logarithm of the latency


class RepliesToQueries(Protocol):
    """The part of `data.world.World` that is needed here."""

    def reply(self, query: str, skill: Mapping[str, float]) -> str:
        """What a model of this skill per domain answers, the same every time."""


@dataclass(frozen=True)
class Answer:
    """One simulated reply. `truncated`: it was cut at the tokens that were asked for."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    truncated: bool


class SimulatedModels:
    """The models of the cards, by provider's id. Text and tokens depend on model and query alone."""

    def __init__(self, world: RepliesToQueries, cards: Sequence[Card]) -> None:
        """Raises ConfigError where two cards have one model id."""
        self._world = world
        self._cards = {card.model: card for card in cards}
        if len(self._cards) < len(cards):
            twice = Counter(card.model for card in cards).most_common(1)[0][0]
            raise ConfigError(f"pool.models holds two simulated models of model id {twice!r}; give each its own")
        self._asked: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The models' ids."""
        return tuple(self._cards)

    def answer(self, model: str, query: str, max_tokens: int | None = None) -> Answer:
        """The reply of a model to a query, cut to `max_tokens` tokens. KeyError for an unknown model."""
        text = self._world.reply(query, self._cards[model].performance)
        ends = [match.end() for match in _TOKEN.finditer(text)]
        truncated = max_tokens is not None and len(ends) > max_tokens
        if truncated:
            ends = ends[:max_tokens]
            text = text[: ends[-1]] if ends else ""
        return Answer(text, count_tokens(query), len(ends), truncated)

    def fails(self, model: str, query: str) -> bool:
        """Whether this request is to be answered with an error: drawn from model, query and how often it was asked."""
        with self._lock:
            asked = self._asked[model, query]
            self._asked[model, query] += 1
        digest = hashlib.blake2b(f"{model}\n{asked}\n{query}".encode("utf-8", "replace"), digest_size=8).digest()
        return int.from_bytes(digest) < self._cards[model].failure_rate * 2**64

    def latency(self, model: str) -> float:
        """Seconds for one reply: log-normal around the card's latency. No result depends on it, so any draw will do."""
        return (self._cards[model].latency or 0.0) * math.exp(random.gauss(0.0, _LATENCY_SPREAD))


def count_tokens(text: str) -> int:
    """Tokens as the simulated models count them: words and punctuation marks."""
    return len(_TOKEN.findall(text))
