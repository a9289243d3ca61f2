"""Changes of the pool under which a trained router is evaluated: does it read the cards, and does it carry over?

Some change the world that is asked (a model less, one more, other prices); the others change only what the router is
shown (names, order, what the cards tell). Each is a pure function of the cards and is written as one word:

    pool=FILE        another pool altogether, such as configs/pools/paper.py
    drop=NAME        without this model
    add=FILE         with the models of a pool's file, such as configs/pools/unseen.py
    prices=2.0       all prices times 2, for prompt and charge alike; prices=NAME:0.5 those of one model
    rename           names (aliases with them) dealt anew: no model keeps its own
    rename=OLD:NEW   one model under a new name
    shuffle          another order of the cards: none keeps its place; pool.shuffle then still draws anew per batch
    blank            no scores and no descriptions; blank=performance or blank=description only one of them
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from router_r1_jax.config import ConfigError, base_config, use_pool
from router_r1_jax.pool.cards import Card, check_names

Cards = tuple[Card, ...]
_BLANK = {"performance": {}, "description": ""}
_TAKES_VALUE = {
    "pool": (True,), "drop": (True,), "add": (True,), "prices": (True,), "rename": (True, False), "shuffle": (False,),
    "blank": (True, False),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Change:
    """One word of --change: `kind` before the first "=", `value` behind it."""

    kind: str
    value: str

    def __str__(self) -> str:
        return f"{self.kind}={self.value}" if self.value else self.kind


def parse_changes(text: str) -> tuple[Change, ...]:
    """The changes that a comma-separated text names; () for "". Raises ConfigError for an unknown word."""
    changes = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        kind, _, value = word.partition("=")
        if bool(value) not in _TAKES_VALUE.get(kind, ()):
            raise ConfigError(
                f"--change holds {word!r}; write pool=FILE, drop=NAME, add=FILE, prices=FACTOR, prices=NAME:FACTOR, "
                "rename, rename=OLD:NEW, shuffle, blank, blank=performance or blank=description, separated by commas"
            )
        changes.append(Change(kind, value))
    return tuple(changes)


def change_pool(pool_config: ConfigDict, changes: Sequence[Change]) -> ConfigDict:
    """`config.pool` after every pool=FILE and add=FILE; the given one stays as it is.

    A provider that is declared already must be declared there in the same way. Raises ConfigError.
    """
    pool = pool_config.copy_and_resolve_references()
    for change in changes:
        if change.kind == "pool":
            other = _read_pool(change)
            pool.providers, pool.models, pool.price_date = other.providers, other.models, other.price_date
        elif change.kind == "add":
            extra = _read_pool(change)
            declared = {entry.name: entry.to_dict() for entry in pool.providers}
            for entry in extra.providers:
                if declared.get(entry.name, entry.to_dict()) != entry.to_dict():
                    raise ConfigError(
                        f"--change={change}: provider {entry.name!r} is declared otherwise in pool.providers; "
                        "give one of the two another name"
                    )
            pool.providers += tuple(entry for entry in extra.providers if entry.name not in declared)
            pool.models += extra.models
    return pool


def _read_pool(change: Change) -> ConfigDict:
    """The pool of the file that the change names."""
    config = base_config()
    try:
        use_pool(config, change.value)
    except (OSError, AttributeError, SyntaxError) as error:
        raise ConfigError(f"--change={change}: {error}; name a pool's file such as configs/pools/unseen.py") from error
    return config.pool


def change_world(cards: Sequence[Card], changes: Sequence[Change]) -> Cards:
    """The cards after drop and prices: who can be asked, and at what price. Raises ConfigError for an unknown model."""
    cards = tuple(cards)
    for change in changes:
        if change.kind == "drop":
            card = _named(cards, change.value, change)
            cards = tuple(other for other in cards if other is not card)
            if not cards:
                raise ConfigError(f"--change={change} leaves no model; drop fewer")
        elif change.kind == "prices":
            name, _, factor = change.value.rpartition(":")
            chosen = [_named(cards, name, change)] if name else cards
            scaled = _priced(_factor(factor, change))
            cards = tuple(scaled(card) if card in chosen else card for card in cards)
    return cards


def check_shown(shown: int, cards: Sequence[Card], changes: Sequence[Change]) -> None:
    """Raise ConfigError where prompts are to show more cards (`pool.shown`) than the changes leave."""
    if shown > len(cards):
        words = ",".join(map(str, changes))
        raise ConfigError(
            f"pool.shown is {shown}, and --change={words} leaves {len(cards)} models; "
            "show them all with --config.pool.shown=0"
        )


def change_shown(cards: Sequence[Card], changes: Sequence[Change], seed: int) -> Cards:
    """The cards as the router is shown them, after rename, shuffle and blank; keys, prices and providers stay.

    Raises ConfigError for an unknown model, a name that cannot be used, or a single card that is to be dealt anew.
    """
    cards = tuple(cards)
    for change in changes:
        if change.kind == "rename" and change.value:
            old, _, new = change.value.partition(":")
            card = _named(cards, old, change)
            cards = tuple(dataclasses.replace(c, name=new, aliases=()) if c is card else c for c in cards)
            try:
                check_names(cards)
            except ConfigError as error:
                raise ConfigError(f"--change={change}: {error}") from error
        elif change.kind == "rename":
            named = _none_in_place(cards, seed, change)
            cards = tuple(
                dataclasses.replace(card, name=other.name, aliases=other.aliases)
                for card, other in zip(cards, named, strict=True)
            )
        elif change.kind == "shuffle":
            cards = _none_in_place(cards, seed, change)
        elif change.kind == "blank":
            if change.value and change.value not in _BLANK:
                raise ConfigError(f"--change={change}; write blank, blank=performance or blank=description")
            fields = {field: empty for field, empty in _BLANK.items() if change.value in ("", field)}
            cards = tuple(dataclasses.replace(card, **fields) for card in cards)
    return cards


def _named(cards: Cards, name: str, change: Change) -> Card:
    for card in cards:
        if card.key.casefold() == name.casefold():
            return card
    raise ConfigError(f"--change={change}: there is no model {name!r}; choose one of {', '.join(c.key for c in cards)}")


def _factor(text: str, change: Change) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not (math.isfinite(factor) and factor >= 0):
        raise ConfigError(f"--change={change}: {text!r} is no factor of prices; write a number >= 0, such as 2.0")
    return factor


def _priced(factor: float) -> Callable[[Card], Card]:
    def scaled(card: Card) -> Card:
        return dataclasses.replace(
            card,
            price_in=factor * card.price_in,
            price_out=factor * card.price_out,
            price_cached=None if card.price_cached is None else factor * card.price_cached,
            price_changes=tuple((step, factor * p_in, factor * p_out) for step, p_in, p_out in card.price_changes),
        )

    return scaled


def _none_in_place(cards: Cards, seed: int, change: Change) -> Cards:
    """The cards in another order in which none keeps its place: each takes the place of the next in a random round."""
    if len(cards) < 2:
        raise ConfigError(f"--change={change} needs at least two models, and the pool has {len(cards)}")
    around = np.random.default_rng(seed).permutation(len(cards))
    order = np.empty_like(around)
    order[around] = np.roll(around, 1)
    return tuple(cards[i] for i in order)
