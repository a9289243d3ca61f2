"""Colours and number formats that the plots and the page share, so that a model looks the same everywhere."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

SHARE_PREFIX = "calls/share/"  # metric key of one model's share of the calls
ALONE_SUFFIX = " alone"  # a reference policy that always asks one model
INK, MUTED, GRID = "#222222", "#6b6b6b", "#e4e4e4"  # of plots: text, lesser text, lines
MOST_NAMED = 10  # models, where many were called: as many as there are hues
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8a8a8a"

# Six hues of Okabe and Ito (2008) and four of Tol's "muted" scheme: told apart with any colour blindness, and none so
# light that it is lost on white or so dark that it is lost on the dark page.
_HUES = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999933", "#882255", "#DDCC77", "#6A5ACD",
)  # fmt: skip


def model_names(metrics: Iterable[Mapping[str, Any]], results: Mapping[str, Any]) -> list[str]:
    """Names of all external models that a run's metrics and results mention, sorted."""
    names = {key.removeprefix(SHARE_PREFIX) for line in metrics for key in line if key.startswith(SHARE_PREFIX)}
    for policy in results.get("policies", ()):
        names.update(policy.get("calls_share") or {})
    for reference in results.get("references", ()):
        if reference["name"].endswith(ALONE_SUFFIX):
            names.add(reference["name"].removesuffix(ALONE_SUFFIX))
    return sorted(names)


def most_called(shares: Mapping[str, float]) -> tuple[list[str], str]:
    """The models that a plot or table has room to name, of all that were called, sorted; and what to call the others.

    The ten most called where there are more, but of eleven all: the last takes no more room than "1 other". Then the
    second is empty.
    """
    called = sorted(name for name, share in shares.items() if share)
    if len(called) <= MOST_NAMED + 1:
        return called, ""
    named = sorted(sorted(called, key=lambda name: -shares[name])[:MOST_NAMED])
    return named, f"{len(called) - MOST_NAMED} others"


def model_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour per model, the same for the same set of names; hues repeat after ten models."""
    return dict(zip(sorted(names), cycle(_HUES), strict=False))


def significant_decimals(value: float) -> int:
    """Decimals that show three significant digits of a positive amount, at least two as money has."""
    return max(2, 2 - math.floor(math.log10(value)))


def dollars(value: float | None, decimals: int | None = None) -> str:
    """Dollars without exponent and, unless `decimals` says otherwise, with three significant digits: "$0.0000123"."""
    if value is None or not math.isfinite(value):
        return "–"
    if decimals is None:
        decimals = significant_decimals(abs(value)) if value else 0
    return f"{'-' if value < 0 else ''}${abs(value):,.{decimals}f}"


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal: 0.734 -> "73.4 %"."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"
