"""The pool: takes what the router wrote into a route tag and answers with a reply, from the tape or over HTTP.

It runs beside the rollout: `respond` returns at once with a future, and threads make the calls. Every call
ends in exactly one outcome and one ledger line.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from ml_collections import ConfigDict

from router_r1_jax.pool.cards import Card, route_names
from router_r1_jax.pool.client import Client
from router_r1_jax.pool.ledger import Ledger
from router_r1_jax.pool.outcomes import FAULT_TEXT, Completion, Outcome, PoolError, Reply, provider_fault
from router_r1_jax.pool.providers import providers_from_config
from router_r1_jax.pool.tape import Request, Tape
from router_r1_jax.protocol import RouteFault, neutralize, parse_route

_PATIENCE = 1.0  # seconds in which running calls may end after Ctrl-C; what comes later is paid and lost
_LONGEST = 100_000  # characters of a reply that are read on; no budget has room for more, and a tokenizer takes seconds


class Pool:
    """The external models of `config.pool`, ready to be asked. A context manager.

    Raises ConfigError for a provider that cannot be meant or a key that is missing, PoolError for a ledger or tape that
    cannot be used. In tape mode strict nothing but the tape is asked and no key is needed.
    """

    def __init__(
        self, pool_config: ConfigDict, cards: Sequence[Card], *, ledger_path: str | Path, tape_path: str | Path
    ) -> None:
        providers = providers_from_config(pool_config)
        self._providers = {card.provider: providers[card.provider] for card in cards}  # only those that serve a card
        mode = pool_config.tape.mode
        self._budget = pool_config.budget
        self.paid_elsewhere = 0.0  # dollars by the run's other processes, as far as they have said
        self._replays = mode in ("replay", "strict")
        self._client = None if mode == "strict" else Client(pool_config, self._providers)
        self._tape = None if mode == "off" else Tape(tape_path, mode)
        self._lock = threading.Lock()
        self._running: dict[
            str, Future[tuple[Completion, Completion]]
        ] = {}  # key of the tape -> the call that is being made
        self._ledger = Ledger(ledger_path, price_date=pool_config.price_date)
        self._calls: set[Future[Reply]] = set()  # that are queued or under way
        # Threads of its own for each provider: calls that queue for a slow one do not hold up the others.
        self._threads = {
            name: ThreadPoolExecutor(provider.concurrency, thread_name_prefix=f"pool-{name}")
            for name, provider in self._providers.items()
        }

    def check(self) -> None:
        """Raise PoolError where a provider that serves a card does not answer. A replayed run asks nobody."""
        if self._client is not None and not self._replays:
            self._client.check(self._providers)

    def respond(
        self, route_text: str, *, cards: Sequence[Card], episode: str, call: int, step: int, split: str
    ) -> Future[Reply]:
        """Answer a route call.

        Args:
          route_text: the inside of the route tag.
          cards: the roster that the episode's prompt shows.
          episode: id of the episode, unique in the run and the same in a repeated run.
          call: number of the call within the episode, from 0.
          step: the training step, for the ledger.
          split: the split that the question comes from, for the ledger.

        Returns:
          The future reply. It raises TapeMiss for a call that a strict tape does not hold and PoolError where ledger or
          tape cannot be written; trouble of a provider is an outcome. A fault of the policy is answered at once.
        """
        where = {"step": step, "split": split, "episode": episode, "call": call}
        route = parse_route(route_text, route_names(cards))
        if isinstance(route, RouteFault):
            done: Future[Reply] = Future()
            try:
                outcome = Outcome(route.reason)
                done.set_result(self._entered(Reply(FAULT_TEXT[outcome], outcome, query=route_text.strip()), where))
            except Exception as error:  # noqa: BLE001  a caller inside of a callback must not be raised at
                done.set_exception(error)
            return done
        card = next(card for card in cards if card.name == route.name)
        future = self._threads[card.provider].submit(self._answer, card, route.query, where)
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        return future

    def note_router(self, *, step: int, split: str, read_tokens: int, sampled_tokens: int) -> None:
        """Write down what the router itself read and sampled in a rollout. Raises PoolError where that fails."""
        self._ledger.add_router(step=step, split=split, read_tokens=read_tokens, sampled_tokens=sampled_tokens)

    def totals(self) -> dict[str, Any]:
        """The ledger's sums: calls, dollars charged and spent, in all and per model."""
        return self._ledger.totals()

    @property
    def paid(self) -> float:
        """Dollars that this ledger's calls have cost, those that a restart has made again included."""
        return self._ledger.paid

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs, as JSON: the ledger's sums and size."""
        return {"ledger": self._ledger.state(), "ledger_size": self._ledger.size}

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Go on from what `state` returned after `step`."""
        self._ledger.restore(state["ledger"], state["ledger_size"], step)

    def close(self, patience: float | None = None) -> None:
        """Drop calls that have not begun, let running ones end without another attempt, and close the files.

        Running calls are waited for `patience` seconds at most, by default until all have ended.
        """
        if self._client is not None:
            self._client.close()
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)
        wait(set(self._calls), patience)
        if self._tape is not None:
            self._tape.close()
        self._ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(_PATIENCE if kind is KeyboardInterrupt else None)

    def _answer(self, card: Card, query: str, where: dict[str, Any]) -> Reply:
        """Take the reply from the tape, or ask; in a thread of the pool."""
        if self._tape is None:
            made = counted = self._make(card, query, where)
            mine = True
        else:
            body = self._providers[card.provider].body(card.model, query)
            request = Request(card.provider, body, where["episode"], where["call"])
            recorded = self._tape.find(request) if self._replays else None  # its own fault, which no other row shares
            if recorded is not None:
                return self._entered(_reply(card, query, recorded, spent=0.0, hit=True), where)
            made, counted, mine = self._shared(request, lambda: self._make(card, query, where))
        if not mine:
            return self._entered(_reply(card, query, replace(counted, attempts=0), spent=0.0, hit=True), where)
        wasted = _dollars(card, made.wasted_prompt_tokens, made.wasted_completion_tokens)
        spent = _dollars(card, made.prompt_tokens, made.completion_tokens, made.cached_tokens) + wasted
        reply = _reply(card, query, counted, spent=spent, hit=False)
        made_only = {"latency": made.latency, "attempts": made.attempts, "cached_tokens": made.cached_tokens}
        return self._entered(replace(reply, **made_only), where)

    def _make(self, card: Card, query: str, where: dict[str, Any]) -> Completion:
        """Ask the model. Raises PoolError over the budget and CancelledError where the pool was closed meanwhile."""
        self._check_budget(card, query, where)
        made = self._client.complete(card, query)
        if self._client.closed and provider_fault(made.outcome):
            raise CancelledError  # cut short by ourselves: nothing to record, and no run is left to take it
        return made

    def _shared(self, request: Request, make: Callable[[], Completion]) -> tuple[Completion, Completion, bool]:
        """What the tape holds, or what `make` returns, called once by all threads that have the same request at the
        same time; what the tape holds then, which counts; and whether this thread has made it.

        Who waits for another's call would otherwise make it and take its time as well. The tape is looked at and
        written to before the request counts as ended: none is made in between.
        """
        key = request.key()
        with self._lock:
            running = self._running.get(key)
            if running is None:
                mine = self._running[key] = Future()
        if running is not None:
            made, counted = running.result()
            if provider_fault(made.outcome):
                self._tape.keep(request, made)  # a fault is on the tape for each row that has met it
            return made, counted, False
        try:
            recorded = self._tape.find(request)
            made = recorded or make()
            counted = recorded or self._tape.keep(request, made)
            mine.set_result((made, counted))
            return made, counted, recorded is None
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._running[key]

    def _check_budget(self, card: Card, query: str, where: dict[str, Any]) -> None:
        """Raise PoolError where the run has spent what it may; the call is written down as not made."""
        paid = self.paid + self.paid_elsewhere
        if self._budget and paid >= self._budget:
            self._entered(Reply(FAULT_TEXT[Outcome.OVER_BUDGET], Outcome.OVER_BUDGET, card.key, query), where)
            raise PoolError(
                f"pool.budget is {self._budget:g} dollars and {paid:.4f} are spent (all of this workdir's "
                "ledger.jsonl); raise pool.budget and run the same command to go on"
            )

    def _entered(self, reply: Reply, where: dict[str, Any]) -> Reply:
        self._ledger.add(reply, **where)
        return reply


def _dollars(card: Card, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> float:
    """Of one call; `cached_tokens` of the prompt's are paid at their own price."""
    cached = card.price_in if card.price_cached is None else card.price_cached
    prompt = (prompt_tokens - cached_tokens) * card.price_in + cached_tokens * cached
    return (prompt + completion_tokens * card.price_out) / 1e6


def _reply(card: Card, query: str, completion: Completion, *, spent: float, hit: bool) -> Reply:
    """The reply that a completion makes; whatever the model wrote can neither open nor close a tag."""
    outcome, text = completion.outcome, neutralize(completion.text[:_LONGEST]).strip()
    if not text and outcome in (Outcome.OK, Outcome.TRUNCATED):
        outcome = Outcome.EMPTY
    return Reply(
        text=text if outcome in (Outcome.OK, Outcome.TRUNCATED) else FAULT_TEXT[outcome],
        outcome=outcome,
        model=card.key,
        query=query,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        raw_cost=completion.completion_tokens * card.price_out,
        charged=_dollars(card, completion.prompt_tokens, completion.completion_tokens),
        spent=spent,
        latency=completion.latency,
        attempts=completion.attempts,
        hit=hit,
        error=completion.error,
    )
