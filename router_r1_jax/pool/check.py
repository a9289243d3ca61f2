"""Pool check: call every model once and print latency, tokens and dollars, before a run relies on the pool.

    python -m router_r1_jax.pool.check --config=configs/demo.py

The table shows for each model how the call ended, its seconds, tokens and dollars, and the reply's first words or the
error. It says if the provider served another model than the one asked for, and if a reply is empty although the model
wrote tokens. The exit status is 1 unless every model gave text. Keys are read from the environment and never printed.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

from ml_collections import ConfigDict

from router_r1_jax.launcher import launch
from router_r1_jax.pool.cards import Card, cards_from_config
from router_r1_jax.pool.client import Client
from router_r1_jax.pool.outcomes import HAS_TEXT, Completion, Outcome
from router_r1_jax.pool.providers import providers_from_config
from router_r1_jax.report.tables import Table
from router_r1_jax.setup.environment import open_environment

QUESTION = "Which city is the capital of France? Answer with one word."
HEADS = ("model", "outcome", "seconds", "tokens in", "tokens out", "dollars", "reply")
_SHOWN = 60  # characters of a reply


def table_row(card: Card, completion: Completion) -> tuple[str, ...]:
    """The model's row of the table; the last column shows the reply's first words or what is wrong."""
    return (
        card.name,
        str(completion.outcome),
        f"{completion.latency:.2f}",
        str(completion.prompt_tokens),
        f"{completion.completion_tokens}{' (estimated)' if completion.estimated else ''}",
        f"{card.dollars(completion.prompt_tokens, completion.completion_tokens):.2e}",
        "; ".join(filter(None, (_words(completion), _other_model(card, completion)))),
    )


def _words(completion: Completion) -> str:
    """The reply's first words, the error, or why there is no text."""
    if completion.error:
        return completion.error
    if completion.outcome == Outcome.EMPTY and completion.completion_tokens:
        return (
            f"no text in {completion.completion_tokens} tokens; if the model thinks first, raise pool.max_tokens "
            "or max_tokens in its parameters"
        )
    words = " ".join(completion.text.split())
    return words if len(words) <= _SHOWN else f"{words[:_SHOWN]} ..."


def _other_model(card: Card, completion: Completion) -> str:
    """The name of the model that was served, if it is not the one asked for or a dated version of it."""
    asked, served = (name.rpartition("/")[2].lower() for name in (card.model, completion.served))
    return "" if served.startswith(asked) or not served else f"served by {completion.served}"


def main(config: ConfigDict) -> int:
    """Call all models at once and print the table; the exit status is 0 if every model gave text."""
    cards = cards_from_config(config.pool)
    environment = open_environment(config, cards)
    with environment.serve(config.pool) if environment else nullcontext():
        providers = providers_from_config(config.pool)
        client = Client(config.pool, {card.provider: providers[card.provider] for card in cards})
        with ThreadPoolExecutor(len(cards)) as threads:
            completions = list(threads.map(lambda card: client.complete(card, QUESTION), cards))
        client.close()
    print(Table(HEADS, list(map(table_row, cards, completions))).text(), flush=True)
    return int(any(completion.outcome not in HAS_TEXT for completion in completions))


if __name__ == "__main__":
    launch(main, workdir=False)
