"""Model cards: description, price of a call and provider of a model; candidate models, drawn and renamed per batch."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from router_r1_jax.config import ConfigError
from router_r1_jax.protocol import PLACEHOLDERS

# Parameters of a request that the pool sets, or that change the shape of the answer.
_RESERVED = ("model", "messages", "stream", "n")
_PRICE = "a price is dollars per million tokens, >= 0"


@dataclasses.dataclass(frozen=True)
class Card:
    """One external model.

    Attributes:
      key: the name declared in the config; it identifies the model in ledger, metrics and rewards.
      name: the name in the prompt. It differs from `key` if the candidates are renamed.
      provider: name of the provider that serves the model.
      model: the provider's id of the model.
      price_in: dollars per million prompt tokens.
      price_out: dollars per million completion tokens.
      latency: usual seconds per call, for the prompt and the simulated server; None if nobody measured it.
      performance: topic -> score in [0, 1].
      description: free text for the prompt.
      aliases: further spellings of `name` that a call may use.
      simulated: faults of a simulated model, as `config.model_card` lists them; all 0 for a real model.
      price_changes: (training step, price_in, price_out); each is valid from its step on.
      price_cached: dollars per million prompt tokens that the provider has cached; None if that is price_in.
      system: system message of every request, "" for none.
      parameters: fields in the body of every request; they replace the provider's, and None takes one away.
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
    simulated: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    price_changes: tuple[tuple[int, float, float], ...] = ()
    price_cached: float | None = None
    system: str = ""
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def dollars(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> float:
        """Price of one call in dollars, if the provider had cached `cached_tokens` of the prompt tokens."""
        cached = self.price_in if self.price_cached is None else self.price_cached
        prompt = (prompt_tokens - cached_tokens) * self.price_in + cached_tokens * cached
        return (prompt + completion_tokens * self.price_out) / 1e6

    def raw_cost(self, completion_tokens: int) -> float:
        """Completion tokens x dollars per million output tokens: the unit of the paper's cost reward."""
        return completion_tokens * self.price_out


def cards_from_config(pool_config: ConfigDict) -> tuple[Card, ...]:
    """The cards of `config.pool`, in declared order. Raises ConfigError for the first invalid field."""
    providers = [provider.name for provider in pool_config.providers]
    cards = tuple(_card(f"pool.models[{i}]", entry, providers) for i, entry in enumerate(pool_config.models))
    check_names(cards)
    names = pool_config.names
    if pool_config.rename and names:
        _check_spellings({f"pool.names[{i}]": name for i, name in enumerate(names)})
        if len(names) < (shown := pool_config.candidates or len(cards)):
            raise ConfigError(
                f"pool.names are {len(names)}, and a prompt shows {shown} models; "
                "add names, show fewer with pool.candidates, or set names to () to use those of the models"
            )
    return cards


def draw_candidates(cards: Sequence[Card], rng: np.random.Generator, pool_config: ConfigDict) -> tuple[Card, ...]:
    """Draw the candidate models of one batch of prompts from `cards`. Every card keeps its `key`.

    `config.pool` says what is drawn:
      candidates: how many models are drawn; 0 takes all. A router that meets other models in each batch gains nothing
        from knowing one of them by heart.
      shuffle: whether the order of the models is drawn.
      rename: whether the names are drawn. A name then tells nothing of the model, and the router must read the cards.
      names: the names to draw from. If there are none, the names of all cards are drawn with their aliases, also those
        of cards that are no candidates. Names are never invented, so that tokenizer and router know all of them.
    """
    order = rng.permutation(len(cards)) if pool_config.shuffle else np.arange(len(cards))
    if pool_config.candidates:
        kept = rng.choice(len(cards), size=pool_config.candidates, replace=False)
        order = order[np.isin(order, kept)]
    chosen = [cards[i] for i in order]
    if pool_config.rename:
        spellings = [(name, ()) for name in pool_config.names] or [(card.name, card.aliases) for card in cards]
        sampled = [spellings[i] for i in rng.permutation(len(spellings))[: len(chosen)]]
        chosen = [
            dataclasses.replace(card, name=name, aliases=aliases)
            for card, (name, aliases) in zip(chosen, sampled, strict=True)
        ]
    return tuple(chosen)


def all_in_prompts(cards: Sequence[Card], pool_config: ConfigDict) -> tuple[Card, ...]:
    """Cards that together hold every value and every name that a prompt of `config.pool` can show."""
    names = pool_config.names
    if not (pool_config.rename and names):
        return tuple(cards)
    return tuple(
        dataclasses.replace(cards[i % len(cards)], name=names[i % len(names)], aliases=())
        for i in range(max(len(cards), len(names)))
    )


def at_step(cards: Sequence[Card], step: int) -> tuple[Card, ...]:
    """The cards with the prices that are valid at a training step, and without price changes."""

    def priced(card: Card) -> Card:
        past = [change for change in card.price_changes if change[0] <= step]
        _, price_in, price_out = max(past, key=lambda c: c[0], default=(0, card.price_in, card.price_out))
        return dataclasses.replace(card, price_in=price_in, price_out=price_out, price_changes=())

    return tuple(map(priced, cards))


def route_names(cards: Sequence[Card]) -> dict[str, str]:
    """Map every spelling that a call may use to the name in the prompt, as `protocol.parse_route` takes it."""
    return {spelling: card.name for card in cards for spelling in (card.name, *card.aliases)}


def check_parameters(field: str, parameters: Mapping[str, Any]) -> None:
    """Raise ConfigError if the parameters of `field`, a provider or a model, hold one that is not the user's to set."""
    for name in _RESERVED:
        if name in parameters:
            raise ConfigError(f"{field}.parameters.{name} is set; leave it out, the pool sets it itself")


def check_names(cards: Sequence[Card]) -> None:
    """Raise ConfigError unless every name and alias can be written in a call and means one model in any case."""
    spellings: dict[str, str] = {}
    for i, card in enumerate(cards):
        spellings[f"pool.models[{i}].name"] = card.name
        spellings |= {f"pool.models[{i}].aliases[{j}]": alias for j, alias in enumerate(card.aliases)}
    _check_spellings(spellings)


def _card(where: str, entry: ConfigDict, providers: Sequence[str]) -> Card:
    if entry.provider not in providers:
        known = ", ".join(providers) or "none, declare one in pool.providers"
        raise ConfigError(f"{where}.provider is {entry.provider!r}, which is not declared; the providers are: {known}")
    if not entry.model:
        raise ConfigError(f"{where}.model is ''; write the id under which provider {entry.provider!r} knows the model")
    for field in ("price_in", "price_out", "price_cached"):
        _check_number(f"{where}.{field}", entry[field], _PRICE)
    for j, change in enumerate(entry.price_changes):
        if len(change) != 3 or not all(math.isfinite(value) and value >= 0 for value in change):
            raise ConfigError(f"{where}.price_changes[{j}] is {change}; write (step, price_in, price_out), each >= 0")
    _check_number(f"{where}.latency", entry.latency, "a latency is seconds per call, >= 0")
    for topic, score in entry.performance.items():
        _check_number(f"{where}.performance.{topic}", score, "a score lies in [0, 1]", most=1.0)
    for field in ("failure_rate", "malformed_rate", "wrong_type_rate", "dropped_rate"):
        _check_number(f"{where}.simulated.{field}", entry.simulated[field], "a share lies in [0, 1]", most=1.0)
    check_parameters(where, entry.parameters)
    return Card(
        key=entry.name,
        **entry.to_dict()
        | {
            "performance": {topic: float(score) for topic, score in entry.performance.items()},
            "aliases": tuple(entry.aliases),
            "price_changes": tuple((int(step), float(p_in), float(p_out)) for step, p_in, p_out in entry.price_changes),
        },
    )


def _check_number(field: str, value: float | None, rule: str, *, most: float = math.inf) -> None:
    if value is not None and not (math.isfinite(value) and 0 <= value <= most):
        raise ConfigError(f"{field} is {value}; {rule}")


def _check_spellings(spellings: Mapping[str, str]) -> None:
    """Raise ConfigError unless every spelling (field -> name) can be written in a call and occurs once in any case."""
    declared: dict[str, str] = {}
    for field, spelling in spellings.items():
        if not spelling:
            raise ConfigError(f"{field} is ''; give the model a name")
        if any(mark in spelling for mark in ":\uff1a<>") or not spelling.isprintable() or spelling != spelling.strip():
            raise ConfigError(
                f"{field} is {spelling!r}; a name holds no colon, angle bracket, line break or invisible character "
                "and no space at its ends, or no call could spell it; "
                f"name it {_speakable(spelling)!r}, and let .model keep the provider's id"
            )
        if any(placeholder in spelling.lower() for placeholder in PLACEHOLDERS):
            raise ConfigError(
                f"{field} is {spelling!r}; {', '.join(PLACEHOLDERS)} are placeholders of the published prompt"
            )
        other = declared.setdefault(spelling.casefold(), field)
        if other != field:
            raise ConfigError(
                f"{field} is {spelling!r}, which {other} is already; names and aliases differ by more than case"
            )


def _speakable(name: str) -> str:
    """A name that a call can spell, as near to `name` as possible: "qwen2.5:7b" becomes "qwen2.5-7b"."""
    return re.sub("[:\uff1a<>]+", "-", "".join(filter(str.isprintable, name))).strip(" -") or "model"
