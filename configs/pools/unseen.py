"""Two simulated models that the demo's router was not trained with, to be added to its pool for an evaluation:

    python -m router_r1_jax.evaluate --config=configs/demo.py --workdir=runs/demo \
        --change=add=configs/pools/unseen.py

Nova is cheap and better in its domains than any model of the pool, so a router that reads cards should ask it. Echo is
good at nothing. The demo's tokenizer does not know their names. `--change=add=configs/pools/unseen.py,rename` gives all
models new names, which separates reading the cards from writing an unknown name.
"""

from ml_collections import ConfigDict

from router_r1_jax.config import model_card, provider

PRICE_DATE = "2026-11-26"  # invented on that day; prices of invented models


def _card(name: str, price: float, latency: float, **skill: float) -> ConfigDict:
    return model_card(
        name=name,
        provider="simulated",
        model=name.lower(),
        price_in=price / 4,
        price_out=price,
        latency=latency,
        performance=skill,
    )


def models() -> tuple[ConfigDict, ...]:
    return (
        _card("Nova", 0.5, 0.02, film=0.99, music=0.98, people=0.2, places=0.2, sport=0.15),
        _card("Echo", 0.4, 0.01, film=0.1, music=0.12, people=0.14, places=0.11, sport=0.13),
    )


def providers() -> tuple[ConfigDict, ...]:
    return (provider(name="simulated"),)
