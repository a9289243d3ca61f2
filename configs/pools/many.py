"""240 simulated models whose skills, prices and latencies are drawn at random.

For training with `pool.shown` and `pool.rename`: where each batch of prompts shows another few of them under names
dealt anew, no name and no selection is worth remembering, and a router has to read. So many that no pair of domain and
score is either: about every score stands on three or four cards. With forty models a router knew by heart which of
their pairs to name, and named them with other models in the prompt too (experiments/studies/README.md). In about every
third pair of model and domain the model is good (.80 to .99), else poor (.05 to .50), so five cards drawn at random
hold a good one for a domain in nine of ten batches. Skill and price have nothing to do with each other.
"""

import numpy as np
from ml_collections import ConfigDict

from router_r1_jax.config import model_card, provider

PRICE_DATE = "2026-11-26"  # invented on that day; prices of invented models
DOMAINS = ("film", "music", "people", "places", "sport")
NAMES = (  # to be dealt among them by `pool.names`
    "Acrux", "Adhara", "Albireo", "Alcor", "Algol", "Alioth", "Alnair", "Alphard", "Altair", "Antares", "Arcturus",
    "Avior", "Capella", "Castor", "Deneb", "Diphda", "Dubhe", "Elnath", "Hadar", "Hamal", "Izar", "Kochab", "Menkar",
    "Merak", "Mintaka", "Mirfak", "Mizar", "Naos", "Nunki", "Phecda", "Pollux", "Procyon", "Regulus", "Rigel", "Saiph",
    "Sargas", "Sirius", "Spica", "Vega", "Wezen",
)  # fmt: skip
MODELS = 240


def drawn_models(names: tuple[str, ...], seed: int) -> tuple[ConfigDict, ...]:
    """One model per name; the same for the same seed."""
    rng = np.random.default_rng(seed)
    cards = []
    for name in names:
        good = rng.random(len(DOMAINS)) < 1 / 3
        skill = np.where(good, rng.uniform(0.8, 0.99, len(DOMAINS)), rng.uniform(0.05, 0.5, len(DOMAINS)))
        price = float(f"{np.exp(rng.uniform(np.log(0.2), np.log(12.0))):.2g}")
        cards.append(
            model_card(
                name=name,
                provider="simulated",
                model=name.lower(),
                price_in=price / 4,
                price_out=price,
                latency=round(float(rng.uniform(0.01, 0.06)), 2),
                performance={domain: round(float(s), 2) for domain, s in zip(DOMAINS, skill, strict=True)},
            )
        )
    return tuple(cards)


def models() -> tuple[ConfigDict, ...]:
    return drawn_models(tuple(f"m{i:03}" for i in range(MODELS)), seed=1)


def providers() -> tuple[ConfigDict, ...]:
    """The base URL is filled in when the simulated models' server has taken its port."""
    return (provider(name="simulated"),)
