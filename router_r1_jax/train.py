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
from collections import Counter
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
from router_r1_jax.alarms import Alarms
from router_r1_jax.checkpoint import CheckpointStore
from router_r1_jax.cli import Interrupts, launch
from router_r1_jax.config import ConfigError
from router_r1_jax.data.questions import QuestionIterator, QuestionRecord
from router_r1_jax.evaluation.records import Record, make_records, summarise
from router_r1_jax.experience import Ahead, Experience, gather, judge
from router_r1_jax.learner import TrainState
from router_r1_jax.learning import improve, make_trainer
from router_r1_jax.model import add_adapters
from router_r1_jax.report.writer import EpisodeWriter, MetricsWriter, replace_file
from router_r1_jax.reward import CostNormalizer
from router_r1_jax.router import Answers, batch_size, join_answers
from router_r1_jax.session import Session, open_session
from router_r1_jax.warmstart import warm_start


def config_hash(config: ConfigDict) -> str:
    """A short hash of the configuration, but for the number of processes that run it."""
    fields = json.loads(config.to_json_best_effort())
    del fields["distributed"]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def estimate(config: ConfigDict) -> str:
    """The most that the run will ask of the pool, said before it starts."""
    c = config
    validations = sum(validates(c, step) for step in range(1, c.steps + 1))
    rounds = c.steps * (1 + c.learner.resample)
    episodes = rounds * c.rollout.questions * c.rollout.group + validations * c.validation.questions
    calls = episodes * c.rollout.max_calls
    prices = [model.price_out for model in c.pool.models]
    dollars = [calls * c.rollout.reply_tokens * price / 1e6 for price in (np.mean(prices), max(prices))]
    return (
        f"{c.steps} steps, at most {episodes} episodes and {calls} calls; with replies of rollout.reply_tokens="
        f"{c.rollout.reply_tokens} tokens that is ${dollars[0]:.2f} at the models' mean price, "
        f"${dollars[1]:.2f} at the dearest's"
    )


