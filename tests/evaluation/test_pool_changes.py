"""Changes of the pool: what they do to prompt, parser and charge, and that they do nothing else."""

import dataclasses

import numpy as np
import pytest

from router_r1_jax.config import ConfigError, base_config, model_card, provider
from router_r1_jax.evaluation.pool_changes import (
    change_models,
    change_pool,
    change_prompt_cards,
    check_candidates,
    parse_changes,
)
from router_r1_jax.pool.cards import Card, cards_from_config, route_names
from router_r1_jax.prompts import card_line, render
from router_r1_jax.protocol import RouteCall, RouteFault, parse_route

CARDS = (
    Card(
        "Titan",
        "Titan",
        "p",
        "titan-70b",
        3.0,
        12.0,
        0.5,
        {"film": 0.9},
        "large",
        ("Titan XL",),
        price_changes=((10, 1.0, 2.0),),
        price_cached=0.5,
    ),
    Card("Aria", "Aria", "p", "aria", 0.1, 0.4, None, {"film": 0.2, "music": 0.8}, "", ()),
    Card("Pico", "Pico", "p", "pico-1b", 0.05, 0.2, 0.1, {}, "small", ("Pi",)),
)
TEMPLATE = "{max_calls}\n{cards}\n{question}"


def shown(text, seed=0, cards=CARDS):
    return change_prompt_cards(cards, parse_changes(text), seed)


def called(text, cards=CARDS):
    return change_models(cards, parse_changes(text))


def lines(cards):
    """The cards' part of the prompt."""
    return render(TEMPLATE, cards, "Who?", 2).split("\n")[1:-1]


def differing(before, after):
    """Fields in which two cards differ."""
    return {f.name for f in dataclasses.fields(Card) if getattr(before, f.name) != getattr(after, f.name)}


def test_no_change_is_no_change():
    assert parse_changes("") == parse_changes(" , ") == ()
    assert shown("") == called("") == CARDS


def test_a_dropped_model_is_neither_shown_nor_found():
    cards = called("drop=aria")
    assert cards == (CARDS[0], CARDS[2])
    assert lines(cards) == [card_line(CARDS[0]), card_line(CARDS[2])]
    assert isinstance(parse_route("Aria: who?", route_names(cards)), RouteFault)
    assert parse_route("Titan: who?", route_names(cards)) == RouteCall("Titan", "who?")
    assert called("drop=Aria,drop=Pico") == (CARDS[0],)


