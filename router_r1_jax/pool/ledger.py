"""The cost ledger: one JSON line per call with its tokens, dollars and outcome, and the sums that a checkpoint keeps.

The file is only appended to. So the dollars that were paid stay written, even if a run goes back to a checkpoint and
makes calls again. The sums belong to the run and are saved in its checkpoint. When a run goes back, the ledger writes a
line {"back_to": size of the file in bytes, "step": step}. Calls behind that size that belong to later steps are made
again: they are no longer counted or charged, but they stay spent.
"""

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from router_r1_jax.pool.outcomes import PoolError, Reply

# Dollars are summed in whole units of this size, so that the sum does not depend on the order in which calls end.
UNITS_PER_DOLLAR = 10**12
_SUMS = ("calls", "charged", "spent")
_TOKENS = ("prompt_tokens", "completion_tokens", "cached_tokens", "estimated")
_FIELDS = ("model", "outcome", *_TOKENS, "charged", "spent", "latency", "attempts", "hit", "error")  # of a Reply


class Ledger:
    """Appends to the file at `path`; threads and processes may share it. `price_date` is written into every line."""

    def __init__(self, path: str | Path, *, price_date: str = "") -> None:
        self._path = Path(path)
        self._price_date = price_date
        self._lock = threading.Lock()
        self._sums: dict[str, list[int]] = {}  # model -> sums in the order of _SUMS
        self._paid = 0  # in units; includes calls that were made again after a restart
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.is_file():
                self._paid = sum(units(line["spent"]) for line in read_ledger(self._path))
            self._file = open(self._path, "a+b", buffering=0)
            if (size := self._size()) and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
                self._file.write(b"\n")  # end a line that a killed process has not finished
        except OSError as error:
            raise self._error(error) from error

    def add(self, reply: Reply, *, step: int, split: str, episode: str, call: int) -> None:
        """Write one call; `call` counts the episode's calls from 0. Raises PoolError if the file cannot be written."""
        line = {"step": step, "split": split, "episode": episode, "call": call}
        line |= {field: getattr(reply, field) for field in _FIELDS}
        line |= {"latency": round(reply.latency, 4), "price_date": self._price_date}
        with self._lock:
            self._write(line)
            sums = self._sums.setdefault(reply.model, [0] * len(_SUMS))
            for i, amount in enumerate((1, units(reply.charged), units(reply.spent))):
                sums[i] += amount
            self._paid += units(reply.spent)

    def add_router(self, *, step: int, split: str, read_tokens: int, sampled_tokens: int) -> None:
        """Write the tokens that the router read and sampled in one rollout; raises PoolError as `add` does."""
        tokens = {"router_read_tokens": read_tokens, "router_sampled_tokens": sampled_tokens}
        with self._lock:
            self._write({"step": step, "split": split} | tokens)

    @property
    def paid(self) -> float:
        """Dollars spent by all calls in the file, including those before a restart."""
        with self._lock:
            return self._paid / UNITS_PER_DOLLAR

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON.

        `ledger` maps each model to its calls, units charged and units spent; the model of a policy's fault is "".
        `ledger_size` is the size of the file in bytes, which tells `restore` which calls came later.
        """
        with self._lock:
            sums = {model: list(sums) for model, sums in sorted(self._sums.items())}
            return {"ledger": sums, "ledger_size": self._size()}

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Continue from the state that the ledger had after `step`; what was spent stays spent."""
        size = state["ledger_size"]
        with self._lock:
            self._sums = {model: list(sums) for model, sums in state["ledger"].items()}
            later = [line for offset, line in ledger_lines(self._path) if offset >= size and "back_to" not in line]
            for line in later:
                if "model" in line:
                    sums = self._sums.setdefault(line["model"], [0] * len(_SUMS))
                    sums[_SUMS.index("spent")] += units(line["spent"])
            # Calls of `step` itself, such as those of an evaluation, may also come later. They are not made again.
            if any(line["step"] > step for line in later):
                self._write({"back_to": size, "step": step})

    def close(self) -> None:
        """Close the file; `add` must not be called any more."""
        self._file.close()

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _write(self, line: dict[str, Any]) -> None:
        data = (json.dumps({"time": round(time.time(), 3)} | line) + "\n").encode()
        try:
            # One unbuffered write per line: lines of several processes do not mix.
            written = self._file.write(data)
            if written < len(data):  # a full disk may take a part; the next write raises the error
                self._file.write(data[written:])
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> PoolError:
        return PoolError(
            f"ledger {self._path} cannot be written ({error.strerror}); make room or choose another workdir"
        )


def read_ledger(path: str | Path) -> list[dict[str, Any]]:
    """The calls of a ledger, in the order in which they ended."""
    return [line for _, line in ledger_lines(path) if "model" in line]


def ledger_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Byte offset and content of each line; lines that a killed process has not finished are left out."""
    offset = 0
    for text in Path(path).read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict):
            yield offset, line
        offset += len(text) + 1


def spent_dollars(state: Mapping[str, Any]) -> float:
    """Dollars really paid, from the state that `Ledger.state` returns."""
    return sum(sums[_SUMS.index("spent")] for sums in state["ledger"].values()) / UNITS_PER_DOLLAR


def units(dollars: float) -> int:
    """Dollars in the units in which the ledger sums."""
    return round(dollars * UNITS_PER_DOLLAR)
