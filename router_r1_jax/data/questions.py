"""Questions as the mains see them: records read from a prepared data set, and an iterator that resumes exactly."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from router_r1_jax.protocol import neutralize

OPEN_QA = "open_qa"  # the TFDS builder of the sets that are read from JSONL; each is a configuration of it


class DataError(ValueError):
    """A data set that cannot be used. The message names the folder, the question and the fix."""


@dataclasses.dataclass(frozen=True)
class QuestionRecord:
    """One question.

    `suite` is the set that it comes from and `id` is unique among all sets. `hops` (0: not known), `domains` and
    `relations` say what to ask at each hop; they are empty where a set does not tell.
    """

    id: str
    suite: str
    question: str
    golds: tuple[str, ...]
    hops: int
    domains: tuple[str, ...]
    relations: tuple[str, ...]


@contextmanager
def refusing_damage(folder: str | Path) -> Iterator[None]:
    """Turn whatever fails where a prepared set is read into a DataError."""
    try:
        yield
    except Exception as error:  # TFDS, array_record and protobuf each raise their own
        message = f"{folder} cannot be read ({error}); remove the folder and prepare the data again"
        raise DataError(message) from error


class StoredQuestions(Sequence[QuestionRecord]):
    """One split of a prepared set, in the order of its files. Read from disk question by question, none are kept.

    Raises DataError for a folder without a readable data set, an unknown split, and, where it is read, a question
    without text or gold answer.
    """

    def __init__(self, data_dir: str | Path, split: str) -> None:
        if not (Path(data_dir) / "dataset_info.json").is_file():
            raise DataError(f"{data_dir} holds no prepared data set; remove the folder and prepare the data again")
        self._folder = data_dir
        with refusing_damage(data_dir):
            builder = tfds.builder_from_directory(str(data_dir))
            source = builder.as_data_source(split) if split in builder.info.splits else None
        if source is None:
            raise DataError(f"{data_dir} has no split {split!r}; choose one of {', '.join(builder.info.splits)}")
        self._source, self._length = source, builder.info.splits[split].num_examples
        self.suite = builder.info.config_name if builder.info.name == OPEN_QA else builder.info.name

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> QuestionRecord:
        if not 0 <= index < self._length:
            raise IndexError(index)
        with refusing_damage(self._folder):
            example = self._source[index]
        return _record(example, self.suite, self._folder)


def _record(example: Mapping[str, Any], suite: str, data_dir: str | Path) -> QuestionRecord:
    """A TFDS example, whose text is bytes, as a record."""
    record = QuestionRecord(
        id=example["id"].decode(),
        suite=suite,
        question=example["question"].decode(),
        golds=tuple(gold.decode() for gold in example["golden_answers"]),
        hops=int(example.get("hops", 0)),
        domains=tuple(domain.decode() for domain in example.get("domains", ())),
        relations=tuple(relation.decode() for relation in example.get("relations", ())),
    )
    if is_blank(record.question):
        raise DataError(
            f"question {record.id!r} in {data_dir} is empty; correct or remove it and prepare the data again"
        )
    if all(map(is_blank, record.golds)):
        raise DataError(f"question {record.id!r} in {data_dir} has no gold answer; add one and prepare the data again")
    return record


def is_blank(text: str) -> bool:
    """Whether nothing of a text would reach a prompt: white space and invisible characters only."""
    return not neutralize(text).strip()


class QuestionIterator:
    """Endless batches of questions, in an order that follows from the seed and the epoch alone.

    A batch never holds a question twice: the last questions of an epoch that do not fill a batch are left for a later
    epoch, whose order is another. `state` and `restore` carry the place over a restart.
    """

    def __init__(self, records: Sequence[QuestionRecord], *, seed: int, batch: int):
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
        """The place of the next batch, as plain JSON; the records, seed and batch are not part of it."""
        return {"epoch": self._epoch, "position": self._position}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from a `state` of an iterator with the same records, seed and batch."""
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._shuffle()
