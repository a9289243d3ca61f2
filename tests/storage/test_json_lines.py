"""JSON lines: what is written is read back whatever its text, and a killed run resumes as if never killed."""

from hypothesis import given, settings
from hypothesis import strategies as st

from router_r1_jax.storage.json_lines import JsonLines, read_episodes, up_to_step, write_episodes

text = st.text(st.characters(codec=None), max_size=20)  # lone surrogates, U+2028, NUL, line breaks


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(text, text | st.integers() | st.none() | st.lists(text), max_size=4), max_size=6))
def test_episodes_come_back_whatever_their_text(tmp_path_factory, episodes):
    workdir = tmp_path_factory.mktemp("run")
    write_episodes(workdir, "trained", episodes[:2])
    lines = JsonLines(workdir / "episodes/trained.jsonl", keep=lambda line: True)
    lines.write(episodes[2:])
    lines.close()
    assert read_episodes(workdir) == episodes
    assert (workdir / "episodes/trained.jsonl").read_bytes().count(b"\n") == len(episodes)


def test_no_file_no_episodes(tmp_path):
    assert read_episodes(tmp_path) == []


def test_episodes_resume_like_metrics(tmp_path):
    write_episodes(tmp_path, "train", [{"step": 10, "reward": {"cost": float("nan")}}, {"step": 20}])
    JsonLines(tmp_path / "episodes/train.jsonl", keep=up_to_step(10)).close()
    assert read_episodes(tmp_path) == [{"step": 10, "reward": {"cost": None}}]
