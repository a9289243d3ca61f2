"""FlashRAG JSONL (`id`, `question`, `golden_answers`, `metadata`): questions are parsed and checked line by line.

A line that cannot be used is reported with its file, number and reason; it is never skipped silently. The files may
hold anything, so the length of a line is bounded, and memory holds only the id and a hash of each question.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from router_r1_jax.data.decontamination import key_array, question_key
from router_r1_jax.data.questions import DataError
from router_r1_jax.protocol import neutralize

MAX_LINE = 4 << 20  # bytes; a question with twenty paragraphs of context takes about 20 KB
MAX_BAD_LINES = 10_000  # a longer report helps nobody
SHOWN_BAD_LINES = 10  # in an error message
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class RawQuestion:
    """The question of one line. `golds` are the gold answers with text; `blank_golds` counts those without."""

    id: str
    question: str
    golds: tuple[str, ...]
    blank_golds: int


@dataclasses.dataclass(frozen=True)
class FileScan:
    """The content of a file.

    Attributes:
      counts: lines (all of them), questions (usable lines), bad_lines, blank_lines (white space only, which is no
        error) and blank_answers (left out of their questions).
      bad_lines: "file:number: reason" for each line that cannot be used.
      numbers: [N] int64, numbers of the usable lines.
      keys: [N] 16 bytes each, `question_key` of their questions.
    """

    counts: dict[str, int]
    bad_lines: list[str]
    numbers: np.ndarray
    keys: np.ndarray


class _LineError(ValueError):
    """The reason why a line cannot be used."""


def read_questions(path: Path, name: str) -> Iterator[tuple[int, RawQuestion | str | None]]:
    """For each line of a file its number from 1, and its question, its error as text, or None if the line is blank.

    Errors and the progress bar call the file `name`.
    """
    for number, line in tqdm(_read_lines(path), desc=name, unit=" lines", leave=False, disable=None):
        if line is None:
            yield number, f"{name}:{number}: is longer than {MAX_LINE >> 20} MiB"
        elif not line.strip():
            yield number, None
        else:
            try:
                yield number, _parse_line(line)
            except _LineError as error:
                yield number, f"{name}:{number}: {error}"


def _read_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, bytes) of each line, or None in place of the bytes if the line is longer than MAX_LINE."""
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


def _parse_line(line: bytes) -> RawQuestion:
    """Raises _LineError."""
    try:
        entry = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _LineError(f"is not UTF-8 at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise _LineError(f"is not JSON ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or very deep brackets
        raise _LineError(f"is not JSON that can be read ({str(error).partition(';')[0]})") from error
    if not isinstance(entry, dict):
        raise _LineError(f"is {_shorten(entry)}; it must be an object with id, question and golden_answers")
    for name in ("id", "question", "golden_answers"):
        if name not in entry:
            raise _LineError(f"{name} is missing")
    texts = {name: _parse_text(entry[name], name) for name in ("id", "question")}
    for name, text in texts.items():
        if _is_blank(text):
            raise _LineError(f"{name} is empty")
    answers = entry["golden_answers"]
    if not isinstance(answers, list):
        raise _LineError(f"golden_answers is {_shorten(answers)}; it must be a list of texts")
    golds = [_parse_text(answer, f"golden_answers[{i}]") for i, answer in enumerate(answers)]
    kept = tuple(gold for gold in golds if not _is_blank(gold))
    if not kept:
        raise _LineError("golden_answers holds no answer")
    return RawQuestion(**texts, golds=kept, blank_golds=len(golds) - len(kept))


def _parse_text(value: object, name: str) -> str:
    """The text of the field `name`, stripped."""
    if not isinstance(value, str):
        raise _LineError(f"{name} is {_shorten(value)}; it must be text")
    if "\0" in value:
        raise _LineError(f"{name} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _LineError(f"{name} holds half of a surrogate pair, \\u{ord(value[error.start]):04x}") from error
    return value.strip()


def _is_blank(text: str) -> bool:
    """Whether a text has only white space and invisible characters, so that nothing of it would reach a prompt."""
    return not neutralize(text).strip()


def _shorten(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def scan_file(path: Path, name: str, *, max_bad: float) -> FileScan:
    """Read a whole file; errors call it `name`. If lines have the same id, all but the first of them are bad.

    Raises DataError if more than the share `max_bad` of the lines is bad, or if no line is usable.
    """
    first_line: dict[str, int] = {}  # id -> number of the first line that has it
    numbers, keys, bad = [], bytearray(), []
    counts = dict.fromkeys(("lines", "questions", "bad_lines", "blank_lines", "blank_answers"), 0)
    for number, found in read_questions(path, name):
        counts["lines"] = number
        if isinstance(found, RawQuestion):
            counts["blank_answers"] += found.blank_golds
            first = first_line.setdefault(found.id, number)
            if first == number:
                numbers.append(number)
                keys += question_key(found.question)
            else:
                bad.append(f"{name}:{number}: id is that of line {first}")
        elif found is None:
            counts["blank_lines"] += 1
        else:
            bad.append(found)
        if len(bad) > MAX_BAD_LINES:
            _refuse(name, bad, f"more than {MAX_BAD_LINES}", "the most that is reported")
    filled = counts["lines"] - counts["blank_lines"]
    if len(bad) > max_bad * filled:
        _refuse(name, bad, f"{len(bad)} of {filled}", f"more than the share --max_bad={max_bad:g}")
    if not numbers:
        raise DataError(f"{name} holds no question; name a source whose {name} is JSONL with one question a line")
    counts |= {"bad_lines": len(bad), "questions": len(numbers)}
    return FileScan(counts, bad, np.array(numbers, np.int64), key_array(keys))


def _refuse(name: str, bad: list[str], count: str, rule: str) -> None:
    lines = bad[:SHOWN_BAD_LINES] + ["..."] * (len(bad) > SHOWN_BAD_LINES)
    shown = "".join(f"\n  {line}" for line in lines)
    raise DataError(f"{name}: {count} lines cannot be used, {rule}; correct them or the source:{shown}")
