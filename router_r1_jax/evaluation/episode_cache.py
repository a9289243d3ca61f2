"""Episode cache: finished episodes are kept on disk, so that an evaluation that was killed resumes where it was.

The file name holds a hash of everything that the episodes depend on (`cache_key`). Another evaluation therefore never
takes them for its own. Rewards and metrics are not kept; they are computed anew from the episodes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from router_r1_jax.evaluation.episode_records import Record
from router_r1_jax.pool.outcomes import Outcome, Reply
from router_r1_jax.rollout import Episode
from router_r1_jax.storage.json_lines import EPISODES_FOLDER, JsonLines, read_lines, write_episodes

FOLDER = "evaluation"


def digest(key: Mapping[str, Any]) -> str:
    """A short hash of a cache key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:12]


def with_call_cache(config: ConfigDict, workdir: Path) -> ConfigDict:
    """The configuration with `<workdir>/evaluation/call_cache.sqlite` as call cache, if pool.call_cache is off.

    Evaluation and baselines share this file, so neither pays for a call twice. evaluation.call_cache turns it off.
    """
    config = config.copy_and_resolve_references()
    if config.pool.call_cache.mode == "off" and config.evaluation.call_cache:
        config.pool.call_cache.mode, config.pool.call_cache.path = "record", str(workdir / FOLDER / "call_cache.sqlite")
    return config


def measured_once(
    workdir: Path, name: str, key: Mapping[str, Any], ids: Sequence[str], measure: Callable[[], list[Record]]
) -> list[Record]:
    """Records of the questions `ids`, read from `<workdir>/episodes/NAME.jsonl`, or else measured and written there.

    Each line carries the digest of `key`. Records of another key are measured anew. Raises BrokenFileError.
    """
    made_with = digest(key)
    records = read_lines(workdir / EPISODES_FOLDER / f"{name}.jsonl")
    if [(r["id"], r.get("made_with")) for r in records] != [(question, made_with) for question in ids]:
        records = [record | {"made_with": made_with} for record in measure()]
        write_episodes(workdir, name, records)
    return records


class EpisodeCache(JsonLines):
    """Finished episodes of one policy, in `<workdir>/evaluation/`.

    If there are several processes, each writes its own file, and each reads all files that it finds.
    """

    def __init__(self, workdir: Path, name: str, key: Mapping[str, Any], process: int = 0) -> None:
        """Raises BrokenFileError for a damaged file; a last line that was cut short by a kill is removed."""
        stem = f"{name}-{digest(key)}"
        super().__init__(workdir / FOLDER / f"{stem}.{process}.jsonl", keep=lambda line: True)
        self._batches: dict[int, dict[int, Episode]] = {}
        for path in sorted(self.path.parent.glob(f"{stem}.*.jsonl")):
            for line in read_lines(path):
                self._batches.setdefault(line["batch"], {})[line["episode"]] = _episode(line)

    def finished(self, batch: int) -> dict[int, Episode]:
        """Episodes by number of the batch that begins at this question, without prompt and tokens."""
        return self._batches.get(batch, {})

    def __len__(self) -> int:
        """Number of episodes that were on disk when the cache was opened."""
        return sum(map(len, self._batches.values()))

    def add(self, batch: int, episode: Episode) -> None:
        """Write one episode. Raises OSError that names the file."""
        replies = [dataclasses.asdict(reply) for reply in episode.replies]
        line = {"batch": batch, "episode": episode.id, "text": episode.text, "stop": episode.stop}
        self.write([line | {"sampled_tokens": int(sum(episode.sampled)), "replies": replies}])


def _episode(line: Mapping[str, Any]) -> Episode:
    return Episode(
        id=line["episode"],
        prompt=(),
        text=line["text"],
        stop=line["stop"],
        replies=[Reply(**{**reply, "outcome": Outcome(reply["outcome"])}) for reply in line["replies"]],
        sampled=[True] * line["sampled_tokens"],
    )
