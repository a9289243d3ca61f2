"""Share of calls per model over the training steps, as stacked bands, and calls per question."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from router_r1_jax.report.colours import GREY, INK, SHARE_PREFIX, model_names, share_columns
from router_r1_jax.report.learning_curves import Metrics, curve, running_mean
from router_r1_jax.report.plot_style import dress, new_figure, save_figure


def calls_per_model(metrics: Metrics, path: str | Path) -> Path | None:
    """Stacked shares of the calls per model over the steps, and below it the calls per question.

    Args:
        metrics: lines of metrics.jsonl. The shares are the keys "calls/share/<model>", of at least two steps.
        path: PNG to write; its folder is made if it is missing.

    Returns:
        The path, or None if there is nothing to draw.
    """
    lines = [line for line in metrics if any(key.startswith(SHARE_PREFIX) for key in line)]
    if len(lines) < 2:
        return None
    steps, names = np.array([line["step"] for line in lines]), model_names(lines, {})
    columns, rows = share_columns([{name: line.get(SHARE_PREFIX + name) or 0.0 for name in names} for line in lines])
    if not columns:  # no episode made a call
        return None
    order = sorted(columns, key=lambda name: columns[name] != GREY)  # all others together are the lowest band
    shares = np.array([running_mean(np.array([row[name] for row in rows])) for name in order])
    figure = new_figure(9.2, 5.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    dress(upper, "Which model is asked: share of the calls", "%")
    upper.stackplot(steps, shares, colors=[columns[name] for name in order], edgecolor="white", linewidth=0.6)
    upper.set(ylim=(0, 1), xmargin=0)
    _label_bands(upper, order, shares[:, -1], columns)
    dress(lower, "Calls per question", "", "step")
    calls = curve(lines, "calls_per_question")
    if len(calls[0]):
        lower.plot(calls[0], running_mean(calls[1]), color=INK, linewidth=1.6)
        lower.set(ylim=(0, max(1.0, 1.15 * float(np.max(calls[1])))), xmargin=0)
    return save_figure(figure, path)


def _label_bands(axes: Axes, names: Sequence[str], last: np.ndarray, colours: Mapping[str, str]) -> None:
    """Write each model's name and last share at the right edge, as near to its band as there is room."""
    middles = np.cumsum(last) - last / 2
    for name, share, y in zip(names, last, _spread(middles, 0.055, 0.98), strict=True):
        style = {"xycoords": "axes fraction", "va": "center", "fontsize": 9}
        axes.annotate("■", (1.012, y), color=colours[name], **style)
        axes.annotate(f"{name}  {100 * share:.0f} %", (1.032, y), color=INK, **style)


def _spread(wanted: np.ndarray, gap: float, top: float) -> np.ndarray:
    """Ascending heights near the (ascending) wanted ones, at least `gap` apart and at most `top`."""
    heights = np.array(wanted, dtype=float)
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    ceiling = top
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    return heights
