"""Plot style shared by all plots: figure size and resolution, axes, number formats of the ticks, writing a PNG."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from router_r1_jax.report.colours import GRID, INK, MUTED


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, whose layout makes room for labels."""
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def dress(axes: Axes, title: str, unit: str = "", xlabel: str = "") -> None:
    """Title, grid, ticks and labels. The units "%" and "$" set the format of the y axis, any other is its label."""
    axes.set_title(title, fontsize=10, loc="left", color=INK, fontweight="bold")
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.tick_params(colors=MUTED, labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set_xlabel(xlabel, color=MUTED, fontsize=9)
    if unit == "%":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=" %"))
    elif unit == "$":
        axes.yaxis.set_major_formatter(dollar_ticks())
    else:
        # Plain numbers, because matplotlib's shared factor above the axis ("1e-6") would run into the title.
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylabel(unit, color=MUTED, fontsize=8)


def dollar_ticks() -> FuncFormatter:
    """Tick labels in dollars without trailing zeros: "$0.00002"."""
    return FuncFormatter(lambda value, _: "$" + f"{value:.10f}".rstrip("0").rstrip("."))


def add_legend(axes: Axes, corner: str, anchor: tuple[float, float], columns: int) -> None:
    """A legend without a frame, whose `corner` lies at `anchor`, in fractions of the axes."""
    axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc=corner, bbox_to_anchor=anchor, ncols=columns)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a PNG; its folder is made if it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi="figure", facecolor="white")
    return path
