"""Mean metrics of episode records."""

from fake_records import record

from router_r1_jax.config import base_config, model_card, provider
from router_r1_jax.evaluation.episode_records import summarise
from router_r1_jax.pool.cards import cards_from_config


def cards():
    config = base_config().pool
    config.providers = (provider(name="p"),)
    skills = {"Titan": dict(film=0.9, sport=0.1), "Reel": dict(film=0.5, sport=0.6), "Pico": dict(film=0.2, sport=0.2)}
    config.models = tuple(model_card(name=n, provider="p", model=n, performance=s) for n, s in skills.items())
    return cards_from_config(config)


def test_the_best_model_is_the_best_of_those_that_the_prompt_showed():
    asked_reel = {"calls": (("Reel", 1e-5, 0.5),), "domains": ["film"]}
    records = [
        record(0, candidates=["Titan", "Reel", "Pico"], **asked_reel),  # Titan is better
        record(1, candidates=["Pico", "Reel"], **asked_reel),
        record(2, candidates=["Reel", "Pico"], **asked_reel),
        record(3, candidates=["Pico", "Titan"], calls=(("Titan", 1e-5, 0.5),), domains=["sport"]),  # Pico is
    ]
    assert summarise(records, cards())["best_model_share"] == 0.5
