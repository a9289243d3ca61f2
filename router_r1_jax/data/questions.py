"""QuestionRecord, prepared data sets read from disk, and the resumable question iterator."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from router_r1_jax.errors import UserError

OPEN_QA = "open_qa"  # name of `tfds_builder.OpenQA`; each data set from JSONL is one of its configurations


class DataError(UserError, ValueError):
    """A data set that cannot be used. The message names the folder, the question and the fix."""


@dataclasses.dataclass(frozen=True)
class QuestionRecord:
    """One question.

    `id` is unique among all data sets, and `dataset` names the question's own. `hops` (0: unknown), `domains` and
    `relations` describe the steps of a synthetic question; other data sets leave them empty.
    """

    id: str
    dataset: str
    question: str
    golds: tuple[str, ...]
    hops: int
    domains: tuple[str, ...]
    relations: tuple[str, ...]


@contextmanager
def damage_as_data_error(folder: str | Path) -> Iterator[None]:
    """Turn every exception that occurs while a prepared data set is read into a DataError."""
    try:
        yield
    except Exception as error:  # TFDS, array_record and protobuf each raise their own
        raise DataError(f"{folder} cannot be read ({error}); remove the folder and prepare the data again") from error


class StoredQuestions(Sequence[QuestionRecord]):
    """One split of a prepared data set, in the order of its files. Each access reads one question from disk.

    Raises DataError if the folder holds no readable data set, or not this split.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        if not (Path(folder) / "dataset_info.json").is_file():
            raise DataError(f"{folder} holds no prepared data set; remove the folder and prepare the data again")
        self._folder = folder
        with damage_as_data_error(folder):
            builder = tfds.builder_from_directory(str(folder))
            source = builder.as_data_source(split) if split in builder.info.splits else None
        if source is None:
            raise DataError(f"{folder} has no split {split!r}; choose one of {', '.join(builder.info.splits)}")
        self._source, self._length = source, builder.info.splits[split].num_examples
        self.dataset = builder.info.config_name if builder.info.name == OPEN_QA else builder.info.name

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> QuestionRecord:
        if not 0 <= index < self._length:
            raise IndexError(index)
        with damage_as_data_error(self._folder):
            return _to_record(self._source[index], self.dataset)


def _to_record(example: Mapping[str, Any], dataset: str) -> QuestionRecord:
    """A TFDS example, whose texts are bytes, as a record."""
    return QuestionRecord(
        id=example["id"].decode(),
        dataset=dataset,
        question=example["question"].decode(),
        golds=tuple(gold.decode() for gold in example["golden_answers"]),
        hops=int(example.get("hops", 0)),
        domains=tuple(domain.decode() for domain in example.get("domains", ())),
        relations=tuple(relation.decode() for relation in example.get("relations", ())),
    )


class QuestionIterator:
    """Resumable iterator: endless batches of questions, whose order depends only on the seed and the epoch.

    A batch never holds a question twice. If the last questions of an epoch do not fill a batch, they are skipped; the
    next epoch has another order. `state` and `restore` carry the position over a restart.
    """

    def __init__(self, records: Sequence[QuestionRecord], *, seed: int, batch: int) -> None:
        """`batch` is the number of questions per batch. Raises DataError if there are fewer records."""
        if not 0 < batch <= len(records):
            raise DataError(f"batch is {batch}; it must lie between 1 and the {len(records)} questions of the split")
        self._records, self._seed, self._batch = records, seed, batch
        self._epoch, self._position = 0, 0
        self._order = self._shuffle()

    def _shuffle(self) -> np.ndarray:
        return np.random.default_rng([self._seed, self._epoch]).permutation(len(self._records))

    def next(self) -> list[QuestionRecord]:
        """The next batch."""
        if self._position + self._batch > len(self._records):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._shuffle()
        chosen = self._order[self._position : self._position + self._batch]
        self._position += self._batch
        return [self._records[i] for i in chosen]

    def state(self) -> dict[str, int]:
        """Position of the next batch, as plain JSON. Records, seed and batch are not part of it."""
        return {"epoch": self._epoch, "position": self._position}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue from the `state` of an iterator with the same records, seed and batch."""
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._shuffle()
