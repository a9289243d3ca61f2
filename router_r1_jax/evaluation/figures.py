"""What an evaluation reports: figures per data set and their mean over sets, with intervals, and paired differences.

Everything is computed from records (`evaluation.records`). Where a question has several records (samples at a
temperature), its value is their mean, and intervals still resample questions: samples of one question are no new
evidence about other questions. What the intervals do not hold: questions of one batch share a roster (`pool.shown`,
`pool.rename`, `pool.shuffle`), and a roster that suits the router lifts all of them; nor other seeds of training.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from router_r1_jax.evaluation.records import Record, summarise
from router_r1_jax.evaluation.statistics import SignTest, bootstrap_mean_of_sets, sign_test
from router_r1_jax.pool.cards import Card

# Name in results.json -> value of one episode. Dollars are those charged; raw cost is in the paper's unit, output
# tokens x dollars per million; seconds are those spent in calls.
VALUES: dict[str, Callable[[Record], float]] = {
    "em": lambda r: r["exact_match"],
    "f1": lambda r: r["f1"],
    "sub_em": lambda r: r["sub_exact_match"],
    "calls_per_question": lambda r: float(len(r["calls"])),
    "dollars_per_question": lambda r: r["dollars"],
    "raw_cost_per_question": lambda r: r["raw_cost"],
    "call_seconds_per_question": lambda r: sum(call["latency"] for call in r["calls"]),
    "malformed_share": lambda r: float(r["reward"]["format"] < 0),
    "failed_share": lambda r: float(r["failed"]),
}
Question = tuple[str, str]  # (suite, id)


class CompareError(ValueError):
    """Two evaluations that cannot be compared question by question. The message names what differs and the fix."""


def policy_figures(records: Sequence[Record], cards: Sequence[Card], *, resamples: int, seed: int) -> dict[str, Any]:
    """All figures of one policy: those of `records.summarise`, means over episodes, and above them `tabulate`'s."""
    summary = summarise(records, cards)
    del summary["calls/share"]  # the same as calls_share
    models = [card.key for card in cards]
    return summary | tabulate(records, models, resamples=resamples, seed=seed)


def tabulate(records: Sequence[Record], models: Sequence[str], *, resamples: int, seed: int) -> dict[str, Any]:
    """Every figure of VALUES and its 95 % interval "<name>_ci", over all questions and, under "suites", per set.

    The figures over all questions are means of the sets' means: each set weighs the same. Each entry also holds
    "questions", "calls_share" (of `models` and others called -> share of the calls that reached a model), "stops"
    (reason -> share of the episodes) and "call_seconds" (median and 95th percentile of one call).
    """
    names = dict.fromkeys(r["suite"] for r in records)
    suites = {name: [r for r in records if r["suite"] == name] for name in names}
    tables = {name: _table([own], models, resamples, seed) for name, own in suites.items()}
    mean = _table(list(suites.values()), models, resamples, seed) if len(suites) != 1 else next(iter(tables.values()))
    return mean | {"suites": tables}


def compare_records(after: Sequence[Record], before: Sequence[Record], *, resamples: int, seed: int) -> dict[str, Any]:
    """Paired differences, after minus before, matched by set and question id.

    Returns:
      {"em": {"mean", "ci", "sign_test": {"better", "worse", "equal", "p"}}, ... for each of VALUES,
      "suites": {set: the same}}. The mean over sets weighs each set the same.

    Raises:
      CompareError: the questions are not the same.
    """
    check_same_questions(after, before)
    differences = {name: _differences(after, before, value) for name, value in VALUES.items()}
    suites = dict.fromkeys(suite for suite, _ in next(iter(differences.values())))
    result = {name: _difference(own, list(suites), resamples, seed) for name, own in differences.items()}
    if len(suites) > 1:
        result["suites"] = {
            suite: {name: _difference(own, [suite], resamples, seed) for name, own in differences.items()}
            for suite in suites
        }
    return result


def _table(sets: Sequence[Sequence[Record]], models: Sequence[str], resamples: int, seed: int) -> dict[str, Any]:
    table: dict[str, Any] = {"questions": sum(len(per_question(records, VALUES["em"])) for records in sets)}
    for name, value in VALUES.items():
        columns = [list(per_question(records, value).values()) for records in sets]
        mean, low, high = bootstrap_mean_of_sets(columns, resamples=resamples, seed=seed)
        table |= {name: mean, f"{name}_ci": [low, high]}
    records = [record for own in sets for record in own]
    called = [call for record in records for call in record["calls"] if call["model"]]
    return table | {
        "calls_share": dict.fromkeys(models, 0.0) | _shares([call["model"] for call in called]),
        "stops": _shares([record["stop"] for record in records]),
        "call_seconds": {
            name: float(np.quantile([call["latency"] for call in called], q)) if called else 0.0
            for name, q in (("median", 0.5), ("p95", 0.95))
        },
    }


def per_question(records: Sequence[Record], value: Callable[[Record], float]) -> dict[Question, float]:
    """(set, id) -> the mean of `value` over the question's records, in the order of their first records."""
    values: dict[Question, list[float]] = {}
    for record in records:
        values.setdefault((record["suite"], record["id"]), []).append(value(record))
    return {question: float(np.mean(own)) for question, own in values.items()}


def _shares(names: Sequence[str]) -> dict[str, float]:
    return {name: names.count(name) / len(names) for name in sorted(set(names))}


def _differences(
    after: Sequence[Record], before: Sequence[Record], value: Callable[[Record], float]
) -> dict[Question, float]:
    first, second = per_question(after, value), per_question(before, value)
    return {question: first[question] - second[question] for question in first}


def _difference(
    differences: Mapping[Question, float], suites: Sequence[str], resamples: int, seed: int
) -> dict[str, Any]:
    sets = [[value for (own, _), value in differences.items() if own == suite] for suite in suites]
    mean, low, high = bootstrap_mean_of_sets(sets, resamples=resamples, seed=seed)
    signs: SignTest = sign_test([value for own in sets for value in own])
    return {"mean": mean, "ci": [low, high], "sign_test": signs._asdict()}


def check_same_questions(after: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> None:
    """Same sets, ids, texts and gold answers; the order and the number of samples may differ. Raises CompareError.

    Of a record only "suite", "id", "question" and "golds" are read, so that questions can be checked before they are
    asked.
    """
    asked = [{(r["suite"], r["id"]): (r["question"], tuple(r["golds"])) for r in side} for side in (after, before)]
    for side, (own, other) in enumerate((asked, asked[::-1])):
        lacking = [question for question in own if question not in other]
        if lacking:
            suite, name = lacking[0]
            raise CompareError(
                f"{len(lacking)} of the {len(own)} questions of the {('first', 'second')[side]} evaluation are not in "
                f"the {('second', 'first')[side]} one's {len(other)} (question {name!r} of set {suite!r}); evaluate "
                "both with the same data and the same evaluation.split and evaluation.questions"
            )
    changed = [question for question, text in asked[0].items() if asked[1][question] != text]
    if changed:
        suite, name = changed[0]
        raise CompareError(
            f"{len(changed)} questions have one id and two texts or gold answers (question {name!r} of set {suite!r}); "
            "evaluate both with the same data"
        )
