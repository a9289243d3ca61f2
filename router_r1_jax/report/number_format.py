"""Number formats (percent, points, dollars, intervals) and Markdown escaping of the report page and the tables."""

import math
from collections.abc import Callable, Sequence


def percent(share: float) -> str:
    """A share as a percentage with one decimal: 0.734 -> "73.4 %"."""
    return f"{points(share)} %"


def points(share: float) -> str:
    """A share in percentage points, for columns whose unit stands elsewhere: 0.734 -> "73.4"."""
    return f"{100 * share:.1f}"


def signed_points(share: float) -> str:
    """A difference of two shares in percentage points: 0.01 -> "+1.0"."""
    return f"{100 * share:+.1f}"


def dollars(value: float) -> str:
    """Dollars without exponent, with four significant digits and at least cents: "$0.00001234"; 0 is "$0"."""
    decimals = max(2, 3 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{'-' if value < 0 else ''}${abs(value):,.{decimals}f}"


def interval(show: Callable[[float], str], value: float, ends: Sequence[float] | None) -> str:
    """A value and its interval, if it has one: "40.0 [36.0, 44.0]". `show` formats all three numbers."""
    return show(value) if ends is None else f"{show(value)} [{show(ends[0])}, {show(ends[1])}]"


def escape_markdown(value: object) -> str:
    """Text that stays in one cell and one line of Markdown, whatever a name holds."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
