"""Question decomposition by a language model: parts that are asked one after the other, each routed by itself.

The paper's table has two baselines of this kind. The synthetic world has its own decomposition, which needs no model.
"""

import re
from collections.abc import Callable

from router_r1_jax.pool.cards import Card
from router_r1_jax.pool.outcomes import Reply

PREVIOUS = "{previous}"  # in a part, it stands for the answer to the part before

Ask = Callable[[Card, str], Reply]  # (model, query) -> reply
Decompose = Callable[[str, Ask], list[str]]  # question -> its parts in order, at least one

MOST_PARTS = 4  # the router's limit on calls, as published
_LIST_MARK = re.compile(r"^\s*(?:\d+[.):]|[-*])\s*")
_INSTRUCTION = (
    "Split the question below into the shortest list of simple questions that lead to its answer, at most "
    f"{MOST_PARTS}. Write one on each line and nothing else. Write {PREVIOUS} where the answer to the line before "
    "belongs. If the question is simple already, repeat it.\nQuestion: "
)


def by_model(card: Card) -> Decompose:
    """A decomposition by this model. Its call is charged like any other.

    If the reply holds no usable list, the question stays whole.
    """

    def decompose(question: str, ask: Ask) -> list[str]:
        return read_parts(ask(card, _INSTRUCTION + question).text) or [question]

    return decompose


def read_parts(reply: str) -> list[str]:
    """The questions of a list, one on each line; [] if the first refers to a previous one, or there are too many."""
    lines = [_LIST_MARK.sub("", line).strip() for line in reply.splitlines()]
    parts = [line for line in lines if line.endswith("?")]
    return parts if 0 < len(parts) <= MOST_PARTS and PREVIOUS not in parts[0] else []
