"""Results tables in Markdown, as console text and on the report page: evaluation, baselines, sweep.

Every number has one format in all tables: exact match, F1, sub-EM and all shares are in percent.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from router_r1_jax.report.colours import share_columns
from router_r1_jax.report.documents import render
from router_r1_jax.report.number_format import dollars, escape_markdown, interval, percent, points, signed_points

Entry = Mapping[str, Any]


class Table(NamedTuple):
    """Cells of text. The first column is aligned to the left, the others to the right."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """GitHub's Markdown, without a final line break."""
        aligned = ["---", *["---:"] * (len(self.heads) - 1)]
        lines = (self.heads, aligned, *self.rows)
        return "\n".join(f"| {' | '.join(map(escape_markdown, cells))} |" for cells in lines)

    def text(self) -> str:
        """Columns of a fixed width for the console, without a final line break."""
        lines = (self.heads, *self.rows)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = [[cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])] for cells in lines]
        return "\n".join("  ".join(cells).rstrip() for cells in padded)


class Metric(NamedTuple):
    """How tables name and show a metric of results.json.

    `signed` shows a difference. Metrics without it stand in no table of differences.
    """

    head: str
    show: Callable[[float], str]
    signed: Callable[[float], str] | None = None


METRICS = {
    "em": Metric("EM", points, signed_points),
    "f1": Metric("F1", points, signed_points),
    "sub_em": Metric("sub-EM", points, signed_points),
    "calls_per_question": Metric("calls", "{:.2f}".format, "{:+.2f}".format),
    "dollars_per_question": Metric("dollars/question", dollars, dollars),
    "raw_cost_per_question": Metric("raw cost", "{:.1f}".format, "{:+.1f}".format),
    "best_model_share": Metric("best model", points),
    "two_hop_two_calls": Metric("two-hop, 2 calls", points),
    "malformed_share": Metric("malformed", points),
    "failed_share": Metric("failed", points),
    "call_seconds_per_question": Metric("seconds in calls", "{:.3g}".format),
}
SWEEP_METRICS = ("em", "f1", "dollars_per_question", "calls_per_question", "best_model_share", "malformed_share")
_ROUTING_METRICS = ("best_model_share", "two_hop_two_calls")  # only if questions state their domains and hops
_POLICY_METRICS = ("f1", "dollars_per_question", "calls_per_question", *_ROUTING_METRICS, "malformed_share")
_DATASET_METRICS = [key for key in METRICS if key not in _ROUTING_METRICS]


def results_markdown(results: Entry) -> str:
    """results.md: the contents of results.json, with the published result beside ours if there is one."""
    return render_results("results.md", results)


def results_text(results: Entry) -> str:
    """The main metrics of results.json, for the console."""
    return render_results("results.txt", results).rstrip()


def render_results(template: str, results: Entry, **values: object) -> str:
    """The document that a template makes from the contents of results.json with the functions of this module."""
    builders = (policy_table, answers, dataset_table, calls_table, paired_differences, difference_table)
    return render(template, results=results, **{builder.__name__: builder for builder in builders}, **values)


def baselines_markdown(results: Entry) -> str:
    """baselines.md: the contents of baselines.json. The router's lead is its EM minus the baseline's, paired."""
    keys, rows = ("f1", "dollars_per_question", "calls_per_question"), []
    for policy in results["policies"]:
        ahead = policy.get("router_ahead", {}).get("em")
        lead = interval(signed_points, ahead["mean"], ahead["ci"]) if ahead else ""
        rows.append([policy["name"], _cell(policy, "em"), *_values(policy, keys), lead])
    table = Table(["policy", "EM", *_heads(keys), "trained router ahead, EM"], rows)
    return render("baselines.md", results=results, table=table)


def sweep_markdown(gathered: Entry) -> str:
    """sweep.md: a line per setting, a line per run, and the runs without results."""
    heads, settings = _heads(SWEEP_METRICS), []
    for entry in gathered["settings"]:
        means = {key: entry[key]["mean"] for key in SWEEP_METRICS if key in entry}
        means |= {f"{key}_ci": entry[key]["ci"] for key in means}
        cells = [_cell(means, key) for key in SWEEP_METRICS]
        settings.append([setting_label(entry["setting"]), str(entry["seeds"]), *cells])
    runs = [[run["name"], *_values(run, SWEEP_METRICS)] for run in gathered["runs"]]
    tables = {"settings": Table(["setting", "seeds", *heads], settings), "runs": Table(["run", *heads], runs)}
    return render("sweep.md", failed=gathered["failed"], **tables)


def setting_label(overrides: Entry) -> str:
    """The overrides of a sweep's run without its seed, e.g. "reward.alpha=0.6"."""
    return ", ".join(f"{field}={value}" for field, value in overrides.items() if field != "seed") or "as configured"


