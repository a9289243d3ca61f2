"""Plots per dataset: exact match beside the published results, and the share of calls per model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from router_r1_jax.report.colours import INK, MUTED, ORANGE, POLICY_COLOURS, share_columns
from router_r1_jax.report.plot_style import add_legend, dress, new_figure, save_figure


def em_by_dataset(results: Mapping[str, Any], path: str | Path) -> Path | None:
    """Exact match of every policy on every dataset with 95 % intervals, and the paper's result if it has one.

    Args:
        results: contents of results.json.
        path: PNG to write; its folder is made if it is missing.

    Returns:
        The path, or None if there are fewer than two datasets.
    """
    policies = results["policies"]
    if len(policies[0]["datasets"]) < 2:
        return None
    names = [*policies[0]["datasets"], "mean"]
    figure = new_figure(max(6.0, 1.25 * len(names) + 1.5), 4.4)
    axes = figure.add_subplot()
    dress(axes, "Exact match per dataset, 95 % intervals", "%")
    width = 0.8 / len(policies)
    for i, policy in enumerate(policies):
        rows = [*policy["datasets"].values(), policy]
        em = np.array([row["em"] for row in rows])
        places = np.arange(len(names)) + (i - (len(policies) - 1) / 2) * width
        error = np.abs(np.array([row["em_ci"] for row in rows]).T - em)
        style = {"ecolor": INK, "error_kw": {"linewidth": 1.0}, "capsize": 2}
        colour = POLICY_COLOURS[i % len(POLICY_COLOURS)]
        axes.bar(places, em, 0.92 * width, yerr=error, color=colour, label=policy["name"], **style)
    paper = policies[0]["paper"]
    published = {place: paper[name]["em"] for place, name in enumerate(names) if name in paper}
    if published:
        places = np.array(list(published))
        label = f"paper, {results['paper_model']}"
        axes.hlines(published.values(), places - 0.46, places + 0.46, color=ORANGE, linewidth=2, zorder=5, label=label)
    axes.set_xticks(range(len(names)), names, rotation=20 if len(names) > 5 else 0)
    axes.set_ylim(bottom=0)
    add_legend(axes, "lower right", (1.0, 1.0), 3)
    return save_figure(figure, path)


def calls_by_dataset(results: Mapping[str, Any], path: str | Path) -> Path | None:
    """Share of the calls per model: one bar per dataset of the first policy, or per policy if there is one dataset.

    The arguments are those of `em_by_dataset`. The result is None if nothing was called.
    """
    policies, datasets = results["policies"], results["policies"][0]["datasets"]
    bars = datasets if len(datasets) > 1 else {policy["name"]: policy for policy in policies}
    columns, rows = share_columns([entry["calls_share"] for entry in bars.values()])
    if not columns:
        return None
    figure = new_figure(8.4, 1.3 + 0.42 * len(bars))
    axes = figure.add_subplot()
    title = f"Which model is asked, by dataset: {policies[0]['name']}" if len(datasets) > 1 else "Which model is asked"
    dress(axes, f"{title} (% of the calls)")
    left = np.zeros(len(bars))
    for model, colour in columns.items():
        widths = np.array([row[model] for row in rows])
        drawn = axes.barh(range(len(bars)), widths, 0.72, left, color=colour, label=model, edgecolor="white")
        labels = [f"{100 * width:.0f}" if width >= 0.06 else "" for width in widths]
        axes.bar_label(drawn, labels, label_type="center", fontsize=8, color="white")
        left += widths
    axes.grid(visible=False)
    axes.set_yticks(range(len(bars)), list(bars), color=MUTED)
    axes.set(xticks=[], xlim=(0, 1))
    axes.invert_yaxis()
    axes.spines[["left", "bottom"]].set_visible(False)
    add_legend(axes, "upper left", (0.0, 0.0), 5)
    return save_figure(figure, path)
