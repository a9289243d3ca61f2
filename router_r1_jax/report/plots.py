"""The pictures of a run: learning curves, calls per model over the steps, exact match against cost, and the slots of a
rollout over time."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from matplotlib.transforms import Bbox

from router_r1_jax.report.style import (
    ALONE_SUFFIX,
    BLUE,
    GREEN,
    GREY,
    GRID,
    INK,
    MUTED,
    ORANGE,
    PINK,
    SHARE_PREFIX,
    model_colours,
    model_names,
    most_called,
)

Metrics = Sequence[Mapping[str, Any]]
Point = tuple[float, float]

DPI = 130
_FAULT_PREFIX = "format/"


class _Series(NamedTuple):
    key: str
    label: str
    colour: str
    dots: bool = False  # measured on a few steps only: drawn as joined dots, never smoothed


class _Panel(NamedTuple):
    title: str
    series: tuple[_Series, ...]
    unit: str = ""  # "%" and "$" choose the axis format, anything else is the axis label


_PANELS = (
    _Panel(
        "Reward per episode",
        (
            _Series("reward/total", "total", BLUE),
            _Series("reward/outcome", "outcome", GREEN),
            _Series("reward/cost", "cost", ORANGE),
            _Series("reward/format", "format", GREY),
        ),
    ),
    _Panel("Exact match", (_Series("em", "train, sampled", BLUE), _Series("val/em", "validation", ORANGE, True)), "%"),
    _Panel(
        "Calls to a model that is best for the domain",
        (
            _Series("best_model_share", "train, sampled", BLUE),
            _Series("val/best_model_share", "validation", ORANGE, True),
        ),
        "%",
    ),
    _Panel(
        "Dollars per question",
        (
            _Series("dollars_per_question", "train, sampled", BLUE),
            _Series("val/dollars_per_question", "validation", ORANGE, True),
        ),
        "$",
    ),
    _Panel(
        "Calls per question",
        (
            _Series("calls_per_question", "train, sampled", BLUE),
            _Series("val/calls_per_question", "validation", ORANGE, True),
        ),
    ),
    _Panel("Malformed episodes", (_Series("malformed_share", "train, sampled", BLUE),), "%"),
    _Panel(
        "Habits to watch",
        (
            _Series("watch/answer_from_question", "answer from the question", BLUE),
            _Series("watch/reply_ignored", "reply ignored", ORANGE),
            _Series("watch/query_is_question", "whole question passed on", GREEN),
            _Series("watch/repeated_call", "call repeated", PINK),
        ),
        "%",
    ),
    _Panel("KL to the reference", (_Series("kl", "estimate", BLUE),), "nats per token"),
    _Panel("Entropy of the sampler", (_Series("entropy", "entropy", BLUE),), "nats per token"),
    _Panel("Gradient norm", (_Series("grad_norm", "before clipping", BLUE),)),
    _Panel("Tokens whose ratio was clipped", (_Series("clip_share", "clipped", BLUE),), "%"),
    _Panel("Questions without a learning signal", (_Series("zero_variance_groups", "equal rewards", BLUE),), "groups"),
    _Panel(
        "Log-prob: sampler against learner",
        (_Series("logp_diff_mean", "mean difference", BLUE), _Series("logp_diff_max", "largest", ORANGE)),
        "nats",
    ),
    _Panel(
        "Seconds per step",
        (_Series("rollout_seconds", "rollout", BLUE), _Series("update_seconds", "update", ORANGE)),
        "s",
    ),
    _Panel("Sampled tokens per second", (_Series("tokens_per_second", "rollout", BLUE),)),
    _Panel("Sampled tokens per episode", (_Series("response_tokens", "response", BLUE),)),
)
_WARMSTART_PANELS = (
    _Panel("Warm start: loss", (_Series("warmstart/loss", "supervised loss", GREY),), "nats per token"),
    _Panel("Warm start: accuracy", (_Series("warmstart/accuracy", "next token", GREY),), "%"),
)


def learning_curves(metrics: Metrics, path: str | Path) -> Path | None:
    """Small multiples of the training metrics over the steps, smoothed over the faint raw values.

    Args:
        metrics: lines of metrics.jsonl; panels whose keys never occur are left out, and a null is skipped.
        path: PNG to write; its folder is made.

    Returns:
        The path, or None where there is nothing to draw.
    """
    train = [line for line in metrics if line.get("phase") != "warmstart"]
    warm = [line for line in metrics if line.get("phase") == "warmstart"]
    groups = ((train, (*_PANELS, _fault_panel(train))), (warm, _WARMSTART_PANELS))
    panels = [(panel, lines) for lines, group in groups for panel in group]
    panels = [(panel, lines) for panel, lines in panels if any(len(_curve(lines, s.key)[0]) for s in panel.series)]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.3 * columns, 2.7 * rows), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.09)
    for index, (panel, lines) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw_panel(axes, panel, lines)
        if index >= len(panels) - columns:
            axes.set_xlabel("step", color=MUTED, fontsize=9)
    return save(figure, path)


def _fault_panel(lines: Metrics) -> _Panel:
    """The commonest faults of the format check, as shares of the episodes; an episode may have several."""
    means = {
        key: float(np.mean(_curve(lines, key)[1]))
        for key in dict.fromkeys(key for line in lines for key in line if key.startswith(_FAULT_PREFIX))
    }
    often = sorted((key for key, mean in means.items() if mean > 0), key=lambda key: -means[key])
    series = tuple(
        _Series(key, key.removeprefix(_FAULT_PREFIX).replace("_", " "), colour)
        for key, colour in zip(often, (BLUE, ORANGE, GREEN, PINK, GREY), strict=False)
    )
    return _Panel("Faults of form, the commonest", series, "%")


def calls_per_model(metrics: Metrics, path: str | Path) -> Path | None:
    """Stacked shares of the calls per model over the steps, and below it the calls per question.

    Arguments and result as for `learning_curves`; the shares are the keys "calls/share/<model>", of two steps at least.
    """
    lines = [line for line in metrics if any(key.startswith(SHARE_PREFIX) for key in line)]
    if len(lines) < 2:
        return None
    steps = np.array([line["step"] for line in lines])
    rows = {name: np.array([line.get(SHARE_PREFIX + name) or 0.0 for line in lines]) for name in model_names(lines, {})}
    names, others = most_called({name: float(row.sum()) for name, row in rows.items()})
    if others:
        rows[others] = sum(row for name, row in rows.items() if name not in names)
        colours = model_colours(names) | {others: GREY}
        names = [others, *names]
    else:
        names = list(rows)  # also those that nobody called
        colours = model_colours(names)
    shares = np.array([_smooth(rows[name]) for name in names])
    figure = Figure(figsize=(9.2, 5.4), dpi=DPI, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    upper.stackplot(steps, shares, colors=[colours[name] for name in names], edgecolor="white", linewidth=0.6)
    dress(upper, "Which model is asked: share of the calls", "%")
    upper.set_ylim(0, 1)
    upper.margins(x=0)
    _label_bands(upper, names, shares[:, -1], colours)
    calls = _curve(lines, "calls_per_question")
    if len(calls[0]):
        lower.plot(calls[0], _smooth(calls[1]), color=INK, linewidth=1.6)
        lower.margins(x=0)
        lower.set_ylim(bottom=0, top=max(1.0, 1.15 * float(np.max(calls[1]))))
    dress(lower, "Calls per question", "")
    lower.set_xlabel("step", color=MUTED, fontsize=9)
    return save(figure, path)


def em_against_cost(results: Mapping[str, Any], path: str | Path) -> Path | None:
    """Exact match over dollars per question: the policies with their intervals, and every reference.

    Args:
        results: contents of results.json, with `policies` and `references` (which may be empty).
        path: PNG to write; its folder is made.

    Returns:
        The path, or None where no policy and no reference has both numbers.
    """
    rows = [*results.get("references", ()), *results.get("policies", ())]
    rows = [row for row in rows if row.get("em") is not None and row.get("dollars_per_question") is not None]
    if not rows:
        return None
    policies = {row["name"] for row in results.get("policies", ())}
    colours = model_colours(model_names((), results))
    # A policy that never calls costs nothing, which a log axis cannot show: it stands left of all others, marked $0.
    paid = [row["dollars_per_question"] for row in rows if row["dollars_per_question"] > 0]
    free = min(paid, default=1e-6) / 3
    places = {row["name"]: (row["dollars_per_question"] or free, row["em"]) for row in rows}

    figure = Figure(figsize=(9.2, 5.8), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    dress(axes, "Exact match against cost", "%")
    for row in rows:
        _draw_policy(axes, row, places[row["name"]], row["name"] in policies, colours)
    if {"warm start", "trained"} <= policies & set(places):
        _arrow(axes, places["warm start"], places["trained"])
    _frame_costs(axes, [place[0] for place in places.values()])
    highest = max([row["em"] for row in rows] + [row["em_ci"][1] for row in rows if row.get("em_ci")])
    axes.set_ylim(0, 1.15 * highest or 1.0)
    labels = {row["name"]: row["name"] + ("" if row["dollars_per_question"] else " · $0") for row in rows}
    bars = [(places[row["name"]][0], *row["em_ci"]) for row in rows if row.get("em_ci")]
    _place_labels(axes, places, labels, bars, bold=policies)
    return save(figure, path)


_DOING = {"decode": (BLUE, "decoding"), "feed": (ORANGE, "reading"), "wait": ("#d9d9d9", "waiting for a reply")}


def slots_over_time(trace: Mapping[str, Any], path: str | Path) -> Path | None:
    """What each row of the sampling loop did in one rollout, a line per row.

    Args:
        trace: contents of rollout.json: `step`, `seconds`, `rows`, `idle_share`, `spans` of [row, kind, start, end].
        path: PNG to write; its folder is made.

    Returns:
        The path, or None where there is nothing to draw.
    """
    if not trace.get("spans"):
        return None
    rows = trace["rows"]
    figure = Figure(figsize=(9.2, 1.6 + min(6.0, 0.09 * rows + 1.0)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for kind, (colour, label) in _DOING.items():
        spans = [(row, start, end - start) for row, what, start, end in trace["spans"] if what == kind]
        busy = sum(width for *_, width in spans) / (rows * trace["seconds"])
        bottoms, starts, widths = ([span[i] for span in spans] for i in range(3))
        style = {"align": "edge", "color": colour, "linewidth": 0, "label": f"{label} {100 * busy:.0f} %"}
        axes.barh([row - 0.42 for row in bottoms], widths, 0.84, starts, **style)
    dress(axes, f"Rows of the rollout of step {trace['step']}", "row")
    axes.grid(axis="y", visible=False)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xlim(0, trace["seconds"])
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.set_xlabel(
        f"seconds; in {100 * trace['idle_share']:.1f} % of them no row could go on by itself", color=MUTED, fontsize=9
    )
    legend = {"fontsize": 8, "frameon": False, "labelcolor": INK, "ncols": 3, "loc": "lower right"}
    axes.legend(bbox_to_anchor=(1.0, 1.0), **legend)
    return save(figure, path)


def _curve(lines: Metrics, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric where it is present and a number."""
    pairs = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float))]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about a tenth of the run; at the ends the window is cut, not filled up."""
    half = len(values) // 20
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, stop = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[stop] - sums[start]) / (stop - start)


def _draw_panel(axes: Axes, panel: _Panel, lines: Metrics) -> None:
    for series in panel.series:
        steps, values = _curve(lines, series.key)
        if not len(steps):
            continue
        if series.dots:
            axes.plot(steps, values, "o-", color=series.colour, markersize=3.5, linewidth=1.2, label=series.label)
            continue
        axes.plot(steps, values, color=series.colour, alpha=0.25, linewidth=0.8)
        single = {"marker": "o", "markersize": 3.5} if len(steps) == 1 else {}  # a line of one point is not seen
        axes.plot(steps, _smooth(values), color=series.colour, linewidth=1.7, label=series.label, **single)
    dress(axes, panel.title, panel.unit)
    axes.margins(y=0.12)
    if panel.unit == "%":  # no share lies below 0
        bottom, _ = axes.get_ylim()
        top = axes.dataLim.ymax * 1.12 or 0.01
        axes.set_ylim(max(bottom, -0.04 * top), top)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize=7.5, frameon=True, framealpha=0.8, edgecolor="none", labelcolor=INK, borderpad=0.2)


def dress(axes: Axes, title: str, unit: str) -> None:
    """Title, grid, ticks and axis in this package's manner; `unit` as in `_Panel`."""
    axes.set_title(title, fontsize=10, loc="left", color=INK, fontweight="bold")
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.tick_params(colors=MUTED, labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if unit == "%":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=" %"))
    elif unit == "$":
        axes.yaxis.set_major_formatter(FuncFormatter(_tick_dollars))
    else:
        # Plain numbers: matplotlib's shared factor ("1e-6" above the axis) would run into the title.
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylabel(unit, color=MUTED, fontsize=8)


