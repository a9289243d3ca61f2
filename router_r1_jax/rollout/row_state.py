"""Row state of continuous batching: prefill, decode or wait per slot, and the messages to and from the host callback.

Each slot of the sampling loop holds one row, and a row samples one episode at a time:

    EMPTY --question--> PREFILL --read--> DECODE --turn ends--> ENDED --report--> WAIT --reply--> PREFILL ...

A turn ends at a closing tag, at the end-of-text token, or at a limit. The next callback reports it to the host, and the
row waits until the host delivers a reply, the question of a new episode, or nothing (the row becomes EMPTY). The KV
caches are kept apart from this state, so the callback never touches them.
"""

import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

EMPTY, PREFILL, DECODE, ENDED, WAIT = range(5)

# Why a turn ended, in the order in which a step looks for it, after the stop tags: accepting states of the automaton.
END_OF_TEXT, TOKEN_LIMIT, TURN_LIMIT, ROW_FULL = range(101, 105)
REASONS = {END_OF_TEXT: "end_of_text", TOKEN_LIMIT: "token_limit", TURN_LIMIT: "turn_limit", ROW_FULL: "row_full"}
# What a run counts, in the order of `Rows.counts`. A step may prefill, decode, both, or neither. `decode_batch_waits`
# is summed over rows: the steps that a row with tokens to read spent outside the decode batch.
COUNTS = ("decode_steps", "decoded_tokens", "prefill_steps", "prefilled_tokens", "steps", "decode_batch_waits")


class StaticShapes(NamedTuple):
    """Static sizes of a compiled sampling loop; all lengths are tokens."""

    slots: int  # B, rows
    decode_batch: int  # A, rows that compute at a time
    row_tokens: int  # S, cache positions of a row, behind the shared prefix
    turn_tokens: int  # M, sampled tokens of one turn
    episode_tokens: int  # sampled tokens of one episode
    prefill_tokens: int  # F, longest question, or longest reply with its tags
    prefill_chunk: int  # C, tokens that one prefill step reads into a row
    prefill_rows: int  # R, rows that one prefill step reads into
    prefill_wait: int  # steps that a row may be held back from prefill until others join it
    callback_rows: int  # E, rows that one callback carries each way
    poll_every: int  # steps between two looks for replies if rows wait

    @property
    def num_caches(self) -> int:
        """Rows that the KV caches have room for: B, and spare ones for swaps if the decode batch is smaller than B."""
        return self.slots + min(self.prefill_rows, self.slots - self.decode_batch)


@flax.struct.dataclass
class Rows:
    """State of all rows [B, ...] and of the loop; the module docstring explains `status`."""

    status: jax.Array  # [B] int32
    episode: jax.Array  # [B] uint32, seeds the row's random draws
    position: jax.Array  # [B] int32, cache positions in use
    last_token: jax.Array  # [B] int32, the next token to enter the cache
    tag_state: jax.Array  # [B] uint8, state of the stop-tag automaton
    reason: jax.Array  # [B] int32, why the turn ended
    prefill: jax.Array  # [B, F] int32, tokens to read
    prefill_length: jax.Array  # [B] int32
    prefill_done: jax.Array  # [B] int32
    arrived: jax.Array  # [B] int32, the step at which the host delivered the tokens to read
    turn: jax.Array  # [B, M] int32, tokens sampled in this turn
    logps: jax.Array  # [B, M] float32, in the whole distribution
    sampler_logps: jax.Array  # [B, M] float32, in the truncated distribution that was sampled from
    turn_length: jax.Array  # [B] int32
    sampled: jax.Array  # [B] int32, tokens sampled in this episode
    turn_began: jax.Array  # [B] int32, the step that sampled the turn's first token
    cache_of_row: jax.Array  # [B] int32, index of the row's KV cache; the first A are the decode batch
    row_of_cache: jax.Array  # [B + spare] int32, the row of each KV cache, B for none
    since_callback: jax.Array  # int32, steps
    prefill_held: jax.Array  # int32, steps since the last prefill in which a row had tokens to read
    more: jax.Array  # bool, the host has more to deliver than one callback carries
    stop: jax.Array  # bool, leave the loop
    counts: jax.Array  # [6] int32: COUNTS


