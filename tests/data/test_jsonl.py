"""Lines of FlashRAG JSONL: each is a question, blank, or reported, and memory stays small whatever a file holds."""

import json
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from router_r1_jax.data import jsonl
from router_r1_jax.data.decontamination import question_keys
from router_r1_jax.data.jsonl import RawQuestion, read_questions, scan_file
from router_r1_jax.data.questions import DataError
from router_r1_jax.protocol import neutralize


def line(**changed):
    entry = {"id": "train_0", "question": "who?", "golden_answers": ["me"], "metadata": {}} | changed
    return json.dumps({name: value for name, value in entry.items() if value is not ...}).encode()


FAULTY = {
    b"{": "is not JSON (",
    b'{"id": "a"} {}': "is not JSON (Extra data, column 1",
    b'{"id": "a\x00"}': "is not JSON (Invalid control character",
    b"[" * 100_000: "is not JSON that can be read",
    b"9" * 5000: "is not JSON that can be read",
    b"\xff\xfe{\x00}\x00": "is not UTF-8 at byte 1",
    line()[:-20] + b"\xc3" + line()[-20:]: "is not UTF-8",
    b"[1, 2]": "is [1, 2]; it must be an object",
    b"null": "is null; it must be an object",
    line(id=...): "id is missing",
    line(question=...): "question is missing",
    line(golden_answers=...): "golden_answers is missing",
    line(id=17): "id is 17; it must be text",
    line(id=" "): "id is empty",
    line(question=""): "question is empty",
    line(question=" \t\u00a0"): "question is empty",
    line(question=["who?"]): 'question is ["who?"]; it must be text',
    line(question="who\0?"): "question holds a NUL character",
    line(question="who \ud83d?"): "question holds half of a surrogate pair, \\ud83d",
    line(golden_answers="me"): 'golden_answers is "me"; it must be a list of texts',
    line(golden_answers={"a": "x" * 90}): 'golden_answers is {"a": "xxxx',
    line(golden_answers=None): "golden_answers is null; it must be a list of texts",
    line(golden_answers=[]): "golden_answers holds no answer",
    line(golden_answers=["", " "]): "golden_answers holds no answer",
    line(golden_answers=["a", 1945]): "golden_answers[1] is 1945; it must be text",
    line(golden_answers=["a\0"]): "golden_answers[0] holds a NUL character",
}


@pytest.mark.parametrize("content", FAULTY, ids=lambda content: str(content)[:40])
def test_a_faulty_line_is_reported_with_its_number_and_reason(tmp_path, content):
    path = tmp_path / "train.jsonl"
    path.write_bytes(line(id="first") + b"\n\n" + content + b"\n" + line(id="last"))
    found = dict(read_questions(path, "nq/train.jsonl"))
    assert [type(found[n]) for n in (1, 2, 3, 4)] == [RawQuestion, type(None), str, RawQuestion]
    assert found[3].startswith(f"nq/train.jsonl:3: {FAULTY[content]}")
    assert len(found[3]) < 200


def test_windows_files_and_odd_text_are_read(tmp_path):
    path = tmp_path / "train.jsonl"
    texts = ["naïve \u2028 ?", 'a \\u0041 "b"', "😀?", " padded ", "line\nbreak"]
    lines = [line(id=str(i), question=text, golden_answers=["ß", " "]) for i, text in enumerate(texts)]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\r\n \t\r\n")
    *found, blank = [question for _, question in read_questions(path, "x")]
    assert [question.question for question in found] == [text.strip() for text in texts]
    assert {(question.golds, question.blank_golds) for question in found} == {(("ß",), 1)}
    assert blank is None
    counts = {"lines": 6, "questions": 5, "bad_lines": 0, "blank_lines": 1, "blank_answers": 5}
    assert scan_file(path, "x", max_bad=0).counts == counts


