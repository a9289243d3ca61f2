"""Train a router: resume or warm start, then GRPO (or another policy loss) step by step.

    python -m router_r1_jax.train --config=configs/demo.py --workdir=runs/demo [--config.reward.alpha=0.6]

The loop at the end of this file is a training step as papers write it. The same command continues a run that was cut.
The parameters come from the first of these that there is:

  1. the latest checkpoint in <workdir>/checkpoints,
  2. config.warmstart.file, a kept warm start,
  3. config.model.source, weights in Hugging Face format, or random weights,
     followed by config.warmstart.steps supervised updates.
"""

import time
from contextlib import ExitStack
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from router_r1_jax.config import ConfigError
from router_r1_jax.data.questions import QuestionIterator
from router_r1_jax.distributed import multihost
from router_r1_jax.launcher import Interrupts, launch
from router_r1_jax.model import add_adapters
from router_r1_jax.reward import CostNormalizer
from router_r1_jax.router import Router, compute_rewards
from router_r1_jax.setup.session import open_session
from router_r1_jax.storage.checkpoint import CheckpointStore
from router_r1_jax.training.alarms import Alarms
from router_r1_jax.training.policy_update import compute_advantages, make_trainer, update_policy
from router_r1_jax.training.rollouts import Prefetch, Round, choose_groups, collect_rollouts, wants_another_round
from router_r1_jax.training.run_state import RunState
from router_r1_jax.training.step_log import open_log, rollout_metrics, write_timeline
from router_r1_jax.training.validation import validate
from router_r1_jax.training.warmstart import warm_start

VALIDATION_EPISODES = 20  # of each validation, that are kept in episodes/train.jsonl


def estimate(config: ConfigDict) -> str:
    """An upper bound of the calls and dollars that the run will ask of the pool, for the screen."""
    c = config
    validations = sum(validates(c, step) for step in range(1, c.steps + 1))
    rounds = c.steps * (1 + c.learner.dynamic_sampling)
    sampled = rounds * c.rollout.prompts_per_step * c.rollout.num_generations
    episodes = sampled + validations * c.validation.questions
    calls = episodes * c.rollout.max_calls
    prices = [model.price_out for model in c.pool.models]
    dollars = [calls * c.rollout.reply_tokens * price / 1e6 for price in (np.mean(prices), max(prices))]
    return (
        f"{c.steps} steps, at most {episodes} episodes and {calls} calls; with replies of rollout.reply_tokens="
        f"{c.rollout.reply_tokens} tokens that is ${dollars[0]:.2f} at the models' mean price, "
        f"${dollars[1]:.2f} at the most expensive one's"
    )


def saves(config: ConfigDict, step: int) -> bool:
    """Whether the step ends with a checkpoint."""
    return step == config.steps or step % config.checkpoint.every == 0


def validates(config: ConfigDict, step: int) -> bool:
    """Whether the step ends with a validation."""
    return config.validation.questions > 0 and (step == config.steps or step % config.validation.every == 0)


def check_config(config: ConfigDict) -> None:
    """Raise ConfigError for a configuration that can be evaluated but not trained."""
    if config.rollout.temperature == 0:
        raise ConfigError("rollout.temperature is 0; training needs draws that differ, set it to 1.0")
    if config.rollout.one_step_off_policy and multihost.is_multihost():
        raise ConfigError(
            "rollout.one_step_off_policy is True; several processes cannot sample and update at once, set it to False"
        )


def sample_step(
    config: ConfigDict, router: Router, iterator: QuestionIterator, normalizer: CostNormalizer, step: int
) -> list[Round]:
    """The rollouts of training step `step` and their rewards; several rounds with dynamic sampling."""
    rounds: list[Round] = []
    while wants_another_round(config, rounds):
        rollouts = collect_rollouts(router, iterator.next(), config, step=step, round=len(rounds))
        rewards = compute_rewards(rollouts, config.reward, normalizer)
        rounds.append(Round(rollouts, rewards))
    return rounds


