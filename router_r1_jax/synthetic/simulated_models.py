"""Simulated models: the world's replies at the skill of each card, with token counts, latency and fault injection."""

import hashlib
import math
import random
import threading
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from router_r1_jax.config import ConfigError
from router_r1_jax.pool.cards import Card
from router_r1_jax.pool.rate_limits import TokenBucket
from router_r1_jax.synthetic.world import TOKEN, World, count_tokens

_LATENCY_SPREAD = 0.3  # standard deviation of the logarithm of the latency


class Answer(NamedTuple):
    """One simulated reply. `truncated` says whether it was longer than `max_tokens`."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    truncated: bool


class SimulatedModels:
    """The models of the cards, by the provider's model id. Text and tokens depend on model and query alone."""

    def __init__(self, world: World, cards: Sequence[Card]) -> None:
        """Raises ConfigError if two cards have the same model id."""
        self._world = world
        self._cards = {card.model: card for card in cards}
        uses = Counter(card.model for card in cards)
        for model, count in uses.items():
            if count > 1:
                raise ConfigError(f"pool.models holds two simulated models of model id {model!r}; give each its own id")
        self._asked: Counter[tuple[str, str]] = Counter()
        self._requests: Counter[str] = Counter()
        self._limits = {card.model: TokenBucket(card.simulated["requests_per_minute"]) for card in cards}
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The models' ids."""
        return tuple(self._cards)

    def next_request(self, model: str) -> int:
        """The number of a new request among all requests to the model, from 0."""
        with self._lock:
            self._requests[model] += 1
            return self._requests[model] - 1

    def retry_after(self, model: str, now: float) -> float:
        """Seconds until a request may be sent again; 0 if this one is within the model's rate limit."""
        wait = self._limits[model].take(1, now)
        if wait:
            self._limits[model].give_back(1)
        return wait

    def answer(self, model: str, query: str, max_tokens: int | None = None) -> Answer:
        """The model's reply, truncated to `max_tokens` tokens. KeyError for an unknown model."""
        text = self._world.reply(query, self._cards[model].performance)
        ends = [match.end() for match in TOKEN.finditer(text)]
        truncated = max_tokens is not None and len(ends) > max_tokens
        if truncated:
            ends = ends[:max_tokens]
            text = text[: ends[-1]]
        return Answer(text, count_tokens(query), len(ends), truncated)

    def fault(self, model: str, query: str, number: int = 0) -> str:
        """How request `number` fails: "failure", "malformed", "wrong_type" or "dropped"; "" if it does not fail.

        In an outage every request fails. Otherwise a hash decides, over the model, the query and how often the query
        has been asked before; so a retry may succeed.
        """
        faults = self._cards[model].simulated
        with self._lock:
            asked = self._asked[model, query]
            self._asked[model, query] += 1
        first, end = faults["outage"]
        if first <= number < end:
            return "failure"
        digest = hashlib.blake2b(f"{model}\n{asked}\n{query}".encode("utf-8", "replace"), digest_size=8).digest()
        draw = int.from_bytes(digest) / 2**64
        for kind in ("failure", "malformed", "wrong_type", "dropped"):
            draw -= faults[f"{kind}_rate"]
            if draw < 0:
                return kind
        return ""

    def latency(self, model: str, number: int = 0) -> float:
        """Seconds that request `number` takes: log-normal around the card's latency, and random in every run."""
        card = self._cards[model]
        requests, seconds = card.simulated["slow_start"]
        slow = seconds if number < requests else 0.0
        return slow + (card.latency or 0.0) * math.exp(random.gauss(0.0, _LATENCY_SPREAD))
