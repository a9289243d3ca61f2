"""The synthetic environment of a run: the world's data set, tokenizer, server, warm start, oracle, decomposition."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.pool.cards import Card, all_in_prompts
from router_r1_jax.router import Router
from router_r1_jax.synthetic import oracle, tfds_builder, tokenizer
from router_r1_jax.synthetic.decompose import by_pattern
from router_r1_jax.synthetic.server import start_server
from router_r1_jax.synthetic.warmstart_rows import warmstart_phases
from router_r1_jax.synthetic.world import World
from router_r1_jax.training.supervised import Phase


class SyntheticEnvironment:
    """A world and the cards of the models that are simulated in it."""

    decompose = staticmethod(by_pattern)

    def __init__(self, config: ConfigDict, cards: Sequence[Card]) -> None:
        """Raises ConfigError for a field of `config.synthetic.world` that is wrong."""
        self.world, self._config, self._cards = World(config.synthetic.world), config, tuple(cards)

    def prepare_dataset(self, root: Path) -> Path:
        """Build the world's questions below `root`, unless they are there; returns the data set's folder."""
        return tfds_builder.prepare(self._config.synthetic.world, root)

    def train_tokenizer(self, template: str, folder: Path) -> None:
        """Train a tokenizer on the world's texts and write it into `folder`."""
        cards = all_in_prompts(self._cards, self._config.pool)
        texts = tokenizer.corpus(self.world, cards, template, self._config.rollout.max_calls)
        tokenizer.train_tokenizer(texts, folder)

    @contextmanager
    def serve(self, pool_config: ConfigDict) -> Iterator[None]:
        """Start the simulated models' server, and write its address into the provider "simulated" of `pool_config`."""
        with start_server(self._config.synthetic.world, self._cards) as base_url:
            for provider in pool_config.providers:
                if provider.name == "simulated":
                    provider.base_url = base_url
            yield

    def recipe(self) -> dict[str, Any]:
        """What the warm start depends on. If a field of the configuration is renamed, its key here stays the same."""
        s = self._config.synthetic
        return {
            "world": {"version": str(tfds_builder.Synthetic.VERSION)} | s.world.to_dict(),
            "warmstart": {"lessons": s.curriculum, "copy_steps": s.copy_steps, "copy_periods": s.copy_periods},
        }

    def warmstart_phases(self, router: Router) -> list[list[Phase]]:
        """Stages of the warm start: the curriculum, if there is one, then scripted episodes."""
        return warmstart_phases(self.world, router)

    def oracle_rows(
        self, questions: Sequence[QuestionRecord], cards: Sequence[Card], split: str
    ) -> list[dict[str, Any]]:
        """What computed policies reach on these questions, with the prices and skills of these cards.

        Empty if the split of this world lacks one of the questions.
        """
        asked = {question.id for question in questions}
        chosen = [question for question in self.world.questions(split) if question.id in asked]
        if len(chosen) < len(asked):
            return []
        values = oracle.reference_policies(self.world, chosen, cards)
        return [{"name": name} | value._asdict() for name, value in values.items()]
