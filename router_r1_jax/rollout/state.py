"""The state of the sampling loop's rows, and how it meets the host: what a row reports, what it is handed.

A row's life:

    EMPTY --question--> FEED --fed--> RUN --turn ended--> WAIT --reply--> FEED ... --episode over--> EMPTY or FEED

A turn ends at a closing tag, the end-of-text token, or a limit. The row then waits; the host reads the turn once (it is
`reported`) and later hands back a reply, a new question, or nothing (EMPTY). Everything here is small: the caches live
apart from it, so that meeting the host never touches them.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

EMPTY, RUN, WAIT, FEED = range(4)

# Why a turn ended. Values from FIRST_TAG on are the automaton's accepting states, in the order of its tags.
TURN_LIMIT, ROW_FULL, END_OF_TEXT, TOKEN_LIMIT = 101, 102, 103, 104
# What is counted over a run, in the order of `Rows.counts`. Only steps count what had nothing to feed or decode.
# `lane_waits` are steps that rows with tokens to read spent without a lane, summed over the rows.
COUNTS = ("decode_steps", "decoded_tokens", "feed_steps", "fed_tokens", "steps", "lane_waits")


class Limits(NamedTuple):
    """Static sizes of a compiled loop; all lengths are tokens."""

    slots: int  # B, rows
    lanes: int  # A, rows that compute at a time
    row_tokens: int  # S, own positions of a row
    turn_tokens: int  # M, sampled tokens of one turn
    episode_tokens: int  # sampled tokens of one episode
    feed_tokens: int  # F, longest question or reply with its tags
    chunk: int  # C, tokens fed to a row at a time
    feed_rows: int  # R, rows fed at a time
    feed_wait: int  # steps that a row may be held back from feeding until others join it
    exchange_rows: int  # rows that one exchange carries each way
    poll_every: int  # decode steps between looks for replies while rows wait

    @property
    def places(self) -> int:
        """Rows' caches that there is room for: where some are parked, with spare places through which they move."""
        return self.slots + min(self.feed_rows, self.slots - self.lanes)


@flax.struct.dataclass
class Rows:
    """Per-row state [B, ...]; see the module docstring for the meaning of `status`."""

    status: jax.Array  # [B] int32
    episode: jax.Array  # [B] uint32, seeds the row's draws
    position: jax.Array  # [B] int32, own positions in the cache
    last: jax.Array  # [B] int32, the next token to enter the cache
    tag: jax.Array  # [B] uint8, state of the tag automaton
    reason: jax.Array  # [B] int32, why the turn ended
    reported: jax.Array  # [B] bool, the host has read the ended turn
    feed: jax.Array  # [B, F] int32
    feed_length: jax.Array  # [B] int32
    feed_done: jax.Array  # [B] int32
    handed: jax.Array  # [B] int32, the step at which the host handed over what is fed
    turn: jax.Array  # [B, M] int32, tokens sampled in this turn
    logps: jax.Array  # [B, M] float32, in the uncut distribution
    drawn_logps: jax.Array  # [B, M] float32, in the one drawn from
    turn_length: jax.Array  # [B] int32
    sampled: jax.Array  # [B] int32, tokens sampled in this episode
    began: jax.Array  # [B] int32, the step that sampled the turn's first token
    place: jax.Array  # [B] int32, where the row's cache is: lanes come first, see `rollout.lanes`
    row_at: jax.Array  # [B + spare] int32, the row in each place, B for none
    since_exchange: jax.Array  # int32, steps
    held: jax.Array  # int32, steps since the last feed in which a row had tokens to read
    more: jax.Array  # bool, the host has more to hand over than one exchange carries
    stop: jax.Array  # bool
    counts: jax.Array  # [6] int32: COUNTS


class Outbox(NamedTuple):
    """What an exchange tells the host: up to E ended turns (row B: none), whether it may wait for replies, counts."""

    row: np.ndarray  # [E] int32
    reason: np.ndarray  # [E] int32
    length: np.ndarray  # [E] int32
    turn: np.ndarray  # [E, M] int32
    logps: np.ndarray  # [E, M] float32
    drawn_logps: np.ndarray  # [E, M] float32
    began: np.ndarray  # [E] int32
    idle: np.ndarray  # bool: no row can go on by itself, and no ended turn is left to tell
    counts: np.ndarray  # [6] int32: COUNTS


class Inbox(NamedTuple):
    """What the host hands back: up to E rows with tokens to feed (row B: none; length 0: the row becomes EMPTY)."""

    row: np.ndarray  # [E] int32
    fresh: np.ndarray  # [E] bool, a new episode: own position 0
    episode: np.ndarray  # [E] uint32, read where fresh
    length: np.ndarray  # [E] int32
    feed: np.ndarray  # [E, F] int32
    more: np.ndarray  # bool, exchange again at the next step
    stop: np.ndarray  # bool, leave the loop


def inbox_spec(limits: Limits) -> Inbox:
    """Shapes and dtypes of an Inbox."""
    E, F = limits.exchange_rows, limits.feed_tokens
    shape = jax.ShapeDtypeStruct
    return Inbox(
        row=shape((E,), np.int32),
        fresh=shape((E,), np.bool_),
        episode=shape((E,), np.uint32),
        length=shape((E,), np.int32),
        feed=shape((E, F), np.int32),
        more=shape((), np.bool_),
        stop=shape((), np.bool_),
    )


