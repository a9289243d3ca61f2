"""Train a router: warm start, then GRPO, one step after the other.

    python -m router_r1_jax.train --config=configs/demo.py --workdir=runs/demo [--config.reward.alpha=0.6]

A step samples a group of episodes per question (`router`), scores them (`reward`), compares each with its group and
updates the parameters (`learner`). The same command goes on where a run was cut; the order of resume sources is:

  1. the latest checkpoint in <workdir>/checkpoints,
  2. config.warmstart.file, a kept warm start,
  3. config.model.source, weights in Hugging Face format, or a random start,
     followed by config.warmstart.steps supervised updates.
"""

import dataclasses
import hashlib
import json
import signal
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from router_r1_jax.checkpoint import CheckpointStore
from router_r1_jax.cli import launch
from router_r1_jax.config import ConfigError
from router_r1_jax.data.questions import QuestionIterator, QuestionRecord
from router_r1_jax.evaluation.records import Record, make_records, summarise
from router_r1_jax.learner import (
    Learner,
    PolicyLoss,
    Row,
    TrainState,
    abstract_state,
    group_advantages,
    init_state,
    make_batch,
    make_optimizer,
)
from router_r1_jax.pool.cards import route_names
from router_r1_jax.report.writer import EpisodeWriter, MetricsWriter
from router_r1_jax.reward import CostNormalizer, Rewards, score
from router_r1_jax.router import Answers
from router_r1_jax.session import Session, open_session
from router_r1_jax.warmstart import warm_start


def config_hash(config: ConfigDict) -> str:
    """A short hash of the whole configuration."""
    return hashlib.sha256(config.to_json_best_effort(sort_keys=True).encode()).hexdigest()[:16]


def estimate(config: ConfigDict) -> str:
    """What the run will ask of the pool, said before it starts."""
    c = config
    validations = c.steps // c.validation.every if c.validation.questions else 0
    episodes = c.steps * c.rollout.questions * c.rollout.group + validations * c.validation.questions
    calls = episodes * c.rollout.max_calls
    prices = [model.price_out for model in c.pool.models]
    dollars = [calls * c.rollout.reply_tokens * price / 1e6 for price in (np.mean(prices), max(prices))]
    return (
        f"{c.steps} steps, {episodes} episodes, at most {calls} calls; with replies of rollout.reply_tokens="
        f"{c.rollout.reply_tokens} tokens that is ${dollars[0]:.2f} at the models' mean price, "
        f"${dollars[1]:.2f} at the dearest's"
    )


def judge(config: ConfigDict, answers: Answers, normalizer: CostNormalizer) -> Rewards:
    """Rewards of one rollout; the normaliser's window takes the costs in the episodes' order."""
    return score(
        [episode.text for episode in answers.episodes],
        [question.golds for question in answers.questions],
        answers.raw_costs,
        route_names(answers.roster),
        preset=config.reward.preset,
        alpha=config.reward.alpha,
        metric=config.reward.metric,
        normalizer=normalizer,
        valid=answers.valid,
    )


def make_rows(answers: Answers, advantages: np.ndarray) -> list[Row]:
    """The learner's rows: sampled ids as they were sampled, never text tokenised again."""
    return [
        Row(e.prompt[answers.prefix_length :], e.tokens, e.sampled, e.logps, float(advantage))
        for e, advantage in zip(answers.episodes, advantages, strict=True)
    ]


def update(
    config: ConfigDict, learner: Learner, state: TrainState, reference: Any, answers: Answers, advantages: np.ndarray
) -> tuple[TrainState, dict[str, float]]:
    """One update per mini-batch; metrics are means over the mini-batches."""
    rows = make_rows(answers, advantages)
    prefix = answers.episodes[0].prompt[: answers.prefix_length]
    size = len(rows) // config.learner.minibatches
    each = []
    for start in range(0, len(rows), size):
        batch = make_batch(prefix, rows[start : start + size])
        batch = batch.replace(reference_logps=learner.logprobs(reference, batch))
        state, metrics = learner.update(state, batch)
        each.append(metrics)
    return state, {name: float(np.mean([m[name] for m in each])) for name in each[0]}


