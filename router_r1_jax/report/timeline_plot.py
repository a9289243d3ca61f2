"""Timeline of a rollout: when each slot of the sampling loop decodes, prefills, or waits for a model's reply."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from router_r1_jax.report.colours import BLUE, ORANGE
from router_r1_jax.report.plot_style import add_legend, dress, new_figure, save_figure

_KINDS = {"decode": (BLUE, "decode"), "prefill": (ORANGE, "prefill"), "wait": ("#d9d9d9", "wait for a reply")}


def slots_over_time(timeline: Mapping[str, Any], path: str | Path) -> Path | None:
    """Timeline of one rollout, a line per slot.

    Args:
        timeline: contents of rollout.json: `step`, `seconds`, `rows`, `idle_share`, `spans` of [row, kind, start, end].
        path: PNG to write; its folder is made if it is missing.

    Returns:
        The path, or None if there is nothing to draw.
    """
    if not timeline.get("spans"):
        return None
    rows, seconds = timeline["rows"], timeline["seconds"]
    figure = new_figure(9.2, 1.6 + min(6.0, 0.09 * rows + 1.0))
    axes = figure.add_subplot()
    idle = f"seconds; all slots of a replica waited in {100 * timeline['idle_share']:.1f} % of the time"
    dress(axes, f"Slots in the rollout of step {timeline['step']}", "slot", idle)
    for kind, (colour, label) in _KINDS.items():
        spans = [(row, start, end) for row, what, start, end in timeline["spans"] if what == kind]
        slots, starts, ends = np.reshape(spans, (-1, 3)).T
        label = f"{label} {100 * np.sum(ends - starts) / (rows * seconds):.0f} %"
        axes.barh(slots, ends - starts, 0.84, starts, color=colour, linewidth=0, label=label)
    axes.grid(axis="y", visible=False)
    axes.set(xlim=(0, seconds), ylim=(rows - 0.5, -0.5))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(8))
    add_legend(axes, "lower right", (1.0, 1.0), 3)
    return save_figure(figure, path)
