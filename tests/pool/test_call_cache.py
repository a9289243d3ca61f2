import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_r1_jax.errors import UserError
from router_r1_jax.pool.call_cache import CacheMissError, CallCache, Request, count_calls, main, merge_caches
from router_r1_jax.pool.outcomes import Completion, Outcome, PoolError

BODY = {"model": "m", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 5, "temperature": 0.0}
REPLY = Completion("Kessan \udc80.", Outcome.TRUNCATED, 11, 5, 0.25, 2)
FAULT = Completion("", Outcome.TIMEOUT, 0, 0, 9.5, 4, "no answer in time")


def _request(episode="e1", call=0, **body):
    return Request("p", {**BODY, **body}, episode, call)


@pytest.fixture
def call_cache(tmp_path):
    """call_cache(mode) opens the test's call cache."""
    opened = []

    def open_cache(mode):
        opened.append(CallCache(tmp_path / "deep" / "call_cache.sqlite", mode))
        return opened[-1]

    yield open_cache
    for each in opened:
        each.close()


@pytest.mark.parametrize("mode", ["record", "replay", "strict"])
def test_a_reply_is_found_again_in_every_mode(call_cache, mode):
    kept = call_cache("record").keep(_request(), REPLY)
    found = call_cache(mode).find(_request())
    assert found == kept  # also in the characters that cannot be stored
    assert found == replace(REPLY, text="Kessan ?.", attempts=0)


def test_a_thought_and_an_estimate_are_kept(call_cache):
    thought = replace(REPLY, text="Kessan.", thought="Who \udc80?", estimated=True, attempts=0)
    kept = call_cache("record").keep(_request(), thought)
    assert call_cache("replay").find(_request()) == kept == replace(thought, thought="Who ??")


def test_a_file_without_these_columns_is_read_and_written(tmp_path):
    """As versions before wrote it. Its replies were paid, so it is not refused."""
    old, new = tmp_path / "old.sqlite", tmp_path / "new.sqlite"
    with contextlib.closing(CallCache(old, "record")) as cache:
        cache.keep(_request(), REPLY)
    with contextlib.closing(sqlite3.connect(old)) as db:
        for column in ("thought", "estimated"):
            db.execute(f"ALTER TABLE replies DROP COLUMN {column}")
        db.commit()
    assert merge_caches(new, [old]) == 1
    for path in (new, old):
        with contextlib.closing(CallCache(path, "record")) as cache:
            found = cache.find(_request())
            assert (found.text, found.thought, found.estimated) == ("Kessan ?.", "", False)
            cache.keep(_request(top_p=0.5), replace(REPLY, thought="x"))
            assert cache.find(_request(top_p=0.5)).thought == "x"


@pytest.mark.parametrize(
    "other",
    [
        Request("q", BODY, "e1", 0),
        _request(model="m2"),
        _request(messages=[{"role": "user", "content": "who?"}]),
        _request(max_tokens=6),
        _request(top_p=1.0),
        _request(temperature=0.1),
    ],
)
def test_another_question_is_another_call(call_cache, other):
    recording = call_cache("record")
    recording.keep(_request(), REPLY)
    assert recording.find(other) is None


