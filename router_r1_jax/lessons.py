"""Lessons that come before the warm start's episodes: from copying a few tokens to reading the table of all cards.

A router that knows models by their cards alone has to find the name that stands behind a score. A small transformer
that starts at random did not learn that from prompts: to read on from where a value stood takes two layers that are of
use only together (Olsson et al. 2022, induction heads), and among many names neither gets a gradient to speak of. So
both begin as such heads (`model.arch.induction_heads`); sequences that repeat after two to four tokens, and then tables
that grow from one line to all, make them read. What each is worth: experiments/studies/README.md.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from router_r1_jax import prompts
from router_r1_jax.config import ConfigError
from router_r1_jax.data.scripted import recited_lines, repeating_sequences
from router_r1_jax.learner import ROW_MULTIPLE, Row
from router_r1_jax.pool.cards import all_in_prompts, roster, roster_settings
from router_r1_jax.session import Session

TOKENS = 96  # a lesson takes about as many tokens as warmstart.batch rows of this length
PERIODS = 8  # a sequence of a lesson in copying is so many times as long as its longest period


def copying(session: Session, rng: np.random.Generator, shortest: int, longest: int) -> tuple[list[int], list[Row]]:
    """The shared prefix, and sequences that repeat with these periods, of the tokens of the cards' table."""
    alphabet = np.array(sorted({token for column in _columns(session) for ids in column for token in ids}))
    count, length = row_count(session, PERIODS * longest), PERIODS * longest
    picks, repeats = repeating_sequences(rng, count, length, len(alphabet), periods=(shortest, longest))
    return _first_token(session), [Row([], alphabet[p], m) for p, m in zip(picks, repeats, strict=True)]


def reading(session: Session, rng: np.random.Generator, models: int, lines: int) -> tuple[list[int], list[Row]]:
    """The shared prefix, and rows of `lines` lines of a table of so many models, and names recited from them."""
    settings, rows = roster_settings(session.config.pool) | {"shown": models}, []
    for _ in range(row_count(session, longest_row(session, "read", models, lines))):
        cards = roster(session.cards, rng, **settings)
        table, *recited = recited_lines(cards, rng, lines=lines, count=recited_names(models, lines))
        shown, _ = token_ids(session, [table])
        rows.append(Row(shown, *token_ids(session, recited)))
    return _first_token(session), rows


ROWS = {"copy": copying, "read": reading}


def recited_names(models: int, lines: int) -> int:
    """Names that a row of a lesson in reading recites: about every second entry of its lines, and a few more."""
    return 5 + models * lines // 2


def row_count(session: Session, length: int) -> int:
    """Rows of a lesson whose longest row has `length` tokens."""
    padded = -(-length // ROW_MULTIPLE) * ROW_MULTIPLE
    return session.config.warmstart.batch * max(TOKENS // padded, 1)


def longest_row(session: Session, kind: str, *numbers: int) -> int:
    """Tokens of a row of a lesson of `warmstart.lessons`, at most. ConfigError where the pool has too few models."""
    if kind == "copy":
        return PERIODS * numbers[1]
    models, lines = numbers
    names = {card.name for card in all_in_prompts(session.cards, session.config.pool)}
    if models > min(len(session.cards), len(names)):
        raise ConfigError(
            f"warmstart.lessons reads of {models} models, and pool.models are {len(session.cards)}, "
            f"their names {len(names)}"
        )
    label, value, name = (max(map(len, column)) for column in _columns(session))
    frame = len(_encode(session, "-")) + len(_encode(session, "\n"))
    entry = label + value + name
    return lines * (frame + models * entry) + recited_names(models, lines) * entry


def token_ids(session: Session, pieces: Sequence[tuple[str, bool]]) -> tuple[list[int], list[float]]:
    """Token ids of pieces of text, and a mask of those that carry loss."""
    tokens, mask = [], []
    for text, spoken in pieces:
        piece = _encode(session, text)
        tokens += piece
        mask += [float(spoken)] * len(piece)
    return tokens, mask


def _encode(session: Session, text: str) -> list[int]:
    return session.tokenizer.encode(text, add_special_tokens=False)


def _first_token(session: Session) -> list[int]:
    """What every prompt begins with; a learner's rows follow a prefix."""
    return list(session.router.prompt_ids("?", session.cards[:1])[:1])


def _columns(session: Session) -> tuple[list[list[int]], ...]:
    """Token ids of each label, value and name of the table of all cards."""
    table = prompts.card_table(all_in_prompts(session.cards, session.config.pool))
    values, names = zip(*itertools.chain.from_iterable(line.entries for line in table), strict=True)
    columns = ({line.label for line in table}, set(values), set(names))
    return tuple([_encode(session, f" {text}") for text in sorted(column)] for column in columns)
