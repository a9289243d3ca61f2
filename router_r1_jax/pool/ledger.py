"""The ledger: one JSON line per call, in the order in which calls end, and the sums of them.

The file is only ever appended to: what was paid stays written, also where a run goes back to a checkpoint and makes
calls again. The sums belong to the run and go with its checkpoint.
"""

import json
import os
import threading
import time
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
        data = (json.dumps(line) + "\n").encode()
        with self._lock:
            try:
                written = self._file.write(data)  # unbuffered, one write: lines of several processes do not mix
                if written < len(data):  # a full disk may take a part; the next write then says why
                    self._file.write(data[written:])
            except OSError as error:
                raise self._error(error) from error
            sums = self._sums.setdefault(reply.model, [0] * len(_SUMS))
            sums[0] += 1
            sums[1] += _parts(reply.charged)
            sums[2] += _parts(reply.spent)
            self._paid += _parts(reply.spent)

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

    def restore(self, state: dict[str, list[int]]) -> None:
        """Go on from the sums that `state` returned."""
        with self._lock:
            self._sums = {model: list(sums) for model, sums in state.items()}

    def close(self) -> None:
        """Close the file; `add` must not be called any more."""
        self._file.close()

    def _error(self, error: OSError) -> PoolError:
        return PoolError(
            f"ledger {self._path} cannot be written ({error.strerror}); make room or choose another workdir"
        )


def read_ledger(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a ledger, without any that a kill has torn."""
    lines = []
    for text in Path(path).read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _parts(dollars: float) -> int:
    return round(dollars * _PARTS)


def _in_dollars(sums: list[int]) -> dict[str, float]:
    return {"calls": sums[0], "charged": sums[1] / _PARTS, "spent": sums[2] / _PARTS}