def main(config: ConfigDict, workdir: Path) -> None:
    """Train a router, from the first or the latest checkpoint to config.steps."""
    interrupts = Interrupts()
    multihost.defer_interrupts()
    check_config(config)
    with ExitStack() as stack:
        # ---- pool, model, data --------------------------------------------------------------------------------------
        store = stack.enter_context(CheckpointStore(workdir / "checkpoints", keep=config.checkpoint.keep))
        session = stack.enter_context(open_session(config, workdir, load_source=True))
        router, train_questions = session.router, session.questions("train")
        validation_questions = session.questions("validation")[: config.validation.questions]
        iterator = QuestionIterator(train_questions, seed=config.seed, batch=config.rollout.prompts_per_step)
        multihost.log_primary(estimate(config))

        # ---- learner, latest checkpoint: before any file changes, so that an unreadable checkpoint costs nothing -----
        trainer = make_trainer(config, session)
        normalizer = CostNormalizer(config.reward.window)
        run = RunState(session, iterator, normalizer, Alarms(config.alarms))
        resume_step = store.latest()
        reference = None  # parameters of the KL reference; None: the state's own without their LoRA adapters
        keeps_reference = config.learner.kl != "none" and not session.model.lora
        if resume_step is not None:
            multihost.log_primary(f"going on from step {resume_step}")
            run.restore(store, resume_step, trainer.abstract_state())
            if keeps_reference:
                reference = store.restore(store.first(), params=session.abstract_params)["params"]

        # ---- logging ------------------------------------------------------------------------------------------------
        writer, episodes_file = stack.enter_context(open_log(config, workdir, resume_step))

        # ---- first checkpoint: the warm start -----------------------------------------------------------------------
        if resume_step is None:
            params = add_adapters(session.model, warm_start(session, writer), session.mesh, config.seed)
            if keeps_reference:
                reference = jax.tree.map(jnp.copy, params)  # the state's own arrays are donated by the first update
            run.advance(trainer.fresh_state(params), 0, run.record_host_state())
            run.save(store, None)
        stack.enter_context(run.saved_on_error(store))

        # ---- steps --------------------------------------------------------------------------------------------------
        bar = {"initial": run.step, "total": config.steps, "desc": "train", "unit": "step", "dynamic_ncols": True}
        bar = stack.enter_context(tqdm(**bar, disable=not multihost.is_primary()))
        prefetch = stack.enter_context(
            Prefetch(router, lambda step: sample_step(config, router, iterator, normalizer, step))
        )
        run.sync_weights()
        while run.step < config.steps:
            step, started = run.step + 1, time.monotonic()
            rounds = prefetch.take(step)  # collect_rollouts and compute_rewards: `sample_step` above
            run.first_cost_window = run.first_cost_window or normalizer.state()
            host_state, sampled = run.record_host_state(), time.monotonic()
            # A step that ends with a checkpoint or a validation prefetches nothing: a resumed run then draws the same.
            if config.rollout.one_step_off_policy and not (saves(config, step) or validates(config, step)):
                run.sync_weights()
                prefetch.begin(step + 1)
            rollouts, rewards = choose_groups(config, rounds)

            interrupts.hold()  # an update consumes the old state's arrays: cut inside it, the run would have no state
            prefix, rows, advantage_metrics = compute_advantages(
                config, trainer.learner, run.state, reference, rollouts, rewards
            )
            state, metrics = update_policy(config, trainer.learner, run.state, prefix, rows)
            run.advance(state, step, host_state)
            if not prefetch.begun:
                run.sync_weights()
            updated = time.monotonic()

            records, sampling_metrics = rollout_metrics(session, rounds, step)
            metrics |= advantage_metrics | sampling_metrics | run.sync_metrics
            metrics |= {
                "rollout_seconds": sampled - started,
                "update_seconds": updated - sampled,
                "learning_rate": float(trainer.schedule(max(int(state.step) - 1, 0))),
            }
            metrics |= run.check_alarms(metrics)
            if step == config.steps or step % config.logging.episodes_every == 0:
                episodes_file.write(records)
                write_timeline(workdir, rounds[0].rollouts, step)

            validation_reward = None
            try:
                interrupts.release()
                if validates(config, step):
                    validation_metrics, records = validate(session, validation_questions, run.first_cost_window, step)
                    run.update_ledger_sums()
                    metrics |= validation_metrics
                    validation_reward = validation_metrics["val/reward/total"]
                    episodes_file.write(records[:VALIDATION_EPISODES])
            finally:  # if the validation is interrupted, the step is still whole and gets its line of metrics
                writer.write(step, metrics)

            if saves(config, step):
                run.save(store, validation_reward)
            multihost.run_on_all(run.alarms.stop_if_collapsed)
            bar.update()
            bar.set_postfix(
                em=f"{metrics['em']:.2f}",
                reward=f"{metrics['reward/total']:.2f}",
                dollars=f"{metrics['dollars_per_question']:.1e}",
            )

        store.wait()
        kept, best = store.steps(), store.best()
        multihost.log_primary(f"steps kept: {kept}; best by validation: {best}; metrics in {workdir / 'metrics.jsonl'}")


if __name__ == "__main__":
    launch(main, multihost=True)
