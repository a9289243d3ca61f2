"""Cutting a question into parts that are asked one after the other: the published table's two starred rows.

There a language model decomposes and each part is routed by itself. Here that is `by_model`, for questions in plain
English; `by_pattern` reads the nested "the A of the B of X" that the synthetic world asks, without a model.
"""

import re
from collections.abc import Callable, Sequence

from router_r1_jax.pool.cards import Card
from router_r1_jax.pool.outcomes import Reply

PREVIOUS = "{previous}"  # stands in a part for the answer to the part before

# (question, how to ask a model) -> parts in order; always at least one.
Decompose = Callable[[str, Callable[[Card, str], Reply]], list[str]]

MOST_PARTS = 4  # the router's own limit on calls, as published
_NESTED = re.compile(r"(?:Who|What|Where|Which) (?:is|was) the (.+)\?", re.IGNORECASE)
_LIST_MARK = re.compile(r"^\s*(?:\d+[.):]|[-*])\s*")
_INSTRUCTION = (
    "Split the question below into the shortest list of simple questions that lead to its answer, at most {most}. "
    f"Write one on each line and nothing else. Write {PREVIOUS} where the answer to the line before belongs. "
    "If the question is simple already, repeat it.\nQuestion: {question}"
)


def by_pattern(question: str, ask: Callable[[Card, str], Reply]) -> list[str]:
    """ "Who is the A of the B of X?" -> "B of X?", "A of {previous}?"; any other question as it is."""
    nested = _NESTED.fullmatch(question.strip())
    if nested is None:
        return [question]
    *outer, inner = nested[1].split(" of the ")
    if not outer:
        return [question]
    return [f"{inner}?", *(f"{relation} of {PREVIOUS}?" for relation in reversed(outer))]


def by_model(card: Card) -> Decompose:
    """Ask a model of the pool to decompose. Its call is paid like any other.

    A reply that holds no usable list leaves the question whole.
    """

    def decompose(question: str, ask: Callable[[Card, str], Reply]) -> list[str]:
        instruction = _INSTRUCTION.replace("{most}", str(MOST_PARTS)).replace("{question}", question)
        return read_parts(ask(card, instruction).text) or [question]

    return decompose


def read_parts(reply: str) -> list[str]:
    """The questions of a list, one on each line; [] where the first leans on a former one or there are too many."""
    lines = [_LIST_MARK.sub("", line).strip() for line in reply.splitlines()]
    parts: Sequence[str] = [line for line in lines if line.endswith("?")]
    usable = 0 < len(parts) <= MOST_PARTS and PREVIOUS not in parts[0]
    return list(parts) if usable else []