def paired_differences(results: Entry) -> list[tuple[str, Entry]]:
    """The first policy minus another one, question by question: the other's name, and the differences.

    The other one is the baseline checkpoint, and the policy of another run if there is one to compare with.
    """
    found = []
    if results["gain"]:
        found.append((results["policies"][1]["name"], results["gain"]))
    if results["comparison"]:
        found.append((results["comparison"]["with"], results["comparison"]))
    return found


def policy_table(results: Entry) -> Table:
    """A row per policy, followed by its datasets if there are several, and a row per reference policy."""
    entries = []
    for policy in results["policies"]:
        datasets = policy["datasets"] if len(policy["datasets"]) > 1 else {}
        entries += [(policy["name"], policy), *((f"{policy['name']}: {name}", e) for name, e in datasets.items())]
    entries += [(policy["name"], policy) for policy in results["reference_policies"]]
    rows = [[name, _cell(entry, "em"), *_values(entry, _POLICY_METRICS)] for name, entry in entries]
    return Table(["policy", "EM, 95 %", *_heads(_POLICY_METRICS)], rows)


def answers(results: Entry) -> list[tuple[str, Entry]]:
    """Title and metrics of every policy's answers: the greedy ones and, if there are any, the sampled ones."""
    found = []
    for policy in results["policies"]:
        name = policy["name"] if policy["checkpoint"] is None else f"{policy['name']}, step {policy['checkpoint']}"
        found.append((f"{name}: greedy", policy))
        if samples := policy.get("samples"):
            mode = f"{samples['per_question']} samples a question at temperature {samples['temperature']:g}"
            found.append((f"{name}: {mode}", samples))
    return found


def dataset_table(policy: Entry, paper_model: str) -> Table:
    """A row per dataset and one for their mean, with the paper's columns if the paper has one of the datasets."""
    entries, paper = _entries(policy, "mean over datasets"), policy["paper"]
    heads = ["dataset", "questions", *_heads(_DATASET_METRICS)]
    rows = [[name, str(e["questions"]), *(_cell(e, key) for key in _DATASET_METRICS)] for name, e in entries.items()]
    if paper:
        heads += [f"paper's EM ({paper_model})", "ours minus it", ""]
        published = [paper.get("mean" if entry is policy else name) for name, entry in entries.items()]
        rows = [[*row, *_paper_cells(result)] for row, result in zip(rows, published, strict=True)]
    return Table(heads, rows)


def calls_table(policy: Entry) -> Table:
    """A row per dataset: share of the calls per model, why episodes ended, seconds of one call.

    Shares are of all calls, so the last row is not a mean of the datasets' shares.
    """
    entries = _entries(policy, "all datasets")
    columns, shares = share_columns([entry["calls_share"] for entry in entries.values()])
    rows = []
    for (name, entry), row in zip(entries.items(), shares, strict=True):
        stops = ", ".join(f"{reason} {percent(share)}" for reason, share in entry["stops"].items())
        seconds = f"{entry['call_seconds']['median']:.3g}, {entry['call_seconds']['p95']:.3g}"
        rows.append([name, *map(percent, row.values()), stops, seconds])
    return Table(["dataset", *columns, "ended by", "one call"], rows)


def difference_table(differences: Entry) -> Table:
    """Paired differences over all questions and, if there are several datasets, per dataset."""
    datasets, rows = differences.get("datasets", {}), []
    for name, entry in {"all datasets" if datasets else "all": differences, **datasets}.items():
        for key, metric in METRICS.items():
            if metric.signed:
                found, signs = entry[key], entry[key]["sign_test"]
                counts = f"{signs['better']} / {signs['worse']} / {signs['equal']}"
                shown = interval(metric.signed, found["mean"], found["ci"])
                rows.append([name, metric.head, shown, counts, f"{signs['p']:.2g}"])
    return Table(["dataset", "", "difference", "higher / lower / equal", "sign test, p"], rows)


def _entries(policy: Entry, whole: str) -> dict[str, Entry]:
    """The policy's datasets and, if there are several, the policy itself under the name `whole`."""
    datasets = policy["datasets"]
    return {**datasets, whole: policy} if len(datasets) > 1 else datasets


def _paper_cells(result: Entry | None) -> list[str]:
    if result is None:
        return ["", "", ""]
    return [points(result["em"]), interval(signed_points, result["difference"], result["ci"]), result["verdict"]]


def _heads(keys: Sequence[str]) -> list[str]:
    return [METRICS[key].head for key in keys]


def _values(entry: Entry, keys: Sequence[str]) -> list[str]:
    return [METRICS[key].show(entry[key]) if key in entry else "" for key in keys]


def _cell(entry: Entry, key: str) -> str:
    """A value with its interval, if it has one."""
    return interval(METRICS[key].show, entry[key], entry.get(f"{key}_ci")) if key in entry else ""
