"""Paired comparison of two policies, question by question: differences, bootstrap intervals and sign tests."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.errors import UserError
from router_r1_jax.evaluation.aggregates import METRICS, Question, per_question
from router_r1_jax.evaluation.episode_records import Record
from router_r1_jax.evaluation.statistics import bootstrap_mean_of_sets, sign_test
from router_r1_jax.storage.json_lines import read_lines


class CompareError(UserError, ValueError):
    """Two evaluations cannot be compared question by question. The message names what differs and the fix."""


def compare_records(after: Sequence[Record], before: Sequence[Record], *, resamples: int, seed: int) -> dict[str, Any]:
    """Paired differences, after minus before, matched by data set and question id.

    Returns:
      Metric -> {"mean", "ci", "sign_test": {"better", "worse", "equal", "p"}} for each of METRICS. Each data set has
      the same weight in the mean. With several data sets, "datasets" holds the same for each of them.

    Raises:
      CompareError: the questions are not the same.
    """
    check_same_questions(after, before)
    differences = {}
    for name, metric in METRICS.items():
        first, second = per_question(after, metric), per_question(before, metric)
        differences[name] = {question: first[question] - second[question] for question in first}
    datasets = list(dict.fromkeys(r["dataset"] for r in after))

    def compare(datasets: Sequence[str]) -> dict[str, Any]:
        return {name: _difference(values, datasets, resamples, seed) for name, values in differences.items()}

    return compare(datasets) | ({"datasets": {d: compare([d]) for d in datasets}} if len(datasets) > 1 else {})


def read_evaluation(folder: Path, questions: Sequence[QuestionRecord]) -> tuple[str, list[Record]]:
    """The first policy that another evaluation left in `folder`: its name beside ours, and its greedy records.

    Raises CompareError if the folder holds no evaluation, or one of other questions.
    """
    try:
        policy = json.loads((folder / "results.json").read_text())["policies"][0]
        records = read_lines(folder / policy["episodes"])
    except (OSError, ValueError, LookupError) as error:
        raise CompareError(
            f"--compare={folder} holds no results.json of an evaluation ({error}); evaluate that run first"
        ) from error
    check_same_questions([dataclasses.asdict(question) for question in questions], records)
    return f"{policy['name']} of {folder.name}", records


def check_same_questions(after: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> None:
    """Raise CompareError unless data sets, ids, texts and gold answers are the same.

    Order and number of samples may differ. Only "dataset", "id", "question" and "golds" are read, so questions can be
    checked before they are answered.
    """
    first, second = (
        {(r["dataset"], r["id"]): (r["question"], tuple(r["golds"])) for r in side} for side in (after, before)
    )
    if different := [question for question in first | second if first.get(question) != second.get(question)]:
        dataset, number = different[0]
        raise CompareError(
            f"{len(different)} questions of the two evaluations, of {len(first)} and {len(second)} questions, differ "
            f"in id, text or gold answers (such as question {number!r} of set {dataset!r}); evaluate both with the "
            "same data and the same evaluation.split and evaluation.questions"
        )


def _difference(
    differences: Mapping[Question, float], datasets: Sequence[str], resamples: int, seed: int
) -> dict[str, Any]:
    sets = [[value for (dataset, _), value in differences.items() if dataset == name] for name in datasets]
    mean, low, high = bootstrap_mean_of_sets(sets, resamples=resamples, seed=seed)
    signs = sign_test([value for values in sets for value in values])
    return {"mean": mean, "ci": [low, high], "sign_test": signs._asdict()}
