"""The answer of a response, and how well it agrees with the gold answers.

Normalisation, exact match and F1 are those of SQuAD and HotpotQA, as the published Router-R1 code applies them.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

from router_r1_jax.protocol import ANSWER, close_tag, open_tag

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# HotpotQA's closed answers: sharing a word with one of them earns nothing.
_CLOSED_ANSWERS = frozenset({"yes", "no", "noanswer"})


def extract_answer(response: str) -> str | None:
    """The stripped inside of the last `<answer>` pair; None without a pair.

    Other tags do not matter here: an answer inside of a think segment is found too (`check_format` faults it).
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
    """Lower case, without ASCII punctuation and the words a, an, the; white space collapsed."""
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the golds after normalisation, else 0.0."""
    normalized = normalize_answer(prediction)
    return float(any(normalized == normalize_answer(gold) for gold in _checked(golds)))


def sub_exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1.0 if one of the golds occurs in the prediction after normalisation, else 0.0. An empty gold occurs always."""
    normalized = normalize_answer(prediction)
    return float(any(normalize_answer(gold) in normalized for gold in _checked(golds)))


def f1_score(prediction: str, golds: Sequence[str]) -> float:
    """Best F1 of the prediction's tokens against those of one gold, counted with multiplicity; in [0, 1]."""
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
    """Refuse a bare string, whose characters would pass for golds and make every metric quietly wrong."""
    if isinstance(golds, str):
        raise TypeError(f"golds is the string {golds!r}; pass a list of gold answers")
    return golds
