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
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from router_r1_jax import hosts
from router_r1_jax.checkpoint import CheckpointStore
from router_r1_jax.cli import Interrupts, launch
from router_r1_jax.config import ConfigError
from router_r1_jax.data.questions import QuestionIterator, QuestionRecord
from router_r1_jax.evaluation.records import Record, make_records, summarise
from router_r1_jax.learner import (
    Learner,
    PolicyLoss,
    Row,
    TrainState,
    abstract_state,
    component_advantages,
    group_advantages,
    init_state,
    make_batch,
    make_optimizer,
)
from router_r1_jax.model import Params, add_adapters
from router_r1_jax.pool.cards import route_names
from router_r1_jax.report.writer import EpisodeWriter, MetricsWriter, replace_file
from router_r1_jax.reward import CostNormalizer, Rewards, score
from router_r1_jax.router import Answers
from router_r1_jax.session import Session, open_session
from router_r1_jax.warmstart import warm_start


def config_hash(config: ConfigDict) -> str:
    """A short hash of the configuration, but for the number of processes that run it."""
    fields = json.loads(config.to_json_best_effort())
    del fields["distributed"]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


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
        answers.raw_costs(config.reward),
        route_names(answers.roster),
        preset=config.reward.preset,
        alpha=config.reward.alpha,
        metric=config.reward.metric,
        normalizer=normalizer,
        groups=answers.groups,
        valid=answers.valid,
    )


def compare(config: ConfigDict, answers: Answers, rewards: Rewards) -> tuple[np.ndarray, int]:
    """Advantages [B] of the total reward, or of its components where they have weights; groups without a spread."""
    weights = np.where(answers.valid, 1.0, config.pool.fault_weight)
    shares = config.learner.component_weights.to_dict()
    if any(shares.values()):
        components = {"format": rewards.format, "outcome": rewards.outcome, "cost": rewards.cost}
        return component_advantages(components, shares, answers.groups, weights, kind=config.learner.advantage)
    return group_advantages(rewards.total, answers.groups, weights, kind=config.learner.advantage)


def make_rows(answers: Answers, advantages: np.ndarray) -> list[Row]:
    """The learner's rows: sampled ids as they were sampled, never text tokenised again."""
    return [
        Row(e.prompt[answers.prefix_length :], e.tokens, e.sampled, e.logps, float(advantage))
        for e, advantage in zip(answers.episodes, advantages, strict=True)
    ]


def update(
    config: ConfigDict,
    learner: Learner,
    state: TrainState,
    reference: Params | None,
    answers: Answers,
    advantages: np.ndarray,
) -> tuple[TrainState, dict[str, float]]:
    """One update per mini-batch; metrics are means over the mini-batches.

    `reference` None: the state's own parameters without their adapters, which no update changes.
    """
    rows = make_rows(answers, advantages)
    prefix = answers.episodes[0].prompt[: answers.prefix_length]
    size = len(rows) // config.learner.minibatches
    each = []
    for start in range(0, len(rows), size):
        batch = make_batch(prefix, rows[start : start + size])
        batch = batch.replace(reference_logps=learner.reference_logprobs(reference or state.params, batch))
        state, metrics = learner.update(state, batch)
        each.append(metrics)
    return state, {name: float(np.mean([m[name] for m in each])) for name in each[0]}


def validate(
    config: ConfigDict,
    session: Session,
    questions: list[QuestionRecord],
    first_window: dict[str, Any],
    step: int,
) -> tuple[dict[str, float], list[Record]]:
    """Greedy answers to the validation questions, each time judged by the costs of the run's first rollout.

    A window that moved along would call the middle of any policy's own costs cheap, and rewards of two steps, by which
    the best checkpoint is chosen, could not be compared.
    """
    answers = session.router.answer(
        questions, group=1, temperature=0.0, seed=(config.seed, 0, 0), step=step, split="validation"
    )
    normalizer = CostNormalizer(config.reward.window)
    normalizer.restore(first_window)
    rewards = judge(config, answers, normalizer)
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
    first_window: dict[str, Any] | None = None  # the cost window after the first rollout
    state: TrainState | None = None
    step: int = 0
    saved_step: int = -1
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)

    def advance(self, state: TrainState, step: int) -> None:
        """Take the state after `step` updates."""
        self.state, self.step = state, step
        self.progress = {
            "data": self.iterator.state(),
            "cost_window": self.normalizer.state(),
            "first_cost_window": self.first_window,
            "pools": self.session.pool_states(),
            "config": config_hash(self.session.config),
        }

    def count_calls(self) -> None:
        """Take the ledger's sums once more: the calls of a validation belong to the step that it follows."""
        self.progress["pools"] = self.session.pool_states()

    def save(self, store: CheckpointStore, metric: float | None) -> None:
        """Write a checkpoint of this step."""
        train = {"opt_state": self.state.opt_state, "step": self.state.step}
        store.save(self.step, params=self.state.params, train=train, run=self.progress, metric=metric)
        self.saved_step = self.step

    @contextmanager
    def kept_on_error(self, store: CheckpointStore) -> Iterator[None]:
        """Whatever ends the block, the last whole step is kept: also on Ctrl-C or a failing pool.

        A process that fails away from the others cannot keep it: all write a checkpoint, or none.
        """
        try:
            yield
        except BaseException:
            whole = not any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state))  # else cut inside an update
            if self.step > self.saved_step and whole and hosts.in_step():
                self.save(store, None)
                store.wait()
                hosts.say(f"\nstopped; step {self.step} is kept in {store.directory}")
            raise

    def restore(self, store: CheckpointStore, step: int, abstract: TrainState) -> None:
        """Become the run that checkpoint `step` holds."""
        train = {"opt_state": abstract.opt_state, "step": abstract.step}
        saved = store.restore(step, abstract_params=abstract.params, abstract_train=train)
        if saved.run["config"] != config_hash(self.session.config):
            hosts.say(f"note: step {step} was made with another configuration; going on with the present one")
        self.iterator.restore(saved.run["data"])
        self.normalizer.restore(saved.run["cost_window"])
        self.first_window = saved.run["first_cost_window"]
        self.session.restore_pools(saved.run["pools"], step)
        self.advance(TrainState(saved.params, saved.train["opt_state"], saved.train["step"]), step)
        self.saved_step = step


