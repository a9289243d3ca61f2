"""The sweep: its expansion, what it refuses before it starts anything, how it continues, and what it gathers."""

import dataclasses
import fcntl
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import mains
import numpy as np
import pytest
from absl import flags
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import config_flags
from scipy import stats

from router_r1_jax.config import ConfigError, config_hash
from router_r1_jax.report.tables import sweep_markdown
from router_r1_jax.sweep import Run, choices, expand_runs, finished, gather, product, run_all, zipped

FILE = """
import runpy
from router_r1_jax.sweep import choices, product, zipped
def get_config(arg=None):
    return runpy.run_path({tiny!r})["get_config"]()
def get_sweep():
    return {sweep}
"""
VALUES = st.lists(st.one_of(st.integers(), st.floats(allow_nan=False), st.text()), min_size=1, max_size=4)


@pytest.fixture
def config_file(tmp_path):
    """config_file(sweep) -> path of a configuration whose get_sweep returns that expression."""

    def write(sweep: str) -> str:
        path = tmp_path / "config.py"
        path.write_text(FILE.format(tiny=str(mains.CONFIG), sweep=sweep))
        return str(path)

    return write


# What it expands to.


@given(VALUES, VALUES, VALUES)
def test_product_is_that_of_itertools(a, b, c):
    runs = product(choices("a", *a), choices("b.c", *b) + choices("b.d", *b), choices("e", *c))
    middle = [("b.c", value) for value in b] + [("b.d", value) for value in b]
    assert runs == [{"a": x, field: y, "e": z} for x, (field, y), z in itertools.product(a, middle, c)]


@given(VALUES)
def test_zipped_is_zip(a):
    runs = zipped(choices("a", *a), choices("b", *reversed(a)))
    assert runs == [{"a": x, "b": y} for x, y in zip(a, reversed(a), strict=True)]
    with pytest.raises(ConfigError, match=f"sweeps of {len(a)}, {len(a) + 1} runs"):
        zipped(choices("a", *a), choices("b", 0, *a))
    with pytest.raises(ConfigError, match="a is set by two parts"):
        product(choices("a", *a), choices("a", *a))


def test_a_command_gives_its_process_the_run_s_configuration(config_file, tmp_path):
    """Parsed as a main does it: each value arrives with its type, on top of what the sweep's own command set."""
    path = config_file(
        "product(choices('reward.alpha', 0.6, 1), choices('model.lora.targets', ('q', 'k'))"
        ", choices('prompt.template', 'router'), choices('pool.shuffle', False))"
    )
    runs = expand_runs(path, {"steps": 7}, tmp_path / "out")
    assert [run.name for run in runs][1] == "alpha=1,targets=-q-,-k-,template=router,shuffle=False"
    for run, alpha in zip(runs, (0.6, 1.0), strict=True):
        train, evaluate = run.commands
        assert train[1:3] == ("-m", "router_r1_jax.train") and evaluate[2] == "router_r1_jax.evaluate"
        assert train[3:] == evaluate[3:] and f"--workdir={run.folder}" in train
        argv = shlex.split(shlex.join(train))[2:]
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        flags.DEFINE_string("workdir", "", "", flag_values=values)
        values(argv)
        config = values["config"].value
        assert (config.steps, config.reward.alpha, config.pool.shuffle) == (7, alpha, False)
        assert config.model.lora.targets == ("q", "k") and type(config.reward.alpha) is float
        assert config_hash(config) == run.hash


