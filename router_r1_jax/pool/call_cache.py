"""The call cache: record/replay of external calls in SQLite, so that a run can be repeated without network and payment.

A reply is found by what was asked (provider, model, messages, parameters). If the model samples (temperature above 0),
it is also found by who asked (episode and call). A provider's fault says nothing about the question. So it is always
found by who asked, and it is repeated only in replay, never while recording.

    python -m router_r1_jax.pool.call_cache --stats=FILE
    python -m router_r1_jax.pool.call_cache --export=FILE
    python -m router_r1_jax.pool.call_cache --merge_into=FILE --merge=FILE,FILE
"""

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
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
# Further columns of `replies`: files of earlier versions lack them, so they are added to every file.
_ADDED_COLUMNS = {"thought": "TEXT DEFAULT ''", "estimated": "INTEGER DEFAULT 0"}
_MEASURED = ("outcome", "prompt_tokens", "completion_tokens", "latency")
_LOCK_TIMEOUT = 30.0  # seconds for which a process waits for another one's write


class CacheMissError(PoolError):
    """In strict mode, a call that the call cache does not hold."""


@dataclass(frozen=True)
class Request:
    """One call as the call cache knows it: the provider's name, the request body, and who asks."""

    provider: str
    body: Mapping[str, Any]
    episode: str
    call: int

    def key(self) -> str:
        """Hash of everything that the reply depends on. If the body sets no temperature, the model may sample."""
        samples = self.body.get("temperature", 1.0) > 0
        parts = [self.provider, self.body, [self.episode, self.call] if samples else None]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class CallCache:
    """The call cache at `path`. Threads and processes may share it.

    The mode is one of:
      record: recorded replies are used; every other call is made and recorded.
      replay: like record, and recorded faults are repeated.
      strict: like replay, but a call that the cache does not hold raises CacheMissError.
    """

    def __init__(self, path: str | Path, mode: str) -> None:
        """Raises PoolError if the file is no call cache, or does not exist in strict mode."""
        self._path = Path(path)
        self._mode = mode
        self._lock = threading.Lock()
        if mode == "strict" and not self._path.exists():
            raise PoolError(f"call cache {self._path} does not exist; record it first with pool.call_cache.mode=record")
        with _pool_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # In autocommit mode each statement is one transaction, and no larger one is needed here.
            self._db = sqlite3.connect(self._path, _LOCK_TIMEOUT, isolation_level=None, check_same_thread=False)
            _use_wal(self._db)
            # Data survives a killed process. A power cut may lose the last calls.
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
            self._db.execute("BEGIN IMMEDIATE")  # one of several processes adds the columns, and the others see them
            for column in sorted(_ADDED_COLUMNS.keys() - _columns(self._db, "main")):
                self._db.execute(f"ALTER TABLE replies ADD COLUMN {column} {_ADDED_COLUMNS[column]}")
            self._db.execute("COMMIT")
            # Processes record different episodes. So a fault that a reply replaces was here at the start, or comes from
            # this process.
            self._may_hold_faults = bool(self._db.execute("SELECT 1 FROM faults LIMIT 1").fetchall())

    def find(self, request: Request) -> Completion | None:
        """The recorded completion (attempts 0), or None if the call has to be made; CacheMissError in strict mode."""
        key = request.key()
        found = None if self._mode == "record" else self._fault(key, request)
        found = found or self._reply(key)
        if found is None and self._mode == "strict":
            raise CacheMissError(
                f"call cache {self._path} does not hold call {request.call} of episode {request.episode} to model "
                f"{request.body['model']!r}: this run differs from the recorded one; use pool.call_cache.mode=record"
            )
        return found

    def keep(self, request: Request, completion: Completion) -> Completion:
        """Record a completion that was just made, and return the one to use.

        If another process has recorded a reply to the same question in the meantime, that reply is returned. Every
        episode then continues as it will in replay.
        """
        key = request.key()
        who = (key, request.episode, request.call)
        if provider_fault(completion.outcome):
            row = (*who, completion.outcome, completion.error, completion.latency)
            self._may_hold_faults = True
            self._execute("INSERT OR REPLACE INTO faults VALUES (?, ?, ?, ?, ?, ?)", row)
            return completion
        # SQLite refuses a lone surrogate.
        text, thought = (said.encode("utf-8", "replace").decode() for said in (completion.text, completion.thought))
        measured = [getattr(completion, name) for name in _MEASURED]
        row = (key, request.provider, json.dumps(request.body), text, *measured, thought, completion.estimated)
        columns = f"key, provider, request, text, {', '.join(_MEASURED)}, thought, estimated"
        if self._may_hold_faults:
            self._execute("DELETE FROM faults WHERE key = ? AND episode = ? AND call = ?", who)
        # Hundreds of threads come here, and each statement waits for the interpreter again: use a single statement.
        insert = f"INSERT OR IGNORE INTO replies ({columns}) VALUES ({'?, ' * (len(row) - 1)}?) RETURNING key"
        inserted = self._execute(insert, row)
        if not inserted:
            return self._reply(key) or completion
        return Completion(text, *measured, attempts=0, thought=thought, estimated=completion.estimated)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _fault(self, key: str, request: Request) -> Completion | None:
        rows = self._execute(
            "SELECT outcome, error, latency FROM faults WHERE key = ? AND episode = ? AND call = ?",
            (key, request.episode, request.call),
        )
        return Completion("", Outcome(rows[0][0]), latency=rows[0][2], attempts=0, error=rows[0][1]) if rows else None

    def _reply(self, key: str) -> Completion | None:
        columns = f"text, {', '.join(_MEASURED)}, thought, estimated"
        rows = self._execute(f"SELECT {columns} FROM replies WHERE key = ?", (key,))
        if not rows:
            return None
        text, outcome, *measured, thought, estimated = rows[0]
        return Completion(text, Outcome(outcome), *measured, attempts=0, thought=thought, estimated=bool(estimated))

    def _execute(self, statement: str, values: tuple) -> list[tuple]:
        with _pool_errors(self._path), self._lock:
            return self._db.execute(statement, values).fetchall()


