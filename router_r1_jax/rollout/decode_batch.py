"""Decode batch: rows that wait for a reply are swapped out of it, and their KV caches with them.

The cost of a step grows with the decode batch, so a row that waits hands its place to a row that is ready. A row's KV
cache has one of B + spare indices. The first A are the decode batch: one array per layer, which a decode step reads in
place. The others are swapped out. `swap` moves rows between the two at fixed shapes, so the order in which rows wait
changes no result. If the decode batch has room for all rows, nothing is ever swapped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from router_r1_jax.model import Cache, ModelConfig, empty_cache
from router_r1_jax.rollout.row_state import DECODE, EMPTY, PREFILL, Rows, StaticShapes, write

_LAST = jnp.iinfo(jnp.int32).max  # priority of a row that has nothing to compute


class Caches(NamedTuple):
    """KV caches, one per layer: of the decode batch [A, ...], and swapped out [B - A + spare, ...] (none if A = B)."""

    batch: tuple[Cache, ...]
    swapped_out: tuple[Cache, ...]

    @property
    def length(self) -> int:
        """S, positions that each row has room for."""
        return self.batch[0].length


def empty_caches(config: ModelConfig, shapes: StaticShapes, length: int) -> Caches:
    """Zeroed KV caches of `length` positions for all rows and spare indices."""
    others = shapes.num_caches - shapes.decode_batch
    batch = empty_cache(config, shapes.decode_batch, length)
    return Caches(batch, empty_cache(config, others, length) if others else ())


def _priorities(rows: Rows) -> jax.Array:
    """Priority of the row of each KV cache [B + spare] int32; lower values come first.

    Rows that decode stay in the decode batch. Rows with tokens to read follow in the order in which these arrived, so
    none is left behind.
    """
    priority = jnp.select([rows.status == DECODE, rows.status == PREFILL], [-1, rows.arrived], _LAST)
    return priority.at[rows.row_of_cache].get(mode="fill", fill_value=_LAST)


def should_swap(rows: Rows, shapes: StaticShapes) -> jax.Array:
    """Whether a row outside the decode batch comes before one inside it."""
    priorities = _priorities(rows)
    return jnp.min(priorities[shapes.decode_batch :]) < jnp.max(priorities[: shapes.decode_batch])


def swap(shapes: StaticShapes, caches: Caches, rows: Rows) -> tuple[Caches, Rows]:
    """Swap in the first of the rows outside the decode batch; the last rows inside it go to spare indices."""
    A, B, spare, priorities = shapes.decode_batch, shapes.slots, shapes.num_caches - shapes.slots, _priorities(rows)
    inside = jnp.argsort(priorities[:A], descending=True)[:spare]
    outside = A + jnp.argsort(priorities[A:])[:spare]
    (free,) = jnp.nonzero(rows.row_of_cache == B, size=spare)
    swaps = priorities[outside] < priorities[inside]  # true for the first pairs only: one side rises, the other falls
    coming, going = rows.row_of_cache[outside], rows.row_of_cache[inside]
    # A cache that nobody will read is not copied: those of empty rows, and of questions that have not been read yet.
    filled = (rows.status != EMPTY) & (rows.position > 0)
    swapped_out = _copy_rows(caches.batch, inside, caches.swapped_out, free - A, swaps & filled[going])
    batch = _copy_rows(swapped_out, outside - A, caches.batch, inside, swaps & filled[coming])

    def if_swapped(index: jax.Array) -> jax.Array:
        return jnp.where(swaps, index, shapes.num_caches)  # past the end: nothing is written

    rows = write(rows, if_swapped(inside), row_of_cache=coming)
    rows = write(rows, if_swapped(free), row_of_cache=going)
    rows = write(rows, if_swapped(outside), row_of_cache=B)
    rows = write(rows, if_swapped(coming), cache_of_row=inside)
    return Caches(batch, swapped_out), write(rows, if_swapped(going), cache_of_row=free)


def _copy_rows(
    source: tuple[Cache, ...], start: jax.Array, target: tuple[Cache, ...], to: jax.Array, wanted: jax.Array
) -> tuple[Cache, ...]:
    """Copy rows `start` [n] of the source to rows `to` [n] of the target if `wanted` [n].

    This is a loop over the wanted rows: they are usually few, and a loop writes in place.
    """
    (chosen,) = jnp.nonzero(wanted, size=len(wanted))

    def copy(turn: jax.Array, target: tuple[Cache, ...]) -> tuple[Cache, ...]:
        i, j = start[chosen[turn]], to[chosen[turn]]
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_index_in_dim(x, jax.lax.dynamic_index_in_dim(y, i), j, 0),
            target,
            source,
        )

    return jax.lax.fori_loop(0, jnp.sum(wanted), copy, target)
