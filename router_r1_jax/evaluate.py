"""Evaluate a router: restore a checkpoint, answer held-out questions greedily, write the table, plots and report.

    python -m router_r1_jax.evaluate --config=configs/demo.py --workdir=runs/demo [--checkpoint=best|last|first|STEP]

The same questions are also put to `config.evaluation.baseline` (the warm start, by default), so that gains are paired.
"""

import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from router_r1_jax import hosts
from router_r1_jax.checkpoint import CheckpointStore
from router_r1_jax.cli import launch
from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.data.reference import references
from router_r1_jax.evaluation.records import Record, make_records, summarise
from router_r1_jax.evaluation.statistics import bootstrap_mean, paired_bootstrap
from router_r1_jax.experience import judge
from router_r1_jax.report import (
    EpisodeWriter,
    calls_per_model,
    em_against_cost,
    learning_curves,
    read_metrics,
    replace_file,
    slots_over_time,
    write_report,
)
from router_r1_jax.reward import CostNormalizer
from router_r1_jax.session import Session, open_session
from router_r1_jax.train import config_hash

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def answer_all(
    config: ConfigDict, session: Session, questions: Sequence[QuestionRecord], *, step: int, policy: str
) -> list[Record]:
    """Greedy answers of the parameters pushed last. Questions go in batches, each with a roster of its own order."""
    split, size = config.evaluation.split, config.rollout.questions * config.rollout.group
    normalizer = CostNormalizer(config.reward.window)
    records = []
    with tqdm(total=len(questions), desc=policy, unit="question", dynamic_ncols=True, disable=not hosts.first()) as bar:
        for start in range(0, len(questions), size):
            answers = session.router.answer(
                questions[start : start + size], group=1, temperature=0.0, seed=(config.seed, 0, 1, start), step=step,
                split=split, on_finish=lambda _: bar.update(),
            )  # fmt: skip
            rewards = judge(config, answers, normalizer)
            records += make_records(answers.questions, answers.episodes, rewards, step=step, split=split, policy=policy)
    return records


def policy_entry(
    config: ConfigDict, session: Session, records: list[Record], *, name: str, step: int
) -> dict[str, Any]:
    """One policy's line of results.json."""
    figures = summarise(records, session.cards)
    em = bootstrap_mean([r["exact_match"] for r in records], resamples=config.evaluation.bootstrap, seed=config.seed)
    figures["calls_share"] = figures.pop("calls/share")
    return {"name": name, "checkpoint": step, "em_ci": [em.low, em.high]} | figures


def reference_entries(
    config: ConfigDict, session: Session, questions: Sequence[QuestionRecord]
) -> list[dict[str, Any]]:
    """What other policies reach on these very questions, computed from the world; empty for real data."""
    if session.world is None:
        return []
    asked = {question.id for question in questions}
    chosen = [q for q in session.world.questions(config.evaluation.split) if q.id in asked]
    values = references(session.world, chosen, session.cards)
    return [
        {"name": name, "em": v.em, "dollars_per_question": v.dollars, "calls_per_question": v.calls}
        for name, v in values.items()
    ]


def gains(config: ConfigDict, after: Sequence[Record], before: Sequence[Record]) -> dict[str, Any]:
    """Paired differences, after minus before, with 95 % bootstrap intervals."""
    figures = {"em": "exact_match", "dollars_per_question": "dollars"}
    result = {}
    for name, key in figures.items():
        interval = paired_bootstrap(
            [r[key] for r in after], [r[key] for r in before],
            resamples=config.evaluation.bootstrap, seed=config.seed,
        )  # fmt: skip
        result[name] = {"mean": interval.mean, "ci": [interval.low, interval.high]}
    return result


def commit() -> str:
    """The commit of the source tree, with "+" where it has changes; "" outside a checkout."""
    source = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(source), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if head and git("status", "--porcelain", "--untracked-files=no") else "")
    except OSError:
        return ""


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def print_table(results: dict[str, Any]) -> None:
    """The headline, for people."""
    print(f"\n{results['questions']} questions of the {results['split']} split, greedy")
    print(f"{'policy':<30}{'EM':>7}{'95 %':>15}{'dollars/question':>18}{'calls':>7}{'best model':>12}{'malformed':>11}")
    for p in results["policies"]:
        low, high = p["em_ci"]
        best = f"{p['best_model_share']:.1%}" if "best_model_share" in p else ""
        print(
            f"{p['name']:<30}{p['em']:>7.3f}{f'{low:.3f}..{high:.3f}':>15}{p['dollars_per_question']:>18.3e}"
            f"{p['calls_per_question']:>7.2f}{best:>12}{p['malformed_share']:>11.1%}"
        )
    for r in results["references"]:
        print(
            f"{r['name']:<30}{r['em']:>7.3f}{'':>15}{r['dollars_per_question']:>18.3e}{r['calls_per_question']:>7.2f}"
        )
    if results["gain"]:
        em = results["gain"]["em"]
        print(f"\ngain in EM, paired: {em['mean']:+.3f}, 95 % interval {em['ci'][0]:+.3f} .. {em['ci'][1]:+.3f}")


def write_pages(workdir: Path, results: dict[str, Any]) -> Path:
    """results.json, the plots and the report; returns the report's path."""
    replace_file(workdir / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    metrics = read_metrics(workdir)
    learning_curves(metrics, workdir / "plots" / "learning_curves.png")
    calls_per_model(metrics, workdir / "plots" / "calls_per_model.png")
    em_against_cost(results, workdir / "plots" / "em_against_cost.png")
    if (workdir / "rollout.json").exists():
        slots_over_time(json.loads((workdir / "rollout.json").read_text()), workdir / "plots" / "slots_over_time.png")
    return write_report(workdir)


def main(config: ConfigDict, workdir: Path, checkpoint: str = "") -> None:
    """Evaluate a checkpoint and its baseline; print and write what came of it."""
    with (
        CheckpointStore(workdir / "checkpoints", keep=None) as store,
        open_session(config, workdir, load_source=False) as session,
    ):
        trained = store.resolve(checkpoint)
        policies = {"trained": trained}
        if config.evaluation.baseline:
            baseline = store.resolve(config.evaluation.baseline)
            policies["warm start" if baseline == 0 else f"step {baseline}"] = baseline
        questions = session.questions(config.evaluation.split)[: config.evaluation.questions]
        records = {}
        for name, step in policies.items():
            session.router.push(store.restore_params(step, session.abstract_params))
            records[name] = answer_all(config, session, questions, step=step, policy=name)
            if hosts.first():
                episodes_file = EpisodeWriter(workdir, f"{config.evaluation.split}_{name.replace(' ', '_')}")
                episodes_file.write(records[name])
                episodes_file.close()
        if not hosts.first():
            return
        names = list(policies)
        results = {
            "commit": commit(),
            "versions": versions(),
            "config_hash": config_hash(config),
            "seeds": {"run": config.seed, "world": config.data.world.seed},
            "price_date": config.pool.price_date,
            "alpha": config.reward.alpha,
            "split": config.evaluation.split,
            "questions": len(questions),
            "policies": [policy_entry(config, session, records[n], name=n, step=policies[n]) for n in names],
            "references": reference_entries(config, session, questions),
            "gain": gains(config, records[names[0]], records[names[1]]) if len(names) > 1 else {},
        }
        report = write_pages(workdir, results)
    print_table(results)
    print(f"\nresults {workdir / 'results.json'}\nplots   {workdir / 'plots'}\nreport  {report}")
    sys.stdout.flush()


if __name__ == "__main__":
    launch(main, several=True, checkpoint="best, last, first or a step; best by validation if empty")