def validate(
    config: ConfigDict,
    session: Session,
    questions: list[QuestionRecord],
    first_window: dict[str, Any],
    step: int,
) -> tuple[dict[str, float], list[Record]]:
    """Greedy answers to the validation questions, each time judged by the costs of the run's first rollout.

    A window that moved along would call the middle of any policy's own costs cheap, and rewards of two steps, by which
    the best checkpoint is chosen, could not be compared. Questions go in batches as evaluation asks them: on a single
    roster of a drawn pool the best checkpoint would be the one that this roster happens to suit.
    """
    normalizer = CostNormalizer(config.reward.window)
    normalizer.restore(first_window)
    size, records = batch_size(config), []
    for start in range(0, len(questions), size):
        answers = session.router.answer(
            questions[start : start + size], group=1, temperature=0.0,
            seed=(config.seed, 0, 0, *([start] if start else [])), step=step, split="validation",
        )  # fmt: skip
        rewards = judge(config, answers, normalizer)
        records += make_records(answers, rewards, step=step, split="validation", policy="training")
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
    alarms: Alarms
    first_window: dict[str, Any] | None = None  # the cost window after the first rollout
    state: TrainState | None = None
    step: int = 0
    saved_step: int = -1
    pushed_step: int = -1  # of the parameters that the rollout has
    push_figures: dict[str, float] = dataclasses.field(default_factory=dict)  # what that push took
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)

    def gather(self, config: ConfigDict, step: int) -> Experience:
        """The episodes of a step, by the parameters pushed last."""
        experience = gather(config, self.session.router, self.iterator, self.normalizer, step)
        self.first_window = self.first_window or self.normalizer.state()
        return experience

    def push(self) -> None:
        """Give the rollout the present parameters, unless it has them."""
        if self.pushed_step != self.step:
            self.push_figures = self.session.router.push(self.state.params)
            self.pushed_step = self.step

    def look_back(self) -> dict[str, Any]:
        """What a checkpoint of the step whose episodes were gathered last will hold of the host."""
        return {
            "data": self.iterator.state(),
            "cost_window": self.normalizer.state(),
            "first_cost_window": self.first_window,
            "pools": self.session.pool_states(),
            "config": config_hash(self.session.config),
        }

    def advance(self, state: TrainState, step: int, progress: dict[str, Any]) -> None:
        """Take the state after `step` updates, and what `look_back` said before the next step's episodes were begun."""
        self.state, self.step, self.progress = state, step, progress | {"alarms": self.alarms.state()}

    def sound(self, metrics: dict[str, Any]) -> dict[str, float]:
        """The alarms of this step's metrics; what begins or ends is printed."""
        figures, lines = self.alarms.look(metrics)
        for line in lines if hosts.first() else []:
            tqdm.write(f"step {self.step}: {line}")
        self.progress["alarms"] = self.alarms.state()
        return figures

    def count_calls(self) -> None:
        """Take the ledger's sums once more: the calls of a validation belong to the step that it follows."""
        self.progress["pools"] = self.session.pool_states()

    def save(self, store: CheckpointStore, metric: float | None) -> None:
        """Write a checkpoint of this step."""
        store.save(self.step, params=self.state.params, train=train_tree(self.state), run=self.progress, metric=metric)
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
        saved = store.restore(step, abstract_params=abstract.params, abstract_train=train_tree(abstract))
        if saved.run["config"] != config_hash(self.session.config):
            hosts.say(f"note: step {step} was made with another configuration; going on with the present one")
        self.iterator.restore(saved.run["data"])
        try:
            self.normalizer.restore(saved.run["cost_window"])
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.first_window = saved.run["first_cost_window"]
        self.session.restore_pools(saved.run["pools"], step)
        self.alarms.restore(saved.run["alarms"])
        self.advance(TrainState(saved.params, **saved.train), step, self.look_back())
        self.saved_step = step


