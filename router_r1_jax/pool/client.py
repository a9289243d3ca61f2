"""The client: one query to one model, asked again after faults that may pass, within deadline and limits."""

import json
import logging
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import replace

from ml_collections import ConfigDict

from router_r1_jax.pool.cards import Card
from router_r1_jax.pool.limits import Breaker, Latencies, RateLimits
from router_r1_jax.pool.outcomes import Completion, Outcome, provider_fault
from router_r1_jax.pool.providers import Provider
from router_r1_jax.pool.transport import Attempt, Transport

_log = logging.getLogger(__name__)


class _Model:
    """What is known of a model's health."""

    def __init__(self, breaker: ConfigDict) -> None:
        self.breaker = Breaker(breaker.failures, breaker.pause, breaker.pause_max)
        self.latencies = Latencies()
        self.trouble = ""  # what its last fault said


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
        self._models: defaultdict[str, _Model] = defaultdict(lambda: _Model(pool_config.breaker))
        most = 2 * sum(provider.concurrency for provider in providers.values())
        self._spare = ThreadPoolExecutor(most, thread_name_prefix="pool-hedge") if pool_config.hedge else None
        self._closed = threading.Event()
        self._warned: set[tuple[str, Outcome]] = set()

    def complete(self, card: Card, query: str) -> Completion:
        """Ask the card's model, again after faults that may pass, for `pool.deadline` seconds in all.

        Only a connection that is taken and then stays silent can overrun that, by at most one request timeout.
        """
        started = time.monotonic()
        give_up = started + self._deadline
        attempts, wasted = 0, [0, 0]
        while True:
            attempt = self._try(card, query, give_up)
            attempts += attempt.sent
            wasted[0] += attempt.wasted_prompt_tokens
            wasted[1] += attempt.wasted_completion_tokens
            failed = provider_fault(attempt.outcome)
            if failed:
                wasted[0] += attempt.prompt_tokens
                wasted[1] += attempt.completion_tokens
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
            prompt_tokens=0 if failed else attempt.prompt_tokens,
            completion_tokens=0 if failed else attempt.completion_tokens,
            latency=time.monotonic() - started,
            attempts=attempts,
            error=attempt.error,
            cached_tokens=attempt.cached_tokens,
            wasted_prompt_tokens=wasted[0],
            wasted_completion_tokens=wasted[1],
            served=attempt.served,
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
        if self._spare is not None:
            self._spare.shutdown(wait=False, cancel_futures=False)

    def _try(self, card: Card, query: str, give_up: float) -> Attempt:
        """One request, sent when the model's breaker and the provider's limits let it through."""
        provider, model = self._providers[card.provider], self._models[card.key]
        breaker = model.breaker
        while delay := breaker.delay(now := time.monotonic()):
            if now + delay >= give_up or self._closed.wait(min(delay, self._backoff)):
                return _unsent(Outcome.UNAVAILABLE, f"the model failed too often (pool.breaker): {model.trouble}")
        limits, tokens = self._limits[provider.name], provider.tokens_at_most(query)
        pause = limits.take(tokens, now)
        if pause and (now + pause >= give_up or self._closed.wait(pause)):
            limits.cancel(tokens)
            return _unsent(Outcome.RATE_LIMITED, f"{provider.field} lets no request through before the deadline")
        body = json.dumps(provider.body(card.model, query)).encode()
        attempt = self._hedged(card, body, tokens, give_up) if self._spare else self._send(card, body, tokens, give_up)
        if attempt.outcome in (Outcome.TIMEOUT, Outcome.UNAVAILABLE):
            model.trouble = attempt.error
            breaker.failed(time.monotonic())
        else:
            breaker.succeeded()
        return attempt

    def _send(self, card: Card, body: bytes, tokens: float, give_up: float) -> Attempt:
        """One request now, for which `tokens` were taken from the provider's limits."""
        started = time.monotonic()
        until = min(started + self._providers[card.provider].request_timeout, give_up)
        attempt = self._transports[card.provider].post(body, until)
        if used := attempt.prompt_tokens + attempt.completion_tokens:
            self._limits[card.provider].settle(tokens, used)
        if not provider_fault(attempt.outcome):
            self._models[card.key].latencies.add(time.monotonic() - started)
        return attempt

    def _hedged(self, card: Card, body: bytes, tokens: float, give_up: float) -> Attempt:
        """As `_send`, and once more where the first answer is later than 95 of 100; the sooner good one counts.

        The other one is paid too. Where it is still under way, its tokens are taken to be those of the answer: it is
        the same model's to the same question.
        """
        first = self._spare.submit(self._send, card, body, tokens, give_up)
        usual, limits = self._models[card.key].latencies.p95(), self._limits[card.provider]
        if usual is None or wait([first], timeout=usual).done:
            return first.result()
        if limits.take(tokens, time.monotonic()):
            limits.cancel(tokens)
            return first.result()
        requests = {first, self._spare.submit(self._send, card, body, tokens, give_up)}
        done, pending = wait(requests, return_when=FIRST_COMPLETED)
        if pending and all(future.result().again for future in done):
            done, pending = wait(requests)
        best = min((future.result() for future in done), key=lambda attempt: attempt.again)
        others = [future.result() for future in done if future.result() is not best] + [best] * len(pending)
        return replace(
            best,
            sent=2,
            wasted_prompt_tokens=sum(other.prompt_tokens for other in others),
            wasted_completion_tokens=sum(other.completion_tokens for other in others),
        )

    def _warn_once(self, card: Card, attempt: Attempt, attempts: int) -> None:
        """Log the first fault of each kind per model: a wrong key should not wait until someone reads the ledger."""
        if provider_fault(attempt.outcome) and (card.key, attempt.outcome) not in self._warned:
            self._warned.add((card.key, attempt.outcome))
            _log.warning(
                "model %r (%s): %s after %d attempts: %s; further ones only in the ledger",
                card.key, card.provider, attempt.outcome, attempts, attempt.error,
            )  # fmt: skip


def _unsent(outcome: Outcome, why: str) -> Attempt:
    return Attempt(outcome, error=f"not sent: {why}", sent=0)
