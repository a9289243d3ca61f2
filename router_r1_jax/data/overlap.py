"""When two questions count as the same, and how many questions of one split stand in another."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable

import numpy as np

_WORD = re.compile(r"[^\W_]+")
_ARTICLES = frozenset({"a", "an", "the"})


def text_key(question: str) -> bytes:
    """16 bytes that questions share which differ in case, marks, articles, white space or compatible letters only."""
    words = _WORD.findall(unicodedata.normalize("NFKC", question).casefold())
    text = " ".join(word for word in words if word not in _ARTICLES) or question
    return digest(text)


def digest(text: str) -> bytes:
    """16 bytes that stand for a text; two texts of a million share them with a chance of 1e-27."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def as_keys(digests: bytes | bytearray) -> np.ndarray:
    """Digests behind each other as an array [N] of 16 bytes each, which NumPy sorts and compares."""
    return np.frombuffer(digests, "S16")


def text_keys(questions: Iterable[str]) -> np.ndarray:
    """[N] the `text_key` of each question."""
    return as_keys(b"".join(map(text_key, questions)))
