"""One step of the sampling loop: chunked prefill of rows with tokens to read, and decoding of one token per row.

Both work on the decode batch. Before them, rows that wait may be swapped out for rows that are ready.

These are pure functions of (sampler, caches, rows). Both drivers, the jitted loop and the host-driven one, call them.
A row's result depends only on its own tokens, key and positions, so no schedule changes it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from router_r1_jax.model import Params, Prefix, RouterLM
from router_r1_jax.rollout import decode_batch, row_state
from router_r1_jax.rollout.decode_batch import Caches
from router_r1_jax.rollout.row_state import DECODE, ENDED, PREFILL, REASONS, Rows, StaticShapes, in_decode_batch
from router_r1_jax.rollout.sampling import Truncation, row_keys, sample
from router_r1_jax.rollout.stop_tags import STOP_TAGS

Carry = tuple[Caches, Rows]  # what a step takes and returns


class Sampler(NamedTuple):
    """What stays the same during a run: arrays, so that other values compile nothing anew."""

    params: Params  # of the model with unrolled layers
    prefix: Prefix  # KV cache of the tokens that all prompts share
    next_state: jax.Array  # [states, V] uint8, the stop-tag automaton
    end_of_text: jax.Array  # int32 scalar id, -1 for none
    temperature: jax.Array  # float32 scalar, 0 is greedy
    key: jax.Array  # of this run
    truncation: Truncation | None  # top-k, top-p, min-p; None for the whole distribution


def _hidden(
    model: RouterLM, sampler: Sampler, caches: Caches, tokens: jax.Array, positions: jax.Array, **rows: jax.Array
) -> tuple[jax.Array, Caches]:
    """Hidden states of tokens [n, T], and the caches with their keys and values. Position S writes nothing."""
    weights, cache = {"params": sampler.params}, caches.batch
    settings = {"positions": positions, "prefix": sampler.prefix, "method": RouterLM.hidden}
    hidden, batch = model.apply(weights, tokens, cache=cache, **settings, **rows)
    return hidden, caches._replace(batch=batch)


def prefill_step(model: RouterLM, shapes: StaticShapes, sampler: Sampler, caches: Caches, rows: Rows) -> Carry:
    """Read up to C tokens into each of up to R rows. A row's last token is left to the decode step, which samples."""
    A, B = shapes.decode_batch, shapes.slots
    reading = in_decode_batch(rows.status, rows, shapes) == PREFILL
    (index,) = jnp.nonzero(reading, size=shapes.prefill_rows, fill_value=A)
    row = index if A == B else rows.row_of_cache[:A].at[index].get(mode="fill", fill_value=B)
    prefill, length, done, start = row_state.read(rows, row, "prefill", "prefill_length", "prefill_done", "position")
    count = jnp.maximum(jnp.minimum(length - 1 - done, shapes.prefill_chunk), 0)  # [R] tokens of this chunk
    offset = jnp.arange(shapes.prefill_chunk, dtype=jnp.int32)
    source = jnp.minimum(done[:, None] + offset, shapes.prefill_tokens - 1)
    positions = jnp.where(offset < count[:, None], start[:, None] + offset, caches.length)
    tokens = jnp.take_along_axis(prefill, source, axis=1)
    _, caches = _hidden(model, sampler, caches, tokens, positions, rows=index)
    done = done + count
    rows = row_state.write(
        rows,
        row,
        status=jnp.where(done >= length - 1, DECODE, PREFILL),
        position=start + count,
        prefill_done=done,
        last_token=jnp.take_along_axis(prefill, done[:, None], axis=1)[:, 0],
        tag_state=jnp.uint8(0),
        turn_length=0,
    )
    rows = row_state.add_counts(rows, prefill_steps=1, prefilled_tokens=jnp.sum(count))
    return caches, rows.replace(prefill_held=jnp.zeros_like(rows.prefill_held))


