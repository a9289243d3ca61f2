"""Two processes that are one run: messages, errors and interrupts, and training with the results of one process."""

import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mains
import numpy as np
import pytest
from ledger_totals import ledger_totals
from mains import checkpoint_arrays, repeatable, train_lines

from router_r1_jax.config import base_config
from router_r1_jax.distributed import multihost
from router_r1_jax.pool.ledger import Ledger
from router_r1_jax.pool.outcomes import Outcome, PoolError, Reply
from router_r1_jax.rollout import Episode
from router_r1_jax.router import Router
from router_r1_jax.setup.session import Session
from router_r1_jax.storage.checkpoint import CheckpointStore
from router_r1_jax.storage.json_lines import read_episodes

SCRIPT = Path(__file__).parents[1] / "two_hosts.py"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def as_srun_does(process, port):
    """What SLURM tells each of two tasks on one node; JAX would choose a port by the job's number."""
    tasks = {"SLURM_NTASKS": "2", "SLURM_PROCID": str(process), "SLURM_LOCALID": str(process)}
    return tasks | {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "JAX_COORDINATOR_PORT": str(port)}


def both(task, slurm=False):
    """(status, output as JSON, errors) of each of two processes, which both end by themselves."""
    port, started = free_port(), []
    for i in range(2):
        environment = mains.environment(JAX_PLATFORMS="cpu", **(as_srun_does(i, port) if slurm else {}))
        command = [sys.executable, SCRIPT, "auto" if slurm else f"127.0.0.1:{port}", str(i), task]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
    results = []
    for process in started:
        out, err = process.communicate(timeout=mains.TIMEOUT)
        lines = [line for line in out.splitlines() if line.startswith("{")]
        results.append((process.returncode, json.loads(lines[-1]) if lines else None, err))
    return results


def test_one_process_alone():
    assert not multihost.is_multihost() and multihost.is_primary() and multihost.all_can_act()
    assert multihost.allgather_objects("a") == ["a"] and multihost.run_on_all(lambda: 1) == [1]
    assert multihost.process_file(Path("call_cache.sqlite")) == Path("call_cache.sqlite")
    assert multihost.process_file(Path("call_cache.sqlite"), 3) == Path("call_cache-3.sqlite")
    assert all(multihost.owns_item(i) for i in range(3))
    with pytest.raises(ZeroDivisionError):
        multihost.run_on_all(lambda: 1 / 0)


class OnlyLedger:
    """A pool as far as a session's states go."""

    def __init__(self, path):
        self.ledger = Ledger(path)


def test_one_process_takes_back_what_another_wrote_behind_the_checkpoint(tmp_path):
    paths = [multihost.process_file(tmp_path / "ledger.jsonl", i) for i in range(2)]
    pools, reply = [OnlyLedger(path) for path in paths], Reply("yes", Outcome.OK, "Aria", charged=0.25, spent=0.125)
    for pool in pools:
        pool.ledger.add(reply, step=1, split="train", episode="a", call=0)
    saved = [pool.ledger.state() for pool in pools]
    for pool in pools:
        pool.ledger.add(reply, step=2, split="train", episode="b", call=0)
    session = object.__new__(Session)
    session.workdir, session.pool = tmp_path, pools[0]
    session.restore_pools(saved, 1)
    states = session.pool_states()
    assert [state["ledger"]["Aria"][:2] for state in states] == [state["ledger"]["Aria"][:2] for state in saved]
    assert session.spent == 4 * 0.125  # what was paid stays paid
    for path in paths:
        assert ledger_totals(path)["calls"] == 1 and ledger_totals(path)["charged"] == 0.25


def test_an_outage_ends_all_processes_at_a_place_where_they_can_keep_a_checkpoint(monkeypatch):
    monkeypatch.setattr(multihost, "is_multihost", lambda: True)
    monkeypatch.setattr(multihost, "allgather_objects", lambda value: [value, value])
    monkeypatch.setattr(multihost._State, "all_raised", False)
    monkeypatch.setattr(Router, "prompt_ids", lambda *_: (1, 2))
    router = object.__new__(Router)
    router.config, router.cards = base_config(), ()
    questions = [SimpleNamespace(question="?")]
    finished = {0: Episode(0, (1, 2), replies=[Reply("", Outcome.TIMEOUT, "Aria")])}
    with pytest.raises(PoolError, match="2 of 2 calls failed at their provider"):
        router.answer(
            questions, num_generations=1, temperature=0.0, seed=(0,), step=1, split="train", finished=finished
        )
    assert multihost.all_can_act()


