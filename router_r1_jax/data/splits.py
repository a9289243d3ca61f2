"""Which questions a run uses: a seeded sample of each data set, decontaminated against the later splits' questions."""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from router_r1_jax.config import SPLITS, SYNTHETIC, ConfigError
from router_r1_jax.data.decontamination import question_key
from router_r1_jax.data.questions import OPEN_QA, DataError, QuestionRecord, StoredQuestions

_VERSION = re.compile(r"\d+\.\d+\.\d+")  # an interrupted build leaves folders with other names


@dataclasses.dataclass(frozen=True)
class SampledDataset:
    """The questions that a split takes from one data set.

    Attributes:
      dataset: name of the data set.
      available: number of questions in the data set's split.
      contaminated: number of questions that were met while sampling and left out, because a later split has them too.
      records: the sampled questions, in the order of sampling.
    """

    dataset: str
    available: int
    contaminated: int
    records: tuple[QuestionRecord, ...]

    def summary(self) -> dict[str, int | str]:
        """The counts as JSON. `ids_sha256` is the hash of the ids in their order, one per line."""
        ids = "".join(f"{record.id}\n" for record in self.records)
        return {
            "available": self.available,
            "contaminated": self.contaminated,
            "questions": len(self.records),
            "ids_sha256": hashlib.sha256(ids.encode()).hexdigest(),
        }


def find_datasets(data_config: ConfigDict, workdir: str | Path) -> dict[str, Path]:
    """Folder of the newest version of each prepared data set that `config.data` names.

    The data set SYNTHETIC is left out, because the environment builds it. Raises ConfigError with the command that
    prepares a missing data set.
    """
    root = Path(data_config.dir) if data_config.dir else Path(workdir) / "data"
    folders = {}
    for name in dict.fromkeys(name for split in SPLITS for name in data_config[split] if name != SYNTHETIC):
        versions = [path for path in (root / OPEN_QA / name).glob("*") if _VERSION.fullmatch(path.name)]
        if not versions:
            raise ConfigError(
                f"data.dir is {str(root)!r}, where no set {name!r} is prepared; run "
                f"python -m router_r1_jax.data.prepare --sets={name} --source=DIR_OR_URL --dir={root}"
            )
        folders[name] = max(versions, key=lambda path: [int(number) for number in path.name.split(".")])
    return folders


def sample_split(data_config: ConfigDict, folders: Mapping[str, Path], split: str) -> list[SampledDataset]:
    """The questions of a split of `config.data`, by data set; `folders` holds the data sets' folders.

    With data.decontaminate, a question is left out if any data set of a later split has it (train: validation and test;
    validation: test), whether or not that split samples it. So neither training nor the checkpoint that validation
    chooses depends on how many questions evaluation asks. Raises DataError if no question is left.
    """
    later = SPLITS[SPLITS.index(split) + 1 :] if data_config.decontaminate else ()
    held_out = [_open_split(folders, name, other) for other in later for name in data_config[other]]
    excluded = {question_key(record.question) for questions in held_out for record in questions}
    count, seed = data_config.per_set[split], data_config.seed
    stored = [_open_split(folders, name, split) for name in data_config[split]]
    sampled = [sample_dataset(questions, split, count=count, seed=seed, excluded=excluded) for questions in stored]
    if not any(dataset.records for dataset in sampled):
        raise DataError(
            f"data.{split} is {data_config[split]!r}, of which {' or '.join(later)} asks every question too; name "
            "other sets there, or set data.decontaminate to False"
        )
    return sampled


def sample_dataset(
    questions: StoredQuestions, split: str, *, count: int, seed: int, excluded: Set[bytes]
) -> SampledDataset:
    """Sample up to `count` questions whose `question_key` is not in `excluded`.

    The same seed gives the same order for every count, so a smaller sample is the beginning of a larger one. A count of
    0 takes all questions in the order of the files.
    """
    order = range(len(questions))
    if count:
        order = np.random.default_rng([seed, *f"{questions.dataset}/{split}".encode()]).permutation(len(questions))
    records, contaminated = [], 0
    for i in order:
        record = questions[int(i)]
        if excluded and question_key(record.question) in excluded:
            contaminated += 1
            continue
        records.append(record)
        if len(records) == count:
            break
    return SampledDataset(questions.dataset, len(questions), contaminated, tuple(records))


def _open_split(folders: Mapping[str, Path], name: str, split: str) -> StoredQuestions:
    try:
        return StoredQuestions(folders[name], split)
    except DataError as error:
        raise DataError(f"data.{split} names {name!r}: {error}") from error


def interleave(sampled: Sequence[SampledDataset]) -> list[QuestionRecord]:
    """All questions, one of each data set in turn, so that the first questions represent all data sets."""
    rounds = itertools.zip_longest(*(dataset.records for dataset in sampled))
    return [record for questions in rounds for record in questions if record is not None]