def validate(
    config: ConfigDict, session: Session, questions: list[QuestionRecord], step: int
) -> tuple[dict[str, float], list[Record]]:
    """Greedy answers to the validation questions, judged with a cost window of their own."""
    answers = session.router.answer(
        questions, group=1, temperature=0.0, seed=(config.seed, 0, 0), step=step, split="validation"
    )
    rewards = judge(config, answers, CostNormalizer(config.reward.window))
    records = make_records(
        answers.questions, answers.episodes, rewards, step=step, split="validation", policy="training"
    )
    figures = summarise(records, session.cards)
    keys = ("em", "reward/total", "dollars_per_question", "calls_per_question", "best_model_share", "malformed_share")
    return {f"val/{key}": figures[key] for key in keys if key in figures}, records


@dataclasses.dataclass
class Run:
    """What a run carries from step to step.

    `progress` is everything beside the arrays, as JSON, taken when a step is complete: a step that is cut in the middle
    leaves no trace in a checkpoint.
    """

    session: Session
    iterator: QuestionIterator
    normalizer: CostNormalizer
    state: TrainState | None = None
    step: int = 0
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)

    def advance(self, state: TrainState, step: int) -> None:
        """Take the state after `step` updates."""
        self.state, self.step = state, step
        self.progress = {
            "data": self.iterator.state(),
            "cost_window": self.normalizer.state(),
            "pool": self.session.pool.state(),
            "config": config_hash(self.session.config),
        }

    def save(self, store: CheckpointStore, metric: float | None) -> None:
        """Write a checkpoint of this step."""
        train = {"opt_state": self.state.opt_state, "step": self.state.step}
        store.save(self.step, params=self.state.params, train=train, run=self.progress, metric=metric)

    def restore(self, store: CheckpointStore, step: int, abstract: TrainState) -> None:
        """Become the run that checkpoint `step` holds."""
        train = {"opt_state": abstract.opt_state, "step": abstract.step}
        saved = store.restore(step, abstract_params=abstract.params, abstract_train=train)
        if saved.run["config"] != config_hash(self.session.config):
            print(f"note: step {step} was made with another configuration; going on with the present one")
        self.iterator.restore(saved.run["data"])
        self.normalizer.restore(saved.run["cost_window"])
        self.session.pool.restore(saved.run["pool"])
        self.advance(TrainState(saved.params, saved.train["opt_state"], saved.train["step"]), step)