@pytest.mark.slow
def test_messages_errors_and_interrupts_reach_both():
    (status, first, err), (other_status, second, other_err) = both("messages")
    assert status == other_status == 0, (err, other_err)
    for found in (first, second):
        assert found["sizes"] == [1, 70_001] and found["order"] == [0, 1] and found["again"] == ["both", "both"]
        assert found["interrupt"] == ["KeyboardInterrupt", "", True]
    assert (first["mine"], second["mine"]) == ([0, 2, 4], [1, 3])
    assert (first["file"], second["file"]) == ("ledger.jsonl", "ledger-1.jsonl")
    assert first["failure"] == ["HostError", "process 1 of the run has failed: ValueError: the disk is full", True]
    assert second["failure"] == ["ValueError", "the disk is full", True]


@pytest.mark.slow
def test_an_interrupt_waits_for_the_place_where_both_can_take_it():
    for status, found, err in both("kept", slurm=True):
        assert status == 0 and found == {"interrupt": ["KeyboardInterrupt", "", True]}, err


@pytest.mark.slow
@pytest.mark.parametrize("task", ["death", "failure"])
def test_where_one_ends_the_other_does_not_wait_for_ever(task):
    """The wait for a dead process is HEARTBEAT_TIMEOUT and a little; `both` would wait ten times as long."""
    (status, found, err), (other_status, other_found, other_err) = both(task)
    assert found is None and other_found is None
    assert status != 0 and other_status != 0
    assert "the disk is full" in err if task == "failure" else other_status == -signal.SIGKILL


# Training.


LAST = 6  # step of the run that others are held against
STRICT = (f"steps={LAST}", "pool.call_cache.mode=strict")


@pytest.fixture(scope="module")
def call_cache(uninterrupted):
    return f"pool.call_cache.path={uninterrupted / 'call_cache.sqlite'}"


@pytest.fixture(scope="module")
def stopped(uninterrupted, call_cache, tmp_path_factory):
    """Two processes went on from the warm start of a finished run, until one was sent SIGTERM; (workdir, its steps)."""
    workdir = tmp_path_factory.mktemp("two")
    begin_from(uninterrupted, workdir, step=0)
    where = ("distributed.processes=2", f"distributed.coordinator=127.0.0.1:{free_port()}")
    command = ("train", workdir, *STRICT, call_cache, "checkpoint.every=1000", *where)
    started = [mains.start(*command, f"distributed.process={i}", JAX_PLATFORMS="cpu") for i in range(2)]
    mains.wait_until(lambda: len(train_lines(workdir)) >= 2, started[0])
    started[1].send_signal(signal.SIGTERM)
    ended = [process.communicate(timeout=mains.TIMEOUT) for process in started]
    assert [process.returncode for process in started] == [130, 130], ended
    with CheckpointStore(workdir / "checkpoints") as store:
        step = store.latest()
    assert f"step {step} is kept" in ended[0][0] and "kept" not in ended[1][0]  # printed once
    return workdir, step


