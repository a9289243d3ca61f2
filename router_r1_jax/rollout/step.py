"""One step of the sampling loop: feed a chunk to the rows that have tokens to read, decode one token on those that run.

Both work on the rows that hold a lane; before them, rows that wait give their lanes to rows that can go on.

Pure functions of (parameters, caches, rows); both drivers, the jitted loop and the host-driven one, call these very
functions. Every row's result depends on its own tokens, key and position only, so a schedule changes nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from router_r1_jax.model import Params, Prefix, RouterLM
from router_r1_jax.rollout.lanes import Caches, swap, wants_swap
from router_r1_jax.rollout.sampling import Cut, row_keys, sample
from router_r1_jax.rollout.state import (
    COUNTS,
    END_OF_TEXT,
    FEED,
    ROW_FULL,
    RUN,
    TOKEN_LIMIT,
    TURN_LIMIT,
    WAIT,
    Limits,
    Rows,
    in_lanes,
    wants_feed,
)


class Sampler(NamedTuple):
    """What sampling needs beside the model: arrays, so that changing them compiles nothing anew."""

    next_state: jax.Array  # [states, V] uint8, the tag automaton
    tags: jax.Array  # int32 scalar: states 1 .. tags accept
    end_of_text: jax.Array  # int32 scalar id, -1 for none
    temperature: jax.Array  # float32 scalar, 0 is greedy
    key: jax.Array  # of this rollout
    cut: Cut | None  # top-k, top-p, min-p; None where nothing is cut


def _counted(rows: Rows, **more: jax.Array | int) -> jax.Array:
    """The counts after this step's."""
    return rows.counts + jnp.stack([jnp.int32(more.get(name, 0)) for name in COUNTS])


def feed(
    model: RouterLM, limits: Limits, params: Params, prefix: Prefix, caches: Caches, rows: Rows
) -> tuple[Caches, Rows]:
    """Read up to C tokens into up to R rows. The last token of a feed is left to the decode step, which samples."""
    A, B, S = limits.lanes, limits.slots, caches.length
    (lane,) = jnp.nonzero(in_lanes(rows.status, rows, limits) == FEED, size=limits.feed_rows, fill_value=A)
    row = lane if A == B else rows.row_at[:A].at[lane].get(mode="fill", fill_value=B)

    def of_row(field: jax.Array) -> jax.Array:
        return field.at[row].get(mode="fill", fill_value=0)

    done, start = of_row(rows.feed_done), of_row(rows.position)
    here = jnp.maximum(jnp.minimum(of_row(rows.feed_length) - 1 - done, limits.chunk), 0)  # [R] tokens of this chunk
    offset = jnp.arange(limits.chunk, dtype=jnp.int32)
    source = jnp.minimum(done[:, None] + offset, limits.feed_tokens - 1)
    tokens = jnp.take_along_axis(of_row(rows.feed), source, axis=1)
    positions = jnp.where(offset < here[:, None], start[:, None] + offset, S)  # S: nothing is written
    _, lanes = model.apply(
        {"params": params}, tokens, positions=positions, prefix=prefix, cache=caches.lanes, rows=lane,
        method=RouterLM.hidden,
    )  # fmt: skip
    done = done + here
    ready = done >= of_row(rows.feed_length) - 1
    last = jnp.take_along_axis(of_row(rows.feed), done[:, None], axis=1)[:, 0]

    def put(field: jax.Array, value: jax.Array) -> jax.Array:
        return field.at[row].set(value, mode="drop")

    return caches._replace(lanes=lanes), rows.replace(
        status=put(rows.status, jnp.where(ready, RUN, FEED)),
        position=put(rows.position, start + here),
        feed_done=put(rows.feed_done, done),
        last=put(rows.last, last),
        tag=put(rows.tag, jnp.uint8(0)),
        turn_length=put(rows.turn_length, 0),
        held=jnp.zeros_like(rows.held),
        counts=_counted(rows, feed_steps=1, fed_tokens=jnp.sum(here)),
    )


