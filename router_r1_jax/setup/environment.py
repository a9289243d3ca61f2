"""The synthetic environment, if the configuration asks for one: the only place that imports the room `synthetic`."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from ml_collections import ConfigDict

from router_r1_jax.config import SPLITS, SYNTHETIC
from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.pool.cards import Card


class Environment(Protocol):
    """What a run uses of a synthetic world. `synthetic.environment` implements it."""

    decompose: Callable[..., list[str]]

    def prepare_dataset(self, root: Path) -> Path:
        """Build the world's questions below `root`, unless they are there; returns the data set's folder."""

    def train_tokenizer(self, template: str, folder: Path) -> None:
        """Train a tokenizer on the world's texts and the prompt template's text, and write it into `folder`."""

    def serve(self, pool_config: ConfigDict) -> AbstractContextManager[None]:
        """Start the simulated models' server, and write its address into the provider "simulated" of `pool_config`."""

    def recipe(self) -> dict[str, Any]:
        """What the warm start depends on, as JSON under names that a renamed field does not change."""

    def warmstart_phases(self, router: Any) -> list[list[Any]]:
        """Stages of the warm start; each is a list of `training.supervised.Phase` and has its own schedule."""

    def oracle_rows(
        self, questions: Sequence[QuestionRecord], cards: Sequence[Card], split: str
    ) -> list[dict[str, Any]]:
        """What computed policies (oracle, one model alone, random choice) reach on these questions."""


def open_environment(config: ConfigDict, cards: Sequence[Card]) -> Environment | None:
    """The environment of `config.synthetic`, or None if no split of `config.data` names the synthetic set."""
    if all(SYNTHETIC not in config.data[split] for split in SPLITS):
        return None
    from router_r1_jax.synthetic.environment import SyntheticEnvironment

    return SyntheticEnvironment(config, cards)
