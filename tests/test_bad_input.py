"""Faulty input, damaged files, full disks and failing providers: one line names field or file, value and fix."""

import re
import shutil
import socket
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import mains
import pytest
from bad_config import tiny_config
from flaky_proxy import FlakyProxy
from mains import assert_same_checkpoint, repeatable, train_lines

from router_r1_jax.pool.cards import cards_from_config
from router_r1_jax.pool.ledger import read_ledger
from router_r1_jax.storage.checkpoint import CheckpointStore
from router_r1_jax.synthetic.server import start_server

CONFIG = Path(__file__).with_name("bad_config.py")


def assert_refused(done, *pieces):
    """Exit status 1, and as the last of standard error one line that holds the pieces in this order."""
    assert done.returncode == 1, done.stderr[-4000:]
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    line = done.stderr.splitlines()[-1]
    assert re.match(".*".join(map(re.escape, ("error: ", *pieces))), line), line
    assert len(line) < 600


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def workdir(finished_run, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished_run, tmp_path / "run")


# Refused before anything is computed.


def closed_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


SILENT = socket.create_server(("127.0.0.1", 0))  # takes connections and never answers
SILENT_URL = f"http://127.0.0.1:{SILENT.getsockname()[1]}/v1"
CLOSED_URL = f"http://127.0.0.1:{closed_port()}/v1"
BAD, SEE = f"--config={CONFIG}:", "router_r1_jax/config.py"

# Arguments after the usual flags, and pieces of the line that they must lead to.
REFUSED = {
    "unknown field": ("rollout.grup=8", "--config.rollout.grup=8: there is no such field", SEE),
    "unknown field in the file": (BAD + "unknown_field", "bad_config.py, line ", "c.rollout.grup = 8", SEE),
    "unknown field of a card": (BAD + "unknown_card_field", "bad_config.py, line ", "prise=12.0", "Key prise", SEE),
    "wrong type": ("steps=many", "--config.steps=many", "int", SEE),
    "wrong type in the file": (BAD + "wrong_type", "bad_config.py, line ", 'generations = "eight"', "<class int>", SEE),
    "wrong type in a card": (BAD + "wrong_card_type", "bad_config.py, line ", 'price_in = "0.2"', "<class float>", SEE),
    "models that are none": ("pool.models=3", "pool.models[0] is 3; make it with model_card(...)"),
    "a file that fails": (BAD + "no_program", "bad_config.py, line ", "NameError", "'setps'", "correct the"),
    "no file": ("--config=configs/nope.py", "--config: ", "configs/nope.py", "name a file such as"),
    "no flag": ("--step=3", "'step'"),
    "negative steps": ("steps=-1", "steps is -1; it must be at least 0"),
    "no learning rate": ("learner.learning_rate=nan", "learner.learning_rate is nan; it must be at least 0"),
    "validation never": ("validation.every=0", "validation.every is 0; it must be at least 1"),
    "no such dtype": ("model.dtype=float31", "model.dtype is 'float31'; choose one of float32"),
    "heads that do not divide": ("model.arch.num_kv_heads=3", "model.arch.num_kv_heads is 3; it must divide num_heads"),
    "no weights": ("model.source=/no/such", "model.source is '/no/such'", "name a folder or hub name"),
    "turns too long": ("rollout.max_turn_tokens=5000", "rollout.max_turn_tokens is 5000; with rollout.driver 'jit'"),
    "no tokenizer": ("model.tokenizer=/no/such", "model.tokenizer is '/no/such'", "name a folder or hub name"),
    "negative price": (
        BAD + "negative_price",
        "pool.models[2].price_out is -1.0; a price is dollars per million tokens, >= 0",
    ),
    "two models of one name": (
        BAD + "two_of_one_name",
        "pool.models[3].name is 'Titan', which pool.models[0].name is already; names and aliases differ",
    ),
    "score in percent": (BAD + "score_in_percent", "pool.models[0].performance.film is 97.0; a score lies in [0, 1]"),
    "undeclared provider": (
        BAD + "undeclared_provider",
        "pool.models[4].provider is 'openai'",
        "the providers are: simulated",
    ),
    "missing key": (
        BAD + "missing_key=NO_SUCH_KEY",
        "pool.providers[0].key_env names NO_SUCH_KEY, which is not set; export it",
    ),
    "unreachable pool": (
        BAD + "pool=" + CLOSED_URL,
        CLOSED_URL,
        "does not answer (connection refused); start it or correct pool.providers[0].base_url",
    ),
    "silent pool": (
        BAD + "pool=" + SILENT_URL + " pool.request_timeout=1.0",
        SILENT_URL,
        "does not answer",
        "start it or correct pool.providers[0].base_url",
    ),
    "unreachable pool, evaluated": ("evaluate " + BAD + "pool=" + CLOSED_URL, CLOSED_URL, "connection refused"),
    "no such checkpoint": ("evaluate --checkpoint=7", "/checkpoints: no checkpoint '7'; choose", "0, 2, 4"),
    "another cost window": ("reward.window=7", "window is 1000 values long and this one 7; set reward.window=1000"),
    "no such split": ("evaluate evaluation.split=dev", "evaluation.split is 'dev'; choose one of train"),
    "no run": ("evaluate --workdir=/nowhere/none", "none/checkpoints: no such checkpoint folder; train first"),
}


