"""Checkpoints: which steps stay, restores on another mesh, damaged files, full disks and kills at any moment."""

import errno
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_r1_jax.storage.checkpoint import CheckpointError, CheckpointStore, best_step, kept_steps, quiet_orbax

# When one read of a damaged step fails, Orbax drops the others; Python complains of them later, in any test.
pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def quiet():
    quiet_orbax()


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def state_of(step, rows=16):
    """params, train and run that follow from the step alone, so that a restore can be checked without the original."""
    rng = np.random.default_rng(step)
    params = {
        "layers": {"w": jnp.asarray(rng.normal(size=(rows, 8)), jnp.float32), "b": jnp.full((3,), step, jnp.bfloat16)},
        "embed": jnp.asarray(rng.integers(0, 99, size=(8,)), jnp.int32),
    }
    opt = jax.tree.map(lambda leaf: leaf + step, OPTIMIZER.init(params))
    run = {"iterator": {"epoch": step, "position": None}, "costs": [0.1 * step, 1e-300], "hash": f"h{step}", "seen": []}
    return {"params": params, "train": {"opt": opt, "step": jnp.int32(step)}, "run": run}


def abstract(tree, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def restore(store, step, rows=16):
    state = state_of(step, rows)
    return store.restore(step, params=abstract(state["params"]), train=abstract(state["train"]), run=None)


def assert_is_step(restored, step, rows=16):
    expected = state_of(step, rows)
    assert restored["run"] == expected["run"]
    for part in ("params", "train"):
        got, want = restored[part], expected[part]
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert left.dtype == right.dtype
            assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def fill(directory, metrics, keep=2, rows=16):
    with CheckpointStore(directory, keep=keep) as store:
        for step, metric in metrics.items():
            store.save(step, **state_of(step, rows), metric=metric)
    return directory


# What is kept, and which is the best.

METRICS = st.dictionaries(st.integers(0, 30), st.none() | st.sampled_from([0.0, 0.25, 0.5, math.inf, -1.0]))


@given(METRICS, st.integers(1, 5))
def test_kept_steps_are_first_best_and_last(metrics, keep):
    kept = kept_steps(metrics, keep)
    for step, metric in metrics.items():
        first = all(step <= other for other in metrics)
        last = sum(other > step for other in metrics) < keep
        best = metric is not None and all(
            value is None or metric > value or (metric == value and step <= other) for other, value in metrics.items()
        )
        assert (step in kept) == (first or last or best)
        assert (step == best_step(metrics)) == best
    assert kept <= set(metrics)


def test_store_keeps_first_best_and_last_across_restarts(tmp_path):
    metrics = {0: 0.1, 10: None, 20: 0.7, 30: 0.2, 40: math.nan, 50: 0.7, 60: 0.5}
    after = {0: [0], 10: [0, 10], 20: [0, 10, 20], 30: [0, 20, 30], 40: [0, 20, 30, 40], 50: [0, 20, 40, 50]}
    after[60] = [0, 20, 50, 60]
    for step, metric in metrics.items():
        with CheckpointStore(tmp_path / "c", keep=2) as store:  # opened anew: the best is known from the disk alone
            store.save(step, **state_of(step), metric=metric)
            store.wait()
            assert store.steps() == after[step]
            assert sorted(int(path.name) for path in (tmp_path / "c").iterdir()) == after[step]
            assert (store.first(), store.latest()) == (0, step)
    with CheckpointStore(tmp_path / "c") as store:
        assert store.best() == 20
        for step in store.steps():
            assert_is_step(restore(store, step), step)


def test_resolve(tmp_path):
    directory = fill(tmp_path / "c", {0: 0.1, 3: 0.9, 12: 0.5})
    with CheckpointStore(directory) as store:
        specs = ("first", "best", "last", "12", 3, "")
        assert [store.resolve(spec) for spec in specs] == [0, 3, 12, 12, 3, 3]
        for absent in ("7", 7, "newest", "-3", "1.5"):
            with pytest.raises(CheckpointError) as error:
                store.resolve(absent)
            assert str(directory) in str(error.value)
            assert repr(absent) in str(error.value) and "0, 3, 12" in str(error.value)


def test_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with CheckpointStore(fill("run/c", {0: 0.1})) as store:
        assert str(store.directory) == f"{tmp_path}/run/c"
        assert_is_step(restore(store, 0), 0)


def test_empty_store(tmp_path):
    with CheckpointStore(tmp_path / "c", keep=1) as store:
        assert (store.steps(), store.first(), store.latest(), store.best()) == ([], None, None, None)
        with pytest.raises(CheckpointError, match="'last'.*none"):
            store.resolve("last")


def test_best_needs_a_metric(tmp_path):
    with CheckpointStore(fill(tmp_path / "c", {0: None, 5: math.nan})) as store:
        assert store.best() is None
        with pytest.raises(CheckpointError, match="'best'"):
            store.resolve("best")
        assert store.resolve("") == 5


# Saving.


def test_the_caller_may_donate_and_change_all_it_gave(tmp_path):
    update = jax.jit(lambda w: w + 1, donate_argnums=0)
    w = update(jnp.zeros((256, 1024)))
    run = {"window": []}
    saved = {}
    with CheckpointStore(tmp_path / "c", keep=99) as store:
        for step in range(6):
            run["window"].append(step)
            saved[step] = (float(w[0, 0]), list(run["window"]))
            store.save(step, params={"w": w}, train={"step": jnp.int32(step)}, run=run, metric=None)
            run["window"].append("after save")
            for _ in range(4):
                given, w = w, update(w)
            assert given.is_deleted()  # else this test would say nothing
        shape = abstract({"w": w})
        for step, (value, window) in saved.items():
            restored = store.restore(step, params=shape, train={"step": abstract(jnp.int32(0))}, run=None)
            assert np.unique(np.asarray(restored["params"]["w"])).tolist() == [value]
            assert restored["run"]["window"] == window


def test_a_step_is_not_overwritten(tmp_path):
    with CheckpointStore(fill(tmp_path / "c", {0: 0.1, 5: 0.2}), keep=2) as store:
        with pytest.raises(CheckpointError, match="step 5 exists"):
            store.save(5, **state_of(6), metric=9.0)
        assert store.best() == 5
        assert_is_step(restore(store, 5), 5)


def test_run_must_be_json(tmp_path):
    with CheckpointStore(tmp_path / "c", keep=2) as store:
        with pytest.raises(TypeError, match="JSON"):
            store.save(0, **{**state_of(0), "run": {"rng": np.zeros(2)}}, metric=None)
        assert store.steps() == []


def test_reader_changes_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        CheckpointStore(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    directory = fill(tmp_path / "c", {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.1}, keep=1)
    (directory / "4.orbax-checkpoint-tmp").mkdir()  # a save of the run that is still going on
    with CheckpointStore(directory) as store:
        assert store.steps() == [0, 2, 3]
        assert_is_step(restore(store, 3), 3)
    assert sorted(path.name for path in directory.iterdir()) == ["0", "2", "3", "4.orbax-checkpoint-tmp"]


def test_unfinished_saves_are_ignored_and_cleaned(tmp_path):
    directory = fill(tmp_path / "c", {0: 0.1})
    unfinished = directory / "7.orbax-checkpoint-tmp" / "params.orbax-checkpoint-tmp"
    unfinished.mkdir(parents=True)
    (unfinished / "data").write_text("x")
    with CheckpointStore(directory, keep=1) as store:
        assert (store.steps(), store.latest()) == ([0], 0)
        store.save(3, **state_of(3), metric=None)
    assert sorted(path.name for path in directory.iterdir()) == ["0", "3"]


def test_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file/c: cannot be opened"):
        CheckpointStore(tmp_path / "file" / "c", keep=1)


# Restoring elsewhere, and what does not fit.

OTHER_MESH = """
import sys, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from router_r1_jax.storage.checkpoint import CheckpointStore
from tests.storage.test_checkpoint import abstract, assert_is_step, state_of

assert len(jax.devices()) == 8
mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
spec = lambda leaf: P("fsdp", "tensor") if leaf.ndim == 2 else P("tensor") if leaf.shape == (8,) else P()
put = lambda tree: jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec(leaf))), tree)
target = {name: jax.tree.map(lambda x: abstract(x, NamedSharding(mesh, spec(x))), state_of(3)[name])
          for name in ("params", "train")}
with CheckpointStore(sys.argv[1]) as store:
    restored = store.restore(3, **target, run=None)
assert_is_step(restored, 3)
parts = [restored[name] for name in target]
for leaf, want in zip(jax.tree.leaves(parts), jax.tree.leaves(list(target.values())), strict=True):
    assert leaf.sharding == want.sharding
assert {shard.data.shape for shard in restored["params"]["layers"]["w"].addressable_shards} == {(4, 4)}
state = state_of(5)
with CheckpointStore(sys.argv[1], keep=2) as store:
    store.save(5, params=put(state["params"]), train=put(state["train"]), run=state["run"], metric=None)
"""


def python(source, *arguments, devices=1):
    env = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")
    command = [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)]
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120)


