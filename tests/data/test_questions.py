"""The TFDS builder against the world it was built from, and the iterator against the uninterrupted one."""

import collections
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st

from router_r1_jax.config import ConfigError, base_config
from router_r1_jax.data import questions, synthetic
from router_r1_jax.data.questions import DataError, QuestionIterator, QuestionRecord
from router_r1_jax.data.world import SPLITS, World


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    data = base_config().data
    return data, synthetic.prepare(data, tmp_path_factory.mktemp("work"))


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_on_disk_is_the_worlds_split(prepared, split):
    data, folder = prepared
    expected = {
        question.id: (
            question.text,
            question.golds,
            len(question.hops),
            tuple(fact.domain for fact in question.hops),
            tuple(fact.relation for fact in question.hops),
        )
        for question in World(data.world).questions(split)
    }
    records = list(questions.StoredQuestions(folder, split))
    assert {r.id: (r.question, r.golds, r.hops, r.domains, r.relations) for r in records} == expected
    assert len(records) == len(expected)
    assert {record.suite for record in records} == {"synthetic"}


def test_prepare_finds_what_lies_there_and_keeps_worlds_apart(prepared):
    data, folder = prepared
    workdir = folder.parents[3]
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert synthetic.prepare(data, workdir) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    other = base_config().data
    other.world.seed = 8
    assert synthetic.prepare(other, workdir) != folder
    other.dir = str(workdir / "elsewhere")
    assert synthetic.prepare(other, workdir).is_relative_to(other.dir)


def test_wrong_data_fields_are_named(tmp_path):
    data = base_config().data
    data.world.films = 1
    with pytest.raises(ConfigError, match=r"data\.world\.films is 1"):
        synthetic.prepare(data, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_neither_tensorflow_nor_jax_is_imported(prepared):
    code = (
        "import sys; from router_r1_jax.data import questions, synthetic; from router_r1_jax.config import base_config;"
        "folder = synthetic.prepare(base_config().data, sys.argv[1]); list(questions.StoredQuestions(folder, 'test'));"
        "print(*sorted({'jax', 'tensorflow', 'torch'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(prepared[1].parents[3])]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == ""


def test_a_folder_without_data_and_an_unknown_split_are_named(prepared, tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path} holds no prepared data set"):
        list(questions.StoredQuestions(tmp_path, "train"))
    with pytest.raises(DataError, match="no split 'dev'; choose one of train, validation, test"):
        list(questions.StoredQuestions(prepared[1], "dev"))


@pytest.mark.parametrize("damage", ["truncated", "gone", "info"])
def test_a_damaged_data_set_is_named_with_the_way_out(prepared, tmp_path, damage):
    folder = shutil.copytree(prepared[1], tmp_path / "1.0.0")
    (records,) = folder.glob("*-test.*")
    if damage == "truncated":
        records.write_bytes(records.read_bytes()[:1000])
    elif damage == "gone":
        records.unlink()
    else:
        (folder / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match=f"{folder} cannot be read .*; remove the folder and prepare the data again"):
        list(questions.StoredQuestions(folder, "test"))


class Broken(tfds.core.GeneratorBasedBuilder):
    """A set with one bad question, of the features that the project's sets have."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="question"), tfds.core.BuilderConfig(name="gold")]

    def _info(self):
        text = tfds.features.Text()
        several = tfds.features.Sequence(tfds.features.Text())
        features = {"id": text, "question": text, "golden_answers": several, "domains": several, "relations": several}
        features["hops"] = tfds.features.Scalar(dtype=np.int32)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"test": self._generate_examples()}

    def _generate_examples(self):
        empty = {"question": ("  ", ["b"]), "gold": ("a", [" "])}[self.builder_config.name]
        for i, (question, golds) in enumerate([("é?", ["ü", ""]), empty]):
            yield (
                i,
                {"id": f"q{i}", "question": question, "golden_answers": golds, "hops": 1}
                | {
                    "domains": [],
                    "relations": [],
                },
            )


@pytest.mark.parametrize(("config", "message"), [("question", "'q1' in .* is empty"), ("gold", "'q1' in .* no gold")])
def test_an_empty_question_is_refused_with_its_id(tmp_path, config, message):
    builder = Broken(data_dir=tmp_path, config=config, file_format="array_record")
    builder.download_and_prepare()
    with pytest.raises(DataError, match=message):
        list(questions.StoredQuestions(builder.data_dir, "test"))


RECORDS = [QuestionRecord(str(i), "set", "?", ("a",), 1, (), ()) for i in range(23)]


@given(seed=st.integers(0, 5), batch=st.integers(1, 23), steps=st.integers(1, 40), data=st.data())
def test_an_interrupted_run_sees_the_same_batches(seed, batch, steps, data):
    whole = QuestionIterator(RECORDS, seed=seed, batch=batch)
    expected = [whole.next() for _ in range(steps)]
    stop = data.draw(st.integers(0, steps))
    first = QuestionIterator(RECORDS, seed=seed, batch=batch)
    seen = [first.next() for _ in range(stop)]
    state = json.loads(json.dumps(first.state()))
    second = QuestionIterator(RECORDS, seed=seed, batch=batch)
    second.restore(state)
    assert seen + [second.next() for _ in range(steps - stop)] == expected


@given(seed=st.integers(0, 100), batch=st.integers(1, 23))
def test_an_epoch_holds_no_question_twice_and_epochs_differ(seed, batch):
    iterator = QuestionIterator(RECORDS, seed=seed, batch=batch)
    epochs = [[iterator.next() for _ in range(len(RECORDS) // batch)] for _ in range(6)]
    for epoch in epochs:
        counts = collections.Counter(record.id for chosen in epoch for record in chosen)
        assert set(counts.values()) == {1}
        assert all(len(chosen) == batch for chosen in epoch)
    assert len({tuple(record.id for chosen in epoch for record in chosen) for epoch in epochs}) > 1


def test_every_question_is_seen_in_time_and_seeds_differ():
    orders = []
    for seed in range(3):
        iterator = QuestionIterator(RECORDS, seed=seed, batch=10)
        drawn = [record.id for _ in range(30) for record in iterator.next()]
        assert set(drawn) == {record.id for record in RECORDS}
        orders.append(tuple(drawn))
    assert len(set(orders)) == 3


@pytest.mark.parametrize("batch", [0, 24])
def test_a_batch_that_the_split_cannot_fill_is_named(batch):
    with pytest.raises(DataError, match=f"batch is {batch}; .* 23 questions"):
        QuestionIterator(RECORDS, seed=0, batch=batch)