def train(config: ConfigDict, session: Session, store: CheckpointStore) -> None:
    """The run, from its first or its latest checkpoint to config.steps."""
    # ---- data -------------------------------------------------------------------------------------------------------
    train_questions = session.questions("train")
    validation_questions = session.questions("validation")[: config.validation.questions]
    iterator = QuestionIterator(train_questions, seed=config.seed, batch=config.rollout.questions)

    # ---- optimizer and learner --------------------------------------------------------------------------------------
    lc = config.learner
    optimizer, schedule = make_optimizer(
        learning_rate=lc.learning_rate, warmup=lc.warmup, total=config.steps * lc.minibatches, decay=lc.decay,
        weight_decay=lc.weight_decay, max_grad_norm=lc.max_grad_norm,
    )  # fmt: skip
    loss = PolicyLoss(clip_low=lc.clip_low, clip_high=lc.clip_high, kl_coef=lc.kl_coef)
    learner = Learner(
        session.model, optimizer, loss, session.mesh, session.abstract_params,
        micro_batch=lc.micro_batch, chunk=lc.logit_chunk, temperature=config.rollout.temperature,
    )  # fmt: skip
    abstract = abstract_state(optimizer, session.abstract_params, session.mesh)

    # ---- first or latest checkpoint ---------------------------------------------------------------------------------
    resume_step = store.latest()
    writer = MetricsWriter(
        session.workdir, tensorboard=config.logging.tensorboard, wandb=config.logging.wandb, resume_step=resume_step
    )
    episodes_file = EpisodeWriter(session.workdir, "train", resume_step=resume_step)
    run = Run(session, iterator, CostNormalizer(config.reward.window))
    if resume_step is None:
        params = warm_start(session, writer)
        reference = jax.tree.map(jnp.copy, params)  # the state's own copy is donated by the first update
        run.advance(init_state(optimizer, params, session.abstract_params, session.mesh), 0)
        run.save(store, None)
    else:
        print(f"going on from step {resume_step}")
        run.restore(store, resume_step, abstract)
        reference = store.restore_params(store.first(), session.abstract_params)
    session.router.push(run.state.params)
    print(estimate(config))

    # ---- steps ------------------------------------------------------------------------------------------------------
    saved_step = run.step
    bar = tqdm(initial=run.step, total=config.steps, desc="train", unit="step", dynamic_ncols=True)
    try:
        while run.step < config.steps:
            started = time.monotonic()
            questions = run.iterator.next()
            answers = session.router.answer(
                questions, group=config.rollout.group, temperature=config.rollout.temperature,
                seed=(config.seed, run.step), step=run.step + 1, split="train",
            )  # fmt: skip
            rewards = judge(config, answers, run.normalizer)
            groups = np.repeat(np.arange(len(questions)), config.rollout.group)
            advantages, without_spread = group_advantages(rewards.total, groups, answers.valid)
            sampled = time.monotonic()
            state, metrics = update(config, learner, run.state, reference, answers, advantages)
            run.advance(state, run.step + 1)
            session.router.push(run.state.params)
            updated = time.monotonic()

            records = make_records(
                answers.questions, answers.episodes, rewards, step=run.step, split="train", policy="training"
            )
            metrics |= summarise(records, session.cards) | {
                "zero_variance_groups": without_spread,
                "failed_episodes": int(np.sum(~answers.valid)),
                "response_tokens": float(np.mean([len(e.tokens) for e in answers.episodes])),
                "tokens_per_second": answers.stats.decoded_tokens / answers.stats.seconds,
                "idle_seconds": answers.stats.idle_seconds,
                "rollout_seconds": sampled - started,
                "update_seconds": updated - sampled,
                "learning_rate": float(schedule(run.step * lc.minibatches)),
                "spent_dollars": session.pool.totals()["spent"],
            }
            validated = None
            if config.validation.questions and (run.step % config.validation.every == 0 or run.step == config.steps):
                figures, validation_records = validate(config, session, validation_questions, run.step)
                metrics |= figures
                validated = figures["val/reward/total"]
                episodes_file.write(validation_records[:20])
            if run.step % config.logging.episodes_every == 0:
                episodes_file.write(records)
            writer.write(run.step, metrics)
            if run.step % config.checkpoint.every == 0 or run.step == config.steps:
                run.save(store, validated)
                saved_step = run.step
            bar.update()
            bar.set_postfix(
                em=f"{metrics['em']:.2f}", reward=f"{metrics['reward/total']:.2f}",
                dollars=f"{metrics['dollars_per_question']:.1e}",
            )  # fmt: skip
    except BaseException:
        # Nothing learnt is lost: the last whole step is kept, unless it is already, or the update itself was cut.
        if run.step > saved_step and not any(x.is_deleted() for x in jax.tree.leaves(run.state.params)):
            run.save(store, None)
            store.wait()
            print(f"\nstopped; step {run.step} is kept in {store.directory}")
        raise
    finally:
        bar.close()
        writer.close()
        episodes_file.close()


def main(config: ConfigDict, workdir: Path) -> None:
    """Open the session, train, and say where things are."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's notice is handled like Ctrl-C
    if config.rollout.temperature == 0:
        raise ConfigError("rollout.temperature is 0; training needs draws that differ, set it to 1.0")
    with (
        CheckpointStore(workdir / "checkpoints", keep=config.checkpoint.keep) as store,
        open_session(config, workdir, load_source=True) as session,
    ):
        (workdir / "config.json").write_text(json.dumps(json.loads(config.to_json_best_effort()), indent=2) + "\n")
        train(config, session, store)
        store.wait()
        best = store.best()
        print(f"steps kept: {store.steps()}; best by validation: {best}; metrics in {workdir / 'metrics.jsonl'}")


if __name__ == "__main__":
    launch(main)
