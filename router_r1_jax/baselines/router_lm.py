"""Baselines that are the router's language model without RL: direct answers, chain of thought, fine-tuned on its best.

The fine-tuned one is rejection sampling: supervised fine-tuning on the best of the episodes that it samples itself.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from tqdm import tqdm

from router_r1_jax import prompts
from router_r1_jax.data.questions import QuestionIterator
from router_r1_jax.learner import Row
from router_r1_jax.model import Params
from router_r1_jax.pool.cards import Card
from router_r1_jax.protocol import neutralize
from router_r1_jax.reward import CostNormalizer
from router_r1_jax.router import Router, compute_rewards
from router_r1_jax.setup.session import Session
from router_r1_jax.training.policy_update import make_rows
from router_r1_jax.training.supervised import Phase, train_supervised

DIRECT = "Answer the question. Write the answer alone, between <answer> and </answer>.\nQuestion: {question}\n"
CHAIN_OF_THOUGHT = (
    "Answer the question. First think step by step between <think> and </think>, then write the answer alone between "
    "<answer> and </answer>.\nQuestion: {question}\n"
)
EPOCHS = 3  # over the episodes that fine-tuning keeps

Batch = tuple[Sequence[int], list[Row]]  # the prompt's prefix, and the rows behind it


class PoolFreeRouter(Router):
    """The language model without a pool: it reads a plain instruction and the question, and calls no model."""

    def __init__(self, session: Session, instruction: str) -> None:
        """`instruction` contains {question}."""
        config = session.config.copy_and_resolve_references()
        config.rollout.max_calls = 0
        super().__init__(config, session.model, session.tokenizer, session.cards, session.pool, session.mesh)
        self._instruction = instruction

    def prompt_ids(self, question: str, cards: Sequence[Card]) -> tuple[int, ...]:
        """Token ids of the instruction and the neutralised question; cards are not shown."""
        prompt = self.config.prompt
        text = self._instruction.replace("{question}", neutralize(question))
        return tuple(prompts.encode(self.tokenizer, text, system=prompt.system, thinking=prompt.thinking))


def best_episodes(config: ConfigDict, session: Session) -> list[Batch]:
    """Sample as many rollouts as a training run, with the router's present weights; keep each question's best episode.

    Every rollout gives one batch, because every rollout has its own prompt. Questions without a rewarded episode are
    left out. Rows are repeated until each batch holds rollout.prompts_per_step rows, so that one shape is compiled.
    """
    r = config.rollout
    iterator = QuestionIterator(session.questions("train"), seed=config.seed, batch=r.prompts_per_step)
    normalizer, batches = CostNormalizer(config.reward.window), []
    for i in tqdm(range(config.steps), desc="sampling to fine-tune", unit="rollout", dynamic_ncols=True):
        batch = session.router.answer(
            iterator.next(),
            num_generations=r.num_generations,
            temperature=r.temperature,
            seed=(config.seed, 2, i),
            step=0,
            split="train",
        )
        rewards = compute_rewards(batch, config.reward, normalizer).total.reshape(-1, r.num_generations)
        rows = make_rows(config, batch)
        best = [int(group.argmax()) + q * r.num_generations for q, group in enumerate(rewards) if group.max() > 0]
        if best:
            kept = [rows[best[j % len(best)]] for j in range(r.prompts_per_step)]
            batches.append((batch.episodes[0].prompt[: batch.prefix_length], kept))
    return batches


def fine_tune(config: ConfigDict, session: Session, params: Params) -> Params:
    """Supervised fine-tuning on the best of as many episodes as a training run of this configuration samples.

    The learning rate is that of the run. Returns new parameters; `params` stay as they are.
    """
    session.router.sync_weights(params)
    batches = best_episodes(config, session)
    c = config.learner
    phase = Phase(
        updates=EPOCHS * len(batches),
        batch=lambda update: batches[update % len(batches)],
        longest=config.rollout.max_row_tokens,
        buckets=c.length_buckets,
        rows=config.rollout.prompts_per_step,
    )
    return train_supervised(
        session.model,
        session.mesh,
        session.abstract_params,
        jax.tree.map(jnp.copy, params),  # training donates its arrays
        [phase],
        learning_rate=c.learning_rate,
        warmup=c.warmup,
        decay=True,
        weight_decay=c.weight_decay,
        micro_tokens=c.micro_tokens,
        logit_chunk=c.logit_chunk,
    )
