"""JSON lines: append-only files of a run (episodes, metrics), crash safety, atomic file replacement.

A line is written in one piece and is not buffered, so `kill -9` can tear only the last one. A run that resumes removes
the torn line and every line after the restored step. It then plays those steps again, and the file reads as if the run
had never been killed.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from router_r1_jax.errors import UserError

EPISODES_FOLDER = "episodes"

Record = Mapping[str, Any]


class BrokenFileError(UserError, ValueError):
    """A file of the run does not hold what was written. The message names the file, the line and the fix."""


def replace_file(path: Path, content: bytes) -> None:
    """Write a whole file. After a crash or on a full disk, either the old file or the new one is there, never a half.

    Raises OSError that names the path.
    """
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.write_bytes(content)
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


class JsonLines(AbstractContextManager):
    """An append-only file of JSON objects, one per line. As a context manager it is closed at the end."""

    def __init__(self, path: Path, *, keep: Callable[[Record], bool]) -> None:
        """Open the file, or make it. Of existing lines only those stay for which `keep` is true.

        Raises BrokenFileError if a line before the last is no JSON object.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            replace_file(path, _encode(filter(keep, read_lines(path))))
        self.path = path
        self._file = path.open("ab", buffering=0)

    def write(self, records: Iterable[Record]) -> None:
        """Append one line per record, all in one piece. Numbers that are not finite become null.

        Raises OSError that names the file.
        """
        data = memoryview(_encode(records))
        size = self.path.stat().st_size
        try:
            while data:  # the system may take only a part of it at a time
                data = data[self._file.write(data) :]
        except OSError as error:
            self._file.truncate(size)  # if the caller goes on, it must not append to half a line
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


def up_to_step(resume_step: int | None) -> Callable[[Record], bool]:
    """A test whether a line stays in the file of a run that resumes from this step. If it is None, no line stays.

    The warm start counts its own steps and comes before every checkpoint, so its lines stay.
    """
    if resume_step is None:
        return lambda line: False
    return lambda line: line.get("phase") == "warmstart" or line.get("step", 0) <= resume_step


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a JSON-lines file; [] if there is no such file. A torn last line is left out.

    Raises BrokenFileError if a line before the last is no JSON object.
    """
    if not path.exists():
        return []
    complete, _, _ = path.read_bytes().rpartition(b"\n")  # text after the last line break is torn
    records = []
    for number, line in enumerate(complete.split(b"\n") if complete else (), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise BrokenFileError(f"{path}, line {number} is not JSON ({error}); delete that line") from error
        if not isinstance(record, dict):
            raise BrokenFileError(f"{path}, line {number} is {line[:40]!r}, not a JSON object; delete that line")
        records.append(record)
    return records


def write_episodes(workdir: Path, name: str, records: Iterable[Record]) -> None:
    """Write `<workdir>/episodes/<name>.jsonl` as a whole. Raises OSError that names the path."""
    path = workdir / EPISODES_FOLDER / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, _encode(records))


def read_episodes(workdir: str | Path) -> list[dict[str, Any]]:
    """All episodes of `<workdir>/episodes/*.jsonl`, file by file in order of name. Raises BrokenFileError."""
    paths = sorted((Path(workdir) / EPISODES_FOLDER).glob("*.jsonl"))
    return [episode for path in paths for episode in read_lines(path)]


def _encode(records: Iterable[Record]) -> bytes:
    # ASCII escapes: lone surrogates and U+2028 in external text would break the file or its lines.
    return "".join(json.dumps(plain_json(record), allow_nan=False) + "\n" for record in records).encode("ascii")


def plain_json(value: Any) -> Any:
    """The value in JSON types: array scalars become numbers, arrays become lists, and NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # NumPy and JAX arrays, and their scalars
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
