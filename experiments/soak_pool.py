"""Twenty thousand calls through client, call cache and ledger against a simulated provider that fails in every way.

It shows that each call ends with exactly one outcome, that none is lost, charged twice or paid twice, that memory stays
flat, and that the pool keeps up with a rollout. 256 calls are in flight. A tenth of the requests fails: HTTP 503, half
a JSON body, a page of HTML and a dropped connection are equally frequent. One model is down for a while, one is slow at
first, and one answers HTTP 429 above a rate near the rate of its calls. A fifth of the calls repeats an earlier one,
and the call cache or a running call must answer it.

    python experiments/soak_pool.py [--calls=20000]

The simulated models answer the same every time. So the price of every call is computed here from their answers, and
compared with replies and ledger. The last line is one JSON object: `calls`, `lost` (calls without exactly one ledger
line), `double_charged` (calls that were charged wrongly, and repeated calls that were paid again), `faults` (calls that
ended in a provider's fault despite retries), `requests` (HTTP requests), `rss_growth_mb` (between the first tenth of
the calls and the end) and `calls_per_s`.

Result, 26 November 2026, 2 cores of an AMD EPYC (Zen 4), Python 3.11: 20,000 calls, none lost, none charged twice, none
ended in a fault; 17,814 requests, 937 calls per second, memory grew by 5.0 MB. The outage is shorter than the 50
failures that open the circuit breaker: the outage counts requests, and an open circuit sends one every ten seconds.
"""

import argparse
import functools
import json
import tempfile
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from threading import Semaphore
from typing import NamedTuple

from ml_collections import ConfigDict
from tqdm import tqdm

from router_r1_jax.config import base_config, model_card, provider
from router_r1_jax.pool.cards import Card, cards_from_config
from router_r1_jax.pool.ledger import read_ledger, spent_dollars
from router_r1_jax.pool.outcomes import Outcome, Reply, provider_fault
from router_r1_jax.pool.pool import Pool
from router_r1_jax.synthetic.server import start_server
from router_r1_jax.synthetic.simulated_models import SimulatedModels
from router_r1_jax.synthetic.world import World

IN_FLIGHT, REPEATED = 256, 5  # every fifth call repeats another one
FAULT_RATES = dict(failure_rate=0.025, malformed_rate=0.025, wrong_type_rate=0.025, dropped_rate=0.025)
MODELS = (
    ("Small", 0.2, dict(outage=(400, 440))),
    ("Middle", 0.8, dict(slow_start=(200, 0.3))),
    ("Large", 2.0, dict(requests_per_minute=18_000)),
)


def make_config() -> ConfigDict:
    """Three models of one provider, with short pauses between retries."""
    config = base_config()
    config.pool.providers = (provider(name="simulated", concurrency=IN_FLIGHT),)
    config.pool.models = tuple(
        model_card(
            name=name,
            provider="simulated",
            model=name.lower(),
            price_in=price / 4,
            price_out=price,
            latency=0.01,
            performance={"film": 0.8},
            simulated=ConfigDict(FAULT_RATES | script),
        )
        for name, price, script in MODELS
    )
    config.pool.update(dict(backoff=0.01, backoff_max=0.2, deadline=30.0))
    config.pool.call_cache.mode = "record"
    return config


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def route(call: int, cards: tuple[Card, ...]) -> tuple[Card, str]:
    """The model and the query of a call; the last of every REPEATED calls repeats the first of them."""
    origin = call - REPEATED + 1 if call % REPEATED == REPEATED - 1 else call
    return cards[origin % len(cards)], f"Who directed film number {origin}, and in which year was that?"


class Ended(NamedTuple):
    """The kept part of a reply; whole replies would use memory that is not the pool's."""

    outcome: Outcome
    charged: float
    spent: float
    attempts: int


def run(pool: Pool, cards: tuple[Card, ...], calls: int) -> tuple[list[Ended], float, float]:
    """How all calls ended, in order; the growth of memory in MB; the seconds that they took."""
    slots, ended, early = Semaphore(IN_FLIGHT), [None] * calls, resident_mb()

    def take(call: int, future: Future[Reply]) -> None:
        reply = future.result()
        ended[call] = Ended(reply.outcome, reply.charged, reply.spent, reply.attempts)
        slots.release()

    started = time.monotonic()
    for call in tqdm(range(calls), desc="soak", unit="call", dynamic_ncols=True):
        slots.acquire()
        card, query = route(call, cards)
        future = pool.respond(f"{card.name}: {query}", cards=cards, episode=str(call), call=0, step=0, split="train")
        future.add_done_callback(functools.partial(take, call))
        if call == calls // 10:
            early = resident_mb()
    for _ in range(IN_FLIGHT):
        if not slots.acquire(timeout=120):
            raise SystemExit(f"calls {[call for call, end in enumerate(ended) if end is None]} did not end")
    return ended, resident_mb() - early, time.monotonic() - started


def wrongly_charged(models: SimulatedModels, cards: tuple[Card, ...], replies: list[Ended], max_tokens: int) -> int:
    """Calls whose charge is not the price of their tokens, and calls paid although an equal one was paid."""
    wrong, paid = 0, Counter()
    for call, reply in enumerate(replies):
        card, query = route(call, cards)
        if provider_fault(reply.outcome):
            wrong += reply.charged != 0
            continue
        answer = models.answer(card.model, query, max_tokens)
        wrong += abs(reply.charged - card.dollars(answer.prompt_tokens, answer.completion_tokens)) > 1e-12
        paid[card.key, query] += reply.spent > 0
    return wrong + sum(times - 1 for times in paid.values() if times > 1)


def soak(calls: int) -> dict[str, float]:
    """The numbers that the module's docstring lists."""
    config = make_config()
    cards = cards_from_config(config.pool)
    with tempfile.TemporaryDirectory() as folder, start_server(config.synthetic.world, cards) as base_url:
        config.pool.providers[0].base_url = base_url
        ledger = Path(folder) / "ledger.jsonl"
        with Pool(config.pool, cards, ledger_path=ledger, cache_path=Path(folder) / "call_cache.sqlite") as pool:
            replies, growth, seconds = run(pool, cards, calls)
            reported = spent_dollars(pool.ledger.state())
        lines = read_ledger(ledger)
    models = SimulatedModels(World(config.synthetic.world), cards)
    written = sum(line["spent"] for line in lines)
    if abs(written - reported) > 1e-9:
        raise SystemExit(f"{written} dollars are spent by the ledger's file, and {reported} by the pool's state")
    lines_per_call = Counter(line["episode"] for line in lines)
    return {
        "calls": len(replies),
        "lost": sum(lines_per_call[str(call)] != 1 for call in range(calls)),
        "double_charged": wrongly_charged(models, cards, replies, config.pool.max_tokens),
        "faults": sum(provider_fault(reply.outcome) for reply in replies),
        "requests": sum(reply.attempts for reply in replies),
        "rss_growth_mb": round(growth, 1),
        "calls_per_s": round(calls / seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=20_000)
    print(json.dumps(soak(parser.parse_args().calls)))


if __name__ == "__main__":
    main()
