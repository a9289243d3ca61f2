"""HTTP client: one query to one model with retry, exponential backoff, deadline, rate limit and circuit breaker."""

import dataclasses
import json
import logging
import random
import threading
import time
from collections import defaultdict
from collections.abc import Mapping

from ml_collections import ConfigDict

from router_r1_jax.pool.cards import Card
from router_r1_jax.pool.http import Transport
from router_r1_jax.pool.outcomes import Completion, Outcome, provider_fault
from router_r1_jax.pool.providers import Provider, tokens_at_most
from router_r1_jax.pool.rate_limits import CircuitBreaker, TokenBucket

_log = logging.getLogger(__name__)


class Client:
    """Asks models over HTTP. Thread-safe."""

    def __init__(self, pool_config: ConfigDict, providers: Mapping[str, Provider]) -> None:
        """Reads the keys of `providers`; raises ConfigError if one is missing."""
        self._config = pool_config
        self._providers = dict(providers)
        self._transports = {name: Transport(provider) for name, provider in providers.items()}
        self._requests = {name: TokenBucket(provider.requests_per_minute) for name, provider in providers.items()}
        self._tokens = {name: TokenBucket(provider.tokens_per_minute) for name, provider in providers.items()}
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
        request = self._providers[card.provider].body(card, query)
        body = json.dumps(request | {"stream": False}).encode()  # some servers stream unless they are told not to
        tokens = tokens_at_most(request)
        completions: list[Completion] = []  # of all attempts
        while True:
            completion, retry_after = self._attempt(card, body, tokens, deadline)
            completions.append(completion)
            if retry_after is None:
                break
            # Half of the pause is random, so that calls that failed together do not retry together.
            pause = min(self._config.backoff * 2.0 ** min(len(completions) - 1, 30), self._config.backoff_max)
            pause = max(pause * random.uniform(0.5, 1.0), retry_after)
            if time.monotonic() + pause >= deadline or self._closed.wait(pause):
                break
        completion = dataclasses.replace(
            completion,
            latency=time.monotonic() - started,
            attempts=sum(c.attempts for c in completions),
            wasted_prompt_tokens=sum(c.wasted_prompt_tokens for c in completions),
            wasted_completion_tokens=sum(c.wasted_completion_tokens for c in completions),
        )
        self._warn_once(card, completion)
        return completion

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

    def _attempt(self, card: Card, body: bytes, reserved: int, deadline: float) -> tuple[Completion, float | None]:
        """Send one request when circuit breaker and rate limits permit it; returns what `Transport.post` returns.

        `reserved` is the number of tokens that the request may use.
        """
        provider, breaker = self._providers[card.provider], self._breakers[card.key]
        while delay := breaker.delay(now := time.monotonic()):
            if now + delay >= deadline or self._closed.wait(min(delay, self._config.backoff)):
                why = f"not sent: the model failed too often (pool.circuit_breaker): {breaker.last_error}"
                return Completion("", Outcome.UNAVAILABLE, attempts=0, error=why), None
        requests, tokens = self._requests[provider.name], self._tokens[provider.name]
        pause = max(requests.take(1, now), tokens.take(reserved, now))
        if pause and (now + pause >= deadline or self._closed.wait(pause)):
            requests.give_back(1)
            tokens.give_back(reserved)
            why = f"not sent: {provider.field} lets no request through before the deadline"
            return Completion("", Outcome.RATE_LIMITED, attempts=0, error=why), None
        until = min(time.monotonic() + provider.request_timeout, deadline)
        completion, retry_after = self._transports[provider.name].post(body, until)
        used = completion.prompt_tokens + completion.completion_tokens
        used += completion.wasted_prompt_tokens + completion.wasted_completion_tokens
        if used:
            tokens.give_back(reserved - used)
        if completion.outcome in (Outcome.TIMEOUT, Outcome.UNAVAILABLE):
            breaker.record_failure(completion.error, time.monotonic())
        else:
            breaker.record_success()
        return completion, retry_after

    def _warn_once(self, card: Card, completion: Completion) -> None:
        """Log the first fault of each kind per model, so that a wrong key is seen before someone reads the ledger."""
        outcome = completion.outcome
        if provider_fault(outcome) and (card.key, outcome) not in self._warned:
            self._warned.add((card.key, outcome))
            _log.warning(
                f"model {card.key!r} ({card.provider}): {outcome} after {completion.attempts} attempts: "
                f"{completion.error}; further ones only in the ledger"
            )
