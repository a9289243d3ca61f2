"""The pools in configs/pools: each makes cards, states no number without a source, and dates its prices."""

import datetime
import importlib.util
from pathlib import Path

import pytest

from router_r1_jax.config import base_config, use_pool
from router_r1_jax.config_checks import validate
from router_r1_jax.pool.cards import cards_from_config
from router_r1_jax.pool.providers import providers_from_config
from router_r1_jax.prompts import load_template, render

POOLS = Path(__file__).parents[2] / "configs" / "pools"

# Dollars per million output tokens, from the paper.
PUBLISHED = {
    "Qwen2.5-7B-Instruct": 0.30,
    "LLaMA-3.1-70B-Instruct": 0.88,
    "LLaMA-3.1-8B-Instruct": 0.18,
    "Mistral-7B-Instruct": 0.20,
    "Mixtral-8x22B-Instruct": 1.20,
    "Gemma-2-27B-Instruct": 0.80,
}
UNSEEN = {"Palmyra-Creative-122B": 1.80, "LLaMA3-ChatQA-1.5-8B": 0.18}


def _load(name):
    spec = importlib.util.spec_from_file_location(name, POOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(path.stem for path in POOLS.glob("*.py")))
def test_a_pool_is_complete_and_dated(name):
    config = base_config()
    use_pool(config, POOLS / f"{name}.py")
    validate(config)
    cards = cards_from_config(config.pool)
    assert len(cards) >= (2 if name == "unseen" else 5)  # the unseen ones are added to another pool
    datetime.date.fromisoformat(config.pool.price_date)
    prompt = render(load_template("router"), cards, "Who?", 4)
    assert all(card.name in prompt and card.price_out > 0 for card in cards)
    if {card.provider for card in cards} != {"simulated"}:
        assert {card.provider for card in cards} <= set(providers_from_config(config.pool))
        # Scores and latencies would have to be measured; the simulated ones are what the server is told to do.
        assert all(card.performance == {} and card.latency is None for card in cards)
        assert "latency" not in prompt.partition(cards[0].name)[2].partition("Who?")[0].splitlines()[0]


def test_a_pools_prompt_does_not_outlast_it():
    config = base_config()
    use_pool(config, POOLS / "paper.py")
    providers_from_config(config.pool)  # refuses a prompt without its place for the query
    assert len(config.pool.prompt) > 100
    use_pool(config, POOLS / "simulated.py")
    assert config.pool.prompt == "{query}"


def test_the_papers_prices_are_the_published_ones():
    paper = _load("paper")
    assert {card.name: card.price_out for card in paper.models()} == PUBLISHED
    assert {card.name: card.price_out for card in paper.models(unseen=True)} == PUBLISHED | UNSEEN
    assert {card.price_in for card in paper.models(unseen=True)} == {0.0}  # not published
