"""Baselines that are the router's own language model.

Asked directly, with a chain of thought, prompted but not trained, and fine-tuned on the best of its own episodes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from router_r1_jax import prompts
from router_r1_jax.data.questions import QuestionIterator, QuestionRecord
from router_r1_jax.evaluation.records import Record, make_records
from router_r1_jax.experience import judge, steady_costs
from router_r1_jax.learner import Learner, Row, SupervisedLoss, init_state, make_optimizer
from router_r1_jax.learning import learner_layout, make_rows
from router_r1_jax.model import Params
from router_r1_jax.pool.cards import Card
from router_r1_jax.protocol import neutralize
from router_r1_jax.reward import CostNormalizer
from router_r1_jax.router import Router, batch_size
from router_r1_jax.session import Session

DIRECT = "Answer the question. Write the answer alone, between <answer> and </answer>.\nQuestion: {question}\n"
CHAIN = (
    "Answer the question. First think step by step between <think> and </think>, then write the answer alone between "
    "<answer> and </answer>.\nQuestion: {question}\n"
)
EPOCHS = 3  # over the episodes that fine-tuning keeps


class AloneRouter(Router):
    """The language model without a pool: it reads a plain instruction and the question, and may call nobody."""

    def __init__(self, session: Session, instruction: str) -> None:
        """`instruction` holds {question}."""
        config = session.config.copy_and_resolve_references()
        config.rollout.max_calls = 0
        super().__init__(config, session.model, session.tokenizer, session.cards, session.pool, session.mesh)
        self._instruction = instruction

    def prompt_ids(self, question: str, cards: Sequence[Card]) -> tuple[int, ...]:
        """Token ids of instruction and question, which is external text; no cards."""
        prompt = self._config.prompt
        text = self._instruction.replace("{question}", neutralize(question))
        return tuple(prompts.encode(self._tokenizer, text, system=prompt.system, thinking=prompt.thinking))


def answer_greedily(
    config: ConfigDict,
    router: Router,
    questions: Sequence[QuestionRecord],
    *,
    policy: str,
    split: str,
    costs: dict[str, Any] | None = None,
    on_finish: Callable[[], Any] = lambda: None,
) -> list[Record]:
    """Records of greedy answers, in batches as evaluation asks them: each with a roster of its own.

    `costs` is the window that they are judged by (`experience.steady_costs`).
    """
    size = batch_size(config)
    normalizer, records = steady_costs(config, costs), []
    for start in range(0, len(questions), size):
        answers = router.answer(
            questions[start : start + size], group=1, temperature=0.0, seed=(config.seed, 0, 1, start), step=0,
            split=split, on_finish=lambda _: on_finish(),
        )  # fmt: skip
        rewards = judge(config, answers, normalizer)
        records += make_records(answers, rewards, step=0, split=split, policy=policy)
    return records


def best_episodes(
    config: ConfigDict, session: Session, *, rollouts: int, on_finish: Callable[[], Any] = lambda: None
) -> list[tuple[Sequence[int], list[Row]]]:
    """Sample as a training run does, from the parameters pushed last, and keep per question the best rewarded episode.

    A prefix and rows for each rollout, because each has a prompt of its own; questions that nobody got right are left
    out. Rows are repeated until each batch holds rollout.questions: one shape.
    """
    iterator = QuestionIterator(session.questions("train"), seed=config.seed, batch=config.rollout.questions)
    normalizer, batches = CostNormalizer(config.reward.window), []
    for i in range(rollouts):
        answers = session.router.answer(
            iterator.next(), group=config.rollout.group, temperature=config.rollout.temperature,
            seed=(config.seed, 2, i), step=0, split="train",
        )  # fmt: skip
        totals = judge(config, answers, normalizer).total.reshape(-1, config.rollout.group)
        rows = make_rows(config, answers)
        best = [int(totals[q].argmax()) + q * config.rollout.group for q in range(len(totals)) if totals[q].max() > 0]
        if best:
            kept = [rows[best[j % len(best)]] for j in range(config.rollout.questions)]
            batches.append((answers.episodes[0].prompt[: answers.prefix_length], kept))
        on_finish()
    return batches


def fine_tune(
    config: ConfigDict,
    session: Session,
    params: Params,
    *,
    on_finish: Callable[[], Any] = lambda: None,
) -> Params:
    """Supervised fine-tuning on the best of as many episodes as a training run of this configuration samples.

    The learning rate is the run's own. Returns new parameters; `params` are left as they are.
    """
    session.router.push(params)
    batches = best_episodes(config, session, rollouts=config.steps, on_finish=on_finish)
    updates = EPOCHS * len(batches)
    optimizer, _ = make_optimizer(
        learning_rate=config.learner.learning_rate, warmup=config.learner.warmup, total=updates, decay=True,
        weight_decay=config.learner.weight_decay, max_grad_norm=1.0,
    )  # fmt: skip
    learner = Learner(
        session.model, optimizer, SupervisedLoss(), session.mesh, session.abstract_params,
        layout=learner_layout(config, session.mesh, rows=config.rollout.questions), chunk=config.learner.logit_chunk,
    )  # fmt: skip
    own = jax.tree.map(jnp.copy, params)  # the state's arrays are donated by the first update
    state = init_state(optimizer, own, session.abstract_params, session.mesh)
    for _ in range(EPOCHS):
        for batch in batches:
            state, _ = learner.update(state, *batch)
    return state.params
