import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_totals import ledger_totals, state_totals

from router_r1_jax.pool.ledger import Ledger, read_ledger
from router_r1_jax.pool.outcomes import Outcome, PoolError, Reply

replies = st.builds(
    Reply,
    text=st.just("Kessan."),
    outcome=st.sampled_from(Outcome),
    model=st.sampled_from(["Titan", "Pico", ""]),
    prompt_tokens=st.integers(0, 10_000),
    completion_tokens=st.integers(0, 10_000),
    charged=st.floats(0.0, 1.0),
    spent=st.floats(0.0, 1.0),
)


def _add(ledger, reply, call=0, step=3):
    ledger.add(reply, step=step, split="train", episode="e1", call=call)


def test_a_line_holds_all_of_a_call_but_its_texts(tmp_path):
    ledger = Ledger(tmp_path / "new" / "ledger.jsonl", price_date="2026-01-31")
    reply = Reply("Kessan.", Outcome.OK, "Titan", "Who?", 11, 2, 24.0, 5.7e-5, 0.0, 0.25, 3, True, "")
    ledger.add(reply, step=3, split="validation", episode="e1", call=2)
    (line,) = read_ledger(tmp_path / "new" / "ledger.jsonl")
    assert line.pop("time") > 1.7e9
    assert line == {
        "step": 3,
        "split": "validation",
        "episode": "e1",
        "call": 2,
        "model": "Titan",
        "outcome": "ok",
        "prompt_tokens": 11,
        "completion_tokens": 2,
        "cached_tokens": 0,
        "estimated": False,
        "charged": 5.7e-5,
        "spent": 0.0,
        "latency": 0.25,
        "attempts": 3,
        "hit": True,
        "error": "",
        "price_date": "2026-01-31",
    }


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(replies, max_size=12), data=st.data())
def test_sums_are_exact_and_the_same_in_any_order(tmp_path, calls, data):
    ledgers = [Ledger(tmp_path / "a"), Ledger(tmp_path / "b")]
    for reply in calls:
        _add(ledgers[0], reply)
    for reply in data.draw(st.permutations(calls)):
        _add(ledgers[1], reply)
    totals = state_totals(ledgers[0].state())
    assert totals == state_totals(ledgers[1].state())
    for model in {reply.model for reply in calls}:
        own = [reply for reply in calls if reply.model == model]
        assert totals["models"][model]["calls"] == len(own)
        for field in ("charged", "spent"):
            exact = sum((Fraction(getattr(reply, field)) for reply in own), Fraction())
            assert totals["models"][model][field] == pytest.approx(float(exact), rel=1e-9, abs=1e-11)
    assert totals["calls"] == len(calls)
    for ledger in ledgers:
        ledger.close()


def test_a_restored_ledger_goes_on_as_if_never_interrupted(tmp_path):
    whole, first, second = (Ledger(tmp_path / name) for name in ("whole", "first", "second"))
    calls = [Reply("", Outcome.OK, "Titan", charged=0.1 * i, spent=0.07) for i in range(10)]
    for reply in calls:
        _add(whole, reply)
    for reply in calls[:6]:
        _add(first, reply)
    second.restore(json.loads(json.dumps(first.state())) | {"ledger_size": 0}, 3)
    for reply in calls[6:]:
        _add(second, reply)
    assert second.state()["ledger"] == whole.state()["ledger"]


def test_threads_write_whole_lines(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda i: _add(ledger, Reply("", Outcome.OK, "Titan", error="x" * (i % 300)), i), range(2000)))
    lines = (tmp_path / "ledger").read_bytes().splitlines()
    assert sorted(json.loads(line)["call"] for line in lines) == list(range(2000))


@pytest.mark.parametrize("torn", [b'{"step": 3, "mod', b"{", b'"text"', b"\xff\xfe"])
def test_a_torn_line_harms_no_other(tmp_path, torn):
    path = tmp_path / "ledger"
    _add(Ledger(path), Reply("", Outcome.OK, "Titan"), call=0)
    with open(path, "ab") as file:
        file.write(torn)
    _add(Ledger(path), Reply("", Outcome.OK, "Titan"), call=1)
    assert [line["call"] for line in read_ledger(path)] == [0, 1]


_WRITER = """
import sys
from router_r1_jax.pool.ledger import Ledger
from router_r1_jax.pool.outcomes import Outcome, Reply
ledger = Ledger(sys.argv[1])
for i in range(10**9):
    ledger.add(Reply("", Outcome.OK, "Titan", error="x" * 500), step=0, split="train", episode=sys.argv[2], call=i)
    print(i, flush=True)
"""


