"""Plot of a sweep: exact match and dollars per question of every setting, a dot per run and a bar at the mean."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from router_r1_jax.report.colours import BLUE, GRID, INK
from router_r1_jax.report.plot_style import new_figure, save_figure
from router_r1_jax.report.tables import METRICS, setting_label


def sweep_plot(gathered: Mapping[str, Any], path: str | Path) -> Path:
    """Write the PNG. `gathered` holds the contents of sweep.json, with at least one run."""
    settings = {setting_label(entry["setting"]): entry for entry in gathered["settings"]}
    labels = list(settings)
    places = [labels.index(setting_label(run["overrides"])) for run in gathered["runs"]]
    figure = new_figure(10, 1.4 + 0.34 * len(labels))
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("em", "dollars_per_question"), strict=True):
        means, values = [e[key]["mean"] for e in settings.values()], [run[key] for run in gathered["runs"]]
        axes.plot(means, range(len(labels)), "|", color=INK, markersize=16, markeredgewidth=2)
        axes.plot(values, places, "o", color=BLUE, alpha=0.6, markersize=5)
        axes.set(yticks=range(len(labels)), yticklabels=labels, xlabel=METRICS[key].head)
        axes.grid(axis="x", color=GRID)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    return save_figure(figure, path)
