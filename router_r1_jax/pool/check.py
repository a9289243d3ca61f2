"""Pool check: call every model once and print latency, tokens and dollars, before a run relies on the pool.

    python -m router_r1_jax.pool.check --config=configs/demo.py

The table shows for each model whether it answers, the seconds, tokens and dollars of the call, and the name under which
the provider reports it: a provider may serve another model than the one that was asked for. The exit status is 1 if a
model does not answer. Keys are read from the environment and never printed.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

from ml_collections import ConfigDict

from router_r1_jax.launcher import launch
from router_r1_jax.pool.cards import Card, cards_from_config
from router_r1_jax.pool.client import Client
from router_r1_jax.pool.outcomes import Completion, provider_fault
from router_r1_jax.pool.providers import providers_from_config
from router_r1_jax.report.tables import Table
from router_r1_jax.setup.environment import open_environment

QUESTION = "Which city is the capital of France? Answer with one word."
HEADS = ("model", "reachable", "seconds", "tokens in", "tokens out", "dollars", "served as")


def table_row(card: Card, completion: Completion) -> tuple[str, ...]:
    """The model's row of the table; the last column shows an error."""
    error = f"{completion.outcome}: {completion.error}" if completion.error else ""
    return (
        card.name,
        "no" if provider_fault(completion.outcome) else "yes",
        f"{completion.latency:.2f}",
        str(completion.prompt_tokens),
        str(completion.completion_tokens),
        f"{card.dollars(completion.prompt_tokens, completion.completion_tokens):.2e}",
        error or completion.served or "(not told)",
    )


def main(config: ConfigDict) -> int:
    """Call all models at once and print the table; the exit status is 0 if every model answers."""
    cards = cards_from_config(config.pool)
    environment = open_environment(config, cards)
    with environment.serve(config.pool) if environment else nullcontext():
        providers = providers_from_config(config.pool)
        client = Client(config.pool, {card.provider: providers[card.provider] for card in cards})
        with ThreadPoolExecutor(len(cards)) as threads:
            completions = list(threads.map(lambda card: client.complete(card, QUESTION), cards))
        client.close()
    print(Table(HEADS, list(map(table_row, cards, completions))).text(), flush=True)
    return int(any(provider_fault(completion.outcome) for completion in completions))


if __name__ == "__main__":
    launch(main, workdir=False)
