"""Learning curves with and without the format reward.

    python experiments/studies/format_reward.py --runs=runs/demo_format

Runs of `configs/sweeps/demo_format.py`. The curves are those of metrics.jsonl: malformed share and exact match of the
sampled train episodes. Lines are means over seeds, and bands the range of the seeds.

Result and what it shows: experiments/studies/README.md.
"""

import numpy as np
from matplotlib.figure import Figure
from runner import arguments, format_mean, make_warm_start, save, trained_runs

from router_r1_jax.report.tables import Table
from router_r1_jax.storage.metrics_writer import read_metrics
from router_r1_jax.sweep import seed_mean

FORMAT = "learner.component_weights.format"
NAMES = {1.0: "with the format reward", 0.0: "without"}
LAST = 10  # the table holds means of the last steps
CURVES = {"malformed_share": "malformed episodes", "em": "exact match, train, sampled"}


def draw(curves: dict[str, dict[str, np.ndarray]]) -> Figure:
    """A panel per metric; curves[name][key] is [seeds, steps]."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, 2), CURVES.items(), strict=True):
        for (name, metrics), colour in zip(curves.items(), ("#0072B2", "#D55E00"), strict=False):
            steps = np.arange(1, metrics[key].shape[1] + 1)
            axes.plot(steps, metrics[key].mean(0), color=colour, label=name)
            axes.fill_between(steps, metrics[key].min(0), metrics[key].max(0), color=colour, alpha=0.15)
        axes.set_xlabel("step")
        axes.set_title(label, loc="left", fontsize=10)
        axes.grid(color="#e4e4e4")
    axes.legend(frameon=False)
    return figure


def main() -> None:
    options = arguments(__doc__, "demo_format")
    if not options.trained_only:
        make_warm_start("demo_format")
    curves: dict[str, dict[str, list]] = {}
    for run in trained_runs(options):
        lines = [line for line in read_metrics(run.folder) if line.get("phase") != "warmstart"]
        of_runs = curves.setdefault(NAMES[run.overrides[FORMAT]], {key: [] for key in CURVES})
        for key in CURVES:
            of_runs[key].append([line[key] for line in lines])
    arrays = {name: {key: np.array(runs) for key, runs in of_runs.items()} for name, of_runs in curves.items()}
    means = {name: {key: seed_mean(a[key][:, -LAST:].mean(1).tolist()) for key in CURVES} for name, a in arrays.items()}
    rows = [[name, str(len(arrays[name]["em"])), *(format_mean(means[name][key]) for key in CURVES)] for name in arrays]
    table = Table(["", "seeds", *(f"{label}, last {LAST} steps" for label in CURVES.values())], rows)
    each = {name: {key: array.tolist() for key, array in by_key.items()} for name, by_key in arrays.items()}
    save("format_reward", {"means": means, "each": each}, table, draw(arrays))


if __name__ == "__main__":
    main()