def _label_bands(axes: Axes, names: Sequence[str], last: np.ndarray, colours: Mapping[str, str]) -> None:
    """Write each model's name and last share at the right edge, at its band where there is room."""
    middles = np.cumsum(last) - last / 2
    for name, share, y in zip(names, last, _spread(middles, 0.055, 0.98), strict=True):
        spot = {"xycoords": "axes fraction", "va": "center", "fontsize": 9}
        axes.annotate("■", (1.012, y), color=colours[name], **spot)
        axes.annotate(f"{name}  {100 * share:.0f} %", (1.032, y), color=INK, **spot)


def _spread(wanted: np.ndarray, gap: float, top: float) -> np.ndarray:
    """Ascending heights, at least `gap` apart and at most `top`, near the (ascending) wanted ones."""
    heights = np.array(wanted, dtype=float)
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    ceiling = top
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    return heights


def _draw_policy(axes: Axes, row: Mapping[str, Any], place: Point, own: bool, colours: Mapping[str, str]) -> None:
    """One marker: own policies large with an interval, oracles stars, single models dots, anything else a diamond."""
    name = row["name"]
    if own:
        colour = BLUE if name == "trained" else MUTED
        low, high = row.get("em_ci") or (row["em"], row["em"])
        axes.vlines(place[0], low, high, color=colour, linewidth=1.6, zorder=5)
        axes.plot([place[0]] * 2, [low, high], "_", color=colour, markersize=9, markeredgewidth=1.6, zorder=5)
        axes.plot(*place, "o", color=colour, markersize=10, markeredgecolor="white", zorder=6)
    elif name.startswith("oracle"):
        axes.plot(*place, "*", color="#F0B400", markersize=18, markeredgecolor=INK, markeredgewidth=0.7, zorder=4)
    elif name.endswith(ALONE_SUFFIX):
        axes.plot(*place, "o", color=colours[name.removesuffix(ALONE_SUFFIX)], markersize=8, zorder=3)
    else:
        axes.plot(*place, "D", color=GREY, markersize=7, zorder=3)