def test_restores_on_another_mesh_and_back(tmp_path):
    directory = fill(tmp_path / "c", {3: 0.5})
    result = python(OTHER_MESH, directory, devices=8)
    assert result.returncode == 0, result.stderr
    with CheckpointStore(directory) as store:
        assert store.steps() == [3, 5]
        assert_is_step(restore(store, 5), 5)


def test_params_and_run_alone(tmp_path):
    with CheckpointStore(fill(tmp_path / "c", {3: 0.5})) as store:
        params = store.restore(3, params=abstract(state_of(3)["params"]))["params"]
        assert store.restore(3, run=None)["run"] == state_of(3)["run"]
    assert np.array_equal(params["layers"]["w"], state_of(3)["params"]["layers"]["w"])


def test_shapes_that_differ_from_the_configuration(tmp_path):
    directory = fill(tmp_path / "c", {3: 0.5})
    with CheckpointStore(directory) as store:
        with pytest.raises(CheckpointError) as error:
            restore(store, 3, rows=32)
        message = str(error.value)
        assert message.startswith(f"{directory}/3: params/layers/w ") and "\n" not in message
        assert "(16, 8)" in message and "(32, 8)" in message
        params = abstract(state_of(3)["params"])
        with pytest.raises(CheckpointError, match=r"params/head has nothing in the checkpoint and shape \(3,\)"):
            store.restore(3, params={**params, "head": params["layers"]["b"]})
        del params["embed"]
        with pytest.raises(CheckpointError, match=r"params/embed has shape \(8,\) in the checkpoint and nothing"):
            store.restore(3, params=params)
        assert_is_step(restore(store, 3), 3)


