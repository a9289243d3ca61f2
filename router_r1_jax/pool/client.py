"""HTTP client: one query to one model with retry, exponential backoff, deadline, rate limit and circuit breaker."""

import json
import logging
import random
import threading
import time
from collections import defaultdict
from collections.abc import Mapping

from ml_collections import ConfigDict

from router_r1_jax.pool.cards import Card
from router_r1_jax.pool.http import Attempt, Transport
from router_r1_jax.pool.outcomes import Completion, Outcome, provider_fault
from router_r1_jax.pool.providers import Provider
from router_r1_jax.pool.rate_limits import CircuitBreaker, RateLimits

_log = logging.getLogger(__name__)


class Client:
    """Asks models over HTTP. Thread-safe."""

    def __init__(self, pool_config: ConfigDict, providers: Mapping[str, Provider]) -> None:
        """Reads the keys of `providers`; raises ConfigError if one is missing."""
        self._config = pool_config
        self._providers = dict(providers)
        self._transports = {name: Transport(provider) for name, provider in providers.items()}
        self._limits = {name: RateLimits(p.requests_per_minute, p.tokens_per_minute) for name, p in providers.items()}
        # Card.key -> circuit breaker
        self._breakers = defaultdict(lambda: CircuitBreaker(**pool_config.circuit_breaker))
        self._closed = threading.Event()
        self._warned: set[tuple[str, Outcome]] = set()

    def complete(self, card: Card, query: str) -> Completion:
        """Ask the card's model, and retry after faults that may pass, until `pool.deadline` seconds have passed.

        Only a connection that is accepted and then stays silent can overrun the deadline, by at most one request
        timeout.
        """
        started = time.monotonic()
        deadline = started + self._config.deadline
        body = json.dumps(self._providers[card.provider].body(card.model, query)).encode()
        attempts = wasted_prompt_tokens = wasted_completion_tokens = 0
        while True:
            attempt, sent = self._attempt(card, query, body, deadline)
            attempts += sent
            failed = provider_fault(attempt.outcome)
            if failed:
                wasted_prompt_tokens += attempt.prompt_tokens
                wasted_completion_tokens += attempt.completion_tokens
            if not attempt.retryable:
                break
            # Half of the pause is random, so that calls that failed together do not retry together.
            pause = min(self._config.backoff * 2.0 ** min(attempts - 1, 30), self._config.backoff_max)
            pause = max(pause * random.uniform(0.5, 1.0), attempt.retry_after)
            if time.monotonic() + pause >= deadline or self._closed.wait(pause):
                break
        self._warn_once(card, attempt, attempts)
        return Completion(
            text=attempt.text,
            outcome=attempt.outcome,
            prompt_tokens=0 if failed else attempt.prompt_tokens,
            completion_tokens=0 if failed else attempt.completion_tokens,
            latency=time.monotonic() - started,
            attempts=attempts,
            error=attempt.error,
            cached_tokens=attempt.cached_tokens,
            wasted_prompt_tokens=wasted_prompt_tokens,
            wasted_completion_tokens=wasted_completion_tokens,
            served=attempt.served,
        )

    def check(self) -> None:
        """Raise PoolError for the first provider that does not answer or refuses the key."""
        for transport in self._transports.values():
            transport.check()

    @property
    def closed(self) -> bool:
        """Whether `close` was called. A call that fails after that was ended by the client itself."""
        return self._closed.is_set()

    def close(self) -> None:
        """Drop the connections, and end pauses between retries, so that running calls end with their last attempt."""
        self._closed.set()
        for transport in self._transports.values():
            transport.close()

    def _attempt(self, card: Card, query: str, body: bytes, deadline: float) -> tuple[Attempt, bool]:
        """Send one request when circuit breaker and rate limits permit it; returns also whether it was sent."""
        provider, breaker = self._providers[card.provider], self._breakers[card.key]
        while delay := breaker.delay(now := time.monotonic()):
            if now + delay >= deadline or self._closed.wait(min(delay, self._config.backoff)):
                why = f"not sent: the model failed too often (pool.circuit_breaker): {breaker.last_error}"
                return Attempt(Outcome.UNAVAILABLE, error=why), False
        limits, tokens = self._limits[provider.name], provider.tokens_at_most(query)
        pause = limits.take(tokens, now)
        if pause and (now + pause >= deadline or self._closed.wait(pause)):
            limits.cancel(tokens)
            why = f"not sent: {provider.field} lets no request through before the deadline"
            return Attempt(Outcome.RATE_LIMITED, error=why), False
        attempt = self._transports[provider.name].post(body, min(time.monotonic() + provider.request_timeout, deadline))
        if used := attempt.prompt_tokens + attempt.completion_tokens:
            limits.settle(tokens, used)
        if attempt.outcome in (Outcome.TIMEOUT, Outcome.UNAVAILABLE):
            breaker.record_failure(attempt.error, time.monotonic())
        else:
            breaker.record_success()
        return attempt, True

    def _warn_once(self, card: Card, attempt: Attempt, attempts: int) -> None:
        """Log the first fault of each kind per model, so that a wrong key is seen before someone reads the ledger."""
        if provider_fault(attempt.outcome) and (card.key, attempt.outcome) not in self._warned:
            self._warned.add((card.key, attempt.outcome))
            _log.warning(
                f"model {card.key!r} ({card.provider}): {attempt.outcome} after {attempts} attempts: {attempt.error}; "
                "further ones only in the ledger"
            )
