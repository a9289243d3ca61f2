import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_r1_jax.config import ConfigError, base_config, model_card, provider
from router_r1_jax.pool.cards import (
    all_in_prompts,
    at_step,
    cards_from_config,
    draw_candidates,
    route_names,
)
from router_r1_jax.protocol import RouteCall, parse_route


def test_a_card_says_what_the_config_says(pool_config):
    titan, pico = cards_from_config(pool_config())
    assert (titan.key, titan.name, titan.provider, titan.model) == ("Titan", "Titan", "p", "titan-70b")
    assert (titan.price_in, titan.price_out, titan.latency, titan.aliases) == (3.0, 12.0, 0.5, ("Titan XL",))
    assert titan.performance == {"film": 0.9}
    assert pico.simulated["failure_rate"] == 0.0


def _third(**fields):
    entry = model_card(name="Third", provider="p", model="third")
    if "failure_rate" in fields:
        entry.simulated.failure_rate = fields.pop("failure_rate")
    return model_card(**{**entry.to_dict(), **fields, "simulated": entry.simulated})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"price_out": -1.0}, r"pool\.models\[2\]\.price_out is -1\.0; a price is dollars per million tokens, >= 0"),
        ({"price_in": math.nan}, r"pool\.models\[2\]\.price_in is nan; a price"),
        ({"latency": -0.5}, r"pool\.models\[2\]\.latency is -0\.5; a latency is seconds"),
        ({"latency": math.inf}, r"pool\.models\[2\]\.latency is inf"),
        ({"performance": {"film": 1.5}}, r"pool\.models\[2\]\.performance\.film is 1\.5; a score lies in \[0, 1\]"),
        ({"failure_rate": 2.0}, r"pool\.models\[2\]\.simulated\.failure_rate is 2\.0; a share"),
        ({"price_cached": -1.0}, r"pool\.models\[2\]\.price_cached is -1\.0; a price"),
        ({"price_changes": ((3, -1.0, 2.0),)}, r"pool\.models\[2\]\.price_changes\[0\] is \(3, -1\.0, 2\.0\); write"),
        ({"price_changes": ((3, 1.0),)}, r"pool\.models\[2\]\.price_changes\[0\]"),
        ({"name": ""}, r"pool\.models\[2\]\.name is ''; give"),
        ({"name": "A: b"}, r"pool\.models\[2\]\.name is 'A: b'; a name holds no colon"),
        ({"name": "qwen2.5:7b"}, r"is 'qwen2.5:7b'; .*name it 'qwen2.5-7b', and let \.model keep the provider's id"),
        ({"name": "a\uff1ab"}, r"a name holds no colon.*name it 'a-b'"),
        ({"parameters": {"stream": True}}, r"pool\.models\[2\]\.parameters\.stream is set; leave it out"),
        ({"name": "<a>"}, r"pool\.models\[2\]\.name"),
        ({"name": "a\nb"}, r"pool\.models\[2\]\.name is 'a\\nb'"),
        ({"name": "a\u200bb"}, r"pool\.models\[2\]\.name"),
        ({"name": " a"}, r"pool\.models\[2\]\.name"),
        ({"name": "My LLM-Name"}, r"pool\.models\[2\]\.name is 'My LLM-Name'"),
        ({"aliases": ("x", "y:z")}, r"pool\.models\[2\]\.aliases\[1\] is 'y:z'"),
        ({"name": "TITAN"}, r"pool\.models\[2\]\.name is 'TITAN', which pool\.models\[0\]\.name is already"),
        ({"name": "titan xl"}, r"which pool\.models\[0\]\.aliases\[0\] is already"),
        ({"aliases": ("pico",)}, r"pool\.models\[2\]\.aliases\[0\] is 'pico', which pool\.models\[1\]\.name is"),
        ({"aliases": ("third",)}, r"pool\.models\[2\]\.aliases\[0\] is 'third', which pool\.models\[2\]\.name is"),
        ({"provider": "q"}, r"pool\.models\[2\]\.provider is 'q', which is not declared; the providers are: p"),
        ({"model": ""}, r"pool\.models\[2\]\.model is ''"),
    ],
)
def test_an_invalid_card_is_refused_by_its_field(pool_config, fields, message):
    config = pool_config()
    config.models = (*config.models, _third(**fields))
    with pytest.raises(ConfigError, match=message) as caught:
        cards_from_config(config)
    assert "\n" not in str(caught.value)


