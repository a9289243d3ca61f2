"""Several processes that are one run: how they join, what they tell each other, how they end together.

Every process runs the same program on the same configuration and calls what is here at the same places. Arrays on
devices span processes by themselves (`mesh.make_mesh`); this room is for what lies in a host's memory (episodes, sums
of money, errors) and for who may write which file. A process that runs alone finds everything here to be the plain
thing.
"""

import itertools
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint import multihost

T = TypeVar("T")

ONE_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
HEARTBEAT_TIMEOUT = 30  # seconds without a sign of life after which a process counts as dead; JAX then ends the others
LONGEST_WAIT = 24 * 3600  # seconds for which a process waits for another's rollout
SMALLEST_MESSAGE = 1 << 12  # bytes; messages are padded to a power of two, so that few programs are compiled


_MEETINGS = itertools.count()  # barriers want names; all processes meet in the same order


class HostError(RuntimeError):
    """Another process of the run has failed; the message names it and what it said."""


class _Ending:
    """How this process may leave. `joined`: it is one of several. `kept`: an interrupt waits for the next `together`.
    `cuts`: one is raised at once. `agreed`: an error was raised in all processes at the same place, from where they can
    still act together."""

    joined = kept = cuts = agreed = False


def join(settings: ConfigDict) -> None:
    """Become one of several processes, as `config.distributed` says; before JAX is used for anything else.

    On CPUs XLA's schedule for concurrency lets independent collectives of a program run in any order: one process then
    waited for the critic's gradient where the other sent the body's. With JAX_PLATFORMS=cpu it is turned off.
    """
    if not settings.coordinator:
        return
    if jax.config.jax_platforms == "cpu":
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_ORDER}"
    where: dict[str, Any] = {}
    if settings.coordinator != "auto":
        where = dict(
            coordinator_address=settings.coordinator, num_processes=settings.processes, process_id=settings.process
        )
    jax.distributed.initialize(**where, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT)
    _Ending.joined = True


def several() -> bool:
    """Whether the run has more than one process. Initialises JAX."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this process writes what a run has one of: metrics, episodes, report."""
    return jax.process_index() == 0


def say(*words: object) -> None:
    """Print, once per run."""
    if first():
        print(*words, flush=True)


def own_file(path: Path, process: int | None = None) -> Path:
    """The file that a process has to itself: `path` for process 0, for process 3 `ledger-3.jsonl` beside it."""
    process = jax.process_index() if process is None else process
    return path.with_name(f"{path.stem}-{process}{path.suffix}") if process else path


def is_mine(number: int) -> bool:
    """Whether the thing of this number (a question of a batch) is dealt to this process."""
    return number % jax.process_count() == jax.process_index()


def meet() -> None:
    """Return when all processes are here, however long that takes: device collectives on CPUs give up after 30 s.

    The wait is in another thread, so that an interrupt reaches Python.
    """
    if not several():
        return
    name, failed = f"router_r1_jax/{next(_MEETINGS)}", []

    def wait() -> None:
        try:
            multihost.get_barrier_sync_fn()(key=name, timeout_ms=LONGEST_WAIT * 1000)
        except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
            failed.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    while waiting.is_alive():
        waiting.join(timeout=0.2)
    if failed:
        said = str(failed[0]).partition("\n")[0]
        raise HostError(f"another process of the run has ended, see its output ({said})") from failed[0]


def gather(value: T) -> list[T]:
    """The value of every process, in the order of processes, in each of them. Values travel pickled."""
    if not several():
        return [value]
    meet()
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(max(SMALLEST_MESSAGE, 1 << int(max(sizes) - 1).bit_length()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def together(call: Callable[[], T]) -> list[T]:
    """What `call` returns in each process, in the order of processes. Where it raises in one, all raise.

    An interrupt that came since the last time, to whichever process, is raised here too: this is where all can still
    act together, as they must to write a checkpoint.
    """
    if not several():
        return [call()]
    result, error = None, None
    try:
        _Ending.cuts = True
        if _Ending.kept:
            raise KeyboardInterrupt
        result = call()
    except BaseException as raised:  # noqa: BLE001  raised again below, in all processes
        error = raised
    finally:
        _Ending.cuts = False
    told = None if error is None else "" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
    parts = gather((result, told))
    failed = {process: words for process, (_, words) in enumerate(parts) if words is not None}
    if not failed:
        return [part for part, _ in parts]
    _Ending.agreed = True
    if error is not None:
        raise error
    process, words = max(failed.items(), key=lambda item: item[1] != "")
    raise HostError(f"process {process} of the run has failed: {words}") if words else KeyboardInterrupt


def in_step() -> bool:
    """In an error's handling: whether all processes are at this place, so that they can act together."""
    return _Ending.agreed or not several()


@contextmanager
def first_before_others() -> Iterator[None]:
    """Process 0 goes through the block alone, then the others: for files that whoever comes first makes for all."""
    if not first():
        meet()
    yield
    if first():
        meet()


def hear_interrupts() -> None:
    """With several processes Ctrl-C and SIGTERM wait for the next `together`; a second one ends this process at once.

    A process that is alone hears them as `cli.Interrupts` says.
    """
    if not several():
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)


def _interrupted(*_: object) -> None:
    if _Ending.kept:
        os._exit(130)
    _Ending.kept = True
    if _Ending.cuts:
        _Ending.cuts = False
        raise KeyboardInterrupt
    print("interrupted: this step is finished first; once more ends at once", file=sys.stderr, flush=True)


@contextmanager
def failing_alone() -> Iterator[None]:
    """Where the block fails in one of several processes, that process ends at once, for the others to notice."""
    try:
        yield
    except BaseException as error:
        if not _Ending.joined or (isinstance(error, SystemExit) and not error.code):
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        leave(1)


def leave(status: int) -> None:
    """End this process now. JAX's own end would wait for the others, which may wait for this one."""
    if _Ending.joined and _Ending.agreed:
        jax.distributed.shutdown()  # they come too; whoever left without it would be taken for dead
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Silent:
    """Stands where only process 0 writes: takes every call and does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None