@pytest.fixture(scope="module")
def refusals(finished_run, tmp_path_factory):
    """All cases against a copy of a finished run: the finished processes, and the copy's files before and after."""
    root = tmp_path_factory.mktemp("refused")
    workdir = shutil.copytree(finished_run, root / "run")
    commands = []
    for words, *_ in REFUSED.values():
        words = words.split()
        main = words.pop(0) if words[0] == "evaluate" else "train"
        config = words.pop(0).removeprefix("--config=") if words[0].startswith("--config=") else mains.CONFIG
        commands.append(mains.command(main, workdir, *words, config=config))
    before = contents(workdir)
    done = dict(zip(REFUSED, mains.run_each(root / "outputs", commands), strict=True))
    return done, before, contents(workdir)


@pytest.mark.parametrize("case", REFUSED)
def test_one_line_names_the_fault_and_the_fix(refusals, case):
    done, _, _ = refusals
    assert_refused(done[case], *REFUSED[case][1:])


def test_refused_commands_leave_the_run_as_it_was(refusals):
    _, before, after = refusals
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] != before[name]] == []


# Files that are damaged, disks that are full.


def test_a_corrupt_checkpoint_is_named(workdir):
    last = workdir / "checkpoints" / "4"
    for file in last.rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = contents(workdir)
    commands = [mains.command("train", workdir), mains.command("evaluate", workdir, "--checkpoint=last")]
    for done in mains.run_each(workdir.parent / "outputs", commands):
        assert_refused(done, f"{last}: cannot be read", "remove it to fall back to step 2")
    assert contents(workdir) == before


@pytest.mark.slow
def test_without_the_corrupt_step_the_run_goes_on(finished_run, warm_file, workdir):
    shutil.rmtree(workdir / "checkpoints" / "4")
    done = mains.succeed("train", workdir, f"warmstart.file={warm_file}")
    assert "going on from step 2" in done.stdout
    assert_ends_like(workdir, finished_run)


def assert_ends_like(workdir, finished_run):
    """The run has the metrics and the checkpoint of the undisturbed run."""
    assert repeatable(train_lines(workdir)) == repeatable(train_lines(finished_run))
    assert_same_checkpoint(workdir, finished_run, 4)


