"""Stopped, killed, repeated: the main job goes on where it was, and on a call cache ends with the same numbers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mains
import numpy as np
import pytest
from ledger_totals import ledger_totals
from mains import CACHE, assert_same_checkpoint, checkpoint_arrays, repeatable, train_lines

from router_r1_jax.pool.ledger import read_ledger
from router_r1_jax.storage.checkpoint import CheckpointStore
from router_r1_jax.storage.json_lines import read_episodes
from router_r1_jax.storage.metrics_writer import read_metrics

pytestmark = pytest.mark.slow

WARM_STEPS = 120  # of tiny_config.py


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_killed_at_any_moment_it_ends_with_the_same_numbers(uninterrupted, tmp_path):
    """kill -9 in the warm start, while episodes are sampled, and while checkpoints are written."""
    rng = np.random.default_rng(0)
    metrics, checkpoints = tmp_path / "metrics.jsonl", tmp_path / "checkpoints"
    line, step, saved = rng.integers(5, WARM_STEPS - 10), rng.integers(1, 3), int(rng.choice([2, 4]))

    def lines(n):
        return metrics.exists() and metrics.read_bytes().count(b"\n") >= n

    def saving(step):
        """A folder of this step is there: whole, or under the name that it has while it is written."""
        return any(folder.name.split(".")[0] == str(step) for folder in checkpoints.glob("*"))

    moments = [lambda: lines(line), lambda: saving(0), lambda: lines(WARM_STEPS + step), lambda: saving(saved)]
    for moment in moments:
        process = mains.start("train", tmp_path, *CACHE)
        mains.wait_until(moment, process)
        time.sleep(float(rng.uniform(0, 0.1)))
        kill(process)
    mains.succeed("train", tmp_path, *CACHE)
    check_same_run(tmp_path, uninterrupted)


# Moment -> how often it has come, at most, when the run is killed there; a run that goes on from step 4 gets there too.
MOMENTS = {
    "a ledger line is half written": 20,
    "a line of metrics or episodes is half written": 3,
    "a call has looked at the call_cache": 20,
    "the rollout meets the host": 40,
    "the rollout has ended": 2,
    "an update was made, nobody has heard of it": 2,
    "new weights are on their way": 2,
    "a checkpoint's files are made": 6,
    "a checkpoint's files are written": 12,
    "a checkpoint or a part of it gets its name": 5,
    "a file is replaced": 2,
}


def draw_kills(rng):
    """(moment, count) of one run's kills: all of MOMENTS in any order; in between it comes past a checkpoint twice."""
    kills = [(str(moment), int(rng.integers(1, MOMENTS[moment] + 1))) for moment in rng.permutation(list(MOMENTS))]
    further = ("an update was made, nobody has heard of it", 3)
    return [
        ("a reply is on the call cache but not in the ledger", 3),
        *kills[:4],
        further,
        *kills[4:8],
        further,
        *kills[8:],
    ]


def test_killed_at_every_hard_moment_it_ends_with_the_same_numbers(uninterrupted, tmp_path):
    """Fourteen kills, each of a run that goes on from the last checkpoint."""
    workdir, kills = tmp_path / "run", draw_kills(np.random.default_rng(0))
    shutil.copytree(uninterrupted / "checkpoints" / "0", workdir / "checkpoints" / "0")
    shutil.copytree(uninterrupted / "tokenizer", workdir / "tokenizer")
    warm = [line for line in read_metrics(uninterrupted) if line.get("phase") == "warmstart"]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in warm))
    # The host's driver samples the same bits, and its programs come from the cache of compiled ones.
    command = mains.command("train", workdir, *CACHE, "rollout.driver=host", "data.dir=" + str(uninterrupted / "data"))
    jobs = [[*kill, str(tmp_path / f"{i}.log"), command[2:]] for i, kill in enumerate([*kills, ("", 1)])]
    script = Path(__file__).parent / "killed_run.py"
    done = subprocess.run(
        [sys.executable, script, json.dumps(jobs)],
        env=mains.environment(),
        capture_output=True,
        text=True,
        timeout=3 * mains.TIMEOUT,
    )
    logs = {kill: (tmp_path / f"{i}.log").read_text()[-2000:] for i, kill in enumerate(kills)}
    statuses = [int(status) for status in done.stdout.split()]
    assert statuses == [-signal.SIGKILL] * len(kills) + [0], (kills, statuses, logs, done.stderr[-2000:])
    check_same_run(workdir, uninterrupted)


