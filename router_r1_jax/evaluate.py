"""Evaluate a router: answer held-out questions with some weights and some pool, and write tables, plots and a report.

    python -m router_r1_jax.evaluate --config=configs/demo.py --workdir=runs/demo [--checkpoint=best|last|first|STEP]

--checkpoint also takes a folder: another run, one of its checkpoints, or weights in Hugging Face format.
--compare=FOLDER compares question by question with the results of another evaluation. --change=WORDS changes the pool,
for instance drop=Titan or rename,blank (`evaluation.pool_changes`); its results go to <workdir>/changes/WORDS.

Every question is answered greedily, which gives the headline, and config.evaluation.samples times at a temperature. The
checkpoint `config.evaluation.baseline` (the warm start, by default) answers the same questions, so that the gain is
paired. Finished episodes are on disk: after a kill, the same command resumes. With `evaluation.call_cache` or
`pool.call_cache` no call is paid twice.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from router_r1_jax import report
from router_r1_jax.config import config_hash
from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.distributed import multihost
from router_r1_jax.evaluation import pool_changes, published_results
from router_r1_jax.evaluation.aggregates import metrics_with_intervals, policy_metrics
from router_r1_jax.evaluation.answering import GREEDY, SamplingParams, answer_questions
from router_r1_jax.evaluation.cache_key import episodes_key
from router_r1_jax.evaluation.comparison import compare_records, read_evaluation
from router_r1_jax.evaluation.episode_cache import EpisodeCache, with_call_cache
from router_r1_jax.evaluation.episode_records import Record
from router_r1_jax.evaluation.provenance import commit, versions
from router_r1_jax.launcher import Flag, launch
from router_r1_jax.pool.cards import Card, at_step
from router_r1_jax.report import tables
from router_r1_jax.reward import make_normalizer
from router_r1_jax.setup.policy_weights import PolicyWeights, find_policy_weights, fingerprint, first_cost_window
from router_r1_jax.setup.session import Session, open_session
from router_r1_jax.storage.checkpoint import CheckpointStore
from router_r1_jax.storage.json_lines import EPISODES_FOLDER, replace_file, write_episodes
from router_r1_jax.storage.metrics_writer import read_metrics


def main(config: ConfigDict, workdir: Path, checkpoint: str, compare: str, change: str) -> None:
    """Evaluate a checkpoint and the baseline checkpoint; print and write the results."""
    # ---- weights, pool, questions ------------------------------------------------------------------------------------
    changes = pool_changes.parse_changes(change)
    config, weights = find_policy_weights(config, workdir, checkpoint)
    baseline = baseline_weights(config, weights)
    settings = with_call_cache(config, workdir)
    settings.pool = pool_changes.change_pool(settings.pool, changes)
    folder = results_folder(workdir, changes)
    with open_session(settings, workdir, load_source=weights.step is None) as session:
        # The prices are those of the evaluated checkpoint's step, also for the baseline and the oracle.
        cards = at_step(pool_changes.change_models(session.cards, changes), weights.step or 0)
        pool_changes.check_candidates(settings.pool.candidates, cards, changes)
        session.router.cards = pool_changes.change_prompt_cards(cards, changes, config.seed)
        questions = session.questions(config.evaluation.split)[: config.evaluation.questions]
        other_name, other_records = read_evaluation(Path(compare).absolute(), questions) if compare else ("", [])

        # ---- answers -------------------------------------------------------------------------------------------------
        cost_window = None if weights.step is None else first_cost_window(weights.source)
        policies = [
            answer_as(policy, session, questions, folder, cost_window) for policy in (weights, baseline) if policy
        ]
        if not multihost.is_primary():
            return

        # ---- metrics, tables, plots, report --------------------------------------------------------------------------
        resampling = {"resamples": config.evaluation.bootstrap, "seed": config.seed}
        results = {
            "commit": commit(),
            "versions": versions(),
            "config_hash": config_hash(config),
            "seeds": {"run": config.seed, "world": config.synthetic.world.seed},
            "price_date": settings.pool.price_date,
            "alpha": config.reward.alpha,
            "split": config.evaluation.split,
            "questions": len(questions),
            "data": session.data_summary(config.evaluation.split),
            "paper_model": published_results.base_model(session.model.family),
            "changes": [str(change) for change in changes],
            "policies": [policy_entry(config, session.model.family, policy, cards) for policy in policies],
            "reference_policies": reference_policies(config, session, questions, cards),
            "gain": compare_records(policies[0].greedy, policies[1].greedy, **resampling) if baseline else {},
            "comparison": {},
        }
        if compare:
            differences = compare_records(policies[0].greedy, other_records, **resampling)
            results["comparison"] = {"with": other_name, "folder": str(Path(compare).absolute())} | differences
        page = write_results(folder, results, {other_name: other_records} if compare else {})
    print(tables.results_text(results))
    print(f"\nresults {folder / 'results.json'}\ntable   {folder / 'results.md'}\nplots   {folder / 'plots'}")
    print(f"report  {page}")
    sys.stdout.flush()


def baseline_weights(config: ConfigDict, weights: PolicyWeights) -> PolicyWeights | None:
    """Baseline checkpoint for the reported gain, or None if the evaluated checkpoint is the baseline itself.

    Also None if no baseline is configured, or if the weights come from no checkpoint.
    """
    if weights.step is None or not config.evaluation.baseline:
        return None
    with CheckpointStore(weights.source, keep=None) as store:
        step = store.resolve(config.evaluation.baseline)
    name = "warm start" if step == 0 else f"step {step}"
    return None if step == weights.step else PolicyWeights(name, weights.source, step)


def results_folder(workdir: Path, changes: Sequence[pool_changes.Change]) -> Path:
    """Folder of the results. A changed pool gets its own, so that it does not replace the results of the run's pool."""
    if not changes:
        return workdir
    return workdir / "changes" / re.sub(r"[^\w.=-]+", "_", ",".join(map(str, changes)))


