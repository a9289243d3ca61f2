"""Twenty thousand calls through client, tape and ledger against a simulated provider that fails in every way.

What it shows: each call ends with exactly one outcome, none is lost, none is charged or paid twice, memory stays flat,
and the pool keeps up with a rollout. 256 calls are in flight; a tenth of the requests fails (HTTP 503, half a JSON
body, a page of HTML, a cut connection, each as often as the others); one model is down for a while, one is slow at
first, one answers HTTP 429 above a rate near that at which it is asked; a fifth of the calls repeats an earlier one,
which the tape or a call under way must answer.

    python experiments/soak_pool.py [--calls=20000]

What every call must cost is computed here from the simulated models themselves, which answer the same every time, and
held against replies and ledger. The last line is one JSON object: `calls`, `lost` (calls without exactly one ledger
line), `double_charged` (calls whose charge is not theirs, and repeated ones that were paid again), `faults` (calls that
ended in a provider's fault although they were tried again), `rss_growth_mb` (between the first tenth of the calls and
the end) and `calls_per_s`.

Result, 26 November 2026, 2 cores of an AMD EPYC (Zen 4), Python 3.11: 20,000 calls, none lost, none charged twice, none
ended in a fault; 17,814 requests, 937 calls per second, memory grew by 5.0 MB. The outage is shorter than the breaker's
50 failures: behind an open breaker its requests, which are numbered, would come one every ten seconds.
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
from router_r1_jax.data.world import World
from router_r1_jax.pool.cards import Card, cards_from_config
from router_r1_jax.pool.ledger import ledger_totals, read_ledger
from router_r1_jax.pool.outcomes import Outcome, Reply, provider_fault
from router_r1_jax.pool.pool import Pool
from router_r1_jax.pool.server import simulated_providers, start_server
from router_r1_jax.pool.simulated import SimulatedModels

IN_FLIGHT, REPEATED = 256, 5  # every fifth call repeats one
FAULT_RATES = dict(failure_rate=0.025, malformed_rate=0.025, wrong_type_rate=0.025, dropped_rate=0.025)
MODELS = (
    ("Small", 0.2, dict(outage=(400, 440))),
    ("Middle", 0.8, dict(slow_start=(200, 0.3))),
    ("Large", 2.0, dict(requests_per_minute=18_000)),
)


def make_config() -> ConfigDict:
    """Three models of one provider, quick to try again."""
    config = base_config()
    config.pool.providers = (provider(name="simulated", concurrency=IN_FLIGHT),)
    config.pool.models = tuple(
        model_card(
            name=name, provider="simulated", model=name.lower(), price_in=price / 4, price_out=price, latency=0.01,
            performance={"film": 0.8}, simulated=ConfigDict(FAULT_RATES | script),
        ) for name, price, script in MODELS
    )  # fmt: skip
    config.pool.update(dict(backoff=0.01, backoff_max=0.2, deadline=30.0))
    config.pool.tape.mode = "record"
    return config


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def route(call: int, cards: tuple[Card, ...]) -> tuple[Card, str]:
    """The model and the query of a call; the last of each REPEATED asks what the first of them did."""
    origin = call - REPEATED + 1 if call % REPEATED == REPEATED - 1 else call
    return cards[origin % len(cards)], f"Who directed film number {origin}, and in which year was that?"


class Ended(NamedTuple):
    """What is kept of a reply, so that memory tells of the pool and not of us."""

    outcome: Outcome
    charged: float
    spent: float
    attempts: int


def run(pool: Pool, cards: tuple[Card, ...], calls: int) -> tuple[list[Ended], float, float]:
    """How all calls ended, in order, the growth of memory in MB, and the seconds it took."""
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
    """Calls whose charge is not what tokens and prices make it, and those paid although an equal one was paid."""
    wrong, paid = 0, Counter()
    for call, reply in enumerate(replies):
        card, query = route(call, cards)
        if provider_fault(reply.outcome):
            wrong += reply.charged != 0
            continue
        answer = models.answer(card.model, query, max_tokens)
        due = (answer.prompt_tokens * card.price_in + answer.completion_tokens * card.price_out) / 1e6
        wrong += abs(reply.charged - due) > 1e-12
        paid[card.key, query] += reply.spent > 0
    return wrong + sum(times - 1 for times in paid.values() if times > 1)


def soak(calls: int) -> dict[str, float]:
    """The figures of the module's docstring."""
    config = make_config()
    cards = cards_from_config(config.pool)
    with tempfile.TemporaryDirectory() as folder, start_server(config.data.world, cards) as server:
        settings = simulated_providers(config.pool, server.base_url)
        ledger = Path(folder) / "ledger.jsonl"
        with Pool(settings, cards, ledger_path=ledger, tape_path=Path(folder) / "tape.sqlite") as pool:
            replies, growth, seconds = run(pool, cards, calls)
            reported = pool.totals()
        lines = Counter(line["episode"] for line in read_ledger(ledger))
        written = ledger_totals(ledger)
    models = SimulatedModels(World(config.data.world), cards)
    sums = ("calls", "charged", "spent")
    if [written[name] for name in sums] != [reported[name] for name in sums]:
        raise SystemExit(f"the ledger's file sums to {written}, the pool reports {reported}")
    return {
        "calls": len(replies),
        "lost": sum(lines[str(call)] != 1 for call in range(calls)),
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