def make_loss(config: ConfigDict) -> PolicyLoss:
    """The loss that `config.learner` describes."""
    c = config.learner
    return PolicyLoss(
        clip_low=c.clip_low, clip_high=c.clip_high, kl_coef=c.kl_coef, ratio=c.ratio, mean_over=c.mean_over,
        length=config.rollout.max_tokens, dual_clip=c.dual_clip, kl=c.kl,
    )  # fmt: skip


def setup_learner(config: ConfigDict, session: Session) -> tuple[Learner, TrainState, Any, Any]:
    """The learner, an abstract TrainState to restore into, the optimizer and its schedule."""
    c = config.learner
    optimizer, schedule = make_optimizer(
        learning_rate=c.learning_rate, warmup=c.warmup, total=config.steps * c.minibatches, decay=c.decay,
        weight_decay=c.weight_decay, max_grad_norm=c.max_grad_norm,
    )  # fmt: skip
    learner = Learner(
        session.model, optimizer, make_loss(config), session.mesh, session.abstract_params,
        micro_batch=c.micro_batch, chunk=c.logit_chunk, temperature=config.rollout.temperature,
    )  # fmt: skip
    return learner, abstract_state(optimizer, session.abstract_params, session.mesh), optimizer, schedule


def hit_rate(answers: Answers) -> float:
    """Of the calls that reached a model, the share answered from the tape or by another row's request; 0 without."""
    hits = [reply.hit for episode in answers.episodes for reply in episode.replies if reply.model]
    return float(np.mean(hits)) if hits else 0.0


def rollout_metrics(session: Session, answers: Answers, records: list[Record]) -> dict[str, Any]:
    """What a step's episodes and its rollout add to the metrics. Times in seconds, money in dollars."""
    stats = answers.stats
    return summarise(records, session.cards) | {
        "failed_episodes": int(np.sum(~answers.valid)),
        "response_tokens": float(np.mean([len(e.tokens) for e in answers.episodes])),
        "tokens_per_second": stats.decoded_tokens / stats.seconds,
        "tape_hit_rate": hit_rate(answers),
        "spent_dollars": session.spent,
        **{f"stops/{reason}": count / len(answers.episodes) for reason, count in stats.stops.items()},
        **{f"rollout/{name}": value for name, value in stats.metrics().items()},
    }


def rollout_trace(answers: Answers, step: int) -> dict[str, Any]:
    """What each row did in a step's rollout, for the plot."""
    s = answers.stats
    return {"step": step, "seconds": s.seconds, "rows": s.rows, "idle_share": s.idle_share, "spans": s.spans}


@contextmanager
def open_files(
    config: ConfigDict, workdir: Path, resume_step: int | None
) -> Iterator[tuple[MetricsWriter | hosts.Silent, EpisodeWriter | hosts.Silent]]:
    """config.json, the metrics and the episodes of training: of several processes the first writes them."""
    if not hosts.first():
        yield hosts.Silent(), hosts.Silent()
        return
    settings = json.dumps(json.loads(config.to_json_best_effort()), indent=2) + "\n"
    replace_file(workdir / "config.json", settings.encode())
    c = config.logging
    with (
        closing(MetricsWriter(workdir, tensorboard=c.tensorboard, wandb=c.wandb, resume_step=resume_step)) as metrics,
        closing(EpisodeWriter(workdir, "train", resume_step=resume_step)) as episodes,
    ):
        yield metrics, episodes


