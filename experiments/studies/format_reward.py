"""Learning curves with and without the format reward.

    python experiments/studies/format_reward.py --runs=runs/demo_format

Runs of `configs/sweeps/demo_format.py`. The curves are those of metrics.jsonl: malformed share and exact match of the
sampled train episodes, the mean over seeds with the range of the seeds.

Result and what it shows: experiments/studies/README.md.
"""

import numpy as np
from matplotlib.figure import Figure
from runner import arguments, make_warm_start, markdown, save, spelt, trained_runs

from router_r1_jax.report import read_metrics
from router_r1_jax.sweep import seed_mean

FORMAT = "learner.component_weights.format"
NAMES = {1.0: "with the format reward", 0.0: "without"}
LAST = 10  # steps whose mean stands in the table
CURVES = {"malformed_share": "malformed episodes", "em": "exact match, train, sampled"}


def draw(curves: dict[str, dict[str, np.ndarray]]) -> Figure:
    """A panel per figure; curves[name][key] is [seeds, steps]."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, 2), CURVES.items(), strict=True):
        for (name, figures), colour in zip(curves.items(), ("#0072B2", "#D55E00"), strict=False):
            steps = np.arange(1, figures[key].shape[1] + 1)
            axes.plot(steps, figures[key].mean(0), color=colour, label=name)
            axes.fill_between(steps, figures[key].min(0), figures[key].max(0), color=colour, alpha=0.15)
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
        own = curves.setdefault(NAMES[run.overrides[FORMAT]], {key: [] for key in CURVES})
        for key in CURVES:
            own[key].append([line[key] for line in lines])
    arrays = {name: {key: np.array(values) for key, values in own.items()} for name, own in curves.items()}
    means = {name: {key: seed_mean(a[key][:, -LAST:].mean(1).tolist()) for key in CURVES} for name, a in arrays.items()}
    rows = [[name, str(len(arrays[name]["em"])), *(spelt(means[name][key]) for key in CURVES)] for name in arrays]
    table = markdown(["", "seeds", *(f"{label}, last {LAST} steps" for label in CURVES.values())], rows)
    each = {name: {key: values.tolist() for key, values in own.items()} for name, own in arrays.items()}
    save("format_reward", {"means": means, "each": each}, table, draw(arrays))


if __name__ == "__main__":
    main()