class Policy(NamedTuple):
    """An evaluated policy: its weights, their fingerprint, and the records of its greedy and its sampled answers."""

    weights: PolicyWeights
    fingerprint: str
    greedy: list[Record]
    sampled: list[Record]


def answer_as(
    weights: PolicyWeights,
    session: Session,
    questions: Sequence[QuestionRecord],
    folder: Path,
    cost_window: Mapping[str, Any] | None,
) -> Policy:
    """Answer the questions with these weights; the episodes are written to `<folder>/episodes`.

    `cost_window` is the frozen cost window for the rewards, or None for one that moves along.
    """
    config, params = session.config, weights.load(session)
    session.router.sync_weights(params)
    bits = fingerprint(params)
    del params
    records = {}
    for sampling in sampling_params(config):
        name, policy = file_name(weights.name, sampling), weights.name
        if sampling != GREEDY:
            policy += ", sampled"
        key = episodes_key(config, session.router.cards, questions, sampling, bits)
        with EpisodeCache(session.workdir, name, key, jax.process_index()) as cache:
            if len(cache):
                multihost.log_primary(f"{policy}: {len(cache)} episodes are on disk already, in {cache.path}")
            records[sampling.name] = answer_questions(
                session.router,
                questions,
                sampling=sampling,
                step=weights.step or 0,
                split=config.evaluation.split,
                policy=policy,
                normalizer=make_normalizer(config.reward.window, frozen=cost_window),
                cache=cache,
                progress=multihost.is_primary(),
            )
        if multihost.is_primary():
            write_episodes(folder, f"{config.evaluation.split}_{name}", records[sampling.name])
    return Policy(weights, bits, records["greedy"], records.get("samples", []))


def sampling_params(config: ConfigDict) -> list[SamplingParams]:
    """Greedy answers for the headline, and sampled answers if the configuration asks for them."""
    e = config.evaluation
    return [GREEDY] + ([SamplingParams("samples", e.samples, e.temperature, stream=2)] if e.samples else [])


def file_name(policy: str, sampling: SamplingParams) -> str:
    """File name of a policy's episodes and episode cache, without split and suffix."""
    safe = re.sub(r"[^\w.-]+", "_", policy)
    return safe if sampling == GREEDY else f"{safe}_{sampling.name}"


def policy_entry(config: ConfigDict, family: str, policy: Policy, cards: Sequence[Card]) -> dict[str, Any]:
    """One policy's entry in results.json; `family` is the model architecture's."""
    resampling = {"resamples": config.evaluation.bootstrap, "seed": config.seed}
    entry = {
        "name": policy.weights.name,
        "checkpoint": policy.weights.step,
        "weights": policy.fingerprint,
        "episodes": f"{EPISODES_FOLDER}/{config.evaluation.split}_{file_name(policy.weights.name, GREEDY)}.jsonl",
    } | policy_metrics(policy.greedy, cards, **resampling)
    entry["paper"] = published_results.compare_with_paper(entry["datasets"], family)
    if policy.sampled:
        entry["samples"] = {
            "per_question": config.evaluation.samples,
            "temperature": config.evaluation.temperature,
        } | metrics_with_intervals(policy.sampled, [card.key for card in cards], **resampling)
        entry["samples"]["paper"] = published_results.compare_with_paper(entry["samples"]["datasets"], family)
    return entry


def reference_policies(
    config: ConfigDict, session: Session, questions: Sequence[QuestionRecord], cards: Sequence[Card]
) -> list[dict[str, Any]]:
    """What the oracle and other computed policies reach on these questions; [] without a synthetic environment.

    They choose among all models. If prompts show only some of the models, they are no fair reference: then also [].
    """
    if session.environment is None or 0 < config.pool.candidates < len(cards):
        return []
    return session.environment.oracle_rows(questions, cards, config.evaluation.split)


def write_results(folder: Path, results: dict[str, Any], others: Mapping[str, list[Record]]) -> Path:
    """Write results.json, results.md, the plots and the report; returns the report's path.

    `others` holds records of other evaluations by name; the report shows their episodes beside ours.
    """
    replace_file(folder / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    replace_file(folder / "results.md", tables.results_markdown(results).encode())
    metrics, timeline_file = read_metrics(folder), folder / "rollout.json"
    timeline = json.loads(timeline_file.read_text()) if timeline_file.exists() else {}
    for plot, data in (
        (report.learning_curves, metrics),
        (report.calls_per_model, metrics),
        (report.em_against_cost, results),
        (report.em_by_dataset, results),
        (report.calls_by_dataset, results),
        (report.slots_over_time, timeline),
    ):
        path = folder / "plots" / f"{plot.__name__}.png"
        if plot(data, path) is None:
            path.unlink(missing_ok=True)  # of an earlier evaluation
    return report.write_report(folder, results, metrics, others)


if __name__ == "__main__":
    flags = {
        "checkpoint": Flag("", "best, last, first or a step; a folder of a run or in Hugging Face format; empty: best"),
        "compare": Flag("", "folder of another evaluation of the same questions, to compare with"),
        "change": Flag("", "pool changes such as drop=Titan or rename,blank: router_r1_jax/evaluation/pool_changes.py"),
    }
    launch(main, flags, multihost=True)
