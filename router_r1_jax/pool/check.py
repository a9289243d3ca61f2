"""Ask every model of a pool one question and print what came back, before a run relies on it.

    python -m router_r1_jax.pool.check --config=configs/demo.py

The table says of each model whether it answers, the seconds, tokens and dollars of the call, and the name under which
the server reports it: a provider may serve another model than was asked for. Exit status 1 where one does not answer.
Keys are read from the environment and never printed.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from router_r1_jax.config import ConfigError, validate
from router_r1_jax.pool.cards import Card, cards_from_config
from router_r1_jax.pool.client import Client
from router_r1_jax.pool.outcomes import Completion, PoolError, provider_fault
from router_r1_jax.pool.providers import providers_from_config
from router_r1_jax.pool.server import simulated_providers, start_server

QUESTION = "Which city is the capital of France? Answer with one word."
_HEADER = ("model", "reachable", "seconds", "tokens in", "tokens out", "dollars", "served as")


def ask_all(pool_config: ConfigDict, cards: Sequence[Card], question: str) -> list[Completion]:
    """One completion per card, all asked at once. Raises ConfigError for a provider without its key."""
    providers = providers_from_config(pool_config)
    client = Client(pool_config, {card.provider: providers[card.provider] for card in cards})
    try:
        with ThreadPoolExecutor(len(cards)) as threads:
            return list(threads.map(lambda card: client.complete(card, question), cards))
    finally:
        client.close()


def table(cards: Sequence[Card], completions: Sequence[Completion]) -> str:
    """A line per model, in columns; what went wrong stands in the last one."""
    rows = [_HEADER]
    for card, got in zip(cards, completions, strict=True):
        dollars = (got.prompt_tokens * card.price_in + got.completion_tokens * card.price_out) / 1e6
        rows.append(
            (
                card.name, "no" if provider_fault(got.outcome) else "yes", f"{got.latency:.2f}",
                str(got.prompt_tokens), str(got.completion_tokens), f"{dollars:.2e}",
                f"{got.outcome}: {got.error}" if got.error else got.served or "(not told)",
            )
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def check(config: ConfigDict) -> bool:
    """Print the table; returns whether every model answers."""
    validate(config)
    cards = cards_from_config(config.pool)
    with ExitStack() as stack:
        pool_config = config.pool
        if pool_config.simulate:
            server = stack.enter_context(start_server(config.data.world, cards))
            pool_config = simulated_providers(pool_config, server.base_url)
        completions = ask_all(pool_config, cards, QUESTION)
    print(table(cards, completions), flush=True)
    return not any(provider_fault(got.outcome) for got in completions)


def main() -> None:
    """Parse --config and its overrides, and check."""
    config = config_flags.DEFINE_config_file("config", help_string="Configuration file, such as configs/demo.py.")
    flags.mark_flag_as_required("config")

    def run(argv: list[str]) -> None:
        try:
            sys.exit(0 if check(config.value) else 1)
        except (ConfigError, PoolError) as error:
            sys.exit(f"error: {error}")

    app.run(run)


if __name__ == "__main__":
    main()
