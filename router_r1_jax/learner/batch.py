"""A learner's batch: rows of token ids behind one shared prefix, with what the loss needs per token."""

from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import numpy as np

LENGTH_BUCKET = 32  # the model reads a multiple of it, which is all of a row but the last token: few compilations
PREFIX_BUCKET = 64


@flax.struct.dataclass
class Batch:
    """B rows. Per-token fields at index t speak of `tokens[:, t]`, predicted from everything before it.

    `prefix` is read once for all rows; a row's own tokens (question, turns, replies) follow it.
    """

    prefix: jax.Array  # [P] int32, padded
    prefix_length: jax.Array  # int32 scalar
    tokens: jax.Array  # [B, T] int32, padded on the right
    mask: jax.Array  # [B, T] float32: 1 on tokens that carry loss
    logps: jax.Array  # [B, T] float32: the sampler's log-probs (0 where unused)
    reference_logps: jax.Array  # [B, T] float32
    advantages: jax.Array  # [B] float32


class Row(NamedTuple):
    """One row before padding: its own prompt tokens, then tokens with their mask and log-probs, and its advantage."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    mask: Sequence[float]
    logps: Sequence[float]
    advantage: float


def _padded_length(n: int, bucket: int) -> int:
    return -(-max(n, 1) // bucket) * bucket


def make_batch(prefix: Sequence[int], rows: Sequence[Row]) -> Batch:
    """Pad rows into one Batch of NumPy arrays; `reference_logps` is zero until it is computed."""
    T = _padded_length(max(len(r.prompt) + len(r.tokens) for r in rows) - 1, LENGTH_BUCKET) + 1
    B = len(rows)
    tokens = np.zeros((B, T), np.int32)
    mask, logps = np.zeros((B, T), np.float32), np.zeros((B, T), np.float32)
    for i, row in enumerate(rows):
        start, end = len(row.prompt), len(row.prompt) + len(row.tokens)
        tokens[i, :start] = row.prompt
        tokens[i, start:end] = row.tokens
        mask[i, start:end] = row.mask
        logps[i, start:end] = row.logps
    padded = np.zeros(_padded_length(len(prefix), PREFIX_BUCKET), np.int32)
    padded[: len(prefix)] = prefix
    return Batch(
        prefix=padded,
        prefix_length=np.int32(len(prefix)),
        tokens=tokens,
        mask=mask,
        logps=logps,
        reference_logps=np.zeros((B, T), np.float32),
        advantages=np.array([r.advantage for r in rows], np.float32),
    )
