"""Validation: greedy answers to held-out questions during training; the best checkpoint is chosen by their reward."""

from collections.abc import Mapping, Sequence
from typing import Any

from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.evaluation.answering import SamplingParams, answer_questions
from router_r1_jax.evaluation.episode_records import Record, summarise
from router_r1_jax.reward import CostNormalizer
from router_r1_jax.setup.session import Session

SAMPLING = SamplingParams("validation", num_generations=1, temperature=0.0, stream=0)
METRICS = "em reward/total dollars_per_question calls_per_question best_model_share malformed_share".split()


def validate(
    session: Session, questions: Sequence[QuestionRecord], first_cost_window: Mapping[str, Any], step: int
) -> tuple[dict[str, float], list[Record]]:
    """Answer the validation questions greedily; returns metrics under "val/" and a record per question.

    Costs are judged by a window that each time begins with the costs of the run's first rollout; the validation's own
    costs enter it too. A window that followed the policy from step to step would call the middle of any policy's costs
    cheap, and rewards of two steps could not be compared. Questions go in batches as in an evaluation: on a single draw
    of candidates, the best checkpoint would be the one that happens to suit it.
    """
    normalizer = CostNormalizer(session.config.reward.window)
    normalizer.restore(first_cost_window)
    records = answer_questions(
        session.router,
        questions,
        sampling=SAMPLING,
        step=step,
        split="validation",
        policy="training",
        normalizer=normalizer,
    )
    summary = summarise(records, session.cards)
    return {f"val/{name}": summary[name] for name in METRICS if name in summary}, records