def check_same_run(workdir, truth):
    """Parameters, optimizer, metrics and episodes bit for bit; the ledger's lines give the sums that are reported."""
    assert repeatable(read_metrics(workdir)) == repeatable(read_metrics(truth))
    assert_same_checkpoint(workdir, truth, 6)
    assert episodes_without_latency(workdir) == episodes_without_latency(truth)
    written, (_, run) = ledger_totals(workdir / "ledger.jsonl"), checkpoint_arrays(workdir, 6)
    reported = zip(*run["pools"][0]["ledger"].values(), strict=True)  # dollars in parts of a million millionth
    calls, charged, spent = (sum(column) for column in reported)
    assert (written["calls"], written["charged"], written["spent"]) == (calls, charged / 10**12, spent / 10**12)


def episodes_without_latency(workdir):
    episodes = [json.loads(line) for line in (workdir / "episodes" / "train.jsonl").read_text().splitlines()]
    for episode in episodes:
        for call in episode["calls"]:
            del call["latency"]
    return episodes


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_keeps_its_last_step(uninterrupted, tmp_path, sent):
    process = mains.start("train", tmp_path, *CACHE, "checkpoint.every=1000")
    mains.wait_until(lambda: len(train_lines(tmp_path)) >= 3, process)
    process.send_signal(sent)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip().endswith("interrupted") and "Traceback" not in stderr
    with CheckpointStore(tmp_path / "checkpoints") as store:
        kept = store.latest()
    assert kept >= 3 and f"step {kept} is kept" in stdout
    assert [line["step"] for line in train_lines(tmp_path)] == list(range(1, kept + 1))
    mains.succeed("train", tmp_path, *CACHE)
    assert without_validation(tmp_path) == without_validation(uninterrupted)


def test_ctrl_c_does_not_wait_for_calls_in_flight(warm_file, tmp_path):
    """One of the models answers no request before this test is over."""
    slow = ("pool.models[0].simulated.slow_start=(100000, 1000.0)", "pool.deadline=2000.0")
    slow += ("pool.providers[0].request_timeout=1000.0", f"warmstart.file={warm_file}")
    process = mains.start("train", tmp_path, *slow)
    answered = tmp_path / "ledger.jsonl"
    mains.wait_until(lambda: answered.exists() and answered.read_bytes().count(b"\n") > 3, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr.strip().endswith("interrupted")
    with CheckpointStore(tmp_path / "checkpoints") as store:
        assert store.latest() == 0


def without_validation(workdir):
    """A validation that was cut is not made up for; all else is as if nothing had happened."""
    lines = repeatable(train_lines(workdir))
    return [{key: value for key, value in line.items() if not key.startswith("val/")} for line in lines]


def test_a_tape_repeats_the_run_without_the_pool(uninterrupted, tmp_path):
    call_cache = uninterrupted / "call_cache.sqlite"
    mains.succeed("train", tmp_path, "steps=6", "pool.call_cache.mode=strict", f"pool.call_cache.path={call_cache}")
    assert repeatable(read_metrics(tmp_path)) == repeatable(read_metrics(uninterrupted))
    assert_same_checkpoint(tmp_path, uninterrupted, 6)
    assert all(line["hit"] or not line["model"] for line in read_ledger(tmp_path / "ledger.jsonl"))


def test_the_host_driver_gives_the_numbers_of_the_jitted_loop(finished_run, warm_file, tmp_path):
    mains.succeed("train", tmp_path, f"warmstart.file={warm_file}", "steps=2", "rollout.driver=host")
    assert repeatable(train_lines(tmp_path)) == repeatable(train_lines(finished_run)[:2])


def test_renamed_models_are_shown_under_another_name_in_each_batch(tmp_path):
    mains.succeed("train", tmp_path, "pool.rename=True", "steps=3", "validation.questions=0")
    shown = {}  # step -> {name in the call: the model that answered}
    for episode in read_episodes(tmp_path):
        if episode["reward"]["format"] < 0:
            continue  # a tag too many, and calls and their texts no longer run in step
        for call, written in zip(episode["calls"], episode["response"].split("<search>")[1:], strict=False):
            if call["model"]:
                name = written.split(":")[0].strip()
                assert shown.setdefault(episode["step"], {}).setdefault(name, call["model"]) == call["model"]
    meanings = {}
    for names in shown.values():
        for name, model in names.items():
            meanings.setdefault(name, set()).add(model)
    assert any(len(models) > 1 for models in meanings.values()), shown
