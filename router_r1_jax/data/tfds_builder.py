"""TFDS builder of question data sets from FlashRAG JSONL: the paper's seven sets, and sets of a user's own.

Each data set is one configuration of the builder. Its files are <set>/{train,dev,test}.jsonl in the manual folder, to
which `data.prepare` downloads them. Examples keep the order of the file. The shards are small, because TFDS holds all
examples of a shard in memory while it writes them.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from router_r1_jax.data.download import sha256
from router_r1_jax.data.jsonl import FileScan, read_questions, scan_file
from router_r1_jax.data.questions import OPEN_QA

# The file of each split in the hub folder RUC-NLPIR/FlashRAG_datasets. If a set has no labelled file but train and dev,
# it is tested on dev, as in the published protocol, and its validation split is held out of train.
SPLIT_FILES = {
    "nq": {"train": "train", "validation": "dev", "test": "test"},
    "triviaqa": {"train": "train", "validation": "dev", "test": "test"},
    "popqa": {"test": "test"},
    "hotpotqa": {"train": "train", "test": "dev"},
    "2wikimultihopqa": {"train": "train", "test": "dev"},
    "musique": {"train": "train", "test": "dev"},
    "bamboogle": {"test": "test"},
}
SHARD = 1 << 14  # examples
HELD_OUT = 0.02  # share of the train file's questions that become the validation split of a set without such a file


@dataclasses.dataclass(kw_only=True)
class QuestionFiles(tfds.core.BuilderConfig):
    """One data set: split -> file without suffix."""

    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


class OpenQA(tfds.core.ShardBasedBuilder):
    """Questions and gold answers. An id is <set>/<file>/<id in the file>, so that it is unique among all sets.

    The metadata holds the counts of each file, every line that cannot be used, and the source of each split. A line's
    own `metadata` is dropped, because some sets have whole paragraphs there.

    Attributes:
      max_bad: share of a file's lines that may be unusable, in [0, 1]; set it before the set is built.
      origin: source of the files, for the metadata; set it too.
    """

    name = OPEN_QA
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Seven sets."}
    BUILDER_CONFIGS = [QuestionFiles(name=dataset, files=files) for dataset, files in SPLIT_FILES.items()]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put <set>/{train,dev,test}.jsonl there, as far as the set has them."

    max_bad = 0.01
    origin = ""

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {"id": text, "question": text, "golden_answers": tfds.features.Sequence(text)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), metadata=tfds.core.MetadataDict()
        )

    def _shard_iterators_per_split(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[Callable]]:
        folder, dataset, files = Path(dl_manager.manual_dir), self.builder_config.name, self.builder_config.files
        names = {stem: f"{dataset}/{stem}.jsonl" for stem in files.values()}
        scans = {stem: scan_file(folder / name, name, max_bad=self.max_bad) for stem, name in names.items()}
        lines = _lines_of_splits(files, scans)
        self.info.metadata.update(
            origin=self.origin,
            files={stem: {"sha256": sha256(folder / names[stem])} | scan.counts for stem, scan in scans.items()},
            bad_lines=[line for scan in scans.values() for line in scan.bad_lines],
            splits={
                split: {"file": stem, "questions": len(numbers)} | ({} if split in files else {"held_out": HELD_OUT})
                for split, (stem, numbers) in lines.items()
            },
        )
        return {
            split: _shards(_examples(folder / names[stem], names[stem], numbers), len(numbers))
            for split, (stem, numbers) in lines.items()
        }


def _lines_of_splits(files: Mapping[str, str], scans: Mapping[str, FileScan]) -> dict[str, tuple[str, np.ndarray]]:
    """Split -> (its file, the numbers of its lines)."""
    lines = {split: (stem, scans[stem].numbers) for split, stem in files.items()}
    if "train" in files and "validation" not in files:
        stem, numbers = lines["train"]
        held_out = hold_out(scans[stem].keys)
        if held_out.any():
            lines |= {"train": (stem, numbers[~held_out]), "validation": (stem, numbers[held_out])}
    return lines


def hold_out(keys: np.ndarray) -> np.ndarray:
    """Which of the questions with these keys [N] are held out, [N] bool: the share HELD_OUT with the lowest keys.

    Keys are hashes. So the choice is random, it is the same on every machine, and equal questions stay together.
    """
    distinct = np.unique(keys)
    count = min(math.ceil(HELD_OUT * len(distinct)), len(distinct) - 1)
    return keys < distinct[count]


def _shards(examples: Iterator, count: int) -> list[Callable[[], Iterator]]:
    """The shards of a split. TFDS writes them in order, so each one continues `examples` after the shard before it."""
    return [functools.partial(itertools.islice, examples, SHARD) for _ in range(0, count, SHARD)]


def _examples(path: Path, name: str, numbers: np.ndarray) -> Iterator[tuple[str, dict[str, Any]]]:
    """The questions on the lines `numbers`, which ascend, as TFDS examples with their keys."""
    wanted = iter(numbers)
    number = next(wanted, None)
    for at, found in read_questions(path, name):
        if at == number:
            key = f"{name.removesuffix('.jsonl')}/{found.id}"
            yield key, {"id": key, "question": found.question, "golden_answers": list(found.golds)}
            number = next(wanted, None)
