"""The journal: what was written is read back, whatever was torn, and never by another evaluation."""

import dataclasses
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_r1_jax.evaluation.journal import Journal, measured_once
from router_r1_jax.pool.outcomes import Outcome, Reply
from router_r1_jax.report.writer import BrokenFileError, read_lines

replies = st.builds(
    Reply, text=st.text(max_size=20), outcome=st.sampled_from(Outcome), model=st.text(max_size=5),
    charged=st.floats(0, 1), latency=st.floats(0, 9), completion_tokens=st.integers(0, 999), hit=st.booleans(),
)  # fmt: skip
episodes = st.builds(
    SimpleNamespace, id=st.integers(0, 40), text=st.text(st.characters(), max_size=50), stop=st.text(max_size=9),
    replies=st.lists(replies, max_size=3), sampled=st.lists(st.booleans(), max_size=9),
)  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 3), episodes), max_size=8))
def test_every_episode_comes_back_as_it_was(tmp_path_factory, written):
    folder = tmp_path_factory.mktemp("journal")
    with Journal(folder, "trained", {"seed": 0}) as journal:
        for batch, episode in written:
            journal.add(batch, episode)
    expected = {}
    for batch, episode in written:
        fields = {**vars(episode), "sampled": [True] * sum(episode.sampled)}
        expected.setdefault(batch, {})[episode.id] = fields
    with Journal(folder, "trained", {"seed": 0}) as journal:
        assert {batch: journal.finished(batch) for batch in range(4)} == {b: expected.get(b, {}) for b in range(4)}
        assert len(journal) == sum(map(len, expected.values()))


def episode(number):
    return SimpleNamespace(id=number, text="t", stop="answer", replies=[Reply("r", Outcome.OK)], sampled=[True, False])


def test_a_torn_line_is_cut_and_the_next_one_is_whole(tmp_path):
    with Journal(tmp_path, "trained", {}) as journal:
        journal.add(0, episode(0))
        journal.add(0, episode(1))
    data = journal.path.read_bytes()
    for end in range(len(data) // 2 + 1, len(data)):  # a kill in the middle of the second line
        journal.path.write_bytes(data[:end])
        with Journal(tmp_path, "trained", {}) as again:
            assert list(again.finished(0)) == [0]
            again.add(0, episode(2))
        with Journal(tmp_path, "trained", {}) as again:
            assert list(again.finished(0)) == [0, 2]


def test_another_evaluation_has_a_journal_of_its_own(tmp_path):
    with Journal(tmp_path, "trained", {"weights": "a"}) as journal:
        journal.add(0, episode(0))
    for name, identity in (("trained", {"weights": "b"}), ("warm_start", {"weights": "a"})):
        with Journal(tmp_path, name, identity) as other:
            assert len(other) == 0
    with Journal(tmp_path, "trained", {"weights": "a"}) as same:
        assert same.finished(0)[0]["replies"] == [Reply("r", Outcome.OK)]
        assert dataclasses.is_dataclass(same.finished(0)[0]["replies"][0])


def test_processes_write_files_of_their_own_and_read_all(tmp_path):
    with Journal(tmp_path, "trained", {}, 0) as first, Journal(tmp_path, "trained", {}, 1) as second:
        first.add(0, episode(0))
        second.add(0, episode(1))
        assert first.path != second.path
    with Journal(tmp_path, "trained", {}, 2) as alone:
        assert sorted(alone.finished(0)) == [0, 1] and len(alone) == 2


def test_a_file_that_is_no_journal_is_named(tmp_path):
    with Journal(tmp_path, "trained", {}) as journal:
        journal.add(0, episode(0))
    journal.path.write_text("not JSON\n")
    with pytest.raises(BrokenFileError, match=f"{journal.path}, line 1 is not JSON"):
        Journal(tmp_path, "trained", {})


def test_records_are_measured_once_and_anew_where_anything_differs(tmp_path):
    path, asked = tmp_path / "episodes" / "b.jsonl", []

    def records(identity, ids):
        def measure():
            asked.append(identity)
            return [{"id": name, "em": len(asked)} for name in ids]

        return measured_once(tmp_path, "b", identity, ids, measure)

    first = records({"seed": 0}, ["x", "y"])
    assert records({"seed": 0}, ["x", "y"]) == first == read_lines(path) and len(asked) == 1
    assert [r["em"] for r in records({"seed": 1}, ["x", "y"])] == [2, 2]
    assert [r["em"] for r in records({"seed": 1}, ["y", "x"])] == [3, 3]
    path.write_bytes(path.read_bytes()[:-5])  # a kill has torn the last line
    assert [r["em"] for r in records({"seed": 1}, ["y", "x"])] == [4, 4] and len(read_lines(path)) == 2
    path.write_text('{"id": "y"}\n{"id": "x"}\n')  # of other code, which did not say what they were made with
    assert [r["em"] for r in records({"seed": 1}, ["y", "x"])] == [5, 5]
