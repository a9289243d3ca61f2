"""The synthetic environment, if the configuration asks for one: the only place that imports the room `synthetic`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from router_r1_jax.config import SPLITS, SYNTHETIC
from router_r1_jax.pool.cards import Card

if TYPE_CHECKING:
    from router_r1_jax.synthetic.environment import SyntheticEnvironment


def open_environment(config: ConfigDict, cards: Sequence[Card]) -> "SyntheticEnvironment | None":
    """The environment of `config.synthetic`, or None if no split of `config.data` names the synthetic set."""
    if all(SYNTHETIC not in config.data[split] for split in SPLITS):
        return None
    from router_r1_jax.synthetic.environment import SyntheticEnvironment

    return SyntheticEnvironment(config, cards)
