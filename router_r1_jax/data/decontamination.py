"""Decontamination (train/test leak check): which questions count as equal, whatever their case, marks and articles."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable

import numpy as np

_WORD = re.compile(r"[^\W_]+")
_ARTICLES = frozenset({"a", "an", "the"})


def question_key(question: str) -> bytes:
    """Hash of a normalised question, 16 bytes.

    Two questions have the same key if they differ only in case, marks, articles, white space or compatible letters.
    The probability that any two of a million other questions have the same key is 1e-27.
    """
    words = _WORD.findall(unicodedata.normalize("NFKC", question).casefold())
    text = " ".join(word for word in words if word not in _ARTICLES) or question
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def key_array(keys: bytes | bytearray) -> np.ndarray:
    """Keys that stand one after the other in `keys`, as an array [N] of 16 bytes each, for sorting and comparing."""
    return np.frombuffer(keys, "S16")


def question_keys(questions: Iterable[str]) -> np.ndarray:
    """[N] the `question_key` of each question."""
    return key_array(b"".join(map(question_key, questions)))
