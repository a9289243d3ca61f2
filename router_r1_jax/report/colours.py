"""Colours of the plots and the report page: the palette, and one colour per external model."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle

ALONE_SUFFIX = " alone"  # name of a reference policy that always asks one model
INK, MUTED, GRID = "#222222", "#6b6b6b", "#e4e4e4"  # of plots: text, lesser text, lines
BLUE, ORANGE, GREEN, PINK, GREY = PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8a8a8a")
POLICY_COLOURS = (BLUE, GREY, GREEN, PINK)

# Six hues of Okabe and Ito (2008) and four of Tol's "muted" scheme. They differ for every kind of colour blindness.
# None is too light for a white page, and none is too dark for a dark page.
_HUES = "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #56B4E9 #999933 #882255 #DDCC77 #6A5ACD".split()


def share_columns(rows: Sequence[Mapping[str, float]]) -> tuple[dict[str, str], list[dict[str, float]]]:
    """Columns (name -> colour) for rows of model shares, and the rows with exactly these columns.

    Models that were never called have no column. If more than eleven were called, the ten most called have their
    columns, sorted by name, and the others share one: there are ten hues, and "1 other" would save no room.
    """
    totals: Counter[str] = Counter()
    for row in rows:
        totals.update(row)
    called = sorted(name for name, total in totals.items() if total)
    if len(called) <= len(_HUES) + 1:
        colours = model_colours(totals)
        return {name: colours[name] for name in called}, [{name: row.get(name, 0.0) for name in called} for row in rows]
    named = sorted(sorted(called, key=lambda name: -totals[name])[: len(_HUES)])
    others = f"{len(called) - len(named)} others"
    rest = [sum(share for name, share in row.items() if name not in named) for row in rows]
    merged = [{name: row.get(name, 0.0) for name in named} | {others: x} for row, x in zip(rows, rest, strict=True)]
    return model_colours(named) | {others: GREY}, merged


def model_colours(names: Iterable[str]) -> dict[str, str]:
    """A colour per model. The same names always get the same colours; hues repeat after ten models."""
    return dict(zip(sorted(names), cycle(_HUES), strict=False))
