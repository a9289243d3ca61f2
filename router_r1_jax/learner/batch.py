"""A learner's batch: rows of token ids behind one shared prefix, in micro-batches of a few static shapes.

Rows differ in length by an order of magnitude. They are sorted into buckets, and a micro-batch of a bucket holds as
many rows as its token budget allows: short rows go many at a time, and padding costs little.

    lengths  64: [8 rows][8 rows]         each micro-batch: at most 512 positions
            128: [4 rows][4 rows][2 rows and 2 of the next shorter bucket]
            256: [2 rows]

The shapes follow from a `Layout` and the number of rows alone, so that one program serves every batch of a run; how
many micro-batches of each bucket are in use is data.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import numpy as np

ROW_MULTIPLE = 32  # lengths of rows, as the model reads them, are multiples of it
PREFIX_MULTIPLE = 64

PerToken = float | Sequence[float] | np.ndarray


class Layout(NamedTuple):
    """Lengths of the buckets, ascending: tokens that are read of a row. And rows of a micro-batch of each."""

    lengths: tuple[int, ...]
    rows: tuple[int, ...]


def make_layout(longest: int, *, buckets: int, tokens: int, rows: int, shares: int = 1) -> Layout:
    """At most `buckets` lengths, each half of the next, the last with room for rows of `longest` tokens.

    Args:
      longest: tokens of the longest row; the last one predicts nothing and is not read.
      buckets: at least 1.
      tokens: positions of one pass on one device, padding included, where a single row does not take more.
      rows: of a batch; no micro-batch needs more.
      shares: devices that a micro-batch's rows are split over, each taking as many.
    """
    lengths = [_padded_length(longest - 1, ROW_MULTIPLE)]
    while len(lengths) < buckets and lengths[0] > ROW_MULTIPLE:
        lengths.insert(0, _padded_length(lengths[0] // 2, ROW_MULTIPLE))
    most = -(-rows // shares)
    return Layout(tuple(lengths), tuple(min(max(tokens // length, 1), most) * shares for length in lengths))


@flax.struct.dataclass
class Rows:
    """Per-token fields of rows, [m, T] for one micro-batch; index t speaks of `tokens[:, t]`, given all before it."""

    tokens: jax.Array  # int32, padded on the right
    mask: jax.Array  # float32: 1 on tokens that carry loss
    logps: jax.Array  # float32: log-probs of the policy that ratios compare with (0 where unused)
    weights: jax.Array  # float32: importance weights of the policy gradient
    reference_logps: jax.Array  # float32
    advantages: jax.Array  # float32
    values: jax.Array  # float32: of the state before the token, by the critic before the update
    returns: jax.Array  # float32: what the critic's value should have been


@flax.struct.dataclass
class Bucket:
    """Micro-batches of one shape: fields [n, m, T], of which the first `count` hold rows."""

    rows: Rows
    count: jax.Array  # int32 scalar


@flax.struct.dataclass
class Batch:
    """All rows of an update. `prefix` is read once for all; a row's own tokens (question, turns, replies) follow it."""

    prefix: jax.Array  # [P] int32, padded
    prefix_length: jax.Array  # int32 scalar
    buckets: tuple[Bucket, ...]


class Row(NamedTuple):
    """One row before padding: its own prompt, and the tokens behind it with a value for each or one for all."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    mask: PerToken = 1.0
    logps: PerToken = 0.0
    weights: PerToken = 1.0
    reference_logps: PerToken = 0.0
    advantages: PerToken = 0.0
    values: PerToken = 0.0
    returns: PerToken = 0.0

    @property
    def length(self) -> int:
        """Tokens, those of the prompt included."""
        return len(self.prompt) + len(self.tokens)


_FIELDS = Row._fields[2:]


def _padded_length(n: int, multiple: int) -> int:
    return -(-max(n, 1) // multiple) * multiple


def deal(lengths: Sequence[int], layout: Layout) -> list[list[int]]:
    """Which rows go to which bucket, by number and in order; `lengths` are tokens of each row.

    Each goes to the shortest bucket with room for it. Where the last micro-batch of a longer bucket has free places,
    the longest rows of the next shorter one take them: they would cost a pass of their own otherwise.

    Raises ValueError for a row that fits in none.
    """
    if max(lengths) - 1 > layout.lengths[-1]:
        raise ValueError(f"a row has {max(lengths)} tokens; the longest bucket reads {layout.lengths[-1]}")
    dealt: list[list[int]] = [[] for _ in layout.lengths]
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        dealt[np.searchsorted(layout.lengths, lengths[row] - 1)].append(row)
    for shorter, longer, rows in zip(dealt[-2::-1], dealt[:0:-1], layout.rows[:0:-1], strict=True):
        free = min(-len(longer) % rows, len(shorter))
        longer[:0] = shorter[len(shorter) - free :]
        del shorter[len(shorter) - free :]
    return dealt


def make_batch(prefix: Sequence[int], rows: Sequence[Row], layout: Layout) -> Batch:
    """Rows behind their prefix as NumPy arrays. Raises ValueError for a row that is longer than all buckets."""
    padded = np.zeros(_padded_length(len(prefix), PREFIX_MULTIPLE), np.int32)
    padded[: len(prefix)] = prefix
    dealt = deal([row.length for row in rows], layout)
    buckets = tuple(
        _make_bucket([rows[i] for i in members], length, size, -(-len(rows) // size))
        for members, length, size in zip(dealt, *layout, strict=True)
    )
    return Batch(padded, np.int32(len(prefix)), buckets)


def _make_bucket(rows: Sequence[Row], length: int, size: int, most: int) -> Bucket:
    """Micro-batches of `size` rows that read `length` tokens, `most` of them."""
    fields = {name: np.zeros((most * size, length + 1), np.float32) for name in _FIELDS}
    tokens = np.zeros((most * size, length + 1), np.int32)
    for i, row in enumerate(rows):
        own = slice(len(row.prompt), row.length)
        tokens[i, : own.start], tokens[i, own] = row.prompt, row.tokens
        for name, field in fields.items():
            field[i, own] = getattr(row, name)
    cut = {name: field.reshape(most, size, length + 1) for name, field in {"tokens": tokens, **fields}.items()}
    return Bucket(Rows(**cut), np.int32(-(-len(rows) // size)))


def unpack(fields: Sequence[np.ndarray], rows: Sequence[Row], layout: Layout) -> list[np.ndarray]:
    """What stands at each row's tokens, behind its prompt, in one field [n, m, T] per bucket of these rows' batch."""
    found: list[np.ndarray] = [np.zeros(0)] * len(rows)
    for field, members in zip(fields, deal([row.length for row in rows], layout), strict=True):
        flat = field.reshape(-1, field.shape[-1])
        for place, i in enumerate(members):
            found[i] = flat[place, len(rows[i].prompt) : rows[i].length]
    return found
