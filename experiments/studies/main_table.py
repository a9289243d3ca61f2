"""Main table: the trained router against all baselines, on the same test questions, pool and scores.

    python experiments/studies/main_table.py --runs=runs/demo_alpha [--trained_only] [--only=knn*,random]

The study runs the main of the baselines in the folder of each run of `configs/sweeps/demo_alpha.py` at alpha 0. It
measures only policies without episodes there. The table holds means over seeds with Student's 95 % intervals.

Result and what it shows: experiments/studies/README.md.
"""

import argparse
import json
import subprocess
import sys

from matplotlib.figure import Figure
from runner import METRICS, ROOT, arguments, format_mean, mean_over_seeds, save, trained_runs

from router_r1_jax.report.tables import Table
from router_r1_jax.sweep import Run


def take_only() -> str:
    """The value of --only. It is removed from the command line, so that the shared arguments can be parsed."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--only", default="")
    known, sys.argv[1:] = parser.parse_known_args()
    return known.only


def call_main(main: str, run: Run, questions: int, *more: str) -> None:
    """Run a main on one run, in a separate process."""
    overrides = [f"--config.{field}={value}" for field, value in run.overrides.items()]
    subprocess.run(
        [
            sys.executable,
            "-m",
            f"router_r1_jax.{main}",
            f"--config={ROOT / 'configs/sweeps/demo_alpha.py'}",
            f"--workdir={run.folder}",
            f"--config.evaluation.questions={questions}",
            *overrides,
            *more,
        ],
        check=True,
        cwd=ROOT,
    )


def kept_metrics(line: dict) -> dict:
    """The metrics of a policy that the results keep. The run's baselines.json has all metrics."""
    kept = {key: line[key] for key in (*METRICS, "em_ci") if key in line}
    return kept | ({"router_ahead": {"em": line["router_ahead"]["em"]}} if "router_ahead" in line else {})


def draw(results: dict) -> Figure:
    """EM of every policy: a dot per seed, a bar at the mean."""
    policies = sorted(results["policies"].items(), key=lambda item: -item[1]["em"]["mean"])
    figure = Figure(figsize=(7.5, 0.24 * len(policies) + 1), layout="constrained")
    axes = figure.subplots()
    for y, (name, line) in enumerate(policies):
        colour = "#D55E00" if name == "trained router" else "#0072B2"
        axes.plot([line["em"]["mean"]], [y], "|", color="#222222", markersize=12, markeredgewidth=2)
        axes.plot(
            [e[name]["em"] for e in results["each"].values()],
            [y] * len(results["each"]),
            "o",
            color=colour,
            markersize=4,
        )
    axes.set_yticks(range(len(policies)), [name for name, _ in policies])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("exact match, test split")
    axes.grid(axis="x", color="#e4e4e4")
    return figure


def main() -> None:
    only = take_only()
    options = arguments(__doc__, "demo_alpha")
    each: dict[int, dict] = {}
    for run in trained_runs(options, lambda overrides: overrides["reward.alpha"] == 0.0):
        if not (run.folder / "results.json").exists():
            call_main("evaluate", run, options.questions)
        call_main("baselines", run, options.questions, f"--only={only}")
        lines = json.loads((run.folder / "baselines.json").read_text())["policies"]
        each[run.overrides["seed"]] = {line["name"]: kept_metrics(line) for line in lines}
    names = [name for name in next(iter(each.values())) if all(name in lines for lines in each.values())]
    policies = {name: mean_over_seeds({seed: lines[name] for seed, lines in each.items()}) for name in names}
    results = {"policies": policies, "each": each}
    rows = [
        [
            name,
            format_mean(p["em"]),
            format_mean(p["dollars_per_question"], ".2e"),
            format_mean(p["calls_per_question"], ".2f"),
        ]
        for name, p in policies.items()
    ]
    table = Table(["policy", "EM", "dollars/question", "calls"], rows)
    save("main_table", results, table, draw(results), note=f"Seeds {sorted(each)}.\n\n")


if __name__ == "__main__":
    main()
