"""Measure baselines on the questions, pool and call cache of a run, and write a table beside the run's results.

    python -m router_r1_jax.baselines --config=configs/demo.py --workdir=runs/demo [--only=knn,mlp] [--tries=500]

Single-call baselines (random, one model alone, kNN, MLP, RouterDC, GraphRouter, FrugalGPT cascade) ask the chosen model
through the pool. With a star (`knn*`) the question is decomposed first, and each part is routed by itself. To fit them,
`--tries` train questions are put to every model. Baselines of the router's language model start from the run's first
checkpoint, or from the warm start if there is none.

Each baseline leaves its episodes. A baseline that has episodes of the same questions, pool, weights and settings is not
measured again, so the same command resumes an interrupted one. With `evaluation.call_cache` or `pool.call_cache` no
call is paid twice.

It writes baselines.json and baselines.md. If `evaluate` has left episodes of the trained router on the same questions,
each baseline's line also says by how much the router is ahead, paired by question.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from router_r1_jax.baselines.suite import STAR, BaselineSuite
from router_r1_jax.config import ConfigError, config_hash
from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.evaluation.aggregates import policy_metrics
from router_r1_jax.evaluation.comparison import compare_records
from router_r1_jax.evaluation.episode_cache import measured_once, with_call_cache
from router_r1_jax.evaluation.episode_records import Record
from router_r1_jax.launcher import Flag, launch
from router_r1_jax.pool.cards import at_step
from router_r1_jax.report.tables import baselines_markdown
from router_r1_jax.setup.session import open_session
from router_r1_jax.storage.json_lines import EPISODES_FOLDER, read_lines, replace_file


def main(config: ConfigDict, workdir: Path, only: str, tries: int) -> None:
    """Measure the baselines of --only that have no episodes yet; write and print their table."""
    split = config.evaluation.split
    if split == "train":
        raise ConfigError("evaluation.split is 'train', on which baselines are fitted; choose validation or test")
    with open_session(with_call_cache(config, workdir), workdir, load_source=True) as session:
        suite = BaselineSuite(config, session, tries)
        names = chosen_names(only, suite.names)
        questions = session.questions(split)[: config.evaluation.questions]
        trained = trained_records(workdir, split, questions)
        if trained is None:
            print("no episodes of the trained router on these questions: evaluate the run first to compare with it")
        # Baselines pay the prices that the trained router was evaluated with.
        session.cards = at_step(session.cards, trained[0]["step"] if trained else 0)
        session.router.cards = session.cards
        resampling = {"resamples": config.evaluation.bootstrap, "seed": config.seed}
        policies: list[dict[str, Any]] = []
        if trained is not None:
            policies.append({"name": "trained router"} | policy_metrics(trained, session.cards, **resampling))
        for name in names:
            records = measured_once(
                workdir,
                file_name(split, name),
                suite.key(name, questions),
                [question.id for question in questions],
                lambda name=name: suite.measure(name, questions),
            )
            policies.append({"name": name} | policy_metrics(records, session.cards, **resampling))
            if trained is not None:
                policies[-1]["router_ahead"] = compare_records(trained, records, **resampling)
        results = {
            "config_hash": config_hash(config),
            "alpha": config.reward.alpha,
            "split": split,
            "questions": len(questions),
            "tries": tries,
            "price_date": config.pool.price_date,
            "models": len(session.cards),
            "candidates": config.pool.candidates or len(session.cards),
            "policies": policies,
        }
    table = baselines_markdown(results)
    replace_file(workdir / "baselines.json", (json.dumps(results, indent=2) + "\n").encode())
    replace_file(workdir / "baselines.md", table.encode())
    print(f"\n{table}\nresults {workdir / 'baselines.json'}")


def chosen_names(only: str, names: Sequence[str]) -> list[str]:
    """The baselines in the text of --only; all if it is empty. Raises ConfigError for an unknown name."""
    chosen = [name.strip() for name in only.split(",") if name.strip()] or list(names)
    for name in chosen:
        if name not in names:
            raise ConfigError(f"--only names {name!r}; choose from {', '.join(names)}")
    return chosen


def trained_records(workdir: Path, split: str, questions: Sequence[QuestionRecord]) -> list[Record] | None:
    """Records of the trained router on these questions, as `evaluate` left them; None if one of them is missing."""
    records = {record["id"]: record for record in read_lines(workdir / EPISODES_FOLDER / f"{split}_trained.jsonl")}
    return [records[q.id] for q in questions] if all(q.id in records for q in questions) else None


def file_name(split: str, name: str) -> str:
    """File name of a baseline's episodes, without suffix."""
    safe = re.sub(r"[^\w.-]+", "_", name.replace(STAR, "_star"))
    return f"{split}_baseline_{safe}"


if __name__ == "__main__":
    flags = {
        "only": Flag("", "comma-separated baselines; all if empty"),
        "tries": Flag(500, "train questions that every model answers, to fit baselines on", least=1),
    }
    launch(main, flags)
