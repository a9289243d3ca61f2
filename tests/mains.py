"""Runs the mains as a user does, as processes of their own on the tiny configuration, and reads what they leave."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from router_r1_jax.storage.checkpoint import CheckpointStore
from router_r1_jax.storage.metrics_writer import read_metrics

CONFIG = Path(__file__).parent / "tiny_config.py"
WITHOUT_TORCH = Path(__file__).parent / "without_torch"
CACHE = ("pool.call_cache.mode=record", "steps=6")  # of the run that is killed, stopped and repeated
TIMEOUT = 300  # seconds; only a run that hangs takes as long

# What a run may do otherwise when it is repeated: times, rates, and what was really paid.
UNEQUAL = re.compile(
    "tokens_per_second|call_cache_hit_rate|spent_dollars|(val/)?call_seconds_per_question|rollout_seconds|update_seconds"
    "|weight_sync_seconds|rollout/.*"
)


def command(main: str, workdir: Path, *overrides: str, config: Path | str = CONFIG) -> list[str]:
    """`overrides` are "field=value"; anything that begins with a dash is passed as it is."""
    args = [arg if arg.startswith("-") else f"--config.{arg}" for arg in overrides]
    return [sys.executable, "-m", f"router_r1_jax.{main}", f"--config={config}", f"--workdir={workdir}", *args]


def environment(**variables: str) -> dict[str, str]:
    """This process's, with `variables`, at most one fake device, and no torch, which users do not install.

    If transformers finds torch, it imports it, and this takes as long as all other imports of a main.
    """
    path = os.pathsep.join(filter(None, (str(WITHOUT_TORCH), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": path, **variables}


def run(
    main: str, workdir: Path, *overrides: str, config: Path | str = CONFIG, timeout: float = TIMEOUT, **variables: str
) -> subprocess.CompletedProcess:
    """The finished process, with its output as text."""
    return subprocess.run(
        command(main, workdir, *overrides, config=config),
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def succeed(main: str, workdir: Path, *overrides: str, **settings: Any) -> subprocess.CompletedProcess:
    """As `run`, with the same settings; the process must end well."""
    done = run(main, workdir, *overrides, **settings)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


FORKS = """
import gc, importlib, json, os, runpy, sys

jobs = json.loads(sys.argv[1])
for main, _, _ in jobs:
    importlib.import_module(f"router_r1_jax.{main}")
gc.freeze()  # or each fork would copy all memory when it collects garbage at its end
for main, out, argv in jobs:
    if os.fork() == 0:
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = argv
        sys.modules.pop(f"router_r1_jax.{main}")
        runpy.run_module(f"router_r1_jax.{main}", run_name="__main__")
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def run_each(outputs: Path, commands: Sequence[list[str]]) -> list[subprocess.CompletedProcess]:
    """The finished processes of many `command`s, which are forks of one: imports take most of a short run's time."""
    outputs.mkdir()
    jobs = [(c[2].rpartition(".")[2], str(outputs / str(i)), c[2:]) for i, c in enumerate(commands)]
    done = subprocess.run(
        [sys.executable, "-c", FORKS, json.dumps(jobs)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    codes = [int(code) for code in done.stdout.split()]
    assert len(codes) == len(jobs), done.stderr[-4000:]
    texts = [[Path(f"{out}.{name}").read_text() for name in ("stdout", "stderr")] for _, out, _ in jobs]
    return [subprocess.CompletedProcess(c, code, *text) for c, code, text in zip(commands, codes, texts, strict=True)]


def start(main: str, workdir: Path, *overrides: str, config: Path | str = CONFIG, **variables: str) -> subprocess.Popen:
    """The running process, the first of a session of its own, so that it can be killed with all it has started."""
    return subprocess.Popen(
        command(main, workdir, *overrides, config=config),
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Until the condition holds; a process that ends before has failed."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} too early: {process.communicate()[1][-4000:]}"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def train_lines(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl that are steps of training, not of the warm start."""
    return [line for line in read_metrics(workdir) if line.get("phase") != "warmstart"]


def repeatable(metrics: list[dict]) -> list[dict]:
    """Metrics lines without what differs between equal runs."""
    return [{key: value for key, value in line.items() if not UNEQUAL.fullmatch(key)} for line in metrics]


def checkpoint_arrays(workdir: Path, step: int) -> tuple[dict[str, np.ndarray], dict]:
    """Every array of a checkpoint's parameters and optimizer, and its `run` dict, without building a model."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # not the devices, of several processes, that saved it

    def target(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)

    with CheckpointStore(workdir / "checkpoints") as store:
        kept = store._checkpointer.checkpointables_metadata(step).metadata
        state = {name: jax.tree.map(target, kept[name]) for name in ("params", "train")}
        saved = store._checkpointer.load_checkpointables(step, state | {"run": None})
    leaves = jax.tree_util.tree_leaves_with_path((saved["params"], saved["train"]))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, saved["run"]


def assert_same_checkpoint(one: Path, other: Path, step: int) -> None:
    """Arrays bit for bit; of the run's state all but the configuration's hash, what was really paid and where."""
    (arrays, run), (others, other_run) = checkpoint_arrays(one, step), checkpoint_arrays(other, step)
    assert arrays.keys() == others.keys() and len(arrays) > 10
    for name, array in arrays.items():
        assert array.tobytes() == others[name].tobytes(), name
    for state in (run, other_run):
        del state["config"]
        state["pools"] = [{model: sums[:2] for model, sums in pool["ledger"].items()} for pool in state["pools"]]
    assert any(run["pools"][0].values()) and run == other_run
