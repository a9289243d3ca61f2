"""Exact match and F1 with answer normalisation, and the extraction of a response's answer.

The metrics are those of SQuAD and HotpotQA, as the published Router-R1 code applies them.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

from router_r1_jax.protocol import ANSWER, close_tag, open_tag

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# HotpotQA's closed answers: a different answer that shares a word with one of them gets F1 0.
_CLOSED_ANSWERS = frozenset({"yes", "no", "noanswer"})


def extract_answer(response: str) -> str | None:
    """The text of the last `<answer>` pair, stripped; None if there is no pair.

    Other tags do not matter here. An answer inside of a think segment is found too; `check_format` reports it.
    """
    answer = None
    position = 0
    while True:
        start = response.find(open_tag(ANSWER), position)
        end = response.find(close_tag(ANSWER), start)
        if start < 0 or end < 0:
            return answer
        answer = response[start + len(open_tag(ANSWER)) : end].strip()
        position = end


def normalize_answer(text: str) -> str:
    """The text in lower case, without ASCII punctuation and the words a, an, the, and with white space collapsed."""
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the golds after normalisation, else 0.0."""
    normalized = normalize_answer(prediction)
    return float(any(normalized == normalize_answer(gold) for gold in _checked(golds)))


def sub_exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1.0 if the prediction contains one of the golds after normalisation, else 0.0. An empty gold always counts."""
    normalized = normalize_answer(prediction)
    return float(any(normalize_answer(gold) in normalized for gold in _checked(golds)))


def f1_score(prediction: str, golds: Sequence[str]) -> float:
    """F1 of the prediction's and a gold's tokens, counted with multiplicity, for the best gold; in [0, 1]."""
    normalized = normalize_answer(prediction)
    return max((_f1(normalized, normalize_answer(gold)) for gold in _checked(golds)), default=0.0)


def _f1(prediction: str, gold: str) -> float:
    """F1 of two normalised answers."""
    if prediction != gold and (prediction in _CLOSED_ANSWERS or gold in _CLOSED_ANSWERS):
        return 0.0
    ours, theirs = Counter(prediction.split()), Counter(gold.split())
    common = (ours & theirs).total()
    return 2.0 * common / (ours.total() + theirs.total()) if common else 0.0


def _checked(golds: Sequence[str]) -> Sequence[str]:
    """Refuse a bare string: its characters would be taken for golds, and every metric would be wrong."""
    if isinstance(golds, str):
        raise TypeError(f"golds is the string {golds!r}; pass a list of gold answers")
    return golds