def decode(
    model: RouterLM, limits: Limits, params: Params, prefix: Prefix, sampler: Sampler, caches: Caches, rows: Rows
) -> tuple[Caches, Rows]:
    """Sample one token on every running row, all of which are in lanes, and see whether its turn ends there."""

    def here(field: jax.Array) -> jax.Array:
        return in_lanes(field, rows, limits)

    running = rows.status == RUN
    positions = here(jnp.where(running, rows.position, caches.length))  # out of range: nothing is written
    hidden, lanes = model.apply(
        {"params": params},
        here(rows.last)[:, None],
        positions=positions[:, None],
        prefix=prefix,
        cache=caches.lanes,
        method=RouterLM.hidden,
    )
    logits = model.apply({"params": params}, hidden[:, 0], method=RouterLM.logits)
    keys = row_keys(sampler.key, here(rows.episode), here(rows.position))
    token, logp, drawn_logp = sample(logits, keys, sampler.temperature, sampler.cut)
    index = here(jnp.arange(limits.slots)), here(jnp.where(running, rows.turn_length, limits.turn_tokens))
    turn = rows.turn.at[index].set(token, mode="drop")
    if limits.lanes < limits.slots:
        token = token.at[rows.place].get(mode="clip")  # [A] -> [B]; what parked rows get is not looked at
    tag = sampler.next_state[rows.tag, token]
    length, sampled, position = rows.turn_length + 1, rows.sampled + 1, rows.position + 1
    ended_by = jnp.select(
        [(tag >= 1) & (tag <= sampler.tags), token == sampler.end_of_text, sampled >= limits.episode_tokens,
         length >= limits.turn_tokens, position >= limits.row_tokens - 1],
        [tag.astype(jnp.int32), END_OF_TEXT, TOKEN_LIMIT, TURN_LIMIT, ROW_FULL],
        0,
    )  # fmt: skip
    ended = running & (ended_by > 0)
    return caches._replace(lanes=lanes), rows.replace(
        status=jnp.where(ended, WAIT, rows.status),
        reason=jnp.where(ended, ended_by, rows.reason),
        reported=rows.reported & ~ended,
        position=jnp.where(running, position, rows.position),
        last=jnp.where(running, token, rows.last),
        tag=jnp.where(running, tag, rows.tag),
        turn=turn,
        logps=rows.logps.at[index].set(logp, mode="drop"),
        drawn_logps=rows.drawn_logps.at[index].set(drawn_logp, mode="drop"),
        turn_length=jnp.where(running, length, rows.turn_length),
        sampled=jnp.where(running, sampled, rows.sampled),
        began=jnp.where(running & (rows.turn_length == 0), rows.counts[COUNTS.index("steps")], rows.began),
        counts=_counted(rows, decode_steps=1, decoded_tokens=jnp.sum(running)),
    )


def work(
    model: RouterLM, limits: Limits, params: Params, prefix: Prefix, sampler: Sampler, caches: Caches, rows: Rows
) -> tuple[Caches, Rows]:
    """One step: swap if a parked row can go on, feed if enough rows have tokens to read, decode if one runs."""
    if limits.lanes < limits.slots:
        caches, rows = jax.lax.cond(
            wants_swap(rows, limits), lambda c, r: swap(limits, c, r), lambda c, r: (c, r), caches, rows
        )
    feeding = in_lanes(rows.status, rows, limits) == FEED
    waiting = jnp.sum(rows.status == FEED) - jnp.sum(feeding)
    caches, rows = jax.lax.cond(
        wants_feed(rows, limits),
        lambda c, r: feed(model, limits, params, prefix, c, r),
        lambda c, r: (c, r.replace(held=r.held + jnp.any(feeding))),
        caches,
        rows,
    )
    caches, rows = jax.lax.cond(
        jnp.any(rows.status == RUN),
        lambda c, r: decode(model, limits, params, prefix, sampler, c, r),
        lambda c, r: (c, r),
        caches,
        rows,
    )
    counts = _counted(rows, steps=1, lane_waits=waiting)
    return caches, rows.replace(since_exchange=rows.since_exchange + 1, counts=counts)
