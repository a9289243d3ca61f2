"""Exact match against cost in dollars: the trained router, its warm start, oracles, and policies that ask one model."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from router_r1_jax.report.colours import ALONE_SUFFIX, BLUE, GREY, INK, MUTED, model_colours
from router_r1_jax.report.plot_style import dollar_ticks, dress, new_figure, save_figure

Point = tuple[float, float]
Row = Mapping[str, Any]

_ARROW = ("warm start", "trained")  # policies that an arrow joins


def em_against_cost(results: Row, path: str | Path) -> Path:
    """Exact match over dollars per question: the policies with their intervals, and every reference.

    Args:
        results: contents of results.json.
        path: PNG to write; its folder is made if it is missing.
    """
    rows = [*results["reference_policies"], *results["policies"]]
    policies = {row["name"] for row in results["policies"]}
    colours = model_colours(results["policies"][0]["calls_share"])
    # A log axis cannot show a policy that never calls and costs nothing. It is drawn left of all others, marked $0.
    free = min((row["dollars_per_question"] for row in rows if row["dollars_per_question"]), default=1e-6) / 3
    places = {row["name"]: (row["dollars_per_question"] or free, row["em"]) for row in rows}

    figure = new_figure(9.2, 5.8)
    axes = figure.add_subplot()
    dress(axes, "Exact match against cost", "%", "dollars per question (log scale)")
    for row in rows:
        _draw_policy(axes, row, places[row["name"]], row["name"] in policies, colours)
    if set(_ARROW) <= policies:
        start, end = (places[name] for name in _ARROW)
        style = {"arrowstyle": "-|>", "color": BLUE, "linewidth": 1.6, "shrinkA": 8, "shrinkB": 8, "mutation_scale": 14}
        axes.annotate("", xy=end, xytext=start, zorder=4, arrowprops=style)
    _frame_costs(axes, [cost for cost, _ in places.values()])
    highest = max([row["em"] for row in rows] + [row["em_ci"][1] for row in results["policies"]])
    axes.set_ylim(0, 1.15 * highest or 1.0)
    _place_labels(axes, rows, places, bold=policies)
    return save_figure(figure, path)


def _draw_policy(axes: Axes, row: Mapping[str, Any], place: Point, evaluated: bool, colours: Mapping[str, str]) -> None:
    """One marker: an evaluated policy is large with its interval, an oracle a star, a single model a dot."""
    name = row["name"]
    if evaluated:
        colour = BLUE if name == "trained" else MUTED
        ends = row["em_ci"]
        axes.plot([place[0]] * 2, ends, "_-", color=colour, linewidth=1.6, markersize=9, markeredgewidth=1.6, zorder=5)
        axes.plot(*place, "o", color=colour, markersize=10, markeredgecolor="white", zorder=6)
    elif name.startswith("oracle"):
        axes.plot(*place, "*", color="#F0B400", markersize=18, markeredgecolor=INK, markeredgewidth=0.7, zorder=4)
    elif name.endswith(ALONE_SUFFIX):
        axes.plot(*place, "o", color=colours[name.removesuffix(ALONE_SUFFIX)], markersize=8, zorder=3)
    else:
        axes.plot(*place, "D", color=GREY, markersize=7, zorder=3)


def _frame_costs(axes: Axes, costs: Sequence[float]) -> None:
    """A log axis of dollars with a little air on both sides and ticks at 1, 2 and 5."""
    axes.set_xscale("log")
    air = max(1.6, (max(costs) / min(costs)) ** 0.12)
    axes.set_xlim(min(costs) / air, max(costs) * air)
    decades = math.log10(max(costs) / min(costs))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    axes.xaxis.set_major_formatter(dollar_ticks())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _place_labels(axes: Axes, rows: Sequence[Row], places: Mapping[str, Point], bold: set[str]) -> None:
    """Write the name at each point, at the nearest spot that covers no marker, interval or other label."""
    figure = axes.figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # fixes the layout, so that data can be turned into pixels
    pixels = {name: axes.transData.transform(place) for name, place in places.items()}
    taken = [Bbox.from_bounds(x - 14, y - 14, 28, 28) for x, y in pixels.values()]
    for row in rows:
        if "em_ci" in row:
            ends = [(places[row["name"]][0], end) for end in row["em_ci"]]
            taken.append(Bbox(axes.transData.transform(ends)).padded(8, 2))
    if set(_ARROW) <= set(pixels):
        line = np.linspace(*(pixels[name] for name in _ARROW), 40)
        taken += [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in line]
    inside = axes.get_window_extent(renderer)
    for row in rows:
        name, label = row["name"], row["name"] + ("" if row["dollars_per_question"] else " · $0")
        anchor, weight = pixels[name], "bold" if name in bold else "normal"
        style = {"fontsize": 9, "fontweight": weight, "color": INK, "ha": "left", "va": "bottom", "zorder": 7}
        probe = axes.text(0, 0, label, **style)
        box = _free_box(anchor, probe.get_window_extent(renderer).size, taken, inside)
        probe.remove()
        taken.append(box)
        if np.hypot(*(anchor - np.clip(anchor, box.min, box.max))) > 28:  # a line leads to a label that is far away
            style["arrowprops"] = {"arrowstyle": "-", "color": "#aaaaaa", "linewidth": 0.7, "shrinkB": 5}
        offset = (box.min - anchor) * 72 / figure.dpi  # from pixels to points
        axes.annotate(label, places[name], offset, textcoords="offset points", **style)


def _free_box(anchor: np.ndarray, size: np.ndarray, taken: Sequence[Bbox], inside: Bbox) -> Bbox:
    """The nearest box of `size` around `anchor` that lies inside and overlaps the fewest of the taken ones."""
    boxes = []
    for radius in (18, 24, 32, 42, 56, 72, 90, 110):
        for turn in (0, 4, 8, 12, 2, 14, 6, 10, 1, 15, 7, 9, 3, 13, 5, 11):  # right, up, left, down, diagonals, between
            direction = np.array([math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)])
            # The box touches the circle with the side or corner that faces the anchor.
            corner = anchor + radius * direction - size / 2 + size / 2 * np.clip(direction * 1.5, -1, 1)
            boxes.append(Bbox([corner, corner + size]))

    def faults(box: Bbox) -> tuple[bool, int]:
        return not (inside.contains(*box.min) and inside.contains(*box.max)), box.count_overlaps(taken)

    return min(boxes, key=faults)