# Damage.


def files_of(step_folder):
    return sorted(path for path in step_folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_file_is_named_or_does_not_matter(tmp_path, damage):
    whole = fill(tmp_path / "whole", {3: 0.5, 7: 0.7})
    complaints = 0
    for file in files_of(whole / "7"):
        broken = shutil.copytree(whole, tmp_path / "broken")
        target = broken / file.relative_to(whole)
        if damage == "missing":
            target.unlink()
        else:
            target.write_bytes(target.read_bytes()[: file.stat().st_size // 2])
        with CheckpointStore(broken, keep=2) as store:
            try:
                assert_is_step(restore(store, 7), 7)
            except CheckpointError as error:
                complaints += 1
                assert str(error).startswith(f"{broken}/7: cannot be read (") and "\n" not in str(error)
                assert str(error).endswith("remove it to fall back to step 3")
        shutil.rmtree(broken)
    assert complaints >= 8  # the data, manifest and tree of params and train; run; index


def test_after_removing_the_damaged_step_the_run_goes_on(tmp_path):
    directory = fill(tmp_path / "c", {3: 0.5, 7: 0.7})
    (directory / "7" / "index" / "data.json").write_text("{")
    with CheckpointStore(directory, keep=2) as store:
        assert (store.steps(), store.best()) == ([3, 7], 3)
        with pytest.raises(CheckpointError, match="fall back to step 3"):
            restore(store, 7)
        assert_is_step(restore(store, 3), 3)
    shutil.rmtree(directory / "7")
    with CheckpointStore(directory, keep=2) as store:
        assert store.latest() == 3
        store.save(7, **state_of(7), metric=0.1)
        store.wait()
        assert_is_step(restore(store, 7), 7)


# A full disk.


@contextmanager
def files_limited_to(size):
    """Any write that makes a file longer than `size` bytes fails with EFBIG, as it would with ENOSPC on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("failing_call", ["wait", "next save", "close", "steps"])
def test_failed_async_save_surfaces_and_leaves_the_rest_usable(tmp_path, failing_call, caplog):
    rows = 8192
    directory = fill(tmp_path / "c", {0: 0.5, 3: 0.9, 6: 0.1}, keep=1, rows=rows)
    store = CheckpointStore(directory, keep=1)
    with pytest.raises(CheckpointError) as error:
        with files_limited_to(20_000):
            store.save(9, **state_of(9, rows), metric=1.0)
            match failing_call:
                case "wait":
                    store.wait()
                case "next save":
                    store.save(12, **state_of(12, rows), metric=1.0)
                case "close":
                    store.close()
                case "steps":
                    store.steps()
    message = str(error.value)
    assert message.startswith(f"{directory}: ") and "\n" not in message
    assert "File too large" in message and "steps 0, 3, 6 are whole" in message
    assert not [record for record in caplog.records if record.name == "absl"]  # Orbax's tracebacks
    if failing_call != "close":
        assert (store.steps(), store.best()) == ([0, 3, 6], 3)
        assert_is_step(restore(store, 3, rows), 3, rows)
        store.save(12, **state_of(12, rows), metric=0.2)  # with room again the same store goes on
        store.wait()
        assert store.steps() == [0, 3, 12]
        store.close()
    with CheckpointStore(directory) as store:
        assert_is_step(restore(store, store.latest(), rows), store.latest(), rows)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_full_disk(small_disk):
    rows = 8192
    directory = fill(small_disk / "c", {0: 0.5}, rows=rows)
    with CheckpointStore(directory, keep=2) as store:  # and nothing is raised a second time at its end
        with pytest.raises(CheckpointError, match=f"{directory}.*No space left.*free space.*steps 0 are whole"):
            with (small_disk / "ballast").open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError as error:
                    assert error.errno == errno.ENOSPC
            store.save(3, **state_of(3, rows), metric=1.0)
            store.wait()
        assert_is_step(restore(store, 0, rows), 0, rows)


# kill -9.

KILLED_RUNS = """
import os, random, signal, sys, threading, traceback
import jax, jax.numpy as jnp, json, numpy as np
from router_r1_jax.storage.checkpoint import CheckpointStore
from tests.storage.test_checkpoint import assert_is_step, restore, state_of

directory, log = sys.argv[1:]

def run(event):
    '''Checks what the last run left, then saves until it is killed just after its `event`-th file operation.'''
    random.seed(event)
    seen = 0

    def count(name, arguments):
        nonlocal seen
        if counting and name in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"):
            seen += 1
            if seen == event:  # a little later: TensorStore's own writes are no Python events
                delay = random.choice([0, 0, 0.001, 0.01])
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start() if delay else os.kill(
                    os.getpid(), signal.SIGKILL)

    counting = False
    sys.addaudithook(count)
    left = [name for name in os.listdir(directory) if "tmp" in name] if os.path.isdir(directory) else []
    with CheckpointStore(directory, keep=1) as store:
        latest = store.latest()
        if latest is not None:
            for step in {store.first(), store.best(), latest}:
                assert_is_step(restore(store, step), step)
            assert store.first() == 0
            assert store.best() == 3 * (latest // 3)
        with open(log, "a") as file:
            file.write(json.dumps([latest, left]) + "\\n")
        counting = True
        step = -1 if latest is None else latest
        while event is not None:
            step += 1
            store.save(step, **state_of(step), metric=step + 1.0 if step % 3 == 0 else 0.5)
        store.save(step + 1, **state_of(step + 1), metric=None)
    assert not [name for name in os.listdir(directory) if "tmp" in name]

# One import of JAX for all runs: each is a fork, made before any device is touched.
for event in [*map(int, np.random.default_rng(0).integers(1, 400, size=7)), None]:
    child = os.fork()
    if child == 0:
        try:
            run(event)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (0 if event is None else -signal.SIGKILL), (event, status)
"""


def test_killed_at_any_moment(tmp_path):
    result = python(KILLED_RUNS, tmp_path / "c", tmp_path / "log")
    assert result.returncode == 0, result.stderr
    starts = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    latest = [step for step, _ in starts if step is not None]
    assert latest == sorted(latest) and latest[-1] > 3  # nothing once saved is lost
    assert any(left for _, left in starts)  # at least one run was killed in the middle of a save
