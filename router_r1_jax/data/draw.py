"""Which questions a run uses: drawn by seed from each of a split's sets, none that a later split asks too."""

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from router_r1_jax.config import SPLITS
from router_r1_jax.data.overlap import text_key
from router_r1_jax.data.questions import DataError, QuestionRecord, StoredQuestions


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What one set gives to a split.

    Attributes:
      suite: the set.
      available: questions of the set's split.
      overlapping: questions met in the draw and left out, because a later split asks them too.
      records: the questions, in the order of the draw.
    """

    suite: str
    available: int
    overlapping: int
    records: tuple[QuestionRecord, ...]

    def summary(self) -> dict[str, int | str]:
        """The figures as JSON; `ids_sha256` is of the ids in their order, a line each."""
        ids = "".join(f"{record.id}\n" for record in self.records)
        return {
            "available": self.available,
            "overlapping": self.overlapping,
            "questions": len(self.records),
            "ids_sha256": hashlib.sha256(ids.encode()).hexdigest(),
        }


def draw(questions: StoredQuestions, split: str, *, count: int, seed: int, left_out: Set[bytes]) -> Drawn:
    """At most `count` questions whose text_key is not in `left_out`; the first n of a draw are the draw of n.

    0: all, in the order of the files.
    """
    order = range(len(questions))
    if count:
        order = np.random.default_rng([seed, *f"{questions.suite}/{split}".encode()]).permutation(len(questions))
    records, overlapping = [], 0
    for i in order:
        record = questions[int(i)]
        if left_out and text_key(record.question) in left_out:
            overlapping += 1
            continue
        records.append(record)
        if len(records) == count:
            break
    return Drawn(questions.suite, len(questions), overlapping, tuple(records))


def draw_split(data: ConfigDict, folders: Mapping[str, Path], split: str) -> list[Drawn]:
    """The questions of a split of `config.data`, set by set; `folders` holds the prepared sets.

    With data.drop_overlap, questions are left out that any question of a later split's sets repeats (train: validation
    and test, validation: test), drawn there or not: so training, and the checkpoint that validation chooses, do not
    depend on how many questions evaluation asks. Raises DataError where that leaves none.
    """
    later = SPLITS[SPLITS.index(split) + 1 :] if data.drop_overlap else ()
    asked = [_open(folders, name, other) for other in later for name in data[other]]
    left_out = {text_key(record.question) for stored in asked for record in stored}
    drawn = [
        draw(_open(folders, name, split), split, count=data.per_set[split], seed=data.seed, left_out=left_out)
        for name in data[split]
    ]
    if not any(one.records for one in drawn):
        raise DataError(
            f"data.{split} is {data[split]!r}, of which {' or '.join(later)} asks every question too; name other sets "
            "there, or set data.drop_overlap to False"
        )
    return drawn


def _open(folders: Mapping[str, Path], name: str, split: str) -> StoredQuestions:
    try:
        return StoredQuestions(folders[name], split)
    except DataError as error:
        raise DataError(f"data.{split} names {name!r}: {error}") from error


def take_turns(drawn: Sequence[Drawn]) -> list[QuestionRecord]:
    """All questions, one of each set in turn, so that the first of them stand for all sets."""
    rounds = itertools.zip_longest(*(one.records for one in drawn))
    return [record for each in rounds for record in each if record is not None]