def test_prices_change_in_prompt_and_charge_alike():
    cards = called("prices=2.5")
    for card, changed in zip(CARDS, cards, strict=True):
        assert differing(card, changed) <= {"price_in", "price_out", "price_cached", "price_changes"}
        assert (changed.price_in, changed.price_out) == (2.5 * card.price_in, 2.5 * card.price_out)
        assert card_line(changed) == card_line(card).replace(
            f"price {card.price_out:g}", f"price {changed.price_out:g}"
        )
    assert cards[0].price_cached == 1.25 and cards[0].price_changes == ((10, 2.5, 5.0),)
    assert cards[1].price_cached is None
    one = called("prices=Pico:0")
    assert one[:2] == CARDS[:2] and (one[2].price_in, one[2].price_out) == (0.0, 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_renamed_models_keep_everything_but_their_names(seed):
    cards = shown("rename", seed)
    for card, changed in zip(CARDS, cards, strict=True):
        assert differing(card, changed) <= {"name", "aliases"} and changed.name != card.name
        assert card_line(changed) == card_line(card).replace(card.name, changed.name)
    named = {card.name: card.aliases for card in cards}
    assert named == {card.name: card.aliases for card in CARDS}  # the same spellings can be written
    found = parse_route("titan xl: who?", route_names(cards))
    assert next(c for c in cards if c.name == found.name).key != "Titan"


def test_one_model_may_get_a_name_of_its_own():
    cards = shown("rename=Titan:Nova 2")
    assert cards[1:] == CARDS[1:] and differing(CARDS[0], cards[0]) == {"name", "aliases"}
    assert parse_route("Nova 2: who?", route_names(cards)) == RouteCall("Nova 2", "who?")
    assert isinstance(parse_route("Titan XL: who?", route_names(cards)), RouteFault)


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_cards_are_the_same_lines_in_other_places(seed):
    after = lines(shown("shuffle", seed))
    assert sorted(after) == sorted(lines(CARDS))
    assert all(line != other for line, other in zip(after, lines(CARDS), strict=True))


def test_seeds_draw_names_and_order():
    for kind in ("rename", "shuffle"):
        drawn = {tuple(c.name for c in shown(kind, seed)) for seed in range(20)}
        assert len(drawn) == 2  # all the ways in which none of three keeps its own
        assert shown(kind, 3) == shown(kind, 3)


@pytest.mark.parametrize(
    ("word", "fields"),
    [
        ("blank", ("performance", "description")),
        ("blank=performance", ("performance",)),
        ("blank=description", ("description",)),
    ],
)
def test_blank_cards_say_nothing_of_skill(word, fields):
    for card, changed in zip(CARDS, shown(word), strict=True):
        assert differing(card, changed) <= set(fields)
        assert not any(getattr(changed, field) for field in fields)
        assert ("film" in card_line(changed)) == ("film" in card_line(card) and "performance" not in fields)
        assert card.price_out == changed.price_out and f"price {card.price_out:g}" in card_line(changed)


def test_changes_add_up():
    changes = parse_changes("drop=Aria, prices=Titan:0.5, rename, blank")
    cards = change_prompt_cards(change_models(CARDS, changes), changes, 0)
    assert [(c.key, c.name, c.price_out, dict(c.performance)) for c in cards] == [
        ("Titan", "Pico", 6.0, {}),
        ("Pico", "Titan", 0.2, {}),
    ]


def pool_config():
    pool = base_config().pool
    pool.providers = (provider(name="p", base_url="http://127.0.0.1:9/v1"),)
    pool.models = (model_card(name="Titan", provider="p", model="t"),)
    return pool


POOL = """
from router_r1_jax.config import model_card, provider
PRICE_DATE = "2026-01-01"
def models():
    return (model_card(name="Nova", provider="{name}", model="n", price_out=2.0),)
def providers():
    return (provider(name="{name}", base_url="{url}"),)
"""


@pytest.mark.parametrize(("name", "known"), [("p", 1), ("q", 2)])
def test_added_models_stand_behind_the_pools_own(tmp_path, name, known):
    file = tmp_path / "new.py"
    file.write_text(POOL.format(name=name, url="http://127.0.0.1:9/v1"))
    before = pool_config()
    after = change_pool(before, parse_changes(f"add={file}"))
    assert len(before.models) == 1 and len(after.providers) == known
    cards, own = cards_from_config(after), cards_from_config(before)
    assert cards[:1] == own and cards[1].name == "Nova" and cards[1].provider == name
    assert lines(cards) == [*lines(own), card_line(cards[1])]
    for field in before:
        if field not in ("providers", "models"):
            assert after[field] == before[field]


def test_another_pool_takes_the_place_of_the_whole(tmp_path):
    file = tmp_path / "new.py"
    file.write_text(POOL.format(name="q", url="http://elsewhere/v1"))
    after = change_pool(pool_config(), parse_changes(f"pool={file}"))
    assert [card.name for card in cards_from_config(after)] == ["Nova"] and len(after.providers) == 1
    assert (after.providers[0].base_url, after.price_date) == ("http://elsewhere/v1", "2026-01-01")
    for field in pool_config():
        if field not in ("providers", "models", "price_date"):
            assert after[field] == pool_config()[field]


def test_one_provider_declared_in_two_ways_is_refused(tmp_path):
    file = tmp_path / "new.py"
    file.write_text(POOL.format(name="p", url="http://elsewhere/v1"))
    with pytest.raises(ConfigError, match="provider 'p' is declared otherwise"):
        change_pool(pool_config(), parse_changes(f"add={file}"))
    with pytest.raises(ConfigError, match="name a pool's file"):
        change_pool(pool_config(), parse_changes("add=nowhere.py"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_changes("renmae"), "--change holds 'renmae'; write pool=FILE, drop=NAME"),
        (lambda: parse_changes("drop"), "--change holds 'drop'; write"),
        (lambda: parse_changes("shuffle=2"), "--change holds 'shuffle=2'; write"),
        (lambda: called("drop=Nova"), "there is no model 'Nova'; choose one of Titan, Aria, Pico"),
        (lambda: called("drop=Titan,drop=Aria,drop=Pico"), "drop=Pico leaves no model"),
        (lambda: called("prices=cheap"), "'cheap' is no factor of prices"),
        (lambda: called("prices=-1"), "'-1' is no factor"),
        (lambda: called("prices=Nova:2"), "there is no model 'Nova'"),
        (lambda: shown("rename=Titan:Aria"), "^--change=rename=Titan:Aria: .* is 'Aria', which"),
        (lambda: shown("rename=Titan:a<b"), "no colon, angle bracket"),
        (lambda: shown("rename=Titan"), "^--change=rename=Titan: .* is ''; give the model a name"),
        (lambda: shown("blank=latency"), "write blank, blank=performance or blank=description"),
    ],
)
def test_what_cannot_be_meant_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_no_card_keeps_its_place_in_any_size():
    many = tuple(dataclasses.replace(CARDS[1], key=str(i), name=str(i)) for i in range(7))
    for seed in np.random.default_rng(0).integers(0, 10_000, 30):
        after = shown("shuffle", int(seed), many)
        assert sorted(c.key for c in after) == sorted(c.key for c in many)
        assert all(a.key != b.key for a, b in zip(after, many, strict=True))


def test_more_cards_than_a_changed_pool_has_cannot_be_shown():
    changes = parse_changes("drop=Titan,rename")
    check_candidates(2, called("drop=Titan"), changes)
    said = r"pool\.candidates is 3, and --change=drop=Titan,rename leaves 2 models; .* --config\.pool\.candidates=0"
    with pytest.raises(ConfigError, match=said):
        check_candidates(3, called("drop=Titan"), changes)