def _use_wal(db: sqlite3.Connection) -> sqlite3.Cursor:
    """Switch to the write-ahead log. SQLite itself does not wait for processes that do the same at the same moment."""
    deadline = time.monotonic() + _LOCK_TIMEOUT
    while True:
        try:
            return db.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _columns(db: sqlite3.Connection, schema: str) -> list[str]:
    """Names of the columns of `replies`, in the main file or in an attached one."""
    return [row[1] for row in db.execute(f"PRAGMA {schema}.table_info(replies)")]


@contextmanager
def _pool_errors(path: Path) -> Iterator[None]:
    """Raise errors of SQLite and of the file system as PoolError."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise PoolError(
            f"call cache {path} cannot be used ({error}); make room, correct pool.call_cache.path or remove the file"
        ) from error


def count_calls(path: Path) -> dict[str, Any]:
    """Numbers of recorded replies and faults, prompt and completion tokens, outcomes, and replies per model."""
    with _open_recorded(path) as db:
        counts = db.execute(
            "SELECT count(*) AS replies, (SELECT count(*) FROM faults) AS faults, coalesce(sum(prompt_tokens), 0) AS "
            "prompt_tokens, coalesce(sum(completion_tokens), 0) AS completion_tokens FROM replies"
        ).fetchone()
        outcomes = "SELECT outcome, count(*) FROM (SELECT outcome FROM replies UNION ALL SELECT outcome FROM faults)"
        models = "SELECT json_extract(request, '$.model') AS model, count(*) FROM replies"
        return dict(counts) | {
            "outcomes": dict(db.execute(f"{outcomes} GROUP BY outcome ORDER BY outcome").fetchall()),
            "models": dict(db.execute(f"{models} GROUP BY model ORDER BY model").fetchall()),
        }


def read_replies(path: Path) -> Iterator[dict[str, Any]]:
    """The recorded replies in the order of their keys, as dicts; `request` is the body that was sent."""
    with _open_recorded(path) as db:
        for row in db.execute("SELECT * FROM replies ORDER BY key"):
            yield {**dict(row), "request": json.loads(row["request"])}


def merge_caches(into: Path, others: Sequence[Path]) -> int:
    """Add what other call caches hold and `into` does not; returns the number of replies added.

    If two caches hold different replies to one question, the reply of `into` stays, and otherwise that of the first.
    """
    for other in others:  # a file that is no call cache is refused before anything is written
        with _open_recorded(other):
            pass
    CallCache(into, "record").close()  # creates the file and its tables if there are none
    added = 0
    with _pool_errors(into), closing(sqlite3.connect(into, _LOCK_TIMEOUT, isolation_level=None)) as db:
        for other in others:
            db.execute("ATTACH ? AS other", (str(other),))
            db.execute("BEGIN IMMEDIATE")
            columns = ", ".join(_columns(db, "other"))
            insert = f"INSERT OR IGNORE INTO replies ({columns}) SELECT {columns} FROM other.replies"
            added += db.execute(insert).rowcount
            db.execute("INSERT OR IGNORE INTO faults SELECT * FROM other.faults")
            db.execute("COMMIT")
            db.execute("DETACH other")
    return added


@contextmanager
def _open_recorded(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to an existing call cache; raises PoolError if there is none."""
    if not path.exists():
        raise PoolError(
            f"call cache {path} does not exist; name a file that a run with pool.call_cache.mode=record has left"
        )
    with _pool_errors(path), closing(sqlite3.connect(path, _LOCK_TIMEOUT)) as db:
        db.row_factory = sqlite3.Row
        db.execute("SELECT count(*) FROM replies")
        yield db


def main(stats: str, export: str, merge_into: str, merge: str) -> None:
    """Print what a call cache holds, or merge several into one. Raises PoolError if there is nothing to do."""
    if bool(merge_into) != bool(merge) or not (stats or export or merge):
        raise PoolError(
            "nothing to do; name a call cache with --stats or --export, or several with --merge and a file "
            "for --merge_into"
        )
    if stats:
        print(json.dumps(count_calls(Path(stats)), indent=2))
    if export:
        for reply in read_replies(Path(export)):
            print(json.dumps(reply))
    if merge_into:
        added = merge_caches(Path(merge_into), [Path(file) for file in merge.split(",") if file])
        print(f"{added} replies added to {merge_into}")


if __name__ == "__main__":
    from router_r1_jax.launcher import Flag, launch  # the library above stays free of the launcher

    flags = {
        "stats": Flag("", "call cache whose numbers to print, as JSON"),
        "export": Flag("", "call cache whose replies to print, as JSON lines"),
        "merge_into": Flag("", "call cache that --merge adds to; a new file is created"),
        "merge": Flag("", "call caches to add to --merge_into, separated by commas"),
    }
    launch(main, flags, config=False, workdir=False)
