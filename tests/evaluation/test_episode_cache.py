"""The episode cache: what was written is read back, whatever was torn, and never by another evaluation."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_r1_jax.evaluation.episode_cache import EpisodeCache, measured_once
from router_r1_jax.pool.outcomes import Outcome, Reply
from router_r1_jax.rollout import Episode
from router_r1_jax.storage.json_lines import BrokenFileError, read_lines

replies = st.builds(
    Reply,
    text=st.text(max_size=20),
    outcome=st.sampled_from(Outcome),
    model=st.text(max_size=5),
    charged=st.floats(0, 1),
    latency=st.floats(0, 9),
    completion_tokens=st.integers(0, 999),
    hit=st.booleans(),
)
episodes = st.builds(
    Episode,
    id=st.integers(0, 40),
    prompt=st.just(()),
    text=st.text(st.characters(), max_size=50),
    stop=st.text(max_size=9),
    replies=st.lists(replies, max_size=3),
    sampled=st.lists(st.booleans(), max_size=9),
)


@given(st.lists(st.tuples(st.integers(0, 3), episodes), max_size=8))
def test_every_episode_comes_back_as_it_was(tmp_path_factory, written):
    folder = tmp_path_factory.mktemp("cache")
    with EpisodeCache(folder, "trained", {"seed": 0}) as cache:
        for batch, episode in written:
            cache.add(batch, episode)
    expected = {}
    for batch, episode in written:
        kept = dataclasses.replace(episode, sampled=[True] * sum(episode.sampled))
        expected.setdefault(batch, {})[episode.id] = kept
    with EpisodeCache(folder, "trained", {"seed": 0}) as cache:
        assert {batch: cache.finished(batch) for batch in range(4)} == {b: expected.get(b, {}) for b in range(4)}
        assert len(cache) == sum(map(len, expected.values()))


def episode(number):
    return Episode(number, (), text="t", stop="answer", replies=[Reply("r", Outcome.OK)], sampled=[True, False])


def test_a_torn_line_is_cut_and_the_next_one_is_whole(tmp_path):
    with EpisodeCache(tmp_path, "trained", {}) as cache:
        cache.add(0, episode(0))
        cache.add(0, episode(1))
    data = cache.path.read_bytes()
    for end in range(len(data) // 2 + 1, len(data)):  # a kill in the middle of the second line
        cache.path.write_bytes(data[:end])
        with EpisodeCache(tmp_path, "trained", {}) as again:
            assert list(again.finished(0)) == [0]
            again.add(0, episode(2))
        with EpisodeCache(tmp_path, "trained", {}) as again:
            assert list(again.finished(0)) == [0, 2]


def test_another_evaluation_has_another_cache(tmp_path):
    with EpisodeCache(tmp_path, "trained", {"weights": "a"}) as cache:
        cache.add(0, episode(0))
    for name, key in (("trained", {"weights": "b"}), ("warm_start", {"weights": "a"})):
        with EpisodeCache(tmp_path, name, key) as other:
            assert len(other) == 0
    with EpisodeCache(tmp_path, "trained", {"weights": "a"}) as same:
        assert same.finished(0)[0].replies == [Reply("r", Outcome.OK)]


def test_processes_write_files_of_their_own_and_read_all(tmp_path):
    with EpisodeCache(tmp_path, "trained", {}, 0) as first, EpisodeCache(tmp_path, "trained", {}, 1) as second:
        first.add(0, episode(0))
        second.add(0, episode(1))
        assert first.path != second.path
    with EpisodeCache(tmp_path, "trained", {}, 2) as alone:
        assert sorted(alone.finished(0)) == [0, 1] and len(alone) == 2


def test_a_file_that_is_no_cache_is_named(tmp_path):
    with EpisodeCache(tmp_path, "trained", {}) as cache:
        cache.add(0, episode(0))
    cache.path.write_text("not JSON\n")
    with pytest.raises(BrokenFileError, match=f"{cache.path}, line 1 is not JSON"):
        EpisodeCache(tmp_path, "trained", {})


def test_records_are_measured_once_and_anew_where_anything_differs(tmp_path):
    path, asked = tmp_path / "episodes" / "b.jsonl", []

    def records(key, ids):
        def measure():
            asked.append(key)
            return [{"id": name, "em": len(asked)} for name in ids]

        return measured_once(tmp_path, "b", key, ids, measure)

    first = records({"seed": 0}, ["x", "y"])
    assert records({"seed": 0}, ["x", "y"]) == first == read_lines(path) and len(asked) == 1
    assert [r["em"] for r in records({"seed": 1}, ["x", "y"])] == [2, 2]
    assert [r["em"] for r in records({"seed": 1}, ["y", "x"])] == [3, 3]
    path.write_bytes(path.read_bytes()[:-5])  # a kill has torn the last line
    assert [r["em"] for r in records({"seed": 1}, ["y", "x"])] == [4, 4] and len(read_lines(path)) == 2
    path.write_text('{"id": "y"}\n{"id": "x"}\n')  # of other code, which did not say what they were made with
    assert [r["em"] for r in records({"seed": 1}, ["y", "x"])] == [5, 5]
