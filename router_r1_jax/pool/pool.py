"""The pool: answers the policy's route calls with replies, from the call cache or over HTTP, within a dollar budget.

It runs beside the rollout: `respond` returns a future at once, and threads make the calls. Every call ends with exactly
one outcome and one line in the ledger. With a call cache, equal requests at the same moment are made once (single
flight).
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Self

from ml_collections import ConfigDict

from router_r1_jax.pool.call_cache import CallCache, Request
from router_r1_jax.pool.cards import Card, route_names
from router_r1_jax.pool.client import Client
from router_r1_jax.pool.ledger import Ledger
from router_r1_jax.pool.outcomes import FAULT_TEXT, HAS_TEXT, Completion, Outcome, PoolError, Reply, provider_fault
from router_r1_jax.pool.providers import providers_from_config
from router_r1_jax.protocol import RouteFault, neutralize, parse_route

_PATIENCE = 1.0  # seconds in which running calls may end after Ctrl-C; later ones are paid and lost
_LONGEST = 100_000  # characters of a reply that are used; no token budget needs more, and 16 MB take 6 s to neutralise


class Pool:
    """The external models of `config.pool`, ready to be called. A context manager.

    `ledger` is the cost ledger, and `paid_elsewhere` holds the dollars that the run's other processes have reported.

    Raises ConfigError for an invalid provider or a missing key, and PoolError for a ledger or a call cache that cannot
    be used. In the strict mode of the call cache, no request is sent and no key is needed.
    """

    def __init__(
        self, pool_config: ConfigDict, cards: Sequence[Card], *, ledger_path: str | Path, cache_path: str | Path
    ) -> None:
        providers = providers_from_config(pool_config)
        # Without those that serve no card.
        self._providers = {card.provider: providers[card.provider] for card in cards}
        mode = pool_config.call_cache.mode
        self._budget = pool_config.budget
        self.paid_elsewhere = 0.0
        self._replays = mode in ("replay", "strict")
        self._client = None if mode == "strict" else Client(pool_config, self._providers)
        self._cache = None if mode == "off" else CallCache(cache_path, mode)
        self._lock = threading.Lock()
        # Key of a request in the call cache -> the call that is being made for it.
        self._in_flight: dict[str, Future[Completion]] = {}
        self.ledger = Ledger(ledger_path, price_date=pool_config.price_date)
        self._calls: set[Future[Reply]] = set()  # calls that are queued or running
        # Each provider has its own threads, so that calls that wait for a slow provider do not hold up the others.
        self._threads = {
            name: ThreadPoolExecutor(provider.concurrency, thread_name_prefix=f"pool-{name}")
            for name, provider in self._providers.items()
        }

    def check(self) -> None:
        """Raise PoolError if a provider that serves a card does not answer. A replayed run sends no request."""
        if self._client is not None and not self._replays:
            self._client.check()

    def respond(
        self, route_text: str, *, cards: Sequence[Card], episode: str, call: int, step: int, split: str
    ) -> Future[Reply]:
        """Answer a route call.

        Args:
          route_text: the text inside the route tag.
          cards: the candidates in the episode's prompt.
          episode: id of the episode, unique in the run and the same in a repeated run.
          call: number of the call within the episode, from 0.
          step: the training step, for the ledger.
          split: the split of the question, for the ledger.

        Returns:
          The future reply. It raises CacheMissError for a call that a strict call cache does not hold, and PoolError if
          ledger or call cache cannot be written. A provider's fault is an outcome and raises nothing. A fault of the
          policy is answered at once.

        Raises:
          PoolError: the ledger cannot be written at a fault of the policy.
        """
        source = {"step": step, "split": split, "episode": episode, "call": call}
        route = parse_route(route_text, route_names(cards))
        if isinstance(route, RouteFault):
            outcome = Outcome(route.reason)
            done: Future[Reply] = Future()
            done.set_result(self._record(Reply(FAULT_TEXT[outcome], outcome, query=route_text.strip()), source))
            return done
        card = next(card for card in cards if card.name == route.name)
        future = self._threads[card.provider].submit(self._answer, card, route.query, source)
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        return future

    def close(self, patience: float | None = None) -> None:
        """Drop calls that have not begun, let running ones end without another attempt, and close the files.

        Wait for running calls for `patience` seconds at most, by default until all have ended.
        """
        if self._client is not None:
            self._client.close()
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)
        wait(set(self._calls), patience)
        if self._cache is not None:
            self._cache.close()
        self.ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(_PATIENCE if kind is KeyboardInterrupt else None)

    def _answer(self, card: Card, query: str, source: dict[str, Any]) -> Reply:
        """Take the reply from the call cache, or call the model. Runs in a thread of the pool."""
        if self._cache is None:
            used = made = self._call(card, query, source)
        else:
            body = self._providers[card.provider].body(card, query)
            request = Request(card.provider, body, source["episode"], source["call"])
            used, made = self._cached_call(request, lambda: self._call(card, query, source))
        return self._record(make_reply(card, query, used, made), source)

    def _call(self, card: Card, query: str, source: dict[str, Any]) -> Completion:
        """Call the model over HTTP.

        Raises PoolError if the budget is spent, and CancelledError if the pool was closed meanwhile.
        """
        paid = self.ledger.paid + self.paid_elsewhere
        if self._budget and paid >= self._budget:
            self._record(Reply(FAULT_TEXT[Outcome.OVER_BUDGET], Outcome.OVER_BUDGET, card.key, query), source)
            raise PoolError(
                f"pool.budget is {self._budget:g} dollars and {paid:.4f} are spent (all of this workdir's "
                "ledger.jsonl); raise pool.budget and run the same command to go on"
            )
        made = self._client.complete(card, query)
        if self._client.closed and provider_fault(made.outcome):
            raise CancelledError  # closing the pool ended the call: it is no fault to record, and no run waits for it
        return made

    def _cached_call(self, request: Request, call: Callable[[], Completion]) -> tuple[Completion, Completion | None]:
        """Look into the call cache, or make the call once for all threads with the same request at the same time.

        The first thread looks into the cache and writes to it before the request counts as ended, so that no other
        thread can make the call in between. The other threads wait for its result.

        Returns:
          The completion to use, and the completion that this thread's call returned, or None if it made no call.
        """
        # A recorded fault belongs to this episode alone, so look for it before the request is shared.
        if self._replays and (recorded := self._cache.find(request)) is not None:
            return recorded, None
        key = request.key()
        with self._lock:
            other = self._in_flight.get(key)
            if other is None:
                mine = self._in_flight[key] = Future()
        if other is not None:
            used = other.result()
            if provider_fault(used.outcome):
                self._cache.keep(request, used)  # every episode repeats its own fault in replay
            return used, None
        try:
            used, made = self._cache.find(request), None
            if used is None:
                made = call()
                used = self._cache.keep(request, made)
            mine.set_result(used)
            return used, made
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._in_flight[key]

    def _record(self, reply: Reply, source: dict[str, Any]) -> Reply:
        self.ledger.add(reply, **source)
        return reply


def make_reply(card: Card, query: str, used: Completion, made: Completion | None) -> Reply:
    """The reply to a call. Its text is neutralised: whatever the model wrote can neither open nor close a tag.

    Args:
      card: the model that was asked.
      query: the question.
      used: the completion to use. If another thread or process recorded one first, it is that one.
      made: the completion that was paid for, or None for a hit.
    """
    outcome, text = used.outcome, neutralize(used.text[:_LONGEST]).strip()
    if not text and outcome in HAS_TEXT:
        outcome = Outcome.EMPTY
    spent = 0.0
    if made is not None:
        spent = card.dollars(made.prompt_tokens, made.completion_tokens, made.cached_tokens)
        spent += card.dollars(made.wasted_prompt_tokens, made.wasted_completion_tokens)
    return Reply(
        text=text if outcome in HAS_TEXT else FAULT_TEXT[outcome],
        outcome=outcome,
        model=card.key,
        query=query,
        prompt_tokens=used.prompt_tokens,
        completion_tokens=used.completion_tokens,
        raw_cost=card.raw_cost(used.completion_tokens),
        charged=card.dollars(used.prompt_tokens, used.completion_tokens),
        spent=spent,
        latency=(made or used).latency,
        attempts=made.attempts if made else 0,
        hit=made is None,
        error=used.error,
        cached_tokens=made.cached_tokens if made else 0,
        thought=used.thought[:_LONGEST],
        estimated=used.estimated,
    )