class ToHost(NamedTuple):
    """Argument of a callback: up to E ended turns (row B: none), whether the host may wait for replies, and counts."""

    row: np.ndarray  # [E] int32
    reason: np.ndarray  # [E] int32
    turn_length: np.ndarray  # [E] int32
    turn: np.ndarray  # [E, M] int32
    logps: np.ndarray  # [E, M] float32
    sampler_logps: np.ndarray  # [E, M] float32
    turn_began: np.ndarray  # [E] int32
    idle: np.ndarray  # bool: no row can go on by itself, and no ended turn is left to report
    counts: np.ndarray  # [6] int32: COUNTS


class FromHost(NamedTuple):
    """Result of a callback: up to E rows with tokens to read (row B: none; length 0: the row becomes EMPTY)."""

    row: np.ndarray  # [E] int32
    fresh: np.ndarray  # [E] bool, whether a new episode begins
    episode: np.ndarray  # [E] uint32, used only if fresh
    length: np.ndarray  # [E] int32
    tokens: np.ndarray  # [E, F] int32
    more: np.ndarray  # bool, call the host again after the next step
    stop: np.ndarray  # bool, leave the loop


def empty_delivery(shapes: StaticShapes) -> FromHost:
    """A FromHost that delivers nothing. It also tells the shapes and dtypes of every callback's result."""
    E = shapes.callback_rows
    return FromHost(
        row=np.full(E, shapes.slots, np.int32),
        fresh=np.zeros(E, np.bool_),
        episode=np.zeros(E, np.uint32),
        length=np.zeros(E, np.int32),
        tokens=np.zeros((E, shapes.prefill_tokens), np.int32),
        more=np.bool_(False),
        stop=np.bool_(False),
    )


def empty_rows(shapes: StaticShapes) -> Rows:
    """All rows EMPTY."""
    B, M = shapes.slots, shapes.turn_tokens
    cache = jnp.arange(shapes.num_caches, dtype=jnp.int32)
    zeros = {name: jnp.zeros(B, jnp.int32) for name in Rows.__annotations__}
    others = {
        "episode": jnp.zeros(B, jnp.uint32),
        "tag_state": jnp.zeros(B, jnp.uint8),
        "prefill": jnp.zeros((B, shapes.prefill_tokens), jnp.int32),
        "turn": jnp.zeros((B, M), jnp.int32),
        "logps": jnp.zeros((B, M), jnp.float32),
        "sampler_logps": jnp.zeros((B, M), jnp.float32),
        "cache_of_row": cache[:B],
        "row_of_cache": jnp.minimum(cache, B),
        "since_callback": jnp.zeros((), jnp.int32),
        "prefill_held": jnp.zeros((), jnp.int32),
        "more": jnp.array(True),
        "stop": jnp.array(False),
        "counts": jnp.zeros(len(COUNTS), jnp.int32),
    }
    return Rows(**zeros | others)


def read(rows: Rows, row: jax.Array, *names: str) -> list[jax.Array]:
    """Fields of the rows [n]: [n, ...] each; 0 for row B."""
    return [getattr(rows, name).at[row].get(mode="fill", fill_value=0) for name in names]


def write(rows: Rows, row: jax.Array, **values: Any) -> Rows:
    """Set fields of the rows [n] to values [n, ...]; a row number past the last one writes nothing."""
    new = {name: getattr(rows, name).at[row].set(value, mode="drop") for name, value in values.items()}
    return rows.replace(**new)


