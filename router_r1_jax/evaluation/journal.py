"""Finished episodes of one evaluation, on disk as they finish: an evaluation that is killed goes on where it was.

A journal's file carries a hash of everything that its episodes depend on in its name, so another evaluation never takes
them for its own. Kept is what scoring needs, not scores: rewards and figures are computed anew from the journal.
Episodes in which a provider failed are left out: they are asked again.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from router_r1_jax.evaluation.records import Record
from router_r1_jax.pool.outcomes import Outcome, Reply
from router_r1_jax.report.writer import EPISODES_FOLDER, EpisodeWriter, JsonLines, read_lines

FOLDER = "evaluation"


class Finished(Protocol):
    """What of an episode is kept (`rollout.Episode` has more)."""

    id: int
    text: str
    stop: str
    replies: list[Reply]
    sampled: list[bool]


def digest(identity: Mapping[str, Any]) -> str:
    """A short hash of what an evaluation's episodes depend on, as JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:12]


def measured_once(
    workdir: Path, name: str, identity: Mapping[str, Any], ids: Sequence[str], measure: Callable[[], list[Record]]
) -> list[Record]:
    """The records of the questions `ids` that lie in `<workdir>/episodes/NAME.jsonl`, else `measure`'s, put there.

    Each line carries the digest of `identity`, all that the records depend on: others' are measured anew.
    Raises BrokenFileError.
    """
    made_with = digest(identity)
    records = read_lines(workdir / EPISODES_FOLDER / f"{name}.jsonl")
    if [(r["id"], r.get("made_with")) for r in records] != [(question, made_with) for question in ids]:
        records = [record | {"made_with": made_with} for record in measure()]
        writer = EpisodeWriter(workdir, name)
        writer.write(records)
        writer.close()
    return records


class Journal:
    """The journal of one policy, in `<workdir>/evaluation/`. A context manager.

    Of several processes each writes a file of its own and reads all that it sees.
    """

    def __init__(self, workdir: Path, name: str, identity: Mapping[str, Any], process: int = 0) -> None:
        """Raises BrokenFileError for a file that is no journal; a line that a kill has torn is cut."""
        stem = f"{name}-{digest(identity)}"
        self.path = workdir / FOLDER / f"{stem}.{process}.jsonl"
        self._lines = JsonLines(self.path, keep=lambda line: True)
        self._batches: dict[int, dict[int, dict[str, Any]]] = {}
        for path in sorted(self.path.parent.glob(f"{stem}.*.jsonl")):
            for line in read_lines(path):
                self._batches.setdefault(line["batch"], {})[line["episode"]] = line

    def finished(self, batch: int) -> dict[int, dict[str, Any]]:
        """Number -> fields of `Finished`, of the episodes of this batch that are on disk."""
        return {number: _fields(line) for number, line in self._batches.get(batch, {}).items()}

    def __len__(self) -> int:
        """Episodes that were on disk when the journal was opened."""
        return sum(map(len, self._batches.values()))

    def add(self, batch: int, episode: Finished) -> None:
        """Write one episode down. Raises OSError that names the file."""
        replies = [dataclasses.asdict(reply) for reply in episode.replies]
        line = {"batch": batch, "episode": episode.id, "text": episode.text, "stop": episode.stop}
        self._lines.append([line | {"sampled_tokens": int(sum(episode.sampled)), "replies": replies}])

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _fields(line: Mapping[str, Any]) -> dict[str, Any]:
    replies = [Reply(**{**reply, "outcome": Outcome(reply["outcome"])}) for reply in line["replies"]]
    sampled = [True] * line["sampled_tokens"]
    return {"id": line["episode"], "text": line["text"], "stop": line["stop"], "replies": replies, "sampled": sampled}
