"""The tape: external calls recorded in SQLite, so that a run can be repeated without the network and without paying.

A reply is found by what was asked (provider, model, messages, parameters), and where the model samples (temperature
above 0) also by who asked (episode and call). A fault says nothing of the question: it is kept by who asked and
repeated in replay only, never while recording.

    python -m router_r1_jax.pool.tape stats|export|merge ...
"""

import argparse
import hashlib
import json
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router_r1_jax.pool.outcomes import Completion, Outcome, PoolError, provider_fault

_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, provider TEXT, request TEXT, text TEXT, outcome TEXT,
    prompt_tokens INTEGER, completion_tokens INTEGER, latency REAL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS faults (
    key TEXT, episode TEXT, call INTEGER, outcome TEXT, error TEXT, latency REAL, PRIMARY KEY (key, episode, call)
) WITHOUT ROWID;
"""
_LOCK_TIMEOUT = 30.0  # seconds for which a process waits for another one's write


class TapeMiss(PoolError):  # noqa: N818  a miss is what it is called
    """In strict mode, a call that is not on the tape."""


@dataclass(frozen=True)
class Request:
    """One call as the tape knows it: the provider's name, the request body, and who asks."""

    provider: str
    body: Mapping[str, Any]
    episode: str
    call: int

    def key(self) -> str:
        """Hash of all that the reply depends on. A body without a temperature leaves it to the provider: it samples."""
        samples = self.body.get("temperature", 1.0) > 0
        parts = [self.provider, self.body, [self.episode, self.call] if samples else None]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Tape:
    """The tape at `path`, in mode "record", "replay" or "strict". Threads and processes may share it.

    record: a recorded reply is served; all else is asked and recorded.
    replay: the same, and recorded faults are repeated.
    strict: as replay, but a call that is not on the tape raises TapeMiss.
    """

    def __init__(self, path: str | Path, mode: str) -> None:
        """Raises PoolError where the file is no tape, or is absent in strict mode."""
        self._path = Path(path)
        self._mode = mode
        self._lock = threading.Lock()
        if mode == "strict" and not self._path.exists():
            raise PoolError(f"tape {self._path} does not exist; record it first with pool.tape.mode=record")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Autocommit: one statement is one transaction, which is all that is needed here.
            self._db = sqlite3.connect(self._path, _LOCK_TIMEOUT, isolation_level=None, check_same_thread=False)
            _use_wal(self._db)
            self._db.execute(
                "PRAGMA synchronous=NORMAL"
            )  # survives a killed process; a power cut may cost the last calls
            self._db.executescript(_SCHEMA)
            # Processes record different episodes: a fault that a reply takes the place of was there before, or is ours.
            self._faults = bool(self._db.execute("SELECT 1 FROM faults LIMIT 1").fetchall())
        except (sqlite3.Error, OSError) as error:
            raise self._error(error) from error

    @property
    def strict(self) -> bool:
        """Whether no call may leave the tape."""
        return self._mode == "strict"

    def find(self, request: Request) -> Completion | None:
        """The recorded completion (attempts 0), or None where the call has to be made; strict mode raises TapeMiss."""
        key = request.key()
        found = None
        if self._mode != "record":
            found = self._fault(key, request)
        if found is None:
            found = self._reply(key)
        if found is None and self.strict:
            raise TapeMiss(
                f"tape {self._path} does not hold call {request.call} of episode {request.episode} to model "
                f"{request.body['model']!r}: this run differs from the recorded one; use pool.tape.mode=record"
            )
        return found

    def keep(self, request: Request, completion: Completion) -> Completion:
        """Record a completion that was just made, and return the one that counts.

        Where someone else has recorded a reply to the same question in the meantime, that is the one: every episode
        then goes on as it will in replay.
        """
        key = request.key()
        who = (key, request.episode, request.call)
        if provider_fault(completion.outcome):
            row = (*who, completion.outcome, completion.error, completion.latency)
            self._faults = True
            self._execute("INSERT OR REPLACE INTO faults VALUES (?, ?, ?, ?, ?, ?)", row)
            return completion
        text = completion.text.encode("utf-8", "replace").decode()  # a lone surrogate is no text for SQLite
        row = (key, request.provider, json.dumps(request.body), text, *_counted(completion))
        if self._faults:  # of an earlier recording
            self._execute("DELETE FROM faults WHERE key = ? AND episode = ? AND call = ?", who)
        # Hundreds of threads come here, and each statement waits for the interpreter anew: it must be a single one.
        ours = self._execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING key", row)
        return Completion(text, *_counted(completion), attempts=0) if ours else self._reply(key) or completion

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _fault(self, key: str, request: Request) -> Completion | None:
        rows = self._execute(
            "SELECT outcome, error, latency FROM faults WHERE key = ? AND episode = ? AND call = ?",
            (key, request.episode, request.call),
        )
        return Completion("", Outcome(rows[0][0]), 0, 0, rows[0][2], 0, rows[0][1]) if rows else None

    def _reply(self, key: str) -> Completion | None:
        rows = self._execute(
            "SELECT text, outcome, prompt_tokens, completion_tokens, latency FROM replies WHERE key = ?", (key,)
        )
        return Completion(rows[0][0], Outcome(rows[0][1]), *rows[0][2:], attempts=0) if rows else None

    def _execute(self, statement: str, values: tuple) -> list[tuple]:
        try:
            with self._lock:
                return self._db.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> PoolError:
        return _unusable(self._path, error)


