"""Evaluate a router: answer held-out questions with some parameters and some pool; write tables, plots and the report.

    python -m router_r1_jax.evaluate --config=configs/demo.py --workdir=runs/demo [--checkpoint=best|last|first|STEP]

--checkpoint also takes a folder: of another run, of one of its checkpoints, or in Hugging Face format.
--compare=FOLDER compares with what another evaluation has left there, question by question. --change=WORDS changes the
pool, for instance drop=Titan or rename,blank (`evaluation.changes`); the results then go to <workdir>/changes/WORDS.

Every question is answered greedily, which is the headline, and config.evaluation.samples times at a temperature. The
same questions are also put to `config.evaluation.baseline` (the warm start, by default), so that gains are paired. What
is finished is on disk: the same command after a kill goes on where it was, and with `evaluation.tape` or `pool.tape`
pays for no call twice.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from router_r1_jax import hosts
from router_r1_jax.checkpoint import CheckpointStore
from router_r1_jax.cli import launch
from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.data.reference import references
from router_r1_jax.evaluation import paper
from router_r1_jax.evaluation.changes import Change, change_pool, change_shown, change_world, check_shown, parse_changes
from router_r1_jax.evaluation.figures import (
    CompareError,
    check_same_questions,
    compare_records,
    policy_figures,
    tabulate,
)
from router_r1_jax.evaluation.journal import FOLDER, Journal
from router_r1_jax.evaluation.provenance import commit, versions
from router_r1_jax.evaluation.records import Record, make_records
from router_r1_jax.experience import judge, steady_costs
from router_r1_jax.pool.cards import Card, at_step, roster_settings
from router_r1_jax.prompts import load_template
from router_r1_jax.report import (
    EpisodeWriter,
    calls_by_set,
    calls_per_model,
    em_against_cost,
    em_by_set,
    learning_curves,
    read_metrics,
    replace_file,
    results_table,
    slots_over_time,
    write_report,
)
from router_r1_jax.report.writer import EPISODES_FOLDER, read_lines
from router_r1_jax.rollout import Episode
from router_r1_jax.router import batch_size, is_valid
from router_r1_jax.session import Session, open_session
from router_r1_jax.train import config_hash
from router_r1_jax.weights import Weights, find_weights, fingerprint, first_costs


class Mode(NamedTuple):
    """One way of answering: `group` episodes per question at a temperature, with draws of its own."""

    name: str
    group: int
    temperature: float
    stream: int


class Policy(NamedTuple):
    """What an evaluated policy has left."""

    weights: Weights
    fingerprint: str
    greedy: list[Record]
    sampled: list[Record]


class Other(NamedTuple):
    """Another evaluation, to compare with."""

    folder: Path
    entry: dict[str, Any]  # of its first policy in results.json
    records: list[Record]


def modes(config: ConfigDict) -> list[Mode]:
    """The greedy headline, and the samples where there are any."""
    e = config.evaluation
    return [Mode("greedy", 1, 0.0, 1)] + ([Mode("samples", e.samples, e.temperature, 2)] if e.samples else [])


def with_tape(config: ConfigDict, workdir: Path) -> ConfigDict:
    """The configuration of a main that may be cut and called again: where pool.tape is off, evaluation.tape stands in.

    Evaluation and baselines share it, in `<workdir>/evaluation/tape.sqlite`: none of their calls is paid twice.
    """
    config = config.copy_and_resolve_references()
    if config.pool.tape.mode == "off" and config.evaluation.tape:
        config.pool.tape.mode, config.pool.tape.path = "record", str(workdir / FOLDER / "tape.sqlite")
    return config


def identity(
    config: ConfigDict, shown: Sequence[Card], questions: Sequence[QuestionRecord], mode: Mode, weights: str
) -> dict[str, Any]:
    """All that an evaluation's episodes depend on; what only costs time or judges them is not part of it."""
    rollout = config.rollout.to_dict() | dict.fromkeys(("replicas", "poll_every", "driver", "temperature"))
    pool = roster_settings(config.pool) | {name: config.pool[name] for name in ("max_tokens", "temperature")}
    asked = {provider.name: provider.parameters.to_dict() for provider in config.pool.providers}
    return {
        "weights": weights, "model": config.model.to_dict(), "mode": mode._asdict(), "seed": config.seed,
        "prompt": config.prompt.to_dict(), "template": load_template(config.prompt.template),
        "rollout": rollout, "pool": pool, "providers": asked,
        "cards": [dataclasses.asdict(card) for card in shown],
        "questions": [(q.suite, q.id, q.question) for q in questions],
    }  # fmt: skip


