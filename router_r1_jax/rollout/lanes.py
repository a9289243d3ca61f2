"""Lanes: the rows that compute. A step costs what its lanes cost, so rows that wait for a reply give theirs up.

A row's cache lies in one of B + spare places. The first A places are lanes: one array per layer, which a decode step
reads where it lies. The others are parked. `swap` moves rows between the two at fixed shapes, so that who waits changes
no result. Where there are as many lanes as rows, nothing is parked and nothing moves.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from router_r1_jax.model import Cache, ModelConfig, empty_cache
from router_r1_jax.rollout.state import EMPTY, FEED, RUN, Limits, Rows

_NONE = jnp.iinfo(jnp.int32).max  # the claim of a row that has nothing to do


class Caches(NamedTuple):
    """A cache per layer of the lanes [A, ...], and one of the other places [B - A + spare, ...]; none where A = B."""

    lanes: tuple[Cache, ...]
    parked: tuple[Cache, ...]

    @property
    def length(self) -> int:
        """S, positions that each row has room for."""
        return self.lanes[0].length


def empty_caches(config: ModelConfig, limits: Limits, length: int) -> Caches:
    """Zeroed caches of all places."""
    parked = limits.places - limits.lanes
    return Caches(empty_cache(config, limits.lanes, length), empty_cache(config, parked, length) if parked else ())


def _claims(rows: Rows) -> jax.Array:
    """By place [B + spare] int32: how good a claim to a lane its row has, the lower the better.

    Running rows keep their lanes; then come those with tokens to read, in the order in which they were handed them, so
    that none is left behind.
    """
    claim = jnp.select([rows.status == RUN, rows.status == FEED], [-1, rows.handed], _NONE)
    return claim.at[rows.row_at].get(mode="fill", fill_value=_NONE)


def wants_swap(rows: Rows, limits: Limits) -> jax.Array:
    """Whether a parked row has a better claim than one in a lane."""
    claims = _claims(rows)
    return jnp.min(claims[limits.lanes :]) < jnp.max(claims[: limits.lanes])


def swap(limits: Limits, caches: Caches, rows: Rows) -> tuple[Caches, Rows]:
    """Give lanes to the parked rows with the best claims; the rows in lanes with the worst ones go to spare places."""
    A, B, spare, claims = limits.lanes, limits.slots, limits.places - limits.slots, _claims(rows)
    lane = jnp.argsort(claims[:A], descending=True)[:spare]
    left = A + jnp.argsort(claims[A:])[:spare]  # places
    (taken,) = jnp.nonzero(rows.row_at == B, size=spare)
    goes = claims[left] < claims[lane]  # of the first pairs only: one side rises, the other falls
    coming, going = rows.row_at[left], rows.row_at[lane]
    # What nobody will read is not copied: the caches of empty rows and of questions of which nothing has been read.
    known = (rows.status != EMPTY) & (rows.position > 0)
    parked = _copied(caches.lanes, lane, caches.parked, taken - A, goes & known[going])
    lanes = _copied(parked, left - A, caches.lanes, lane, goes & known[coming])

    def put(field: jax.Array, index: jax.Array, value: jax.Array | int) -> jax.Array:
        return field.at[jnp.where(goes, index, len(field))].set(value, mode="drop")

    return Caches(lanes, parked), rows.replace(
        row_at=put(put(put(rows.row_at, lane, coming), taken, going), left, B),
        place=put(put(rows.place, coming, lane), going, taken),
    )


def _copied(
    source: tuple[Cache, ...], start: jax.Array, target: tuple[Cache, ...], to: jax.Array, wanted: jax.Array
) -> tuple[Cache, ...]:
    """The target's caches with rows start [n] of the source's in their rows to [n], where wanted [n].

    A loop of as many turns as there are rows: they are usually few, and a loop writes in place.
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
