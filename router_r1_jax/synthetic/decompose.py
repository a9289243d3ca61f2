"""Question decomposition by pattern: nested questions of the synthetic world are split without a language model."""

import re
from collections.abc import Callable
from typing import Any

from router_r1_jax.baselines.decompose import PREVIOUS

_NESTED = re.compile(r"(?:Who|What|Where|Which) (?:is|was) the (.+)\?", re.IGNORECASE)


def by_pattern(question: str, ask: Callable[..., Any] | None = None) -> list[str]:
    """ "Who is the A of the B of X?" -> "B of X?", "A of {previous}?"; any other question as it is.

    `ask` is not called: a `baselines.decompose.Decompose` may ask a model, and this one need not.
    """
    nested = _NESTED.fullmatch(question.strip())
    if nested is None:
        return [question]
    *outer, inner = nested[1].split(" of the ")
    if not outer:
        return [question]
    return [f"{inner}?", *(f"{relation} of {PREVIOUS}?" for relation in reversed(outer))]
