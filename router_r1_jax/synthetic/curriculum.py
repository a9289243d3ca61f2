"""Curriculum of the warm start, before its episodes: phases that go from copying a few tokens to reading whole tables.

A router that knows the models by their cards alone must find the name that stands behind a score. To read on from the
place of a value takes two layers that only work together (induction heads, Olsson et al. 2022), and a small transformer
with random weights gets almost no gradient for that from prompts. So both layers are initialised as such heads
(`model.arch.induction_heads`). Sequences that repeat after two to four tokens, and tables that grow from one line to
all lines, then train them to read. experiments/studies/README.md has the measurements.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from router_r1_jax import prompts
from router_r1_jax.config import ConfigError
from router_r1_jax.learner import ROW_MULTIPLE, Row
from router_r1_jax.pool.cards import all_in_prompts, draw_candidates
from router_r1_jax.router import Router
from router_r1_jax.synthetic.scripted_episodes import recited_lines, repeating_sequences
from router_r1_jax.training.supervised import Phase

ROW_TOKENS = 96  # an update takes about as many tokens as warmstart.batch rows of this length
REPEATS = 8  # a copied sequence is this many times as long as the longest period


def curriculum_phase(router: Router, kind: str, updates: int, *numbers: int) -> Phase:
    """The updates of one entry of `synthetic.curriculum`. Raises ConfigError if the pool has too few models."""
    longest_row, make_rows = {"copy": (_longest_copy, _copied_rows), "read": (_longest_table, _read_rows)}[kind]
    longest = longest_row(router, *numbers)
    padded = -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE
    count = router.config.warmstart.batch * max(ROW_TOKENS // padded, 1)

    def batch(step: int) -> tuple[list[int], list[Row]]:
        rng = np.random.default_rng([router.config.warmstart.seed, step])
        # The learner's rows follow a prefix; the first token of every prompt serves as one.
        return list(router.prompt_ids("?", router.cards[:1])[:1]), make_rows(router, rng, count, *numbers)

    return Phase(updates, batch, longest, 1, count)  # one padded length, because all rows are about as long


def _longest_copy(router: Router, shortest: int, longest: int) -> int:
    return REPEATS * longest


def _copied_rows(router: Router, rng: np.random.Generator, count: int, shortest: int, longest: int) -> list[Row]:
    """Sequences that repeat with periods from `shortest` to `longest`, made of the tokens of the cards' table."""
    alphabet = np.array(sorted({token for column in _columns(router) for ids in column for token in ids}))
    length = REPEATS * longest
    picks, repeats = repeating_sequences(rng, count, length, len(alphabet), periods=(shortest, longest))
    return [Row([], alphabet[pick], mask) for pick, mask in zip(picks, repeats, strict=True)]


def _read_rows(router: Router, rng: np.random.Generator, count: int, models: int, lines: int) -> list[Row]:
    """Rows of `lines` lines of a table of `models` models, and names that are recited from them."""
    pool, rows = router.config.pool.copy_and_resolve_references(), []
    pool.candidates = models
    for _ in range(count):
        cards = draw_candidates(router.cards, rng, pool)
        table, *recited = recited_lines(cards, rng, lines=lines, count=_recited_names(models, lines))
        prompt, _ = token_ids(router, [table])
        rows.append(Row(prompt, *token_ids(router, recited)))
    return rows


def _recited_names(models: int, lines: int) -> int:
    """Names that a row recites from its table: about every second entry, and a few more."""
    return 5 + models * lines // 2


def _longest_table(router: Router, models: int, lines: int) -> int:
    """An upper bound of the tokens of `_read_rows`. Raises ConfigError if the pool has too few models."""
    names = {card.name for card in all_in_prompts(router.cards, router.config.pool)}
    if models > min(len(router.cards), len(names)):
        raise ConfigError(
            f"synthetic.curriculum reads of {models} models, and pool.models are {len(router.cards)}, "
            f"their names {len(names)}"
        )
    label, value, name = (max(map(len, column)) for column in _columns(router))
    frame = len(_encode(router, "-")) + len(_encode(router, "\n"))
    entry = label + value + name
    return lines * (frame + models * entry) + _recited_names(models, lines) * entry


def token_ids(router: Router, pieces: Sequence[tuple[str, bool]]) -> tuple[list[int], list[float]]:
    """Token ids of (text, trained) pieces, and a mask that is 1 for tokens that carry loss."""
    tokens, mask = [], []
    for text, trained in pieces:
        piece = _encode(router, text)
        tokens += piece
        mask += [float(trained)] * len(piece)
    return tokens, mask


def _encode(router: Router, text: str) -> list[int]:
    return router.tokenizer.encode(text, add_special_tokens=False)


def _columns(router: Router) -> tuple[list[list[int]], ...]:
    """Token ids of each label, each value and each name in the table of all cards."""
    table = prompts.card_table(all_in_prompts(router.cards, router.config.pool))
    values, names = zip(*itertools.chain.from_iterable(line.entries for line in table), strict=True)
    columns = ({line.label for line in table}, set(values), set(names))
    return tuple([_encode(router, f" {text}") for text in sorted(column)] for column in columns)
