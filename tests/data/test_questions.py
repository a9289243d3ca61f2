"""Prepared data sets that are damaged or missing, and the resumable iterator against the uninterrupted one."""

import collections
import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_r1_jax.config import base_config
from router_r1_jax.data import questions
from router_r1_jax.data.questions import DataError, QuestionIterator, QuestionRecord
from router_r1_jax.synthetic import tfds_builder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Folder of a prepared data set."""
    return tfds_builder.prepare(base_config().synthetic.world, tmp_path_factory.mktemp("work"))


def test_a_folder_without_data_and_an_unknown_split_are_named(prepared, tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path} holds no prepared data set"):
        list(questions.StoredQuestions(tmp_path, "train"))
    with pytest.raises(DataError, match="no split 'dev'; choose one of train, validation, test"):
        list(questions.StoredQuestions(prepared, "dev"))


@pytest.mark.parametrize("damage", ["truncated", "gone", "info"])
def test_a_damaged_data_set_is_named_with_the_way_out(prepared, tmp_path, damage):
    folder = shutil.copytree(prepared, tmp_path / "1.0.0")
    (records,) = folder.glob("*-test.*")
    if damage == "truncated":
        records.write_bytes(records.read_bytes()[:1000])
    elif damage == "gone":
        records.unlink()
    else:
        (folder / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match=f"{folder} cannot be read .*; remove the folder and prepare the data again"):
        list(questions.StoredQuestions(folder, "test"))


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
        seen = [record.id for _ in range(30) for record in iterator.next()]
        assert set(seen) == {record.id for record in RECORDS}
        orders.append(tuple(seen))
    assert len(set(orders)) == 3


@pytest.mark.parametrize("batch", [0, 24])
def test_a_batch_that_the_split_cannot_fill_is_named(batch):
    with pytest.raises(DataError, match=f"batch is {batch}; .* 23 questions"):
        QuestionIterator(RECORDS, seed=0, batch=batch)