def main(config: ConfigDict, workdir: Path) -> None:
    """The run, from its first or its latest checkpoint to config.steps."""
    interrupts = Interrupts()
    hosts.hear_interrupts()
    if config.rollout.temperature == 0:
        raise ConfigError("rollout.temperature is 0; training needs draws that differ, set it to 1.0")
    with ExitStack() as stack:
        # ---- pool, model, data --------------------------------------------------------------------------------------
        store = stack.enter_context(CheckpointStore(workdir / "checkpoints", keep=config.checkpoint.keep))
        session = stack.enter_context(open_session(config, workdir, load_source=True))
        train_questions = session.questions("train")
        validation_questions = session.questions("validation")[: config.validation.questions]
        iterator = QuestionIterator(train_questions, seed=config.seed, batch=config.rollout.questions)
        hosts.say(estimate(config))

        # ---- learner, latest checkpoint: before any file is changed, so that one that cannot be read costs nothing --
        learner, abstract, optimizer, schedule = setup_learner(config, session)
        run = Run(session, iterator, CostNormalizer(config.reward.window))
        resume_step = store.latest()
        if resume_step is not None:
            hosts.say(f"going on from step {resume_step}")
            run.restore(store, resume_step, abstract)
            reference = None if session.model.lora else store.restore_params(store.first(), session.abstract_params)

        # ---- logging ------------------------------------------------------------------------------------------------
        writer, episodes_file = stack.enter_context(open_files(config, workdir, resume_step))

        # ---- first checkpoint: the warm start -----------------------------------------------------------------------
        if resume_step is None:
            params = add_adapters(session.model, warm_start(session, writer), session.mesh, config.seed)
            # The state's own copy is donated by the first update.
            reference = None if session.model.lora else jax.tree.map(jnp.copy, params)
            run.advance(init_state(optimizer, params, session.abstract_params, session.mesh), 0)
            run.save(store, None)
        session.router.push(run.state.params)
        stack.enter_context(run.kept_on_error(store))

        # ---- steps --------------------------------------------------------------------------------------------------
        bar = stack.enter_context(
            tqdm(
                initial=run.step,
                total=config.steps,
                desc="train",
                unit="step",
                dynamic_ncols=True,
                disable=not hosts.first(),
            )
        )
        while run.step < config.steps:
            started = time.monotonic()
            questions = iterator.next()
            answers = session.router.answer(
                questions, group=config.rollout.group, temperature=config.rollout.temperature,
                seed=(config.seed, run.step), step=run.step + 1, split="train",
            )  # fmt: skip
            rewards = judge(config, answers, run.normalizer)
            run.first_window = run.first_window or run.normalizer.state()
            advantages, without_spread = compare(config, answers, rewards)
            sampled = time.monotonic()

            interrupts.hold()  # the update takes the old state's arrays: cut in it, the run would have neither state
            state, metrics = update(config, learner, run.state, reference, answers, advantages)
            run.advance(state, run.step + 1)
            updated = time.monotonic()
            metrics |= session.router.push(run.state.params)

            records = make_records(
                answers.questions, answers.episodes, rewards, step=run.step, split="train", policy="training"
            )
            metrics |= rollout_metrics(session, answers, records) | {
                "zero_variance_groups": without_spread,
                "rollout_seconds": sampled - started,
                "update_seconds": updated - sampled,
                "learning_rate": float(schedule((run.step - 1) * config.learner.minibatches)),
            }
            last = run.step == config.steps
            if last or run.step % config.logging.episodes_every == 0:
                episodes_file.write(records)
                if hosts.first():
                    replace_file(workdir / "rollout.json", json.dumps(rollout_trace(answers, run.step)).encode())
            validated = None
            try:
                interrupts.let_go()
                if config.validation.questions and (last or run.step % config.validation.every == 0):
                    figures, validation_records = validate(
                        config, session, validation_questions, run.first_window, run.step
                    )
                    run.count_calls()
                    metrics |= figures
                    validated = figures["val/reward/total"]
                    episodes_file.write(validation_records[:20])
            finally:  # a step whose validation is cut is whole, and kept, without it
                writer.write(run.step, metrics)
            if last or run.step % config.checkpoint.every == 0:
                run.save(store, validated)
            bar.update()
            bar.set_postfix(
                em=f"{metrics['em']:.2f}", reward=f"{metrics['reward/total']:.2f}",
                dollars=f"{metrics['dollars_per_question']:.1e}",
            )  # fmt: skip

        store.wait()
        kept, best = store.steps(), store.best()
        hosts.say(f"steps kept: {kept}; best by validation: {best}; metrics in {workdir / 'metrics.jsonl'}")


if __name__ == "__main__":
    launch(main, several=True)
