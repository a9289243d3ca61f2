"""TFDS builder of the seven sets of questions that the paper uses, and of a user's own, from FlashRAG-style JSONL.

Each set is one configuration. The files lie in the manual folder as <set>/{train,dev,test}.jsonl; `data.prepare` puts
them there, or finds them there. Examples go from the file to the shards in the order of the file.

Memory: `prepare_set` on 300,000 lines (82 MB) reached 102 MB resident, 62 MB of them before it began; with one shard a
split, of which TFDS keeps all examples, a million lines passed 800 MB (26 November 2026, TFDS 4.9.10, Python 3.11).
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
from tqdm import tqdm

from router_r1_jax.data.download import sha256
from router_r1_jax.data.jsonl import Survey, read_questions, survey
from router_r1_jax.data.questions import OPEN_QA

# Of the hub folder RUC-NLPIR/FlashRAG_datasets: which file a split is read from. A set whose only labelled file beside
# train is dev is tested on it, as the published protocol does; its validation split is then held out of train.
FILES = {
    "nq": {"train": "train", "validation": "dev", "test": "test"},
    "triviaqa": {"train": "train", "validation": "dev", "test": "test"},
    "popqa": {"test": "test"},
    "hotpotqa": {"train": "train", "test": "dev"},
    "2wikimultihopqa": {"train": "train", "test": "dev"},
    "musique": {"train": "train", "test": "dev"},
    "bamboogle": {"test": "test"},
}
SHARD = 1 << 14  # examples; TFDS holds those of one shard in memory while it writes them
HELD_OUT = 0.02  # share of the train file's questions that become validation where no file is left for it


@dataclasses.dataclass(kw_only=True)
class SetConfig(tfds.core.BuilderConfig):
    """A set: split -> file without its suffix."""

    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


class OpenQA(tfds.core.ShardBasedBuilder):
    """Questions and gold answers. An id is <set>/<file>/<id in the file>, so that no two sets share one.

    The metadata say what came of each file, name every line that could not be used, and where each split comes from.
    Nothing is kept of a line's `metadata`, where some sets have whole paragraphs.

    Attributes:
      max_bad: share of a file's lines that may be unusable, in [0, 1]; to be set before the set is built.
      origin: where the files come from, for the metadata; the manual folder if empty.
    """

    name = OPEN_QA
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Seven sets."}
    BUILDER_CONFIGS = [SetConfig(name=suite, files=files) for suite, files in FILES.items()]
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put <set>/{train,dev,test}.jsonl there, as far as the set has them."

    max_bad = 0.01
    origin = ""

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {"id": text, "question": text, "golden_answers": tfds.features.Sequence(text)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), metadata=tfds.core.MetadataDict()
        )

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, list[Callable[[], Iterator[tuple[str, dict[str, Any]]]]]]:
        folder, suite = Path(dl_manager.manual_dir), self.builder_config.name
        names = {stem: f"{suite}/{stem}.jsonl" for stem in self.builder_config.files.values()}
        surveys = {stem: survey(folder / name, name, max_bad=self.max_bad) for stem, name in names.items()}
        chosen = _choose(self.builder_config.files, surveys)
        self.info.metadata.update(
            origin=self.origin or str(folder),
            files={stem: _describe(folder / names[stem], found) for stem, found in surveys.items()},
            bad_lines=[str(line) for found in surveys.values() for line in found.bad],
            splits={
                split: {"file": stem, "questions": len(numbers)}
                | ({"held_out": HELD_OUT} if split not in self.builder_config.files else {})
                for split, (stem, numbers) in chosen.items()
            },
        )
        return {
            split: _shards(_examples(folder / names[stem], names[stem], f"{suite}/{stem}", numbers), len(numbers))
            for split, (stem, numbers) in chosen.items()
        }


def _choose(files: Mapping[str, str], surveys: Mapping[str, Survey]) -> dict[str, tuple[str, np.ndarray]]:
    """For each split its file and the numbers of the lines that it takes."""
    chosen = {split: (stem, surveys[stem].numbers) for split, stem in files.items()}
    if "train" in files and "validation" not in files:
        stem, numbers = chosen["train"]
        held_out = hold_out(surveys[stem].texts)
        if held_out.any():
            chosen["train"], chosen["validation"] = (stem, numbers[~held_out]), (stem, numbers[held_out])
    return chosen


def hold_out(texts: np.ndarray) -> np.ndarray:
    """Which of the questions with these keys [N] are held out, [N] bool: the share HELD_OUT of the lowest keys.

    Keys are hashes, so the choice is random, the same wherever the set is built, and equal questions stay together.
    """
    distinct = np.unique(texts)
    count = min(math.ceil(HELD_OUT * len(distinct)), len(distinct) - 1)
    return texts < distinct[count]


def _describe(path: Path, found: Survey) -> dict[str, Any]:
    return {
        "sha256": sha256(path),
        "lines": found.lines,
        "questions": len(found.numbers),
        "bad_lines": len(found.bad),
        "blank_lines": found.blank,
        "blank_answers": found.blank_golds,
    }


def _shards(examples: Iterator, count: int) -> list[Callable[[], Iterator]]:
    """The shards of a split, which TFDS writes one after the other: each takes `examples` up where the last left it."""
    return [functools.partial(itertools.islice, examples, SHARD) for _ in range(0, count, SHARD)]


def _examples(path: Path, name: str, prefix: str, numbers: np.ndarray) -> Iterator[tuple[str, dict[str, Any]]]:
    """The questions on the lines `numbers`, in ascending order, as TFDS examples."""
    wanted = iter(numbers)
    number = next(wanted, None)
    for at, found in tqdm(read_questions(path, name), desc=f"writing {name}", unit=" lines", leave=False, disable=None):
        if at == number:
            key = f"{prefix}/{found.id}"
            yield key, {"id": key, "question": found.question, "golden_answers": list(found.golds)}
            number = next(wanted, None)
