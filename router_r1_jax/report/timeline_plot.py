"""Timeline of a rollout: when each slot of the decode batch decodes, prefills, or waits for a model's reply."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from router_r1_jax.report.colours import BLUE, ORANGE
from router_r1_jax.report.plot_style import add_legend, dress, new_figure, save_figure

_KINDS = {"decode": (BLUE, "decoding"), "prefill": (ORANGE, "reading"), "wait": ("#d9d9d9", "waiting for a reply")}


def slots_over_time(trace: Mapping[str, Any], path: str | Path) -> Path | None:
    """Timeline of every row of the sampling loop in one rollout, a line per row.

    Args:
        trace: contents of rollout.json: `step`, `seconds`, `rows`, `idle_share`, `spans` of [row, kind, start, end].
        path: PNG to write; its folder is made if it is missing.

    Returns:
        The path, or None if there is nothing to draw.
    """
    if not trace.get("spans"):
        return None
    rows, seconds = trace["rows"], trace["seconds"]
    figure = new_figure(9.2, 1.6 + min(6.0, 0.09 * rows + 1.0))
    axes = figure.add_subplot()
    idle = f"seconds; in {100 * trace['idle_share']:.1f} % of them no row could go on by itself"
    dress(axes, f"Rows of the rollout of step {trace['step']}", "row", idle)
    for kind, (colour, label) in _KINDS.items():
        spans = [(row, start, end - start) for row, what, start, end in trace["spans"] if what == kind]
        bottoms, starts, widths = (
            [row - 0.42 for row, _, _ in spans],
            [s for _, s, _ in spans],
            [w for _, _, w in spans],
        )
        label = f"{label} {100 * sum(widths) / (rows * seconds):.0f} %"
        axes.barh(bottoms, widths, 0.84, starts, align="edge", color=colour, linewidth=0, label=label)
    axes.grid(axis="y", visible=False)
    axes.set(xlim=(0, seconds), ylim=(rows - 0.5, -0.5))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(8))
    add_legend(axes, "lower right", (1.0, 1.0), 3)
    return save_figure(figure, path)