def empty_rows(limits: Limits) -> Rows:
    """All rows EMPTY."""
    B, F, M = limits.slots, limits.feed_tokens, limits.turn_tokens
    place = jnp.arange(limits.places, dtype=jnp.int32)

    def ints(*shape: int) -> jax.Array:
        return jnp.zeros(shape, jnp.int32)

    return Rows(
        status=ints(B), episode=jnp.zeros(B, jnp.uint32), position=ints(B), last=ints(B), tag=jnp.zeros(B, jnp.uint8),
        reason=ints(B), reported=jnp.ones(B, bool), feed=ints(B, F), feed_length=ints(B), feed_done=ints(B),
        handed=ints(B), turn=ints(B, M), logps=jnp.zeros((B, M), jnp.float32),
        drawn_logps=jnp.zeros((B, M), jnp.float32), turn_length=ints(B), sampled=ints(B), began=ints(B),
        place=place[:B], row_at=jnp.minimum(place, B), since_exchange=ints(),
        held=ints(), more=jnp.array(True), stop=jnp.array(False), counts=ints(len(COUNTS)),
    )  # fmt: skip


def in_lanes(field: jax.Array, rows: Rows, limits: Limits) -> jax.Array:
    """A field [B, ...] of the rows that hold a lane: [A, ...], by lane."""
    if limits.lanes == limits.slots:
        return field
    return field.at[rows.row_at[: limits.lanes]].get(mode="clip")


def positions_needed(rows: Rows, limits: Limits) -> jax.Array:
    """How long the cache must be for the next step: int32 scalar."""
    fed = jnp.clip(rows.feed_length - 1 - rows.feed_done, 0, limits.chunk)
    ahead = jnp.where(rows.status == FEED, fed + 1, 1)  # the step that ends a feed also decodes
    busy = (rows.status == RUN) | (rows.status == FEED)
    return jnp.max(jnp.where(busy, rows.position + ahead, 0))


def wants_feed(rows: Rows, limits: Limits) -> jax.Array:
    """Whether to feed now: a feed costs for one row what it costs for R, so rows wait for company while others run.

    Of few busy rows fewer are waited for: a third of them would be long in coming together. Only lanes can be fed.
    """
    status = in_lanes(rows.status, rows, limits)
    feeding = jnp.sum(status == FEED)
    company = jnp.clip(jnp.sum(status != EMPTY) // 3, 1, limits.feed_rows)
    alone = ~jnp.any(status == RUN)
    return (feeding > 0) & ((feeding >= company) | (rows.held >= limits.feed_wait) | alone)


def wants_exchange(rows: Rows, limits: Limits) -> jax.Array:
    """Whether to meet the host now: something ended, replies may have come, nothing else to do, or it has been long."""
    waiting = rows.status == WAIT
    idle = ~jnp.any((rows.status == RUN) | (rows.status == FEED))
    patience = jnp.where(jnp.any(waiting), limits.poll_every, 8 * limits.poll_every)
    return rows.more | idle | jnp.any(waiting & ~rows.reported) | (rows.since_exchange >= patience)


def collect(rows: Rows, limits: Limits) -> tuple[Rows, Outbox]:
    """Take up to E ended turns that the host has not seen, and mark them as seen."""
    B = limits.slots
    unseen = (rows.status == WAIT) & ~rows.reported
    (row,) = jnp.nonzero(unseen, size=limits.exchange_rows, fill_value=B)
    reported = rows.reported.at[row].set(True, mode="drop")
    # Where more turns ended than one exchange carries, the host must hear of all before it may wait for replies.
    busy = (rows.status == RUN) | (rows.status == FEED) | ((rows.status == WAIT) & ~reported)

    def of_row(field: jax.Array) -> jax.Array:
        return field.at[row].get(mode="fill", fill_value=0)

    out = Outbox(
        row=row.astype(jnp.int32),
        reason=of_row(rows.reason),
        length=of_row(rows.turn_length),
        turn=of_row(rows.turn),
        logps=of_row(rows.logps),
        drawn_logps=of_row(rows.drawn_logps),
        began=of_row(rows.began),
        idle=~jnp.any(busy),
        counts=rows.counts,
    )
    return rows.replace(reported=reported), out


def deliver(rows: Rows, inbox: Inbox) -> Rows:
    """Hand the host's tokens to their rows."""
    row = inbox.row

    def put(field: jax.Array, value: jax.Array) -> jax.Array:
        return field.at[row].set(value, mode="drop")

    def keep_unless_fresh(field: jax.Array, value: jax.Array) -> jax.Array:
        return put(field, jnp.where(inbox.fresh, value, field.at[row].get(mode="fill", fill_value=0)))

    return rows.replace(
        status=put(rows.status, jnp.where(inbox.length > 0, FEED, EMPTY)),
        episode=keep_unless_fresh(rows.episode, inbox.episode),
        position=keep_unless_fresh(rows.position, 0),
        sampled=keep_unless_fresh(rows.sampled, 0),
        reported=put(rows.reported, True),
        feed=put(rows.feed, inbox.feed),
        feed_length=put(rows.feed_length, inbox.length),
        feed_done=put(rows.feed_done, 0),
        handed=put(rows.handed, rows.counts[COUNTS.index("steps")]),
        since_exchange=jnp.zeros_like(rows.since_exchange),
        more=inbox.more,
        stop=inbox.stop,
    )
