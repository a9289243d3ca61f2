"""Pool changes (--change): does a trained router read the cards, and does it carry over to another pool of models?

Some changes alter which models can be called and at what price. The others alter only what the prompt shows: names,
order, and what the cards tell. Each change is a pure function of the cards and is written as one word:

    pool=FILE        another pool altogether, such as configs/pools/paper.py
    drop=NAME        without this model
    add=FILE         with the models of another pool file, such as configs/pools/unseen.py
    prices=2.0       all prices times 2, in the prompt and in the charges; prices=NAME:0.5 changes one model
    rename           every model gets another model's name and aliases
    rename=OLD:NEW   one model under a new name
    shuffle          the cards in another order: none keeps its place; pool.shuffle still shuffles each batch
    blank            cards without scores and descriptions; blank=performance or blank=description removes one of them
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from router_r1_jax.config import ConfigError, base_config, use_pool
from router_r1_jax.pool.cards import Card, check_names

Cards = tuple[Card, ...]
_WITH_VALUE, _WITHOUT_VALUE = ("pool", "drop", "add", "prices", "rename", "blank"), ("rename", "shuffle", "blank")
_BLANK = {"performance": {}, "description": ""}


@dataclasses.dataclass(frozen=True)
class Change:
    """One word of --change: `kind` stands before the first "=", `value` behind it."""

    kind: str
    value: str

    def __str__(self) -> str:
        return f"{self.kind}={self.value}" if self.value else self.kind

    def error(self, message: str) -> ConfigError:
        """An error that names this change."""
        return ConfigError(f"--change={self}{message}")


def parse_changes(text: str) -> tuple[Change, ...]:
    """The changes in a comma-separated text; () for "". Raises ConfigError for an unknown word."""
    changes = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        kind, _, value = word.partition("=")
        if kind not in (_WITH_VALUE if value else _WITHOUT_VALUE):
            raise ConfigError(
                f"--change holds {word!r}; write pool=FILE, drop=NAME, add=FILE, prices=FACTOR, prices=NAME:FACTOR, "
                "rename, rename=OLD:NEW, shuffle, blank, blank=performance or blank=description, separated by commas"
            )
        changes.append(Change(kind, value))
    return tuple(changes)


def change_pool(pool_config: ConfigDict, changes: Sequence[Change]) -> ConfigDict:
    """`config.pool` after every pool=FILE and add=FILE; the given one stays as it is.

    Raises ConfigError if a file cannot be read, or declares a provider of the pool in another way.
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
                    raise change.error(
                        f": provider {entry.name!r} is declared otherwise in pool.providers; "
                        "give one of the two another name"
                    )
            pool.providers += tuple(entry for entry in extra.providers if entry.name not in declared)
            pool.models += extra.models
    return pool


def change_models(cards: Cards, changes: Sequence[Change]) -> Cards:
    """The cards after drop and prices: which models can be called, and at what price.

    Raises ConfigError for an unknown model, a factor that is none, or if no model is left.
    """
    for change in changes:
        if change.kind == "drop":
            dropped = _find(cards, change.value, change)
            cards = tuple(card for card in cards if card is not dropped)
            if not cards:
                raise change.error(" leaves no model; drop fewer")
        elif change.kind == "prices":
            name, _, factor = change.value.rpartition(":")
            changed = [_find(cards, name, change)] if name else cards
            cards = tuple(_scale_prices(card, factor, change) if card in changed else card for card in cards)
    return cards


def check_candidates(candidates: int, cards: Sequence[Card], changes: Sequence[Change]) -> None:
    """Raise ConfigError if prompts are to show more cards (`pool.candidates`) than the changes leave."""
    if candidates > len(cards):
        raise ConfigError(
            f"pool.candidates is {candidates}, and --change={','.join(map(str, changes))} leaves {len(cards)} models; "
            "show them all with --config.pool.candidates=0"
        )


def change_prompt_cards(cards: Cards, changes: Sequence[Change], seed: int) -> Cards:
    """The cards as prompts show them, after rename, shuffle and blank; keys, prices and providers stay.

    Raises ConfigError for an unknown model, or for a name that cannot be used.
    """
    for change in changes:
        kind, value = change.kind, change.value
        if kind == "rename" and value:
            old, _, new = value.partition(":")
            renamed = _find(cards, old, change)
            cards = tuple(dataclasses.replace(c, name=new, aliases=()) if c is renamed else c for c in cards)
            try:
                check_names(cards)
            except ConfigError as error:
                raise change.error(f": {error}") from error
        elif kind == "rename":
            pairs = zip(cards, _derange(cards, seed), strict=True)
            cards = tuple(dataclasses.replace(card, name=o.name, aliases=o.aliases) for card, o in pairs)
        elif kind == "shuffle":
            cards = _derange(cards, seed)
        elif kind == "blank":
            if value and value not in _BLANK:
                raise change.error("; write blank, blank=performance or blank=description")
            fields = {field: empty for field, empty in _BLANK.items() if value in ("", field)}
            cards = tuple(dataclasses.replace(card, **fields) for card in cards)
    return cards


def _read_pool(change: Change) -> ConfigDict:
    """The pool in the file that the change names."""
    config = base_config()
    try:
        use_pool(config, change.value)
    except (OSError, AttributeError, SyntaxError) as error:
        raise change.error(f": {error}; name a pool's file such as configs/pools/unseen.py") from error
    return config.pool


def _find(cards: Cards, name: str, change: Change) -> Card:
    for card in cards:
        if card.key.casefold() == name.casefold():
            return card
    raise change.error(f": there is no model {name!r}; choose one of {', '.join(card.key for card in cards)}")


def _scale_prices(card: Card, text: str, change: Change) -> Card:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not (math.isfinite(factor) and factor >= 0):
        raise change.error(f": {text!r} is no factor of prices; write a number >= 0, such as 2.0")
    return dataclasses.replace(
        card,
        price_in=factor * card.price_in,
        price_out=factor * card.price_out,
        price_cached=None if card.price_cached is None else factor * card.price_cached,
        price_changes=tuple((step, factor * p_in, factor * p_out) for step, p_in, p_out in card.price_changes),
    )


def _derange(cards: Cards, seed: int) -> Cards:
    """The cards in another order in which none keeps its place: each takes the place of the next in a random cycle.

    A single card keeps its place.
    """
    cycle = np.random.default_rng(seed).permutation(len(cards))
    order = np.empty_like(cycle)
    order[cycle] = np.roll(cycle, 1)
    return tuple(cards[i] for i in order)