def test_the_third_card_is_fine_without_the_fault(pool_config):
    config = pool_config()
    config.models = (*config.models, _third())
    assert len(cards_from_config(config)) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"names": ("Nova", "a:b", "Vega")}, r"pool\.names\[1\] is 'a:b'; a name holds no colon"),
        ({"names": ("Nova", "Vega", "nova")}, r"pool\.names\[2\] is 'nova', which pool\.names\[0\] is already"),
        ({"names": ("Nova",)}, r"pool\.names are 1, and a prompt shows 2 models; add names"),
        ({"names": ("Nova",), "candidates": 2}, r"pool\.names are 1, and a prompt shows 2 models"),
    ],
)
def test_invalid_names_are_refused_if_they_would_be_used(pool_config, fields, message):
    config = pool_config()
    config.update(fields | {"rename": True})
    with pytest.raises(ConfigError, match=message):
        cards_from_config(config)
    config.rename = False
    assert [card.name for card in all_in_prompts(cards_from_config(config), config)] == ["Titan", "Pico"]


def _draws(**fields):
    """The settings of `config.pool` by which candidates are drawn."""
    config = base_config().pool
    config.update(fields)
    return config


def _cards(count):
    config = base_config().pool
    config.providers = (provider(name="p"),)
    config.models = tuple(
        model_card(name=f"Model {i}", provider="p", model=str(i), price_out=float(i), aliases=(f"m{i}", f"n{i}"))
        for i in range(count)
    )
    return cards_from_config(config)


@given(count=st.integers(1, 7), seed=st.integers(0, 2**32), shuffle=st.booleans(), rename=st.booleans())
def test_candidates_get_another_order_and_other_names_and_nothing_else(count, seed, shuffle, rename):
    cards = _cards(count)
    shown = draw_candidates(cards, np.random.default_rng(seed), _draws(shuffle=shuffle, rename=rename))
    by_key = {card.key: card for card in cards}
    assert sorted(card.key for card in shown) == sorted(by_key)
    for card in shown:
        declared = by_key[card.key]
        assert dataclasses.replace(card, name=declared.name, aliases=declared.aliases) == declared
    # Names stay the declared ones, each with its own aliases.
    assert sorted((card.name, card.aliases) for card in shown) == sorted((card.name, card.aliases) for card in cards)
    if not shuffle:
        assert [card.key for card in shown] == [card.key for card in cards]
    if not rename:
        assert all(card.name == card.key for card in shown)


@given(count=st.integers(1, 7), seed=st.integers(0, 2**32), shuffle=st.booleans(), rename=st.booleans())
def test_some_candidates_get_names_of_all_cards(count, seed, shuffle, rename):
    cards = _cards(7)
    draws = _draws(candidates=count, shuffle=shuffle, rename=rename)
    chosen = draw_candidates(cards, np.random.default_rng(seed), draws)
    by_key, names = {card.key: card for card in cards}, {(card.name, card.aliases) for card in cards}
    assert len({card.key for card in chosen}) == len({card.name for card in chosen}) == len(chosen) == count
    for card in chosen:
        declared = by_key[card.key]
        assert (card.name, card.aliases) in names and (rename or card == declared)
        assert dataclasses.replace(card, name=declared.name, aliases=declared.aliases) == declared
    if not shuffle:
        assert [card.key for card in chosen] == sorted(card.key for card in chosen)


