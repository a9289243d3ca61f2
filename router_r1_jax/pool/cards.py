"""Model cards: what the router is told of each external model, what a call to it costs, and where it is served."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from router_r1_jax.config import ConfigError
from router_r1_jax.protocol import PLACEHOLDERS


@dataclasses.dataclass(frozen=True)
class Faults:
    """What the simulated server does wrong for a model; `config.model_card` says what each means."""

    failure_rate: float = 0.0
    malformed_rate: float = 0.0
    wrong_type_rate: float = 0.0
    dropped_rate: float = 0.0
    outage: tuple[int, int] = (0, 0)
    slow_start: tuple[int, float] = (0, 0.0)
    downgrade: tuple[int, str] = (0, "")
    requests_per_minute: int = 0


@dataclasses.dataclass(frozen=True)
class Card:
    """One external model.

    Attributes:
      key: the name declared in the config; it stands for the model in ledger, metrics and rewards.
      name: the name shown to the router, which is another one where the roster is renamed.
      provider: name of the provider that serves it.
      model: the id under which the provider knows it.
      price_in: dollars per million prompt tokens.
      price_out: dollars per million completion tokens.
      latency: usual seconds per call, for the prompt and for the simulated server; None where nobody measured it.
      performance: topic -> score in [0, 1].
      description: free text for the prompt.
      aliases: further spellings of `name` that a call may use.
      price_cached: dollars per million prompt tokens that the provider has cached; None where that is price_in.
      price_changes: (training step, price_in, price_out), valid from that step on.
      simulated: what the simulated server does wrong for it.
    """

    key: str
    name: str
    provider: str
    model: str
    price_in: float
    price_out: float
    latency: float | None
    performance: Mapping[str, float] = dataclasses.field(hash=False)
    description: str
    aliases: tuple[str, ...]
    simulated: Faults = Faults()
    price_changes: tuple[tuple[int, float, float], ...] = ()
    price_cached: float | None = None


def cards_from_config(pool_config: ConfigDict) -> tuple[Card, ...]:
    """The cards of `config.pool`, in declared order. Raises ConfigError for the first field that cannot be meant."""
    providers = [provider.name for provider in pool_config.providers]
    cards = tuple(_card(f"pool.models[{i}]", entry, providers) for i, entry in enumerate(pool_config.models))
    check_names(cards)
    if pool_config.rename and pool_config.names:
        _check_dealt_names(pool_config, cards)
    return cards


def roster(
    cards: Sequence[Card],
    rng: np.random.Generator,
    *,
    shown: int = 0,
    shuffle: bool,
    rename: bool,
    names: Sequence[str] = (),
) -> tuple[Card, ...]:
    """The cards as one batch of prompts shows them; a card keeps its `key`.

    `shown` draws so many of them, 0 takes all; a router that meets another selection in each batch has no use for
    knowing one by heart. `shuffle` draws their order. `rename` deals `names` out anew, or the declared ones (aliases
    with them) where there are none, also those of cards that are not shown. Names are dealt and not invented: each
    stays one that the tokenizer and the router know, and yet a name says nothing of the model: the router must read the
    cards.
    """
    order = rng.permutation(len(cards)) if shuffle else np.arange(len(cards))
    if shown:
        kept = rng.choice(len(cards), size=shown, replace=False)
        order = order[np.isin(order, kept)]
    chosen = [cards[i] for i in order]
    if rename:
        spellings = [(name, ()) for name in names] or [(card.name, card.aliases) for card in cards]
        dealt = [spellings[i] for i in rng.permutation(len(spellings))[: len(chosen)]]
        chosen = [
            dataclasses.replace(card, name=name, aliases=aliases)
            for card, (name, aliases) in zip(chosen, dealt, strict=True)
        ]
    return tuple(chosen)


def roster_settings(pool_config: ConfigDict) -> dict[str, Any]:
    """The arguments of `roster` that `config.pool` says."""
    return {name: pool_config[name] for name in ("shown", "shuffle", "rename", "names")}


def all_in_prompts(cards: Sequence[Card], pool_config: ConfigDict) -> tuple[Card, ...]:
    """Cards that among them hold every value and every name that a prompt of `config.pool` can show."""
    names = pool_config.names
    if not (pool_config.rename and names):
        return tuple(cards)
    return tuple(
        dataclasses.replace(cards[i % len(cards)], name=names[i % len(names)], aliases=())
        for i in range(max(len(cards), len(names)))
    )


def at_step(cards: Sequence[Card], step: int) -> tuple[Card, ...]:
    """The cards with the prices that are valid at a training step, which no other step changes any more."""

    def priced(card: Card) -> Card:
        past = [change for change in card.price_changes if change[0] <= step]
        _, price_in, price_out = max(past, key=lambda c: c[0], default=(0, card.price_in, card.price_out))
        return dataclasses.replace(card, price_in=price_in, price_out=price_out, price_changes=())

    return tuple(map(priced, cards))


def route_names(cards: Sequence[Card]) -> dict[str, str]:
    """Every spelling that a call may use -> the shown name: the mapping that `protocol.parse_route` takes."""
    return {spelling: card.name for card in cards for spelling in (card.name, *card.aliases)}


def _card(where: str, entry: ConfigDict, providers: Sequence[str]) -> Card:
    if entry.provider not in providers:
        known = ", ".join(providers) or "none, declare one in pool.providers"
        raise ConfigError(f"{where}.provider is {entry.provider!r}, which is not declared; the providers are: {known}")
    if not entry.model:
        raise ConfigError(f"{where}.model is ''; write the id under which provider {entry.provider!r} knows the model")
    for field in ("price_in", "price_out"):
        _check_number(f"{where}.{field}", entry[field], "a price is dollars per million tokens, >= 0")
    if entry.price_cached is not None:
        _check_number(f"{where}.price_cached", entry.price_cached, "a price is dollars per million tokens, >= 0")
    for j, change in enumerate(entry.price_changes):
        if len(change) != 3 or not all(math.isfinite(value) and value >= 0 for value in change):
            raise ConfigError(f"{where}.price_changes[{j}] is {change}; write (step, price_in, price_out), each >= 0")
    if entry.latency is not None:
        _check_number(f"{where}.latency", entry.latency, "a latency is seconds per call, >= 0")
    for topic, score in entry.performance.items():
        _check_number(f"{where}.performance.{topic}", score, "a score lies in [0, 1]", most=1.0)
    for field in ("failure_rate", "malformed_rate", "wrong_type_rate", "dropped_rate"):
        _check_number(f"{where}.simulated.{field}", entry.simulated[field], "a share lies in [0, 1]", most=1.0)
    return Card(
        key=entry.name,
        name=entry.name,
        provider=entry.provider,
        model=entry.model,
        price_in=float(entry.price_in),
        price_out=float(entry.price_out),
        latency=None if entry.latency is None else float(entry.latency),
        performance={topic: float(score) for topic, score in entry.performance.items()},
        description=entry.description,
        aliases=tuple(entry.aliases),
        simulated=Faults(**entry.simulated),
        price_cached=None if entry.price_cached is None else float(entry.price_cached),
        price_changes=tuple((int(step), float(p_in), float(p_out)) for step, p_in, p_out in entry.price_changes),
    )


def _check_number(field: str, value: float, rule: str, *, most: float = math.inf) -> None:
    if not (math.isfinite(value) and 0 <= value <= most):
        raise ConfigError(f"{field} is {value}; {rule}")


def check_names(cards: Sequence[Card]) -> None:
    """Raise ConfigError unless every spelling can be written in a call, and means one model in any case."""
    declared: dict[str, str] = {}
    for i, card in enumerate(cards):
        fields = {f"pool.models[{i}].name": card.name}
        fields |= {f"pool.models[{i}].aliases[{j}]": alias for j, alias in enumerate(card.aliases)}
        for field, spelling in fields.items():
            _check_spelling(field, spelling)
            other = declared.setdefault(spelling.casefold(), field)
            if other != field:
                raise ConfigError(
                    f"{field} is {spelling!r}, which {other} is already; names and aliases differ by more than case"
                )


def _check_dealt_names(pool_config: ConfigDict, cards: Sequence[Card]) -> None:
    """Raise ConfigError where `config.pool.names` cannot be dealt to these cards."""
    declared: dict[str, int] = {}
    for i, name in enumerate(pool_config.names):
        _check_spelling(f"pool.names[{i}]", name)
        if declared.setdefault(name.casefold(), i) != i:
            first = declared[name.casefold()]
            raise ConfigError(f"pool.names[{i}] is {name!r}, which pool.names[{first}] is already; write each once")
    if len(pool_config.names) < (shown := pool_config.shown or len(cards)):
        raise ConfigError(
            f"pool.names are {len(pool_config.names)}, and a prompt shows {shown} models; "
            "add names, show fewer with pool.shown, or set names to () to deal those of the models"
        )


def _check_spelling(field: str, spelling: str) -> None:
    if not spelling:
        raise ConfigError(f"{field} is ''; give the model a name")
    if any(mark in spelling for mark in ":<>") or not spelling.isprintable() or spelling != spelling.strip():
        raise ConfigError(
            f"{field} is {spelling!r}; a name holds no colon, angle bracket, line break or invisible character "
            "and no space at its ends, or no call could spell it"
        )
    if any(placeholder in spelling.lower() for placeholder in PLACEHOLDERS):
        raise ConfigError(f"{field} is {spelling!r}; {', '.join(PLACEHOLDERS)} stand for the prompt's example")