def in_decode_batch(field: jax.Array, rows: Rows, shapes: StaticShapes) -> jax.Array:
    """A field [B, ...] of the rows that are in the decode batch: [A, ...]."""
    if shapes.decode_batch == shapes.slots:
        return field
    return field.at[rows.row_of_cache[: shapes.decode_batch]].get(mode="clip")


def add_counts(rows: Rows, **more: jax.Array | int) -> Rows:
    """Add to the counts."""
    return rows.replace(counts=rows.counts + jnp.stack([jnp.int32(more.get(name, 0)) for name in COUNTS]))


def should_prefill(rows: Rows, shapes: StaticShapes) -> jax.Array:
    """Whether the next step prefills. A prefill of one row costs as much as one of R rows, so rows wait for others.

    Rows wait only if others decode meanwhile. If few rows are busy, a third of them is enough, because more would take
    long to come together. Only rows in the decode batch count.
    """
    status = in_decode_batch(rows.status, rows, shapes)
    reading = jnp.sum(status == PREFILL)
    enough = jnp.clip(jnp.sum(status != EMPTY) // 3, 1, shapes.prefill_rows)
    alone = ~jnp.any(status == DECODE)
    return (reading > 0) & ((reading >= enough) | (rows.prefill_held >= shapes.prefill_wait) | alone)


# The host driver calls the next functions from Python, so each is compiled on its own.


@functools.partial(jax.jit, static_argnums=1)
def positions_needed(rows: Rows, shapes: StaticShapes) -> jax.Array:
    """How long the KV cache must be for the next step: int32 scalar."""
    chunk = jnp.clip(rows.prefill_length - 1 - rows.prefill_done, 0, shapes.prefill_chunk)
    ahead = jnp.where(rows.status == PREFILL, chunk + 1, 1)  # the step that ends a prefill also decodes
    busy = (rows.status == DECODE) | (rows.status == PREFILL)
    return jnp.max(jnp.where(busy, rows.position + ahead, 0))


@functools.partial(jax.jit, static_argnums=1)
def should_call_host(rows: Rows, shapes: StaticShapes) -> jax.Array:
    """Whether to call the host now: a turn ended, replies may have come, no row can go on, or the last call is old."""
    ended, waiting = jnp.any(rows.status == ENDED), jnp.any(rows.status == WAIT)
    idle = ~jnp.any((rows.status == DECODE) | (rows.status == PREFILL))
    patience = jnp.where(waiting, shapes.poll_every, 8 * shapes.poll_every)
    return rows.more | idle | ended | (rows.since_callback >= patience)


@functools.partial(jax.jit, static_argnums=1)
def collect(rows: Rows, shapes: StaticShapes) -> tuple[Rows, ToHost]:
    """Take up to E ended turns for the host; their rows then wait."""
    (row,) = jnp.nonzero(rows.status == ENDED, size=shapes.callback_rows, fill_value=shapes.slots)
    rows = write(rows, row, status=WAIT)
    # If more turns ended than one callback carries, the host must read all of them before it may wait for replies.
    idle = jnp.all((rows.status == EMPTY) | (rows.status == WAIT))
    turns = read(rows, row, "reason", "turn_length", "turn", "logps", "sampler_logps", "turn_began")
    return rows, ToHost(row.astype(jnp.int32), *turns, idle, rows.counts)


@jax.jit
def deliver(rows: Rows, delivery: FromHost) -> Rows:
    """Give the host's tokens to their rows."""
    row, B = delivery.row, len(rows.status)
    rows = write(rows, jnp.where(delivery.fresh, row, B), episode=delivery.episode, position=0, sampled=0)
    rows = write(
        rows,
        row,
        status=jnp.where(delivery.length > 0, PREFILL, EMPTY),
        prefill=delivery.tokens,
        prefill_length=delivery.length,
        prefill_done=0,
        arrived=rows.counts[COUNTS.index("steps")],
    )
    return rows.replace(since_callback=jnp.zeros_like(rows.since_callback), more=delivery.more, stop=delivery.stop)
