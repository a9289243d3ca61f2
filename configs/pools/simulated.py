"""Five simulated models over the five domains of the synthetic world, and the provider that serves them.

In each domain one model is best by at least 7 points. If that model is the expensive Titan, a cheap model is within 10
points. Every other model is below .3. The gap has a reason: under the published reward at alpha 0.6, a cheaper model
wins as soon as it is right more than 0.4 times as often as an expensive one, and exact match would collapse. Prices are
dollars per million tokens.
"""

from ml_collections import ConfigDict

from router_r1_jax.config import model_card, provider

PRICE_DATE = "2026-11-01"  # invented on that day; prices of invented models


def _card(name: str, price: float, latency: float, failure_rate: float, **skill: float) -> ConfigDict:
    return model_card(
        name=name,
        provider="simulated",
        model=name.lower(),
        price_in=price / 4,
        price_out=price,
        latency=latency,
        performance=skill,
        simulated=ConfigDict(dict(failure_rate=failure_rate)),
    )


def models() -> tuple[ConfigDict, ...]:
    return (
        _card("Titan", 12.0, 0.06, 0.02, film=0.97, music=0.97, people=0.28, places=0.26, sport=0.27),
        _card("Reel", 0.9, 0.03, 0.01, film=0.899, music=0.15, people=0.12, places=0.14, sport=0.96),
        _card("Aria", 1.2, 0.03, 0.01, film=0.16, music=0.899, people=0.95, places=0.18, sport=0.13),
        _card("Atlas", 0.6, 0.02, 0.005, film=0.14, music=0.12, people=0.17, places=0.96, sport=0.19),
        _card("Pico", 0.2, 0.01, 0.005, film=0.22, music=0.18, people=0.24, places=0.21, sport=0.2),
    )


def providers() -> tuple[ConfigDict, ...]:
    """The base URL is set when the simulated models' server has its port."""
    return (provider(name="simulated"),)