def records_identity(
    config: ConfigDict, shown: Sequence[Card], questions: Sequence[QuestionRecord], weights: str
) -> dict[str, Any]:
    """All that the records of greedy episodes depend on: `identity`, and what judges them."""
    judges = {"reward": config.reward.to_dict(), "golds": [question.golds for question in questions]}
    return identity(config, shown, questions, modes(config)[0], weights) | judges


def answer_all(
    config: ConfigDict,
    session: Session,
    questions: Sequence[QuestionRecord],
    mode: Mode,
    journal: Journal,
    *,
    step: int,
    policy: str,
    costs: dict[str, Any] | None = None,
) -> list[Record]:
    """Records of the parameters pushed last. Questions go in batches, each with a roster of its own.

    `costs` is the window that they are judged by (`experience.steady_costs`).
    Episodes of the journal are not sampled again, and what is sampled enters it at once.
    """
    split = config.evaluation.split
    size = batch_size(config, mode.group)
    normalizer = steady_costs(config, costs)
    records = []
    total = len(questions) * mode.group
    with tqdm(total=total, desc=policy, unit="episode", dynamic_ncols=True, disable=not hosts.first()) as bar:
        for start in range(0, len(questions), size):
            finished = {number: Episode(prompt=(), **kept) for number, kept in journal.finished(start).items()}
            bar.update(len(finished))

            def keep(episode: Episode, start: int = start) -> None:
                if is_valid(episode):
                    journal.add(start, episode)
                bar.update()

            answers = session.router.answer(
                questions[start : start + size], group=mode.group, temperature=mode.temperature,
                seed=(config.seed, 0, mode.stream, start), step=step, split=split, on_finish=keep, finished=finished,
            )  # fmt: skip
            rewards = judge(config, answers, normalizer)
            records += make_records(answers, rewards, step=step, split=split, policy=policy)
    return records


def evaluate_policy(
    config: ConfigDict,
    session: Session,
    questions: Sequence[QuestionRecord],
    shown: Sequence[Card],
    weights: Weights,
    workdir: Path,
    costs: dict[str, Any] | None,
) -> Policy:
    """Every mode of one policy; its episodes are written to `<workdir>/episodes`. `costs` as for `answer_all`."""
    params = weights.load(session)
    session.router.push(params)
    bits = fingerprint(params)
    del params
    split, results = config.evaluation.split, {}
    for mode in modes(config):
        name, depends = file_name(weights.name, mode), identity(config, shown, questions, mode, bits)
        with Journal(session.workdir, name, depends, jax.process_index()) as journal:
            if len(journal):
                hosts.say(
                    f"{weights.name}, {mode.name}: {len(journal)} episodes are on disk already, in {journal.path}"
                )
            policy = weights.name if mode.name == "greedy" else f"{weights.name}, sampled"
            step = weights.step or 0
            results[mode.name] = answer_all(
                config, session, questions, mode, journal, step=step, policy=policy, costs=costs
            )
        if hosts.first():
            writer = EpisodeWriter(workdir, f"{split}_{name}")
            writer.write(results[mode.name])
            writer.close()
    return Policy(weights, bits, results["greedy"], results.get("samples", []))


def file_name(policy: str, mode: Mode) -> str:
    """Of a policy's episodes and journal, without split and suffix."""
    safe = re.sub(r"[^\w.-]+", "_", policy)
    return safe if mode.name == "greedy" else f"{safe}_{mode.name}"