def _counted(completion: Completion) -> tuple[Outcome, int, int, float]:
    """What is recorded beside the text."""
    return completion.outcome, completion.prompt_tokens, completion.completion_tokens, completion.latency


def _use_wal(db: sqlite3.Connection) -> None:
    """Switch to the write-ahead log. SQLite does not wait for processes that do the same at the same moment."""
    give_up = time.monotonic() + _LOCK_TIMEOUT
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > give_up:
                raise
        time.sleep(0.01)


def _unusable(path: Path, error: Exception) -> PoolError:
    return PoolError(f"tape {path} cannot be used ({error}); make room, correct pool.tape.path or remove the file")


def stats(path: Path) -> dict[str, Any]:
    """Recorded replies and faults, tokens in and out, outcomes, and replies per model."""
    with _read(path) as db:
        replies, tokens_in, tokens_out = db.execute(
            "SELECT count(*), coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0) FROM replies"
        ).fetchone()
        outcomes = "SELECT outcome, count(*) FROM (SELECT outcome FROM replies UNION ALL SELECT outcome FROM faults)"
        models = "SELECT json_extract(request, '$.model') AS model, count(*) FROM replies"
        return {
            "replies": replies,
            "faults": db.execute("SELECT count(*) FROM faults").fetchone()[0],
            "prompt_tokens": tokens_in,
            "completion_tokens": tokens_out,
            "outcomes": dict(db.execute(f"{outcomes} GROUP BY outcome ORDER BY outcome")),
            "models": dict(db.execute(f"{models} GROUP BY model ORDER BY model")),
        }


def export(path: Path) -> Iterator[dict[str, Any]]:
    """The replies, as dicts whose `request` is the body that was sent, in the order of their keys."""
    with _read(path) as db:
        db.row_factory = sqlite3.Row
        for row in db.execute("SELECT * FROM replies ORDER BY key"):
            yield {**dict(row), "request": json.loads(row["request"])}


def merge(into: Path, others: Sequence[Path]) -> int:
    """Add what other tapes hold and `into` does not; returns the number of replies added. Where two recorded different
    replies to one question, that of `into`, then of the first, stays."""
    Tape(into, "record").close()  # makes it, with its tables, where there is none
    added = 0
    with closing(sqlite3.connect(into, _LOCK_TIMEOUT, isolation_level=None)) as db:
        for other in others:
            with _read(other):  # refuses a file that is no tape before anything is written
                pass
            try:
                db.execute("ATTACH ? AS other", (str(other),))
                db.execute("BEGIN IMMEDIATE")
                added += db.execute("INSERT OR IGNORE INTO replies SELECT * FROM other.replies").rowcount
                db.execute("INSERT OR IGNORE INTO faults SELECT * FROM other.faults")
                db.execute("COMMIT")
                db.execute("DETACH other")
            except sqlite3.Error as error:
                raise _unusable(into, error) from error
    return added


def _read(path: Path) -> closing[sqlite3.Connection]:
    """A connection to an existing tape; PoolError where there is none."""
    if not path.exists():
        raise PoolError(f"tape {path} does not exist; name a file that a run with pool.tape.mode=record has left")
    db = sqlite3.connect(path, _LOCK_TIMEOUT)
    try:
        db.execute("SELECT count(*) FROM replies")
    except sqlite3.Error as error:
        db.close()
        raise _unusable(path, error) from error
    return closing(db)


def main(arguments: Sequence[str] | None = None) -> None:
    """python -m router_r1_jax.pool.tape stats TAPE | export TAPE | merge INTO TAPE [TAPE ...]."""
    parser = argparse.ArgumentParser(prog="python -m router_r1_jax.pool.tape", description="Looks at recorded calls.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("stats", "what a tape holds, as JSON"), ("export", "its replies, as JSON lines")):
        commands.add_parser(name, help=text).add_argument("tape", type=Path)
    merging = commands.add_parser("merge", help="add what other tapes hold to the first one")
    merging.add_argument("into", type=Path)
    merging.add_argument("tapes", type=Path, nargs="+")
    args = parser.parse_args(arguments)
    try:
        if args.command == "stats":
            print(json.dumps(stats(args.tape), indent=2))
        elif args.command == "export":
            for reply in export(args.tape):
                print(json.dumps(reply))
        else:
            print(f"{merge(args.into, args.tapes)} replies added to {args.into}")
    except PoolError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
