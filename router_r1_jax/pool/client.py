"""The client: one query to one model, asked again after faults that may pass, within deadline and limits."""

import json
import logging
import random
import threading
import time
from collections.abc import Iterable, Mapping

from ml_collections import ConfigDict

from router_r1_jax.pool.cards import Card
from router_r1_jax.pool.limits import RateLimits
from router_r1_jax.pool.outcomes import Completion, Outcome, provider_fault
from router_r1_jax.pool.providers import Provider
from router_r1_jax.pool.transport import Attempt, Transport

_log = logging.getLogger(__name__)


class Client:
    """Asks models over HTTP. Safe to use from many threads at once."""

    def __init__(self, pool_config: ConfigDict, providers: Mapping[str, Provider]) -> None:
        """Reads the keys of `providers`; raises ConfigError where one is missing."""
        self._deadline = pool_config.deadline
        self._backoff = pool_config.backoff
        self._backoff_max = pool_config.backoff_max
        self._providers = dict(providers)
        self._transports = {name: Transport(provider) for name, provider in providers.items()}
        self._limits = {
            name: RateLimits(provider.requests_per_minute, provider.tokens_per_minute)
            for name, provider in providers.items()
        }
        self._closed = threading.Event()
        self._warned: set[tuple[str, Outcome]] = set()

    def complete(self, card: Card, query: str) -> Completion:
        """Ask the card's model, again after faults that may pass, for `pool.deadline` seconds in all.

        Only a connection that is taken and then stays silent can overrun that, by at most one request timeout.
        """
        started = time.monotonic()
        give_up = started + self._deadline
        attempts = 0
        while True:
            attempt = self._request(self._providers[card.provider], card.model, query, give_up)
            attempts += attempt.sent
            if not attempt.again:
                break
            # Half of the pause is random, so that calls which failed together do not come back together.
            pause = min(self._backoff * 2.0 ** min(attempts - 1, 30), self._backoff_max) * random.uniform(0.5, 1.0)
            pause = max(pause, attempt.pause)
            if time.monotonic() + pause >= give_up or self._closed.wait(pause):
                break
        self._warn_once(card, attempt, attempts)
        return Completion(
            text=attempt.text,
            outcome=attempt.outcome,
            prompt_tokens=attempt.prompt_tokens,
            completion_tokens=attempt.completion_tokens,
            latency=time.monotonic() - started,
            attempts=attempts,
            error=attempt.error,
        )

    def check(self, names: Iterable[str]) -> None:
        """Raise PoolError for the first of these providers that does not answer or refuses the key."""
        for name in names:
            self._transports[name].check()

    @property
    def closed(self) -> bool:
        """Whether `close` was called: faults are then ours."""
        return self._closed.is_set()

    def close(self) -> None:
        """End pauses between retries, so that running calls finish with what they have, and drop the connections."""
        self._closed.set()
        for transport in self._transports.values():
            transport.close()

    def _request(self, provider: Provider, model: str, query: str, give_up: float) -> Attempt:
        """One request, sent when the provider's limits let it through."""
        limits, tokens = self._limits[provider.name], provider.tokens_at_most(query)
        now = time.monotonic()
        wait = limits.take(tokens, now)
        if wait and (now + wait >= give_up or self._closed.wait(wait)):
            limits.cancel(tokens)
            error = f"not sent: {provider.field} lets no request through before the deadline"
            return Attempt(Outcome.RATE_LIMITED, error=error, sent=0)
        body = json.dumps(provider.body(model, query)).encode()
        until = min(time.monotonic() + provider.request_timeout, give_up)
        attempt = self._transports[provider.name].post(body, until)
        if used := attempt.prompt_tokens + attempt.completion_tokens:
            limits.settle(tokens, used)
        return attempt

    def _warn_once(self, card: Card, attempt: Attempt, attempts: int) -> None:
        """Log the first fault of each kind per model: a wrong key should not wait until someone reads the ledger."""
        if provider_fault(attempt.outcome) and (card.key, attempt.outcome) not in self._warned:
            self._warned.add((card.key, attempt.outcome))
            _log.warning(
                "model %r (%s): %s after %d attempts: %s; further ones only in the ledger",
                card.key, card.provider, attempt.outcome, attempts, attempt.error,
            )  # fmt: skip
