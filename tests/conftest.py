"""Shared by all tests: kept compiled programs, and the runs of the mains that several tests look at.

pytest-xdist runs tests in several processes; what is dear is made by the first that needs it and shared by all.
"""

import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before JAX is imported. Most of what a small run costs is compilation.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "router_r1_jax" / "tests_xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def keep_to_own_cores() -> None:
    """Give each pytest-xdist process, and what it starts, its share of the cores.

    XLA's threads wait for each other at every operation: beside other work on two cores, a step of the warm start took
    5.5 s (median of 8) with two threads and 2.5 s (median of 6) when kept to one core.
    """
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        own = int(worker.removeprefix("gw")) % workers
        os.sched_setaffinity(0, cores[own::workers] or cores)


def hear_ctrl_c() -> None:
    """A shell lets its background jobs ignore SIGINT, and all they start: tests of Ctrl-C would wait for ever."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


keep_to_own_cores()
hear_ctrl_c()

# On a loaded machine an example, or drawing one, may take long: time decides no test.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

import mains  # noqa: E402


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """shared(name, make) -> a folder that make(folder) has filled once, for all processes of this test run."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def get(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                assert not folder.exists(), f"{name} failed in another process"
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def warm_file(shared) -> Path:
    """The tiny router's warm start, made by the main that makes the demo's."""
    return shared("warm", lambda folder: mains.succeed("training.warmstart", folder)) / "warmstart.safetensors"


@pytest.fixture(scope="session")
def finished_run(shared, warm_file) -> Path:
    """Workdir of a whole run: trained and evaluated. Only to be looked at."""

    def make(folder: Path) -> None:
        done = mains.succeed("train", folder, f"warmstart.file={warm_file}")
        (folder / "train.stdout").write_text(done.stdout)
        done = mains.succeed("evaluate", folder, f"warmstart.file={warm_file}")
        (folder / "evaluate.stdout").write_text(done.stdout)

    return shared("finished", make)


@pytest.fixture(scope="session")
def uninterrupted(shared) -> Path:
    """Workdir of the run that others are held against: six steps on a call cache, its warm start trained in it."""
    return shared("uninterrupted", lambda folder: mains.succeed("train", folder, *mains.CACHE))