def test_of_equal_ids_the_first_is_used(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n".join(line(id=i, question=f"who is {n}?") for n, i in enumerate("abacab")))
    found = scan_file(path, "f", max_bad=0.5)
    assert found.bad_lines == [
        "f:3: id is that of line 1",
        "f:5: id is that of line 1",
        "f:6: id is that of line 2",
    ]
    assert found.numbers.tolist() == [1, 2, 4]
    assert (found.keys == question_keys(f"who is {n}?" for n in (0, 1, 3))).all()


def test_too_many_bad_lines_are_refused_with_the_first_of_them(tmp_path, monkeypatch):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n".join([line(id=str(i)) for i in range(88)] + [b"{"] * 12))
    assert len(scan_file(path, "f", max_bad=0.12).bad_lines) == 12
    with pytest.raises(DataError, match=r"f: 12 of 100 lines cannot be used.*--max_bad=0\.11") as refused:
        scan_file(path, "f", max_bad=0.11)
    assert "\n  f:89: is not JSON" in str(refused.value) and str(refused.value).count("\n") == 11
    monkeypatch.setattr(jsonl, "MAX_BAD_LINES", 11)
    with pytest.raises(DataError, match="f: more than 11 lines cannot be used"):
        scan_file(path, "f", max_bad=0.99)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_a_question_is_refused(tmp_path, content):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="f holds no question"):
        scan_file(path, "f", max_bad=0.5)


LINES = st.one_of(
    st.binary(max_size=30),
    st.builds(lambda text, gold: line(question=text, golden_answers=[gold]), st.text(max_size=20), st.text(max_size=5)),
    st.just(b"x" * 150),
    st.just(b"x" * 99),
)


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(LINES, max_size=8), end=st.booleans())
@example(lines=[b"x" * 99, b"y" * 100, b"z" * 101, b"x" * 200], end=True)
@example(lines=[b"x" * 100], end=False)
@example(lines=[line(question="0", golden_answers=["\x1b"])], end=False)
def test_every_line_is_accounted_for(lines, end, tmp_path_factory):
    """Lines, counted by splitting the bytes, whatever they hold and however short the bound on a line is."""
    content = b"\n".join(lines) + b"\n" * end
    path = tmp_path_factory.mktemp("lines") / "f.jsonl"
    path.write_bytes(content)
    rows = content.split(b"\n")[: None if content and not content.endswith(b"\n") else -1]
    rows[:1] = [row.removeprefix(b"\xef\xbb\xbf") for row in rows[:1]]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jsonl, "MAX_LINE", 100)
        found = list(read_questions(path, "f"))
    assert [number for number, _ in found] == list(range(1, len(rows) + 1))
    for (_, got), row in zip(found, rows, strict=True):
        if len(row) >= 100:
            assert ": is longer than" in got
        elif not row.strip():
            assert got is None
        else:
            assert isinstance(got, RawQuestion) == _usable(row)


def _usable(row):
    try:
        entry = json.loads(row.decode())
        question, golds = entry["question"], entry["golden_answers"]
        everything = question + "".join(golds)
        everything.encode()
        shown = [neutralize(text).strip() for text in (question, "".join(golds))]  # invisible characters do not count
        return all(shown) and "\0" not in everything
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def peak_bytes(job):
    tracemalloc.start()
    try:
        job()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_line_of_50_megabytes_is_reported_and_not_held(tmp_path):
    path = tmp_path / "train.jsonl"
    with open(path, "wb") as file:
        file.write(line(id="a") + b'\n{"id": "b", "question": "')
        file.write(b"w" * 50_000_000)
        file.write(b'"}\n' + line(id="c") + b"\n")
    found = []
    peak = peak_bytes(lambda: found.append(scan_file(path, "f", max_bad=0.5)))
    assert found[0].bad_lines == ["f:2: is longer than 4 MiB"]
    assert found[0].numbers.tolist() == [1, 3]
    assert peak < 5 * jsonl.MAX_LINE


def test_memory_follows_the_number_of_questions_not_the_size_of_the_file(tmp_path):
    path = tmp_path / "train.jsonl"
    count = 4000
    with open(path, "wb") as file:
        for i in range(count):
            file.write(line(id=f"train_{i}", question=f"who is {i}?", metadata={"context": "w" * 5000}) + b"\n")
    assert path.stat().st_size > 20e6
    scan_file(path, "f", max_bad=0)  # imports and caches are not counted
    assert peak_bytes(lambda: scan_file(path, "f", max_bad=0)) < 1e6