# What it refuses.


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("choices('reward.alhpa', 0.5)", "--config.reward.alhpa=0.5: there is no such field"),
        ("choices('seed', 0, 1.5)", "--config.seed=1.5: .*invalid literal for int"),
        ("choices('seed', 0, '1')", "seed to '1': it would be read as 1; write it as a int"),
        ("choices('seed', 0, True)", "--config.seed=True: .*invalid literal for int"),
        ("choices('reward.alpha', 0.5, 'much')", "--config.reward.alpha=much: .*could not convert"),
        ("choices('reward', 0.5)", "--config.reward=0.5: .*is not a dict"),
        ("choices('pool.shuffle', 'maybe')", "--config.pool.shuffle=maybe: .*Non-boolean"),
        ("choices('reward.alpha', 0.5, 2.0)", "run alpha=2.0: reward.alpha is 2.0"),
        ("choices('learner.minibatches', 1, 3)", "run minibatches=3: learner.minibatches is 3; it must divide"),
        ("choices('prompt.template', 'terse', 'terce')", "run template=terce: prompt.template is 'terce'"),
        ("choices('model.arch.num_kv_heads', 1, 3)", "num_kv_heads=3: model.arch.num_kv_heads is 3; it must divide"),
        ("product(choices('model.lora.rank', 1), choices('model.lora.targets', ('k', 'w')))", "model.lora.targets is"),
        ("choices('seed', 1, 1)", "holds seed=1 twice"),
        ("choices('reward.alpha', 0, 0.5, 0.0)", "holds alpha=0 and alpha=0.0, which are one configuration"),
        ("[]", "get_sweep\\(\\) is empty"),
        ("None", "get_sweep\\(\\) is empty"),
        ("choice('seed', 1)", "config.py, line 7, .*NameError: name 'choice' is not defined; correct"),
        ("[3]", "get_sweep\\(\\)\\[0\\] is 3"),
    ],
)
def test_a_wrong_override_is_refused_before_anything_starts(config_file, tmp_path, sweep, message):
    with pytest.raises(ConfigError, match=message):
        expand_runs(config_file(sweep), {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", [".", "configs", "configs/sweeps"])
def test_a_run_is_the_same_from_wherever_its_configuration_is_named(folder, tmp_path, monkeypatch):
    """Configurations name files beside their own by path, and a printed command may run in another folder."""
    path = mains.CONFIG.parents[1] / "configs" / "sweeps" / "demo_unseen.py"
    monkeypatch.chdir(mains.CONFIG.parents[1] / folder)
    assert expand_runs(os.path.relpath(path), {}, tmp_path) == expand_runs(str(path), {}, tmp_path)


def test_a_configuration_without_a_sweep_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no get_sweep"):
        expand_runs(str(mains.CONFIG), {}, tmp_path)


# How it runs and goes on.

WORK = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def hear(number, frame):
    with open(folder / "heard", "a") as heard:
        heard.write(signal.Signals(number).name + "\\n")
    sys.exit(1)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, hear)
with open(folder / "starts", "a") as starts:
    starts.write(f"{os.getpid()}\\n")
while (folder / "hold").exists():
    time.sleep(0.05)
if (folder / "fail").exists():
    sys.exit("error: no such luck")
(folder / "results.json").write_text(json.dumps({"config_hash": "h", "policies": [{"em": 0.5}]}))
"""
SWEEP = """
import pathlib, sys
sys.path.insert(0, {tests!r})
from test_sweep import make_runs
from router_r1_jax.sweep import run_all
run_all(make_runs(pathlib.Path({folder!r})), 2)
"""


def make_runs(folder: Path) -> list[Run]:
    """Four runs whose process writes down that it started, waits while a file `hold` lies there, and ends.

    A signal ends it too, and is written down.
    """
    runs = []
    for seed in range(4):
        run = Run({"seed": seed}, folder / f"seed={seed}", "h", ())
        run.folder.mkdir(exist_ok=True)
        runs.append(dataclasses.replace(run, commands=((sys.executable, "-c", WORK, str(run.folder)),)))
    return runs


def pids(run: Run) -> list[int]:
    path = run.folder / "starts"
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def starts(run: Run) -> int:
    return len(pids(run))


def start_sweep(folder: Path) -> subprocess.Popen:
    code = SWEEP.format(tests=str(Path(__file__).parent), folder=str(folder))
    return subprocess.Popen([sys.executable, "-c", code], env=mains.environment(), start_new_session=True)


def test_a_failing_run_is_named_and_stops_no_other(tmp_path):
    runs = make_runs(tmp_path)
    (runs[1].folder / "fail").touch()
    lines = []
    errors = run_all(runs, 2, lines.append)
    assert errors == {"seed=1": "failed with status 1: error: no such luck"}
    assert [line.partition("]")[0] for line in lines] == ["[1/4", "[2/4", "[3/4", "[4/4"]
    assert any("seed=1: failed with status 1: error: no such luck" in line for line in lines)
    assert [finished(run) for run in runs] == [True, False, True, True]
    assert gather(runs, errors)["failed"] == {"seed=1": errors["seed=1"]}


def test_a_killed_sweep_goes_on_and_never_twice_in_one_folder(tmp_path):
    """Killed alone, its processes still work: a second sweep leaves their folders be. What was finished stays."""
    runs = make_runs(tmp_path)
    for run in runs[1:]:
        (run.folder / "hold").touch()
    sweep = start_sweep(tmp_path)
    try:
        mains.wait_until(lambda: all(starts(run) for run in runs[:3]) and finished(runs[0]), sweep)
        sweep.kill()
        sweep.wait()
        (runs[3].folder / "hold").unlink()
        left = [run for run in runs if not finished(run)]
        assert left == runs[1:]
        errors = run_all(left, 3, lambda _: None)
        assert errors["seed=1"] == errors["seed=2"] == "failed: a process of an earlier sweep still works in its folder"
        assert "seed=3" not in errors and finished(runs[3])
        assert [starts(run) for run in runs] == [1, 1, 1, 1]
    finally:
        sweep.kill()
        for run in runs[1:3]:
            for pid in pids(run):
                os.kill(pid, signal.SIGKILL)
    for run in runs[1:3]:
        with open(run.folder / "sweep.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # which its process holds until it is gone
        (run.folder / "hold").unlink()
        assert not finished(run)
    assert run_all(runs[1:3], 2, lambda _: None) == {}
    assert [starts(run) for run in runs] == [1, 2, 2, 1] and all(map(finished, runs))


def test_a_terminal_s_ctrl_c_asks_each_run_once(tmp_path):
    """It is sent to the sweep's whole process group; two signals at once would interrupt an update."""
    runs = make_runs(tmp_path)
    for run in runs:
        (run.folder / "hold").touch()
    sweep = start_sweep(tmp_path)
    try:
        mains.wait_until(lambda: all(starts(run) for run in runs[:2]), sweep)
        os.killpg(sweep.pid, signal.SIGINT)
        assert sweep.wait(mains.TIMEOUT) != 0
    finally:
        sweep.kill()
        for run in runs:
            (run.folder / "hold").unlink()
    assert [(run.folder / "heard").read_text().split() for run in runs[:2]] == [["SIGTERM"], ["SIGTERM"]]
    assert [starts(run) for run in runs] == [1, 1, 0, 0]


def test_results_of_another_configuration_are_not_taken_for_a_run_s(tmp_path):
    run = make_runs(tmp_path)[0]
    (run.folder / "results.json").write_text(json.dumps({"config_hash": "other", "policies": [{"em": 0.5}]}))
    with pytest.raises(ConfigError, match="was made by another configuration"):
        finished(run)


@pytest.mark.slow
def test_a_whole_sweep_through_the_mains(warm_file, tmp_path):
    """One run works and one fails; a second sweep starts the failed one alone and says so with its exit status."""
    config = Path(__file__).parent / "sweep_config.py"
    done = mains.run("sweep", tmp_path, f"warmstart.file={warm_file}", config=config)
    assert done.returncode == 1, done.stderr
    assert "seed=1,batch=16: failed with status 1: error: warmstart.file" in done.stdout
    gathered = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["name"] for row in gathered["runs"]] == ["seed=0,batch=32"] and list(gathered["failed"]) == [
        "seed=1,batch=16"
    ]
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    results = (tmp_path / "seed=0,batch=32" / "results.json").read_bytes()
    assert gathered["runs"][0]["em"] == json.loads(results)["policies"][0]["em"]
    dry = mains.run("sweep", tmp_path, f"warmstart.file={warm_file}", "--dry_run", config=config)
    (command,) = dry.stdout.splitlines()
    assert "--config.seed=1" in command and dry.returncode == 0
    again = mains.run("sweep", tmp_path, f"warmstart.file={warm_file}", config=config)
    assert again.returncode == 1 and "2 runs, 1 finished" in again.stdout
    assert (tmp_path / "seed=0,batch=32" / "results.json").read_bytes() == results