def _arrow(axes: Axes, start: Point, end: Point) -> None:
    axes.annotate(
        "", xy=end, xytext=start, zorder=4,
        arrowprops=dict(arrowstyle="-|>", color=BLUE, linewidth=1.6, shrinkA=8, shrinkB=8, mutation_scale=14),
    )  # fmt: skip


def _frame_costs(axes: Axes, costs: Sequence[float]) -> None:
    """A log axis of dollars with a little air on both sides and ticks at 1, 2 and 5."""
    axes.set_xscale("log")
    air = max(1.6, (max(costs) / min(costs)) ** 0.12)
    axes.set_xlim(min(costs) / air, max(costs) * air)
    decades = math.log10(max(costs) / min(costs))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(_tick_dollars))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("dollars per question (log scale)", color=MUTED, fontsize=9)


def _tick_dollars(value: float, _position: int) -> str:
    return "$" + f"{value:.10f}".rstrip("0").rstrip(".")


def _place_labels(
    axes: Axes,
    places: Mapping[str, Point],
    labels: Mapping[str, str],
    bars: Sequence[tuple[float, float, float]],
    bold: set[str],
) -> None:
    """Write each point's label at the nearest spot that covers no marker, interval (x, low, high) or other label."""
    figure = axes.figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # fixes the layout, so that data can be turned into pixels
    pixels = {name: axes.transData.transform(place) for name, place in places.items()}
    taken = [Bbox.from_bounds(x - 14, y - 14, 28, 28) for x, y in pixels.values()]
    for x, low, high in bars:
        taken.append(Bbox(axes.transData.transform([(x, low), (x, high)])).padded(8, 2))
    if {"warm start", "trained"} <= set(pixels):
        line = np.linspace(pixels["warm start"], pixels["trained"], 40)
        taken.extend(Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in line)
    inside = axes.get_window_extent(renderer)
    for name, label in labels.items():
        style = {"fontsize": 9, "fontweight": "bold" if name in bold else "normal", "color": INK}
        probe = axes.text(0, 0, label, **style)
        size = probe.get_window_extent(renderer).size
        probe.remove()
        anchor = pixels[name]
        box = _free_box(anchor, size, taken, inside)
        taken.append(box)
        # Corner of the box in points from the anchor; a leader line where the label had to go far.
        gap = np.hypot(*(anchor - np.clip(anchor, box.min, box.max)))
        leader = {"arrowstyle": "-", "color": "#aaaaaa", "linewidth": 0.7, "shrinkB": 5} if gap > 28 else None
        axes.annotate(
            label, places[name], xytext=(box.min - anchor) * 72 / figure.dpi, textcoords="offset points", zorder=7,
            ha="left", va="bottom", arrowprops=leader, **style,
        )  # fmt: skip


def _free_box(anchor: np.ndarray, size: np.ndarray, taken: Sequence[Bbox], inside: Bbox) -> Bbox:
    """The nearest box of `size` around `anchor` that lies inside and overlaps nothing; else the least bad one."""
    best, least = None, math.inf
    for radius in (18, 24, 32, 42, 56, 72, 90, 110):
        for turn in (0, 4, 8, 12, 2, 14, 6, 10, 1, 15, 7, 9, 3, 13, 5, 11):  # right, up, left, down, diagonals, between
            direction = np.array([math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)])
            # The box touches the circle with the side or corner that faces the anchor.
            corner = anchor + radius * direction - size / 2 + size / 2 * np.clip(direction * 1.5, -1, 1)
            box = Bbox([corner, corner + size])
            covered = sum(_area(Bbox.intersection(box, other)) for other in taken)
            outside = _area(box) - _area(Bbox.intersection(box, inside))
            if covered + outside < least:
                best, least = box, covered + outside
            if least < 1.0:
                return best
    return best


def _area(box: Bbox | None) -> float:
    return 0.0 if box is None else float(box.width * box.height)


def save(figure: Figure, path: str | Path) -> Path:
    """Write a picture; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi="figure", facecolor="white")
    return path
