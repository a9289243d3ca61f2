"""Share of calls per model over the training steps, as stacked bands."""

from pathlib import Path

import numpy as np

from router_r1_jax.report.colours import GREY, INK, share_columns
from router_r1_jax.report.learning_curves import Metrics, running_mean
from router_r1_jax.report.plot_style import dress, new_figure, save_figure

SHARE_PREFIX = "calls/share/"  # metric key: share of the calls that reached one model


def calls_per_model(metrics: Metrics, path: str | Path) -> Path | None:
    """Stacked shares of the calls per model over the steps. The legend has each model's last share.

    Args:
        metrics: lines of metrics.jsonl. The shares are the keys "calls/share/<model>", of at least two steps.
        path: PNG to write; its folder is made if it is missing.

    Returns:
        The path, or None if there is nothing to draw.
    """
    lines = [line for line in metrics if any(key.startswith(SHARE_PREFIX) for key in line)]
    columns, rows = share_columns(
        [{key.removeprefix(SHARE_PREFIX): line[key] for key in line if key.startswith(SHARE_PREFIX)} for line in lines]
    )
    if len(lines) < 2 or not columns:  # without columns no episode made a call
        return None
    order = sorted(columns, key=lambda name: columns[name] != GREY)  # all others together are the lowest band
    shares = np.array([running_mean(np.array([row[name] for row in rows])) for name in order])
    labels = [f"{name}  {100 * share:.0f} %" for name, share in zip(order, shares[:, -1], strict=True)]
    figure = new_figure(9.2, 4.8)
    axes = figure.add_subplot()
    dress(axes, "Which model is asked: share of the calls", "%", "step")
    colours = [columns[name] for name in order]
    axes.stackplot([line["step"] for line in lines], shares, colors=colours, labels=labels, edgecolor="white")
    axes.set(ylim=(0, 1), xmargin=0)
    figure.legend(loc="outside right upper", reverse=True, frameon=False, fontsize=9, labelcolor=INK)
    return save_figure(figure, path)