def policy_entry(config: ConfigDict, session: Session, policy: Policy, cards: Sequence[Card]) -> dict[str, Any]:
    """One policy's entry of results.json."""
    draws = {"resamples": config.evaluation.bootstrap, "seed": config.seed}
    name = policy.weights.name
    entry = {
        "name": name, "checkpoint": policy.weights.step, "weights": policy.fingerprint,
        "episodes": f"{EPISODES_FOLDER}/{config.evaluation.split}_{file_name(name, modes(config)[0])}.jsonl",
    } | policy_figures(policy.greedy, cards, **draws)  # fmt: skip
    family = session.model.family
    entry["paper"] = paper.beside(entry["suites"], family)
    if policy.sampled:
        table = tabulate(policy.sampled, [card.key for card in cards], **draws)
        head = {"per_question": config.evaluation.samples, "temperature": config.evaluation.temperature}
        entry["samples"] = head | table | {"paper": paper.beside(table["suites"], family)}
    return entry


def reference_entries(
    config: ConfigDict, session: Session, questions: Sequence[QuestionRecord], cards: Sequence[Card]
) -> list[dict[str, Any]]:
    """What other policies reach on these very questions, computed from the world.

    Empty for real data, and where prompts show some of the models only: the others choose among all.
    """
    if session.world is None or 0 < config.pool.shown < len(cards):
        return []
    asked = {question.id for question in questions}
    chosen = [q for q in session.world.questions(config.evaluation.split) if q.id in asked]
    if len(chosen) < len(asked):
        return []
    return [
        {
            "name": name, "em": v.em, "dollars_per_question": v.dollars, "raw_cost_per_question": v.raw_cost,
            "calls_per_question": v.calls,
        }
        for name, v in references(session.world, chosen, cards).items()
    ]  # fmt: skip


def read_other(folder: Path, questions: Sequence[QuestionRecord]) -> Other:
    """The first policy of another evaluation. Raises CompareError, before anything is asked, where it cannot serve."""
    try:
        entry = json.loads((folder / "results.json").read_text())["policies"][0]
        records = read_lines(folder / entry["episodes"])
    except (OSError, ValueError, LookupError) as error:
        raise CompareError(
            f"--compare={folder} holds no results.json of an evaluation ({error}); evaluate that run first"
        ) from error
    check_same_questions([dataclasses.asdict(question) for question in questions], records)
    return Other(folder, entry, records)


def baseline(config: ConfigDict, weights: Weights) -> Weights | None:
    """The checkpoint that gains are counted from; None where there is none, or where it is the one evaluated."""
    if weights.step is None or not config.evaluation.baseline:
        return None
    with CheckpointStore(weights.source, keep=None) as store:
        step = store.resolve(config.evaluation.baseline)
    name = "warm start" if step == 0 else f"step {step}"
    return None if step == weights.step else Weights(name, weights.source, step)


def print_table(results: dict[str, Any]) -> None:
    """The headline, for people."""
    means = "; a policy's own row is the mean over its sets" if len(results["policies"][0]["suites"]) > 1 else ""
    print(f"\n{results['questions']} questions of the {results['split']} split, greedy{means}")
    print(f"{'policy':<30}{'EM':>7}{'95 %':>15}{'dollars/question':>18}{'calls':>7}{'best model':>12}{'malformed':>11}")
    for p in results["policies"]:
        for name, row in [(p["name"], p)] + [(f"  {s}", t) for s, t in p["suites"].items() if len(p["suites"]) > 1]:
            low, high = row["em_ci"]
            best = f"{row['best_model_share']:.1%}" if "best_model_share" in row else ""
            print(
                f"{name:<30}{row['em']:>7.3f}{f'{low:.3f}..{high:.3f}':>15}{row['dollars_per_question']:>18.3e}"
                f"{row['calls_per_question']:>7.2f}{best:>12}{row['malformed_share']:>11.1%}"
            )
    for r in results["references"]:
        print(
            f"{r['name']:<30}{r['em']:>7.3f}{'':>15}{r['dollars_per_question']:>18.3e}{r['calls_per_question']:>7.2f}"
        )
    for title, found in (("gain", results["gain"]), ("difference from the other run", results["comparison"])):
        if found:
            em, signs = found["em"], found["em"]["sign_test"]
            print(
                f"\n{title} in EM, paired: {em['mean']:+.3f}, 95 % interval {em['ci'][0]:+.3f} .. {em['ci'][1]:+.3f}; "
                f"better on {signs['better']} questions, worse on {signs['worse']} (sign test p = {signs['p']:.2g})"
            )