@pytest.mark.slow
def test_a_disk_that_is_full_when_a_checkpoint_is_written(finished_run, warm_file, tmp_path):
    """A limit on the length of files: the warm start fits, a step's optimizer state does not."""
    command = mains.command("train", tmp_path / "run", f"warmstart.file={warm_file}")
    sizes = {step: max(map(len, contents(finished_run / "checkpoints" / step).values())) for step in ("0", "2")}
    limit = (sizes["0"] + sizes["2"]) // 2 // 1024  # the shell counts in units of 1024 bytes
    done = subprocess.run(
        ["bash", "-c", f'ulimit -f {limit} && exec "$@"', "bash", *command],
        env=mains.environment(),
        capture_output=True,
        text=True,
        timeout=mains.TIMEOUT,
    )
    assert_refused(done, "run/checkpoints: ", "File too large", "free space", "start again, steps 0 are whole")
    written = train_lines(tmp_path / "run")
    assert 2 <= len(written) <= 4
    with CheckpointStore(tmp_path / "run" / "checkpoints") as store:
        assert store.steps() == [0]
    done = mains.succeed("train", tmp_path / "run", f"warmstart.file={warm_file}")
    assert "going on from step 0" in done.stdout
    assert repeatable(train_lines(tmp_path / "run"))[: len(written)] == repeatable(written)
    assert_ends_like(tmp_path / "run", finished_run)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_in_mid_run(finished_run, warm_file, small_disk):
    """Whichever file is written first: the run ends, and once there is space it resumes from what was written."""
    workdir, ballast = small_disk / "run", small_disk / "ballast"
    process = mains.start("train", workdir, f"warmstart.file={warm_file}", "steps=500")
    mains.wait_until(lambda: (workdir / "checkpoints" / "2").exists(), process)
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    stdout, stderr = process.communicate(timeout=mains.TIMEOUT)
    done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
    assert_refused(done, f"{workdir}/")
    assert re.search("No space left on device|database or disk is full", stderr.splitlines()[-1])
    written = train_lines(workdir)
    with CheckpointStore(workdir / "checkpoints") as store:
        latest = store.latest()
    assert latest >= 2 and len(written) >= latest
    ballast.unlink()
    steps = f"steps={latest + 2}"
    mains.succeed("train", workdir, f"warmstart.file={warm_file}", steps)
    assert train_lines(workdir)[:latest] == written[:latest]
    assert [line["step"] for line in train_lines(workdir)] == list(range(1, latest + 3))


# A pool that fails in mid-run.


@pytest.fixture
def port():
    """Port of the simulated models of the tiny configuration, started by the test and not by the run."""
    config = tiny_config()
    with start_server(config.synthetic.world.to_dict(), cards_from_config(config.pool)) as base_url:
        yield urlsplit(base_url).port


def requests_before(finished_run, step, split):
    """Number of requests before the first call of this step and split. The check at the start makes one of them."""
    calls = read_ledger(finished_run / "ledger.jsonl")
    first = next(i for i, call in enumerate(calls) if (call["step"], call["split"]) == (step, split))
    return 1 + sum(call["attempts"] for call in calls[:first])


@pytest.mark.slow
def test_the_run_waits_for_the_pool_and_goes_on(finished_run, warm_file, port, tmp_path):
    seconds = 20.0
    last_good = requests_before(finished_run, 2, "train") + 3
    with FlakyProxy(port, requests=last_good, seconds=seconds) as proxy:
        config = f"{CONFIG}:pool={proxy.base_url}"
        mains.succeed("train", tmp_path, f"warmstart.file={warm_file}", config=config)
    assert_ends_like(tmp_path, finished_run)
    calls = read_ledger(tmp_path / "ledger.jsonl")
    assert max(call["latency"] for call in calls) > 0.8 * seconds  # someone has waited
    assert {call["outcome"] for call in calls if call["model"]} <= {"ok", "truncated", "empty"}


@pytest.mark.slow
@pytest.mark.parametrize(("split", "kept"), [("train", 1), ("validation", 2)])
def test_a_pool_that_stays_down_ends_the_run_with_a_checkpoint(finished_run, warm_file, port, tmp_path, split, kept):
    """The pool fails in the second step's rollout, which is lost, or in its validation; then the step is kept."""
    last_good = requests_before(finished_run, 2, split) + 2
    with FlakyProxy(port, requests=last_good, seconds=None) as proxy:
        config = f"{CONFIG}:pool={proxy.base_url}"
        overrides = (f"warmstart.file={warm_file}", "checkpoint.every=100")
        done = mains.run("train", tmp_path, *overrides, "pool.deadline=1.0", config=config)
        assert_refused(done, "calls failed at their provider", "connection refused", "run the same command again")
        with CheckpointStore(tmp_path / "checkpoints") as store:
            assert store.steps() == [0, kept]
        assert f"step {kept} is kept" in done.stdout
        assert [line["step"] for line in train_lines(tmp_path)] == list(range(1, kept + 1))
        proxy.up()
        mains.succeed("train", tmp_path, *overrides, config=config)
    if split == "train":
        assert_ends_like(tmp_path, finished_run)
    else:  # the interrupted validation is not repeated
        ours, theirs = (
            [{k: v for k, v in line.items() if not k.startswith("val/")} for line in repeatable(train_lines(workdir))]
            for workdir in (tmp_path, finished_run)
        )
        assert ours == theirs