# What it gathers.


def test_settings_are_means_over_seeds_with_student_s_interval(tmp_path):
    rng = np.random.default_rng(0)
    runs, em = [], {}
    for alpha, seed in itertools.product((0.0, 0.6), range(3)):
        run = Run({"reward.alpha": alpha, "seed": seed}, tmp_path / f"alpha={alpha},seed={seed}", "h", ())
        run.folder.mkdir()
        em[alpha, seed] = rng.random()
        policy = {"em": em[alpha, seed], "em_ci": [0.0, 1.0], "dollars_per_question": 1e-5}
        if (alpha, seed) != (0.6, 2):
            (run.folder / "results.json").write_text(json.dumps({"config_hash": "h", "policies": [policy, {"em": 9}]}))
        runs.append(run)
    gathered = gather(runs, {})
    assert gathered["failed"] == {"alpha=0.6,seed=2": "not finished"}
    for setting, members in zip(gathered["settings"], (range(3), range(2)), strict=True):
        values = [em[setting["setting"]["reward.alpha"], seed] for seed in members]
        interval = stats.ttest_1samp(values, 0.0).confidence_interval()
        assert setting["seeds"] == len(values) and setting["em"]["mean"] == pytest.approx(np.mean(values))
        assert setting["em"]["ci"] == pytest.approx([interval.low, interval.high])
    text = sweep_markdown(gathered)
    assert "| reward.alpha=0.6 | 2 |" in text and "- missing: alpha=0.6,seed=2: not finished" in text