def write_pages(folder: Path, results: dict[str, Any], other: Other | None) -> Path:
    """results.json, results.md, the plots and the report; returns the report's path."""
    replace_file(folder / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    replace_file(folder / "results.md", results_table(results).encode())
    metrics, trace = read_metrics(folder), folder / "rollout.json"
    pictures = (
        (learning_curves, metrics), (calls_per_model, metrics), (em_against_cost, results), (em_by_set, results),
        (calls_by_set, results), (slots_over_time, json.loads(trace.read_text()) if trace.exists() else {}),
    )  # fmt: skip
    for draw, shown in pictures:
        path = folder / "plots" / f"{draw.__name__}.png"
        if draw(shown, path) is None:
            path.unlink(missing_ok=True)  # an earlier evaluation's, of more sets
    return write_report(folder, {other_name(other): other.records} if other else {})


def other_name(other: Other) -> str:
    """What the other evaluation's policy is called beside ours."""
    return f"{other.entry['name']} of {other.folder.name}"


def results_folder(workdir: Path, changes: Sequence[Change]) -> Path:
    """Where the results go: a changed pool does not take the place of the pool's own results."""
    if not changes:
        return workdir
    return workdir / "changes" / re.sub(r"[^\w.=-]+", "_", ",".join(map(str, changes)))


def main(config: ConfigDict, workdir: Path, checkpoint: str = "", compare: str = "", change: str = "") -> None:
    """Evaluate a checkpoint and its baseline; print and write what came of it."""
    # ---- what is evaluated, and on what ------------------------------------------------------------------------------
    changes = parse_changes(change)
    config, weights = find_weights(config, workdir, checkpoint)
    before = baseline(config, weights)
    settings = with_tape(config, workdir)
    settings.pool = change_pool(settings.pool, changes)
    folder = results_folder(workdir, changes)
    with open_session(settings, workdir, load_source=weights.step is None) as session:
        # At the prices of one step: other policies are charged what the checkpoint evaluated is charged.
        cards = at_step(change_world(session.cards, changes), weights.step or 0)
        check_shown(settings.pool.shown, cards, changes)
        shown = change_shown(cards, changes, config.seed)
        session.router.show(shown)
        questions = session.questions(config.evaluation.split)[: config.evaluation.questions]
        other = read_other(Path(compare).absolute(), questions) if compare else None

        # ---- answers -------------------------------------------------------------------------------------------------
        costs = None if weights.step is None else first_costs(weights.source)
        policies = [
            evaluate_policy(settings, session, questions, shown, each, folder, costs)
            for each in (weights, before)
            if each
        ]
        if not hosts.first():
            return

        # ---- figures, pages ------------------------------------------------------------------------------------------
        draws = {"resamples": config.evaluation.bootstrap, "seed": config.seed}
        against = compare_records(policies[0].greedy, other.records, **draws) if other else {}
        results = {
            "commit": commit(),
            "versions": versions(),
            "config_hash": config_hash(config),
            "seeds": {"run": config.seed, "world": config.data.world.seed},
            "price_date": settings.pool.price_date,
            "alpha": config.reward.alpha,
            "split": config.evaluation.split,
            "questions": len(questions),
            "drawn": session.drawn(config.evaluation.split),
            "paper_model": paper.base_model(session.model.family),
            "changes": [str(one) for one in changes],
            "policies": [policy_entry(config, session, policy, cards) for policy in policies],
            "references": reference_entries(config, session, questions, cards),
            "gain": compare_records(policies[0].greedy, policies[1].greedy, **draws) if before else {},
            "comparison": {"with": other_name(other), "folder": str(other.folder)} | against if other else {},
        }
        report = write_pages(folder, results, other)
    print_table(results)
    print(f"\nresults {folder / 'results.json'}\ntable   {folder / 'results.md'}\nplots   {folder / 'plots'}")
    print(f"report  {report}")
    sys.stdout.flush()


if __name__ == "__main__":
    launch(
        main,
        several=True,
        checkpoint="best, last, first or a step (best by validation if empty); or a folder: a run's, or Hugging Face's",
        compare="folder of another evaluation, to compare with on the same questions",
        change="changes of the pool, such as drop=Titan or rename,blank: router_r1_jax/evaluation/changes.py",
    )