def decode_step(model: RouterLM, shapes: StaticShapes, sampler: Sampler, caches: Caches, rows: Rows) -> Carry:
    """Sample one token on every row that decodes, and see whether its turn ends there. All of them are in the batch."""
    batched = functools.partial(in_decode_batch, rows=rows, shapes=shapes)
    running = rows.status == DECODE
    positions = batched(jnp.where(running, rows.position, caches.length))
    hidden, caches = _hidden(model, sampler, caches, batched(rows.last_token)[:, None], positions[:, None])
    logits = model.apply({"params": sampler.params}, hidden[:, 0], method=RouterLM.logits)
    keys = row_keys(sampler.key, batched(rows.episode), batched(rows.position))
    token, logp, sampler_logp = sample(logits, keys, sampler.temperature, sampler.truncation)
    index = batched(jnp.arange(shapes.slots)), batched(jnp.where(running, rows.turn_length, shapes.turn_tokens))
    turn = rows.turn.at[index].set(token, mode="drop")
    if shapes.decode_batch < shapes.slots:
        token = token.at[rows.cache_of_row].get(mode="clip")  # [A] -> [B]; rows outside the batch ignore theirs
    tag_state = sampler.next_state[rows.tag_state, token]
    length, sampled, position = rows.turn_length + 1, rows.sampled + 1, rows.position + 1
    ended_by = jnp.select(
        [
            (tag_state >= 1) & (tag_state <= len(STOP_TAGS)),
            token == sampler.end_of_text,
            sampled >= shapes.episode_tokens,
            length >= shapes.turn_tokens,
            position >= shapes.row_tokens - 1,
        ],
        [tag_state.astype(jnp.int32), *REASONS],
        0,
    )
    ended = running & (ended_by > 0)
    steps = rows.counts[row_state.COUNTS.index("steps")]
    rows = rows.replace(
        status=jnp.where(ended, ENDED, rows.status),
        reason=jnp.where(ended, ended_by, rows.reason),
        position=jnp.where(running, position, rows.position),
        last_token=jnp.where(running, token, rows.last_token),
        tag_state=jnp.where(running, tag_state, rows.tag_state),
        turn=turn,
        logps=rows.logps.at[index].set(logp, mode="drop"),
        sampler_logps=rows.sampler_logps.at[index].set(sampler_logp, mode="drop"),
        turn_length=jnp.where(running, length, rows.turn_length),
        sampled=jnp.where(running, sampled, rows.sampled),
        turn_began=jnp.where(running & (rows.turn_length == 0), steps, rows.turn_began),
    )
    return caches, row_state.add_counts(rows, decode_steps=1, decoded_tokens=jnp.sum(running))


def step(model: RouterLM, shapes: StaticShapes, sampler: Sampler, caches: Caches, rows: Rows) -> Carry:
    """Swap rows if one outside the batch is ready, prefill if enough rows have tokens to read, decode if a row can."""
    if shapes.decode_batch < shapes.slots:
        swap = functools.partial(decode_batch.swap, shapes)
        caches, rows = jax.lax.cond(decode_batch.should_swap(rows, shapes), swap, lambda *same: same, caches, rows)
    reading = in_decode_batch(rows.status, rows, shapes) == PREFILL
    outside = jnp.sum(rows.status == PREFILL) - jnp.sum(reading)
    caches, rows = jax.lax.cond(
        row_state.should_prefill(rows, shapes),
        functools.partial(prefill_step, model, shapes, sampler),
        lambda c, r: (c, r.replace(prefill_held=r.prefill_held + jnp.any(reading))),
        caches,
        rows,
    )
    decode = functools.partial(decode_step, model, shapes, sampler)
    caches, rows = jax.lax.cond(jnp.any(rows.status == DECODE), decode, lambda *same: same, caches, rows)
    rows = row_state.add_counts(rows, steps=1, decode_batch_waits=outside)
    return caches, rows.replace(since_callback=rows.since_callback + 1)