def test_what_was_added_outlives_kill_9(tmp_path):
    """Two processes write into one ledger and are killed in the middle of it."""
    path = tmp_path / "ledger"
    processes = [
        subprocess.Popen([sys.executable, "-c", _WRITER, path, name], stdout=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    for process in processes:
        for _ in range(200):
            assert process.stdout.readline()
    for process in processes:
        process.send_signal(signal.SIGKILL)
    added = {
        name: len(process.communicate()[0].splitlines()) + 200 for name, process in zip("ab", processes, strict=True)
    }
    calls = {name: [line["call"] for line in read_ledger(path) if line["episode"] == name] for name in "ab"}
    for name in "ab":
        assert len(calls[name]) in (added[name], added[name] + 1)  # the last one may not have been reported any more
        assert calls[name] == list(range(len(calls[name])))


def test_a_full_disk_is_one_clear_line():
    with pytest.raises(PoolError, match=r"^ledger /dev/full cannot be written \(No space left on device\); make room"):
        _add(Ledger("/dev/full"), Reply("", Outcome.OK, "Titan"))


def test_a_folder_in_its_place_is_one_clear_line(tmp_path):
    with pytest.raises(PoolError, match=r"cannot be written \(Is a directory\)"):
        Ledger(tmp_path)


def test_totals_of_the_file_are_told_by_model_and_step(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    for step, model in ((1, "Titan"), (1, "Pico"), (2, "Titan"), (2, "")):
        reply = Reply("", Outcome.OK, model, charged=0.25 * bool(model), spent=0.125 * bool(model))
        ledger.add(reply, step=step, split="train", episode="e", call=0)
    totals = ledger_totals(tmp_path / "ledger")
    assert totals["steps"] == {
        1: {"calls": 2, "charged": 0.5, "spent": 0.25},
        2: {"calls": 2, "charged": 0.25, "spent": 0.125},
    }
    assert totals["models"]["Titan"] == {"calls": 2, "charged": 0.5, "spent": 0.25}
    assert totals["models"] == state_totals(ledger.state())["models"]


def test_an_evaluation_behind_the_checkpoint_a_run_goes_back_to_is_not_made_again(tmp_path):
    path = tmp_path / "ledger"
    ledger = Ledger(path)
    _add(ledger, Reply("", Outcome.OK, "Titan", charged=1.0, spent=1.0), step=2)
    state = ledger.state()
    ledger.add(Reply("", Outcome.OK, "Titan", charged=2.0, spent=2.0), step=2, split="test", episode="e", call=0)
    before = path.stat().st_size
    ledger.restore(state, 2)
    assert path.stat().st_size == before  # nothing is made again, so nothing is written
    _add(ledger, Reply("", Outcome.OK, "Titan", charged=4.0, spent=4.0), step=3)
    ledger.restore(state, 2)
    totals = ledger_totals(path)
    assert (totals["calls"], totals["charged"], totals["spent"]) == (2, 3.0, 7.0)


events = st.lists(st.one_of(replies, st.just("checkpoint"), st.just("crash"), st.just("torn crash")), max_size=40)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=events)
def test_file_and_run_tell_the_same_sums_however_often_it_crashes(tmp_path, events):
    """A run that goes back to its last checkpoint: what it reports is what its ledger says, and all that it paid."""
    path = tmp_path / "ledger"
    path.unlink(missing_ok=True)
    ledger = Ledger(path)
    saved, kept, since, paid, step = ledger.state(), [], [], [], 0
    for event in events:
        if isinstance(event, Reply):
            _add(ledger, event, step=step + 1)
            since.append(event)
            paid.append(event)
        elif event == "checkpoint":
            saved, kept, since = json.loads(json.dumps(ledger.state())), kept + since, []
            step += 1
        else:
            ledger.close()
            if event == "torn crash":
                with open(path, "ab") as file:
                    file.write(b'{"time": 3, "step"')
            ledger, since = Ledger(path), []
            ledger.restore(saved, step)
    reported, written = state_totals(ledger.state()), ledger_totals(path)
    assert {name: written[name] for name in ("calls", "charged", "spent")} == {
        name: reported[name] for name in ("calls", "charged", "spent")
    }
    for model, sums in written["models"].items():
        assert reported["models"][model] == sums
    assert reported["calls"] == len(kept + since)
    assert reported["charged"] == pytest.approx(sum(reply.charged for reply in kept + since), abs=1e-9)
    assert reported["spent"] == pytest.approx(sum(reply.spent for reply in paid), abs=1e-9)
    assert ledger.paid == reported["spent"]
    ledger.close()


def test_the_routers_tokens_are_summed_without_those_of_a_repeated_rollout(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.add_router(step=1, split="train", read_tokens=100, sampled_tokens=40)
    _add(ledger, Reply("x", Outcome.OK, "Titan", charged=0.5, spent=0.5), step=1)
    state = ledger.state()
    ledger.add_router(step=1, split="validation", read_tokens=1000, sampled_tokens=400)  # of the step that is kept
    ledger.add_router(step=2, split="train", read_tokens=7, sampled_tokens=7)
    ledger.close()
    again = Ledger(path)
    again.restore(state, 1)
    again.add_router(step=2, split="train", read_tokens=10, sampled_tokens=4)
    totals = ledger_totals(path)
    assert totals["router"] == {"read_tokens": 1110, "sampled_tokens": 444}
    assert totals["calls"] == 1 and state_totals(again.state())["calls"] == 1 and len(read_ledger(path)) == 1
