"""Questions from JSONL files in FlashRAG's form (`id`, `question`, `golden_answers`, `metadata`), one line at a time.

What cannot be used is said with file, line number and reason, never passed over. The files may be anything: a line is
read up to a bound, and of what has been read only 16 bytes per question's text and id are kept.
"""

import dataclasses
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from router_r1_jax.data.overlap import as_keys, digest, text_key
from router_r1_jax.data.questions import DataError, is_blank

MAX_LINE = 4 << 20  # bytes; a question with twenty paragraphs of context takes some 20 KB
MAX_BAD_LINES = 10_000  # however long the file: a report that long is no report
SHOWN = 10  # bad lines in an error's message
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class RawQuestion:
    """A usable line. `golds` are its answers that are not blank, `blank_golds` the number of the others."""

    id: str
    question: str
    golds: tuple[str, ...]
    blank_golds: int


@dataclasses.dataclass(frozen=True)
class BadLine:
    """A line that cannot be used, and why."""

    file: str
    number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a file holds.

    Attributes:
      lines: all, blank ones too.
      blank: lines of white space only; they are no questions, and no fault.
      blank_golds: answers of white space only, left out of their questions.
      bad: the lines that cannot be used.
      numbers: [N] int64, numbers of the usable lines.
      texts: [N] 16 bytes each, `text_key` of their questions.
    """

    lines: int
    blank: int
    blank_golds: int
    bad: tuple[BadLine, ...]
    numbers: np.ndarray
    texts: np.ndarray


class _LineError(ValueError):
    """What is wrong with a line."""


def _read_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, line) for each line, None for one that is longer than MAX_LINE and was skipped."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            if number == 1:
                line = line.removeprefix(_BOM)
            if len(line) < MAX_LINE or line.endswith(b"\n"):
                yield number, line
                continue
            while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                pass
            yield number, None


def _text(value: object, name: str) -> str:
    """The stripped text of a field that must be one."""
    if not isinstance(value, str):
        raise _LineError(f"{name} is {_shown(value)}; it must be text")
    if "\0" in value:
        raise _LineError(f"{name} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _LineError(f"{name} holds half of a surrogate pair, \\u{ord(value[error.start]):04x}") from error
    return value.strip()


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _parse(line: bytes) -> RawQuestion:
    """The question of a line. Raises _LineError."""
    try:
        entry = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _LineError(f"is not UTF-8 at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise _LineError(f"is not JSON ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
        raise _LineError(f"is not JSON that can be read ({str(error).partition(';')[0]})") from error
    if not isinstance(entry, dict):
        raise _LineError(f"is {_shown(entry)}; it must be an object with id, question and golden_answers")
    return _question(entry)


def _question(entry: dict[str, Any]) -> RawQuestion:
    for name in ("id", "question", "golden_answers"):
        if name not in entry:
            raise _LineError(f"{name} is missing")
    texts = {name: _text(entry[name], name) for name in ("id", "question")}
    for name, text in texts.items():
        if is_blank(text):
            raise _LineError(f"{name} is empty")
    answers = entry["golden_answers"]
    if not isinstance(answers, list):
        raise _LineError(f"golden_answers is {_shown(answers)}; it must be a list of texts")
    golds = [_text(answer, f"golden_answers[{i}]") for i, answer in enumerate(answers)]
    kept = tuple(gold for gold in golds if not is_blank(gold))
    if not kept:
        raise _LineError("golden_answers holds no answer")
    return RawQuestion(**texts, golds=kept, blank_golds=len(golds) - len(kept))


def read_questions(path: Path, name: str) -> Iterator[tuple[int, RawQuestion | BadLine | None]]:
    """(number, question, fault or None for a blank line) for each line of a file, which faults call `name`."""
    for number, line in _read_lines(path):
        if line is None:
            yield number, BadLine(name, number, f"is longer than {MAX_LINE >> 20} MiB")
        elif not line.strip():
            yield number, None
        else:
            try:
                yield number, _parse(line)
            except _LineError as error:
                yield number, BadLine(name, number, str(error))


def survey(path: Path, name: str, *, max_bad: float) -> Survey:
    """Read a whole file, which faults call `name`. Of lines with the same id all but the first are bad.

    Raises DataError where more than the share `max_bad` of the lines cannot be used, or none can.
    """
    numbers, ids, texts, bad = array("q"), bytearray(), bytearray(), []
    lines = blank = blank_golds = 0
    for number, found in tqdm(read_questions(path, name), desc=name, unit=" lines", leave=False, disable=None):
        lines = number
        if isinstance(found, RawQuestion):
            numbers.append(number)
            ids += digest(found.id)
            texts += text_key(found.question)
            blank_golds += found.blank_golds
        elif found is None:
            blank += 1
        else:
            bad.append(found)
            if len(bad) > MAX_BAD_LINES:
                _refuse(name, bad, f"more than {MAX_BAD_LINES}", "the most that is reported")
    at, keys = np.frombuffer(numbers, np.int64), as_keys(texts)
    repeats, first = _find_repeats(as_keys(ids))
    bad += [BadLine(name, int(at[i]), f"id is that of line {at[j]}") for i, j in zip(repeats, first, strict=True)]
    bad.sort(key=lambda line: line.number)
    if len(bad) > max_bad * (lines - blank):
        _refuse(name, bad, f"{len(bad)} of {lines - blank}", f"more than the share --max_bad={max_bad:g}")
    if not len(at):
        raise DataError(f"{name} holds no question; name a source whose {name} is JSONL with one question a line")
    return Survey(lines, blank, blank_golds, tuple(bad), np.delete(at, repeats), np.delete(keys, repeats))


def _find_repeats(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the keys that an earlier one equals, and the position of the first such one for each."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    first_of = first[inverse]  # np.unique gives first occurrences
    repeats = np.flatnonzero(first_of != np.arange(len(keys)))
    return repeats, first_of[repeats]


def _refuse(name: str, bad: list[BadLine], count: str, rule: str) -> None:
    shown = "".join(f"\n  {line}" for line in bad[:SHOWN]) + ("\n  ..." if len(bad) > SHOWN else "")
    raise DataError(f"{name}: {count} lines cannot be used, {rule}; correct them or the source:{shown}")
