"""Cache keys: everything that evaluated episodes and their records depend on, so that kept ones are reused safely."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.evaluation.answering import GREEDY, SamplingParams
from router_r1_jax.pool.cards import Card
from router_r1_jax.prompts import load_template

# Fields of config.rollout that change how long an evaluation takes, or that evaluations do not read.
_NO_INFLUENCE = ("replicas", "driver", "temperature")
# Fields of config.pool that an evaluation depends on, beside providers and cards.
_POOL = ("candidates", "shuffle", "rename", "names", "prompt", "max_tokens", "temperature")


def episodes_key(
    config: ConfigDict,
    cards: Sequence[Card],
    questions: Sequence[QuestionRecord],
    sampling: SamplingParams,
    weights: str,
) -> dict[str, Any]:
    """Everything that an evaluation's episodes depend on.

    Args:
      config: how the router is asked.
      cards: the models, as prompts show them.
      questions: those that are answered.
      sampling: how they are answered.
      weights: fingerprint of the parameters.
    """
    return {
        "weights": weights,
        "model": config.model.to_dict(),
        "sampling": sampling._asdict(),
        "seed": config.seed,
        "prompt": config.prompt.to_dict(),
        "template": load_template(config.prompt.template),
        "rollout": config.rollout.to_dict() | dict.fromkeys(_NO_INFLUENCE),
        "pool": {name: config.pool[name] for name in _POOL},
        "providers": {provider.name: provider.parameters.to_dict() for provider in config.pool.providers},
        "cards": [dataclasses.asdict(card) for card in cards],
        "questions": [(q.dataset, q.id, q.question) for q in questions],
    }


def records_key(
    config: ConfigDict, cards: Sequence[Card], questions: Sequence[QuestionRecord], weights: str
) -> dict[str, Any]:
    """Everything that the records of greedy episodes depend on: `episodes_key`, the reward and the gold answers."""
    scoring = {"reward": config.reward.to_dict(), "golds": [question.golds for question in questions]}
    return episodes_key(config, cards, questions, GREEDY, weights) | scoring
