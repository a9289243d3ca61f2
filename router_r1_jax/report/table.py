"""results.md: an evaluation's table for people, with the published figure beside ours where there is one."""

from collections.abc import Mapping, Sequence
from typing import Any

from router_r1_jax.report.style import dollars, most_called, percent

Results = Mapping[str, Any]

_COLUMNS = (
    "set", "questions", "EM", "F1", "sub-EM", "calls", "dollars", "raw cost", "malformed", "failed", "seconds in calls",
)  # fmt: skip
_MEAN = "mean over sets"
_NOTES = (
    "Per question, with 95 % bootstrap intervals (questions resampled). EM, F1, sub-EM, malformed and failed in "
    "percent. Dollars are those charged at the cards' prices; raw cost is in the paper's unit, output tokens x dollars "
    'per million; "failed" is the share of episodes in which a provider gave no answer.'
)


def results_table(results: Results) -> str:
    """The contents of results.json as Markdown."""
    lines = ["# Evaluation", "", _facts(results), ""]
    for policy in results["policies"]:
        step = "" if policy.get("checkpoint") is None else f", step {policy['checkpoint']}"
        lines += [f"## {_text(policy['name'])}{step}: greedy", "", *_policy(policy, results)]
        if samples := policy.get("samples"):
            how = f"{samples['per_question']} samples a question at temperature {samples['temperature']:g}"
            lines += [f"## {_text(policy['name'])}{step}: {how}", "", *_policy(samples, results)]
    if results.get("gain"):
        title = f"{results['policies'][0]['name']} minus {results['policies'][1]['name']}"
        lines += _differences(title, results["gain"])
    if results.get("comparison"):
        title = f"{results['policies'][0]['name']} minus {results['comparison']['with']}"
        lines += _differences(title, results["comparison"])
    if results.get("references"):
        lines += _references(results["references"])
    return "\n".join([*lines, _NOTES, ""])


def _facts(results: Results) -> str:
    facts = [f"{results['questions']} questions of the {results['split']} split"]
    if results.get("changes"):
        facts.append("pool changed: " + ", ".join(f"`{_text(change)}`" for change in results["changes"]))
    facts += [f"commit {results['commit'] or 'unknown'}", f"config {results['config_hash']}"]
    if results.get("price_date"):
        facts.append(f"prices of {results['price_date']}")
    return "; ".join(facts) + "."


def _policy(table: Mapping[str, Any], results: Results) -> list[str]:
    """One policy's rows: each set, and their mean; the paper's columns where it has one of the sets."""
    suites, published = table["suites"], table.get("paper") or {}
    rows = [(name, entry, published.get(name)) for name, entry in suites.items()]
    if len(suites) > 1:
        rows.append((_MEAN, table, published.get("mean")))
    heads = [*_COLUMNS, *((f"paper's EM ({results['paper_model']})", "ours minus it", "") if published else ())]
    cells = [[*_row(name, entry), *(_beside(beside) if published else ())] for name, entry, beside in rows]
    models, others = most_called(table["calls_share"])
    shares = [[_all(name), *_shares(entry["calls_share"], models, others)] for name, entry, _ in rows]
    stops = [", ".join(f"{_text(k)} {percent(v)}" for k, v in entry["stops"].items()) for _, entry, _ in rows]
    seconds = [_seconds(entry["call_seconds"]) for _, entry, _ in rows]
    own = [[*share, stop, call] for share, stop, call in zip(shares, stops, seconds, strict=True)]
    return [
        *_markdown(heads, cells), "",
        "Share of the calls by model, why episodes ended, seconds of one call (median, 95th percentile):", "",
        *_markdown(["set", *models, *([others] if others else []), "ended by", "one call"], own), "",
    ]  # fmt: skip


def _shares(shares: Mapping[str, float], models: Sequence[str], others: str) -> list[str]:
    """Of the calls, per model named; then of all others together, where there are such."""
    rest = [sum(share for model, share in shares.items() if model not in models)] if others else []
    return [percent(share) for share in (*(shares.get(model, 0.0) for model in models), *rest)]


def _all(name: str) -> str:
    """Shares are of all calls, not means of the sets' shares."""
    return "all sets" if name == _MEAN else name


def _row(name: str, entry: Mapping[str, Any]) -> list[str]:
    return [
        name,
        str(entry["questions"]),
        *(_interval(entry, key, _in_percent) for key in ("em", "f1", "sub_em")),
        _interval(entry, "calls_per_question", lambda v: f"{v:.2f}"),
        _interval(entry, "dollars_per_question", dollars),
        _interval(entry, "raw_cost_per_question", lambda v: f"{v:.1f}"),
        *(_interval(entry, key, _in_percent) for key in ("malformed_share", "failed_share")),
        _interval(entry, "call_seconds_per_question", lambda v: f"{v:.3g}"),
    ]


def _beside(paper: Mapping[str, Any] | None) -> list[str]:
    if paper is None:
        return ["", "", ""]
    difference, (low, high) = paper["difference"], paper["ci"]
    signed = f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return [f"{100 * paper['em']:.1f}", signed, paper["verdict"]]


def _seconds(call: Mapping[str, float]) -> str:
    return f"{call['median']:.3g}, {call['p95']:.3g}"


def _in_percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(entry: Mapping[str, Any], key: str, show: Any) -> str:
    low, high = entry[f"{key}_ci"]
    return f"{show(entry[key])} [{show(low)}, {show(high)}]"


_DIFFERENCES = (
    ("em", "EM, points", lambda v: f"{100 * v:+.1f}"),
    ("f1", "F1, points", lambda v: f"{100 * v:+.1f}"),
    ("sub_em", "sub-EM, points", lambda v: f"{100 * v:+.1f}"),
    ("calls_per_question", "calls", lambda v: f"{v:+.2f}"),
    ("dollars_per_question", "dollars", dollars),
    ("raw_cost_per_question", "raw cost", lambda v: f"{v:+.1f}"),
)


def _differences(title: str, gain: Mapping[str, Any]) -> list[str]:
    """Paired differences, for all questions and, where there are several, per set."""
    rows = []
    for name, entry in [("all sets" if gain.get("suites") else "all", gain), *(gain.get("suites") or {}).items()]:
        for key, label, show in _DIFFERENCES:
            if not (found := entry.get(key)):
                continue
            low, high = found["ci"]
            signs = found["sign_test"]
            counts = f"{signs['better']} / {signs['worse']} / {signs['equal']}"
            shown = f"{show(found['mean'])} [{show(low)}, {show(high)}]"
            rows.append([name, label, shown, counts, f"{signs['p']:.2g}"])
    heads = ["set", "", "difference", "higher / lower / equal", "sign test, p"]
    return [f"## {_text(title)}, paired", "", *_markdown(heads, rows), ""]


def _references(references: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for row in references:
        calls = f"{row['calls_per_question']:.2f}"
        rows.append([row["name"], f"{100 * row['em']:.1f}", dollars(row["dollars_per_question"]), calls])
    title = "## What other ways of choosing would reach, computed"
    return [title, "", *_markdown(["policy", "EM", "dollars", "calls"], rows), ""]


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    aligned = ["---", *["---:"] * (len(heads) - 1)]
    return ["| " + " | ".join(_text(cell) for cell in row) + " |" for row in (heads, aligned, *rows)]


def _text(value: Any) -> str:
    """In one cell and one line, whatever a name holds."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
