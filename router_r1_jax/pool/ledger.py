"""The ledger: one JSON line per call, in the order in which calls end, one per rollout with the router's own tokens,
and the sums of them.

The file is only ever appended to: what was paid stays written, also where a run goes back to a checkpoint and makes
calls again. The sums belong to the run and go with its checkpoint. Where a run goes back, a line says to which size of
the file and which step: calls of later steps behind it are made again, so they are neither counted nor charged any
more, but they stay spent.
"""

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from router_r1_jax.pool.outcomes import PoolError, Reply

# Dollars are summed as whole parts of this size: such a sum does not depend on the order in which calls end.
_PARTS = 10**12  # per dollar
_SUMS = ("calls", "charged", "spent")


class Ledger:
    """Appends to the file at `path`; threads and processes may share it. `price_date` is written into every line."""

    def __init__(self, path: str | Path, *, price_date: str = "") -> None:
        self._path = Path(path)
        self._price_date = price_date
        self._lock = threading.Lock()
        self._sums: dict[str, list[int]] = {}  # model -> in the order of _SUMS
        self._paid = 0  # parts; also of calls that a restart has made again
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.is_file():
                self._paid = sum(_parts(line.get("spent", 0.0)) for line in read_ledger(self._path))
            self._file = open(self._path, "a+b", buffering=0)
            size = os.fstat(self._file.fileno()).st_size
            if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
                self._file.write(b"\n")  # a line that a kill has torn must not swallow the next one
        except OSError as error:
            raise self._error(error) from error

    def add(self, reply: Reply, *, step: int, split: str, episode: str, call: int) -> None:
        """Write down one call; `call` counts the episode's calls from 0. Raises PoolError where that fails."""
        line = {
            "time": round(time.time(), 3),
            "step": step,
            "split": split,
            "episode": episode,
            "call": call,
            "model": reply.model,
            "outcome": reply.outcome,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "cached_tokens": reply.cached_tokens,
            "charged": reply.charged,
            "spent": reply.spent,
            "latency": round(reply.latency, 4),
            "attempts": reply.attempts,
            "hit": reply.hit,
            "error": reply.error,
            "price_date": self._price_date,
        }
        with self._lock:
            self._write(line)
            sums = self._sums.setdefault(reply.model, [0] * len(_SUMS))
            sums[0] += 1
            sums[1] += _parts(reply.charged)
            sums[2] += _parts(reply.spent)
            self._paid += _parts(reply.spent)

    def add_router(self, *, step: int, split: str, read_tokens: int, sampled_tokens: int) -> None:
        """Write down the tokens that the router read and sampled in one rollout. Raises PoolError where that fails."""
        line = {"time": round(time.time(), 3), "step": step, "split": split}
        with self._lock:
            self._write(line | {"router_read_tokens": read_tokens, "router_sampled_tokens": sampled_tokens})

    @property
    def paid(self) -> float:
        """Dollars spent by all calls in the file, those before a restart included."""
        with self._lock:
            return self._paid / _PARTS

    def totals(self) -> dict[str, Any]:
        """Calls, and dollars charged and spent, in all and under "models" for each model ("" is none)."""
        with self._lock:
            models = {model: _in_dollars(sums) for model, sums in sorted(self._sums.items())}
            in_all = _in_dollars([sum(column) for column in zip(*self._sums.values(), strict=True)] or [0] * len(_SUMS))
        return {**in_all, "models": models}

    def state(self) -> dict[str, list[int]]:
        """The sums for a checkpoint, as JSON."""
        with self._lock:
            return {model: list(sums) for model, sums in sorted(self._sums.items())}

    @property
    def size(self) -> int:
        """Bytes of the file; a checkpoint keeps it, to tell later which calls it knew."""
        return os.fstat(self._file.fileno()).st_size

    def restore(self, state: dict[str, list[int]], size: int, step: int) -> None:
        """Go on from what `state` returned after `step`, when the file had `size` bytes; what was spent stays spent."""
        with self._lock:
            self._sums = {model: list(sums) for model, sums in state.items()}
            lines = [(offset, line) for offset, line in _lines(self._path) if "back_to" not in line]
            for offset, line in lines:
                if offset >= size and "model" in line:
                    self._sums.setdefault(line["model"], [0] * len(_SUMS))[2] += _parts(line["spent"])
            if _made_again(lines, size, step):
                self._write({"time": round(time.time(), 3), "back_to": size, "step": step})

    def close(self) -> None:
        """Close the file; `add` must not be called any more."""
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        data = (json.dumps(line) + "\n").encode()
        try:
            written = self._file.write(data)  # unbuffered, one write: lines of several processes do not mix
            if written < len(data):  # a full disk may take a part; the next write then says why
                self._file.write(data[written:])
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> PoolError:
        return PoolError(
            f"ledger {self._path} cannot be written ({error.strerror}); make room or choose another workdir"
        )


def read_ledger(path: str | Path) -> list[dict[str, Any]]:
    """The calls of a ledger, without any line that a kill has torn."""
    return [line for _, line in _lines(path) if "model" in line]


def ledger_totals(path: str | Path) -> dict[str, Any]:
    """The sums that a ledger's file gives for all runs in it: in all, under "models" per model, under "steps" per step,
    and under "router" the tokens that the router itself read and sampled.

    Calls and rollouts that a restart has made again do not count; such calls stay spent.
    """
    entries: list[tuple[int, dict[str, Any]]] = []
    again: set[int] = set()  # offsets
    for offset, line in _lines(path):
        if "back_to" in line:
            again |= _made_again(entries, line["back_to"], line["step"])
        else:
            entries.append((offset, line))
    rollouts = [line for offset, line in entries if "model" not in line and offset not in again]
    router = {name: sum(line[f"router_{name}"] for line in rollouts) for name in ("read_tokens", "sampled_tokens")}
    in_all, models, steps = [0] * len(_SUMS), {}, {}
    for offset, line in entries:
        if "model" not in line:
            continue
        counts = offset not in again
        parts = (int(counts), counts * _parts(line["charged"]), _parts(line["spent"]))
        for sums in (in_all, models.setdefault(line["model"], [0] * 3), steps.setdefault(line["step"], [0] * 3)):
            for i, part in enumerate(parts):
                sums[i] += part
    named = {"models": models, "steps": steps}
    return (
        _in_dollars(in_all)
        | {name: {key: _in_dollars(sums) for key, sums in sorted(table.items())} for name, table in named.items()}
        | {"router": router}
    )


def spent_dollars(state: Mapping[str, Sequence[int]]) -> float:
    """Dollars really paid by the calls whose sums a `Ledger.state` holds."""
    return sum(sums[_SUMS.index("spent")] for sums in state.values()) / _PARTS


def _made_again(lines: Sequence[tuple[int, dict[str, Any]]], size: int, step: int) -> set[int]:
    """Offsets of what a run makes again on going back to `step`, where the file had `size` bytes.

    They belong to later steps; an evaluation of a step that is kept stands behind too, and is not repeated.
    """
    return {offset for offset, line in lines if offset >= size and line["step"] > step}


def _lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Offset and content of each whole line."""
    offset = 0
    for text in Path(path).read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict):
            yield offset, line
        offset += len(text) + 1


def _parts(dollars: float) -> int:
    return round(dollars * _PARTS)


def _in_dollars(sums: list[int]) -> dict[str, float]:
    return {"calls": sums[0], "charged": sums[1] / _PARTS, "spent": sums[2] / _PARTS}