@given(episodes=st.tuples(st.text(), st.text()), calls=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_who_asks_matters_only_if_the_model_samples(episodes, calls):
    same = episodes[0] == episodes[1] and calls[0] == calls[1]
    for temperature in ({"temperature": 0.7}, {"temperature": 1}):
        keys = [_request(e, c, **temperature).key() for e, c in zip(episodes, calls, strict=True)]
        assert (keys[0] == keys[1]) == same
    keys = [_request(e, c).key() for e, c in zip(episodes, calls, strict=True)]
    assert keys[0] == keys[1]
    without = {name: value for name, value in BODY.items() if name != "temperature"}
    keys = [Request("p", without, e, c).key() for e, c in zip(episodes, calls, strict=True)]
    assert (keys[0] == keys[1]) == same


def test_the_order_of_parameters_does_not_matter():
    assert Request("p", dict(reversed(BODY.items())), "e", 0).key() == _request().key()


def test_a_fault_is_repeated_in_replay_and_never_while_recording(call_cache):
    recording = call_cache("record")
    assert recording.keep(_request(), FAULT) == FAULT
    assert recording.find(_request()) is None
    for mode in ("replay", "strict"):
        assert call_cache(mode).find(_request()) == replace(FAULT, attempts=0)
    assert call_cache("replay").find(_request("e2")) is None  # nobody else's fault
    assert call_cache("replay").find(_request(call=1)) is None


def test_one_episodes_fault_and_anothers_reply_to_the_same_question_are_both_repeated(call_cache):
    recording = call_cache("record")
    recording.keep(_request("e1"), FAULT)
    recording.keep(_request("e2"), REPLY)
    strict = call_cache("strict")
    assert strict.find(_request("e1")).outcome == Outcome.TIMEOUT
    assert strict.find(_request("e2")).outcome == Outcome.TRUNCATED
    assert recording.find(_request("e1")).outcome == Outcome.TRUNCATED  # while recording a reply is better than a fault


def test_a_later_recording_of_the_same_call_replaces_its_fault(call_cache):
    recording = call_cache("record")
    recording.keep(_request(), FAULT)
    recording.keep(_request(), REPLY)
    assert call_cache("strict").find(_request()).outcome == Outcome.TRUNCATED


def test_the_first_reply_to_a_question_counts_for_all(call_cache):
    first = call_cache("record").keep(_request("e1"), replace(REPLY, text="first"))
    second = call_cache("record").keep(_request("e2"), replace(REPLY, text="second"))
    assert (first.text, second.text) == ("first", "first")


def test_a_strict_miss_says_which_call(call_cache):
    call_cache("record")
    with pytest.raises(
        CacheMissError, match=r"call cache .*call_cache\.sqlite does not hold call 3 of episode e9 to model 'm'.*record"
    ):
        call_cache("strict").find(_request("e9", 3))
    assert call_cache("replay").find(_request("e9", 3)) is None


def test_a_strict_call_cache_has_to_exist(tmp_path):
    with pytest.raises(PoolError, match=r"call cache .*none\.sqlite does not exist; record it first"):
        CallCache(tmp_path / "none.sqlite", "strict")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_call_cache_is_named(tmp_path):
    path = tmp_path / "call_cache.sqlite"
    path.write_text("something else entirely, and longer than the header of a database\n" * 20)
    with pytest.raises(PoolError, match=r"^call cache .*call_cache\.sqlite cannot be used \(file is not a database\)"):
        CallCache(path, "record")


_WRITER = """
import sys
from router_r1_jax.pool.outcomes import Completion, Outcome
from router_r1_jax.pool.call_cache import Request, CallCache, merge_caches
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
call_cache = CallCache(path, "record")
for i in range(count):
    body = {"model": "m", "messages": str(i), "temperature": 0.0}
    kept = call_cache.keep(Request("p", body, name, i), Completion(f"{i} from {name}", Outcome.OK, 1, 1, 0.0, 1))
    print(kept.text, flush=True)
"""


def _write(path, name, count):
    return subprocess.Popen([sys.executable, "-c", _WRITER, path, name, str(count)], stdout=subprocess.PIPE, text=True)


def test_processes_that_record_the_same_questions_agree_on_the_replies(tmp_path):
    path = tmp_path / "call_cache.sqlite"
    processes = [_write(path, name, 300) for name in "abc"]
    said = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert said[0] == said[1] == said[2]
    assert [text.split()[0] for text in said[0]] == [str(i) for i in range(300)]
    rows = sqlite3.connect(path).execute("SELECT count(*) FROM replies").fetchone()
    assert rows == (300,)


def test_what_was_kept_outlives_kill_9(tmp_path):
    path = tmp_path / "call_cache.sqlite"
    process = _write(path, "a", 10**9)
    kept = [process.stdout.readline() for _ in range(200)]
    process.send_signal(signal.SIGKILL)
    kept += process.communicate()[0].splitlines()
    call_cache = CallCache(path, "strict")
    for i in range(len(kept)):
        body = {"model": "m", "messages": str(i), "temperature": 0.0}
        assert call_cache.find(Request("p", body, "x", 0)).text == f"{i} from a"


def _record(path, *texts):
    call_cache = CallCache(path, "record")
    for text in texts:
        call_cache.keep(_request(messages=text), replace(REPLY, text=f"{text} on {path.stem}"))
    call_cache.keep(_request(path.stem, messages="down"), FAULT)
    call_cache.close()


def _command(capsys, **flags):
    main(**dict.fromkeys(("stats", "export", "merge_into", "merge"), "") | {k: str(v) for k, v in flags.items()})
    return capsys.readouterr().out


def test_stats_count_what_a_call_cache_holds(tmp_path, capsys):
    _record(tmp_path / "a", "x", "y")
    assert json.loads(_command(capsys, stats=tmp_path / "a")) == {
        "replies": 2,
        "faults": 1,
        "prompt_tokens": 22,
        "completion_tokens": 10,
        "outcomes": {"timeout": 1, "truncated": 2},
        "models": {"m": 2},
    }


def test_export_prints_a_line_per_reply(tmp_path, capsys):
    _record(tmp_path / "a", "x", "y")
    lines = [json.loads(line) for line in _command(capsys, export=tmp_path / "a").splitlines()]
    assert {line["request"]["messages"]: line["text"] for line in lines} == {"x": "x on a", "y": "y on a"}
    assert [line["key"] for line in lines] == sorted(line["key"] for line in lines)


@pytest.mark.parametrize("flags", [{}, {"merge": "a"}, {"merge_into": "a"}, {"stats": "a", "merge": "b"}])
def test_a_command_without_a_task_is_refused(capsys, flags):
    with pytest.raises(PoolError, match="nothing to do"):
        _command(capsys, **flags)


def test_a_merge_of_a_file_that_is_no_call_cache_changes_nothing(tmp_path):
    _record(tmp_path / "a", "x")
    (tmp_path / "b").write_text("no database")
    with pytest.raises(PoolError, match="b cannot be used"):
        merge_caches(tmp_path / "new", [tmp_path / "a", tmp_path / "b"])
    assert not (tmp_path / "new").exists()


def test_merged_call_caches_hold_all_and_the_first_reply_stays(tmp_path, capsys):
    for name, texts in (("a", "xy"), ("b", "yz"), ("c", "zw")):
        _record(tmp_path / name, *texts)
    others = f"{tmp_path / 'b'},{tmp_path / 'c'}"
    assert _command(capsys, merge_into=tmp_path / "a", merge=others).startswith("2 replies added to")
    strict = CallCache(tmp_path / "a", "strict")
    texts = [strict.find(_request(messages=text)).text for text in "xyzw"]
    assert texts == ["x on a", "y on a", "z on b", "w on c"]
    assert all(strict.find(_request(name, messages="down")).outcome == Outcome.TIMEOUT for name in "abc")
    _command(capsys, merge_into=tmp_path / "new", merge=tmp_path / "a")
    assert count_calls(tmp_path / "new") == count_calls(tmp_path / "a")


@pytest.mark.parametrize("flag", ["stats", "export", "merge"])
@pytest.mark.parametrize("kind", ["absent", "other"])
def test_a_command_on_another_file_is_one_line(tmp_path, capsys, flag, kind):
    path = tmp_path / "file"
    if kind == "other":
        path.write_text("something else entirely, and longer than the header of a database\n" * 20)
    error = "does not exist; name a file" if kind == "absent" else "cannot be used"
    with pytest.raises(UserError, match=f"^call cache .*file {error}"):
        _command(capsys, **{flag: path}, **({"merge_into": tmp_path / "new"} if flag == "merge" else {}))


def test_the_command_line_takes_the_flags(tmp_path):
    _record(tmp_path / "a", "x")
    command = [sys.executable, "-m", "router_r1_jax.pool.call_cache"]
    done = subprocess.run([*command, f"--stats={tmp_path / 'a'}"], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["replies"] == 1
    failed = subprocess.run([*command, f"--stats={tmp_path / 'b'}"], capture_output=True, text=True, timeout=60)
    assert failed.returncode == 1 and failed.stderr.startswith("error: call cache ")
