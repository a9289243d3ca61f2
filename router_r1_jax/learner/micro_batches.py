"""Micro-batches: rows of token ids behind one shared prefix, sorted into buckets of a few static shapes, and padded.

Rows differ in length by an order of magnitude. They are sorted into buckets by length. A micro-batch of a bucket has as
many rows as its token budget allows, so that short rows are computed many at a time and padding costs little.

    lengths  64: [8 rows][8 rows]         each micro-batch has at most 512 positions
            128: [4 rows][4 rows][2 rows and 2 of the next shorter bucket]
            256: [2 rows]

The shapes follow from a `Layout` and the number of rows alone, so that one compiled program serves every batch of a
run. How many micro-batches of each bucket are in use is data.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import numpy as np

from router_r1_jax.model import pad_prefix

ROW_MULTIPLE = 32  # the padded lengths of rows, without their last token, are multiples of it

PerToken = float | Sequence[float] | np.ndarray


class Layout(NamedTuple):
    """Shapes of the micro-batches: lengths of the buckets, ascending, and rows of a micro-batch of each bucket.

    A length counts the tokens of a row that are read, which are all but the last.
    """

    lengths: tuple[int, ...]
    rows: tuple[int, ...]


def make_layout(longest: int, *, buckets: int, tokens: int, rows: int, shares: int = 1) -> Layout:
    """A layout of at most `buckets` lengths, each half of the next; the last has room for rows of `longest` tokens.

    Args:
      longest: tokens of the longest row. The last one predicts nothing and is not read.
      buckets: at least 1.
      tokens: positions of one forward-backward pass on one device, padding included; at least one row is taken.
      rows: rows of a batch. No micro-batch needs more.
      shares: devices over which the rows of a micro-batch are split, each taking the same number.
    """
    lengths = [_padded_length(longest - 1)]
    while len(lengths) < buckets and lengths[0] > ROW_MULTIPLE:
        lengths.insert(0, _padded_length(lengths[0] // 2))
    most = -(-rows // shares)
    return Layout(tuple(lengths), tuple(min(max(tokens // length, 1), most) * shares for length in lengths))


def _padded_length(n: int) -> int:
    return -(-max(n, 1) // ROW_MULTIPLE) * ROW_MULTIPLE


@flax.struct.dataclass
class Rows:
    """Per-token fields of rows, [m, T] for one micro-batch; index t belongs to `tokens[:, t]`, given all before it."""

    tokens: jax.Array  # int32, padded on the right
    mask: jax.Array  # float32, 1 on tokens that carry loss
    logps: jax.Array  # float32, log-probs of the old policy, for the probability ratio (0 if unused)
    weights: jax.Array  # float32, importance weights of the policy gradient
    reference_logps: jax.Array  # float32, log-probs of the KL reference
    advantages: jax.Array  # float32
    values: jax.Array  # float32, the critic's values before the update, of the states before the tokens
    returns: jax.Array  # float32, targets of the critic


@flax.struct.dataclass
class Bucket:
    """Micro-batches of one shape: fields [n, m, T]. The first `count` of the n micro-batches have rows."""

    rows: Rows
    count: jax.Array  # int32 scalar


@flax.struct.dataclass
class Batch:
    """All rows of an update behind one prefix. Each row continues it with its question, turns and replies."""

    prefix: jax.Array  # [P] int32, padded
    prefix_length: jax.Array  # int32 scalar
    buckets: tuple[Bucket, ...]


class Row(NamedTuple):
    """One row before padding: its prompt, and the tokens after it, with one value for each token or one for all."""

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
        """Number of tokens, with the prompt."""
        return len(self.prompt) + len(self.tokens)


_FIELDS = Row._fields[2:]


def assign_buckets(lengths: Sequence[int], layout: Layout) -> list[list[int]]:
    """The indices of the rows of each bucket, in order; `lengths` are the rows' numbers of tokens.

    Each row goes to the shortest bucket with room for it. If the last micro-batch of a longer bucket has free places,
    the longest rows of the next shorter bucket fill them, because they could cost a pass of their own otherwise.

    Raises ValueError if a row is longer than all buckets.
    """
    if max(lengths) - 1 > layout.lengths[-1]:
        raise ValueError(f"a row has {max(lengths)} tokens; the longest bucket reads {layout.lengths[-1]}")
    assigned: list[list[int]] = [[] for _ in layout.lengths]
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        assigned[np.searchsorted(layout.lengths, lengths[row] - 1)].append(row)
    for shorter, longer, rows in zip(assigned[-2::-1], assigned[:0:-1], layout.rows[:0:-1], strict=True):
        start = len(shorter) - min(-len(longer) % rows, len(shorter))
        longer[:0] = shorter[start:]
        del shorter[start:]
    return assigned


def make_batch(prefix: Sequence[int], rows: Sequence[Row], layout: Layout) -> Batch:
    """Rows behind their prefix as NumPy arrays. Raises ValueError if a row is longer than all buckets."""
    assigned = assign_buckets([row.length for row in rows], layout)
    buckets = tuple(
        _make_bucket([rows[i] for i in members], length, size, -(-len(rows) // size))
        for members, length, size in zip(assigned, *layout, strict=True)
    )
    return Batch(pad_prefix(prefix), np.int32(len(prefix)), buckets)


def _make_bucket(rows: Sequence[Row], length: int, size: int, n: int) -> Bucket:
    """`n` micro-batches of `size` rows; `length` tokens of each row are read."""
    fields = {name: np.zeros((n * size, length + 1), np.float32) for name in _FIELDS}
    fields["tokens"] = np.zeros((n * size, length + 1), np.int32)
    for i, row in enumerate(rows):
        start = len(row.prompt)
        fields["tokens"][i, :start] = row.prompt
        for name in ("tokens", *_FIELDS):
            fields[name][i, start : row.length] = getattr(row, name)
    split = {name: field.reshape(n, size, length + 1) for name, field in fields.items()}
    return Bucket(Rows(**split), np.int32(-(-len(rows) // size)))


def unpack(fields: Sequence[np.ndarray], rows: Sequence[Row], layout: Layout) -> list[np.ndarray]:
    """The values at each row's tokens after its prompt, from one field [n, m, T] per bucket of these rows' batch."""
    found: list[np.ndarray] = [np.zeros(0)] * len(rows)
    for field, members in zip(fields, assign_buckets([row.length for row in rows], layout), strict=True):
        flat = field.reshape(-1, field.shape[-1])
        for place, i in enumerate(members):
            found[i] = flat[place, len(rows[i].prompt) : rows[i].length]
    return found