@pytest.fixture(scope="module")
def continued(stopped, call_cache, tmp_path_factory):
    """One process went on where the two were stopped."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    shutil.copytree(stopped[0], workdir)
    mains.succeed("train", workdir, *STRICT, call_cache)
    return workdir


def begin_from(finished, workdir, step):
    """A workdir whose only checkpoint is this one of a finished run."""
    shutil.copytree(finished / "checkpoints" / str(step), workdir / "checkpoints" / str(step))
    shutil.copytree(finished / "tokenizer", workdir / "tokenizer")


def told(workdir):
    """Text, calls and rewards of the episodes of training; not how long the calls took."""
    episodes = [e for e in read_episodes(workdir) if e["split"] == "train"]
    for episode in episodes:
        for call in episode["calls"]:
            del call["latency"]
    return episodes


@pytest.mark.slow
def test_two_processes_train_as_one_does(stopped, uninterrupted):
    workdir, step = stopped
    lines, truth = train_lines(workdir), repeatable(train_lines(uninterrupted))
    assert [line["step"] for line in lines] == list(range(1, step + 1)) and step >= 2
    for line, single in zip(repeatable(lines), truth, strict=False):
        for key in set(single) & set(line):
            assert line[key] == pytest.approx(single[key], rel=1e-3, abs=1e-5), (line["step"], key)
        assert line["reward/total"] == single["reward/total"]
    assert told(workdir) == [e for e in told(uninterrupted) if e["step"] <= step]


@pytest.mark.slow
def test_one_process_goes_on_where_two_were(continued, uninterrupted):
    assert told(continued) == told(uninterrupted)
    (arrays, run), (others, other_run) = checkpoint_arrays(continued, LAST), checkpoint_arrays(uninterrupted, LAST)
    start, _ = checkpoint_arrays(uninterrupted, 0)
    worst = max(np.max(np.abs(x - others[name])) for name, x in arrays.items() if name.startswith("[0]"))
    moved = max(np.max(np.abs(x - start[name])) for name, x in others.items() if name.startswith("[0]"))
    assert worst < min(1e-5, moved / 20)
    assert run["cost_window"] == other_run["cost_window"] and run["data"] == other_run["data"]


@pytest.mark.slow
def test_ledgers_of_two_processes_sum_to_what_one_writes(continued, uninterrupted):
    totals = [ledger_totals(continued / name) for name in ("ledger.jsonl", "ledger-1.jsonl")]
    assert all(part["calls"] > 0 for part in totals)
    _, run = checkpoint_arrays(continued, LAST)
    assert len(run["pools"]) == 2
    for part, pool in zip(totals, run["pools"], strict=True):
        assert part["calls"] == sum(sums[0] for sums in pool["ledger"].values())
    trained = [part["steps"] for part in totals]
    one = ledger_totals(uninterrupted / "ledger.jsonl")["steps"]
    for step, sums in one.items():
        parts = [steps[step] for steps in trained if step in steps]
        assert sum(part["charged"] for part in parts) == pytest.approx(sums["charged"])
        assert sum(part["calls"] for part in parts) == sums["calls"]


# A collapse, PPO and evaluation.


def on_two(main, workdir, *overrides, status=0):
    """What a main says as two processes, which both end with this status: (output, errors) of each."""
    where = ("distributed.processes=2", f"distributed.coordinator=127.0.0.1:{free_port()}")
    command = (main, workdir, *overrides, *where)
    started = [mains.start(*command, f"distributed.process={i}", JAX_PLATFORMS="cpu") for i in range(2)]
    ended = [process.communicate(timeout=mains.TIMEOUT) for process in started]
    assert [process.returncode for process in started] == [status, status], ended
    return ended


@pytest.mark.slow
def test_an_alarm_that_ends_two_processes_keeps_their_last_step(uninterrupted, call_cache, tmp_path):
    begin_from(uninterrupted, tmp_path, step=0)
    alarm = ("alarms.stop=True", "alarms.patience=1", "alarms.length=0.0", "checkpoint.every=1000")
    (out, err), (_, other_err) = on_two("train", tmp_path, *STRICT, call_cache, *alarm, status=1)
    assert "step 1 is kept" in out
    assert all("length has stood for 1 steps (alarms.patience)" in text for text in (err, other_err))
    with CheckpointStore(tmp_path / "checkpoints") as store:
        assert store.latest() == 1


@pytest.mark.slow
def test_two_processes_train_a_critic_as_one_does(warm_file, tmp_path):
    """With PPO's several updates per rollout and dynamic sampling. One update's rounding feeds the next."""
    settings = (
        "steps=2",
        f"warmstart.file={warm_file}",
        "validation.questions=0",
        "learner.advantage=gae",
        "learner.value_coef=0.1",
        "learner.kl=k1",
        "learner.kl_in=reward",
        "learner.epochs=2",
        "learner.minibatches=2",
        "learner.dynamic_sampling=1",
    )
    one, two = tmp_path / "one", tmp_path / "two"
    mains.succeed("train", one, *settings, "pool.call_cache.mode=record")
    on_two("train", two, *settings, "pool.call_cache.mode=strict", f"pool.call_cache.path={one / 'call_cache.sqlite'}")
    lines, truth = train_lines(two), repeatable(train_lines(one))
    assert [line["step"] for line in lines] == [1, 2]
    for line, single in zip(repeatable(lines), truth, strict=True):
        assert line["sampling_rounds"] == single["sampling_rounds"] and line["reward/total"] == single["reward/total"]
        for key in ("loss", "value_loss", "kl", "entropy", "grad_norm"):
            assert line[key] == pytest.approx(single[key], rel=1e-3, abs=1e-5), (line["step"], key)


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(finished_run, tmp_path):
    one, two = (shutil.copytree(finished_run, tmp_path / name) for name in ("one", "two"))
    for folder in (one, two):
        shutil.rmtree(folder / "evaluation")
        (folder / "results.json").unlink()
    settings = ("evaluation.samples=2", "evaluation.questions=9")
    mains.succeed("evaluate", one, *settings, "pool.call_cache.mode=record")
    on_two(
        "evaluate", two, *settings, "pool.call_cache.mode=strict", f"pool.call_cache.path={one / 'call_cache.sqlite'}"
    )
    single, found = (json.loads((folder / "results.json").read_text())["policies"] for folder in (one, two))
    assert len(single) == 2
    for policy, truth in zip(found, single, strict=True):
        for key in ("name", "questions", "em", "em_ci", "f1", "dollars_per_question", "calls_share", "stops"):
            assert policy[key] == truth[key], key
        assert policy["samples"]["em"] == truth["samples"]["em"]
    texts, others = ([(e["policy"], e["id"], e["response"]) for e in read_episodes(f)] for f in (one, two))
    assert sorted(texts) == sorted(others)