@given(names=st.integers(3, 9), seed=st.integers(0, 2**32))
def test_names_of_the_configuration_replace_those_of_the_models(names, seed):
    """Each at most once, none with the aliases of a model; and all of them stand on cards that a prompt can show."""
    cards, config = _cards(7), _draws(candidates=3, rename=True, names=tuple("ABCDEFGHI"[:names]))
    chosen = draw_candidates(cards, np.random.default_rng(seed), config)
    names_drawn = [card.name for card in chosen]
    assert len(chosen) == len(set(names_drawn)) == 3 and set(names_drawn) <= set(config.names)
    by_key = {card.key: card for card in cards}
    for card in chosen:
        assert card == dataclasses.replace(by_key[card.key], name=card.name, aliases=())
    every = all_in_prompts(cards, config)
    assert {card.name for card in every} == set(config.names) and {card.key for card in every} == set(by_key)
    config.names = ()
    assert all_in_prompts(cards, config) == cards


def test_every_selection_order_and_naming_is_drawn_about_equally_often():
    cards, rng, draws = _cards(3), np.random.default_rng(0), _draws(candidates=2, shuffle=True, rename=True)
    drawn = [tuple((c.key, c.name) for c in draw_candidates(cards, rng, draws)) for _ in range(7200)]
    counts = np.unique([str(each) for each in drawn], return_counts=True)[1]
    assert len(counts) == 36  # six ordered pairs of cards, six of names
    assert abs(counts - 200).max() < 5 * math.sqrt(200)


@pytest.mark.parametrize("switch", ["shuffle", "rename"])
def test_every_arrangement_is_drawn_about_equally_often(switch):
    cards = _cards(3)
    rng = np.random.default_rng(0)
    draws = _draws(**{"shuffle": False, "rename": False, switch: True})
    field = "key" if switch == "shuffle" else "name"
    drawn = [tuple(getattr(card, field) for card in draw_candidates(cards, rng, draws)) for _ in range(3000)]
    counts = np.unique(drawn, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert abs(counts - 500).max() < 5 * math.sqrt(500)  # 5 standard deviations


def test_order_and_names_are_drawn_apart_from_each_other():
    cards = _cards(3)
    rng = np.random.default_rng(0)
    draws = _draws(shuffle=True, rename=True)
    drawn = {tuple((c.key, c.name) for c in draw_candidates(cards, rng, draws)) for _ in range(1000)}
    assert len(drawn) == 36


def test_every_spelling_finds_the_name_in_the_prompt():
    cards = draw_candidates(_cards(5), np.random.default_rng(1), _draws(shuffle=True, rename=True))
    names = route_names(cards)
    for card in cards:
        for spelling in (card.name, card.name.upper(), *card.aliases):
            assert parse_route(f" {spelling} : who: me?", names) == RouteCall(card.name, "who: me?")


def test_the_price_of_a_call(pool_config):
    config = pool_config()
    config.models[0].price_cached = 0.5
    titan, pico = cards_from_config(config)
    assert titan.dollars(100, 20) == pytest.approx(100 * 3e-6 + 20 * 12e-6)
    assert titan.dollars(100, 20, 80) == pytest.approx(20 * 3e-6 + 80 * 0.5e-6 + 20 * 12e-6)
    assert pico.dollars(100, 20, 80) == pico.dollars(100, 20) == pytest.approx(100 * 0.05e-6 + 20 * 0.2e-6)
    assert titan.raw_cost(20) == 240.0


def test_a_price_changes_at_its_step_and_nothing_else_does(pool_config):
    config = pool_config()
    config.models[0].price_changes = ((10, 1.0, 2.0), (5, 4.0, 6.0))
    cards = cards_from_config(config)
    prices = [(card.price_in, card.price_out) for step in (0, 4, 5, 9, 10, 99) for card in at_step(cards, step)[:1]]
    assert prices == [(3.0, 12.0)] * 2 + [(4.0, 6.0)] * 2 + [(1.0, 2.0)] * 2
    assert at_step(cards, 99)[1] == cards[1]
    fields = dict(price_in=3.0, price_out=12.0, price_changes=cards[0].price_changes)
    assert dataclasses.replace(at_step(cards, 99)[0], **fields) == cards[0]
    for step in (0, 5, 10):
        assert at_step(at_step(cards, step), 7) == at_step(cards, step)
