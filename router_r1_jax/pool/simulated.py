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
from router_r1_jax.pool.limits import TokenBucket

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
        for card in cards:
            _, other = card.simulated.downgrade
            if other and other not in self._cards:
                raise ConfigError(
                    f"the simulated downgrade of model {card.model!r} is to {other!r}; name a served model id"
                )
        self._asked: Counter[tuple[str, str]] = Counter()
        self._requests: Counter[str] = Counter()
        self._limits = {card.model: TokenBucket(card.simulated.requests_per_minute) for card in cards}
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The models' ids."""
        return tuple(self._cards)

    def next_request(self, model: str) -> int:
        """The number of this request among all to the model, from 0."""
        with self._lock:
            self._requests[model] += 1
            return self._requests[model] - 1

    def retry_after(self, model: str, now: float) -> float:
        """Seconds after which a request may come again, 0 if this one is within the model's rate."""
        wait = self._limits[model].take(1, now)
        if wait:
            self._limits[model].give_back(1)
        return wait

    def answer(self, model: str, query: str, max_tokens: int | None = None, number: int = 0) -> Answer:
        """The reply of a model to a query, cut to `max_tokens` tokens. KeyError for an unknown model."""
        first, other = self._cards[model].simulated.downgrade
        skill = self._cards[other if other and number >= first else model].performance
        text = self._world.reply(query, skill)
        ends = [match.end() for match in _TOKEN.finditer(text)]
        truncated = max_tokens is not None and len(ends) > max_tokens
        if truncated:
            ends = ends[:max_tokens]
            text = text[: ends[-1]] if ends else ""
        return Answer(text, count_tokens(query), len(ends), truncated)

    def fault(self, model: str, query: str, number: int = 0) -> str:
        """How this request is to fail: "failure", "malformed", "wrong_type", "dropped", or "" for not at all.

        Drawn from model, query and how often it was asked; in an outage every request fails.
        """
        faults = self._cards[model].simulated
        with self._lock:
            asked = self._asked[model, query]
            self._asked[model, query] += 1
        digest = hashlib.blake2b(f"{model}\n{asked}\n{query}".encode("utf-8", "replace"), digest_size=8).digest()
        if faults.outage[0] <= number < faults.outage[1]:
            return "failure"
        draw = int.from_bytes(digest) / 2**64
        for kind in ("failure", "malformed", "wrong_type", "dropped"):
            draw -= getattr(faults, f"{kind}_rate")
            if draw < 0:
                return kind
        return ""

    def latency(self, model: str, number: int = 0) -> float:
        """Seconds for one reply: log-normal around the card's latency. No result depends on it, so any draw will do."""
        requests, seconds = self._cards[model].simulated.slow_start
        slow = seconds if number < requests else 0.0
        return slow + (self._cards[model].latency or 0.0) * math.exp(random.gauss(0.0, _LATENCY_SPREAD))


def count_tokens(text: str) -> int:
    """Tokens as the simulated models count them: words and punctuation marks."""
    return len(_TOKEN.findall(text))