def train_tree(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of a state beside its parameters."""
    return {"opt_state": state.opt_state, "step": state.step} | ({"critic": state.critic} if state.critic else {})


def hit_rate(answers: Answers) -> float:
    """Of the calls that reached a model, the share answered from the tape or by another row's request; 0 without."""
    hits = [reply.hit for episode in answers.episodes for reply in episode.replies if reply.model]
    return float(np.mean(hits)) if hits else 0.0


def step_metrics(session: Session, experience: Experience, step: int) -> tuple[list[Record], dict[str, Any]]:
    """Records of all episodes of a step, and what they and their rollouts add to the metrics.

    Times in seconds, money in dollars; the telemetry is that of the first rollout.
    """
    records = [
        record
        for answers, rewards in experience.rounds
        for record in make_records(answers, rewards, step=step, split="train", policy="training")
    ]
    answers = join_answers([answers for answers, _ in experience.rounds])
    stats, stops = answers.stats, Counter(episode.stop for episode in answers.episodes)
    return records, summarise(records, session.cards) | {
        "rounds": len(experience.rounds),
        "failed_episodes": int(np.sum(~answers.valid)),
        "response_tokens": float(np.mean([len(e.tokens) for e in answers.episodes])),
        "tokens_per_second": stats.decoded_tokens / stats.seconds,
        "tape_hit_rate": hit_rate(answers),
        "spent_dollars": session.spent,
        **{f"stops/{reason}": count / len(answers.episodes) for reason, count in stops.items()},
        **{f"rollout/{name}": value for name, value in stats.metrics().items()},
    }


def saves(config: ConfigDict, step: int) -> bool:
    """Whether the step ends with a checkpoint."""
    return step == config.steps or step % config.checkpoint.every == 0


def validates(config: ConfigDict, step: int) -> bool:
    """Whether the step ends with a validation."""
    return config.validation.questions > 0 and (step == config.steps or step % config.validation.every == 0)


def pauses(config: ConfigDict, step: int) -> bool:
    """Whether the next step's episodes wait for the step's end: a run that goes on from a checkpoint draws the same."""
    return saves(config, step) or validates(config, step)


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
    if config.rollout.ahead and hosts.several():
        raise ConfigError("rollout.ahead is True; several processes cannot sample and update at once, set it to False")
    with ExitStack() as stack:
        # ---- pool, model, data --------------------------------------------------------------------------------------
        store = stack.enter_context(CheckpointStore(workdir / "checkpoints", keep=config.checkpoint.keep))
        session = stack.enter_context(open_session(config, workdir, load_source=True))
        train_questions = session.questions("train")
        validation_questions = session.questions("validation")[: config.validation.questions]
        iterator = QuestionIterator(train_questions, seed=config.seed, batch=config.rollout.questions)
        hosts.say(estimate(config))

        # ---- learner, latest checkpoint: before any file is changed, so that one that cannot be read costs nothing --
        trainer = make_trainer(config, session)
        run = Run(session, iterator, CostNormalizer(config.reward.window), Alarms(config.alarms))
        resume_step = store.latest()
        reference = None  # then the state's own parameters without their adapters
        keeps_reference = config.learner.kl != "none" and not session.model.lora
        if resume_step is not None:
            hosts.say(f"going on from step {resume_step}")
            run.restore(store, resume_step, trainer.abstract_state())
            if keeps_reference:
                reference = store.restore_params(store.first(), session.abstract_params)

        # ---- logging ------------------------------------------------------------------------------------------------
        writer, episodes_file = stack.enter_context(open_files(config, workdir, resume_step))

        # ---- first checkpoint: the warm start -----------------------------------------------------------------------
        if resume_step is None:
            params = add_adapters(session.model, warm_start(session, writer), session.mesh, config.seed)
            if keeps_reference:
                reference = jax.tree.map(jnp.copy, params)  # the state's own is donated by the first update
            run.advance(trainer.fresh_state(params), 0, run.look_back())
            run.save(store, None)
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
        ahead = stack.enter_context(Ahead(session.router, lambda step: run.gather(config, step)))
        while run.step < config.steps:
            step, started = run.step + 1, time.monotonic()
            if not ahead.begun:
                run.push()
            experience = ahead.take(step)
            progress, sampled = run.look_back(), time.monotonic()
            if config.rollout.ahead and not pauses(config, step):
                run.push()
                ahead.begin(step + 1)

            interrupts.hold()  # the update takes the old state's arrays: cut in it, the run would have neither state
            state, metrics = improve(config, trainer.learner, run.state, reference, *experience.chosen)
            run.advance(state, step, progress)
            updated = time.monotonic()

            records, figures = step_metrics(session, experience, step)
            metrics |= (
                figures
                | run.push_figures
                | {
                    "rollout_seconds": sampled - started,
                    "update_seconds": updated - sampled,
                    "learning_rate": float(trainer.schedule(max(int(state.step) - 1, 0))),
                }
            )
            metrics |= run.sound(metrics)
            if step == config.steps or step % config.logging.episodes_every == 0:
                episodes_file.write(records)
                if hosts.first():
                    trace = rollout_trace(experience.rounds[0].answers, step)
                    replace_file(workdir / "rollout.json", json.dumps(trace).encode())
            validated = None
            try:
                interrupts.let_go()
                if validates(config, step):
                    run.push()
                    figures, validation_records = validate(
                        config, session, validation_questions, run.first_window, run.step
                    )
                    run.count_calls()
                    metrics |= figures
                    validated = figures["val/reward/total"]
                    episodes_file.write(validation_records[:20])
            finally:  # a step whose validation is cut is whole, and kept, without it
                writer.write(run.step, metrics)
            if saves(config, step):
                run.save(store, validated)
            hosts.together(run.alarms.check)
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
