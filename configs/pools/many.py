"""240 simulated models whose skills, prices and latencies are sampled at random.

This pool is for training with `pool.candidates` and `pool.rename`: each batch of prompts shows a few of the models,
under names that are sampled anew. So many models leave nothing to memorise. No name, no selection of models and no pair
of domain and score is worth remembering, because about every score stands on three or four cards. A router must read
the cards. Forty models are too few: a router learns their pairs by heart (experiments/studies/README.md).

In about every third pair of model and domain the model is good (.80 to .99), otherwise poor (.05 to .50). So five cards
hold a good model for a domain in nine of ten batches. Skill and price are independent.
"""

import numpy as np
from ml_collections import ConfigDict

from router_r1_jax.config import model_card, provider

PRICE_DATE = "2026-11-26"  # invented on that day; prices of invented models
DOMAINS = ("film", "music", "people", "places", "sport")
# Names that `pool.names` gives to `pool.rename`.
NAMES = tuple(
    """
    Acrux Adhara Albireo Alcor Algol Alioth Alnair Alphard Altair Antares Arcturus Avior Capella Castor Deneb Diphda
    Dubhe Elnath Hadar Hamal Izar Kochab Menkar Merak Mintaka Mirfak Mizar Naos Nunki Phecda Pollux Procyon Regulus
    Rigel Saiph Sargas Sirius Spica Vega Wezen
    """.split()
)
MODELS = 240


def sample_models(names: tuple[str, ...], seed: int) -> tuple[ConfigDict, ...]:
    """One model per name; the same seed gives the same models."""
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
    return sample_models(tuple(f"m{i:03}" for i in range(MODELS)), seed=1)


def providers() -> tuple[ConfigDict, ...]:
    """The base URL is set when the simulated models' server has its port."""
    return (provider(name="simulated"),)
