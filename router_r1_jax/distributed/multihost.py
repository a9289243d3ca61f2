"""Multi-host runs: joining processes, barrier, allgather of objects, errors and interrupts that reach all processes.

Every process runs the same program on the same configuration and calls the functions of this module at the same places.
Arrays on devices span all processes (`mesh.make_mesh`). This module is for what lies in a host's memory (episodes, sums
of money, errors) and for the question which process writes which file. In a run of one process every function does the
obvious thing without communication.
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

from router_r1_jax.errors import UserError

T = TypeVar("T")

SEQUENTIAL_SCHEDULER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
HEARTBEAT_TIMEOUT = 30  # seconds without a heartbeat after which a process counts as dead; JAX then ends the others
BARRIER_TIMEOUT = 24 * 3600  # seconds that a process waits for another one's rollout
SMALLEST_MESSAGE = 1 << 12  # bytes; messages are padded to a power of two, so that few programs are compiled

_BARRIERS = itertools.count()  # a barrier needs a name; all processes pass the barriers in the same order


class HostError(UserError, RuntimeError):
    """Another process of the run has failed; the message names it and repeats its error."""


class _State:
    """What this process knows of interrupts and errors in a multi-host run; it decides how the process may end."""

    joined = False  # this process is one of several
    interrupted = False  # an interrupt was received; the next `run_on_all` raises it
    raise_at_once = False  # the process is inside `run_on_all`, where an interrupt is raised at once
    all_raised = False  # all processes raised an error at the same place, from where they can still act together


def initialize(settings: ConfigDict) -> None:
    """Join the other processes as `config.distributed` says. Must run before JAX is used for anything else.

    On CPUs, XLA's concurrency-optimised scheduler may run independent collectives of one program in any order, and two
    processes that wait for different collectives deadlock. With JAX_PLATFORMS=cpu it is turned off.
    """
    if not settings.coordinator:
        return
    if jax.config.jax_platforms == "cpu":
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {SEQUENTIAL_SCHEDULER}"
    address: dict[str, Any] = {}
    if settings.coordinator != "auto":
        address = dict(
            coordinator_address=settings.coordinator, num_processes=settings.processes, process_id=settings.process
        )
    jax.distributed.initialize(**address, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT)
    _State.joined = True


def is_multihost() -> bool:
    """Whether the run has more than one process. Initialises JAX."""
    return jax.process_count() > 1


def is_primary() -> bool:
    """Whether this process writes the files that a run has once: metrics, episodes, report."""
    return jax.process_index() == 0


def log_primary(*words: object) -> None:
    """Print once per run."""
    if is_primary():
        print(*words, flush=True)


def process_file(path: Path, process: int | None = None) -> Path:
    """The file of one process: `path` for process 0; for process 3, `ledger-3.jsonl` beside `ledger.jsonl`."""
    process = jax.process_index() if process is None else process
    return path.with_name(f"{path.stem}-{process}{path.suffix}") if process else path


def owns_item(number: int) -> bool:
    """Whether this process works on the item (a question of a batch) of this number."""
    return number % jax.process_count() == jax.process_index()


def barrier() -> None:
    """Return when all processes are here, however long that takes: device collectives on CPUs time out after 30 s.

    A thread waits, so that an interrupt reaches Python. Raises HostError if another process has ended.
    """
    if not is_multihost():
        return
    name, failed = f"router_r1_jax/{next(_BARRIERS)}", []

    def wait() -> None:
        try:
            multihost.get_barrier_sync_fn()(key=name, timeout_ms=BARRIER_TIMEOUT * 1000)
        except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
            failed.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    while waiting.is_alive():
        waiting.join(timeout=0.2)
    if failed:
        message = str(failed[0]).partition("\n")[0]
        raise HostError(f"another process of the run has ended, see its output ({message})") from failed[0]


def allgather_objects(value: T) -> list[T]:
    """The values of all processes, in the order of processes, in every process. Values are pickled."""
    if not is_multihost():
        return [value]
    barrier()
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(max(SMALLEST_MESSAGE, 1 << int(max(sizes) - 1).bit_length()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def run_on_all(call: Callable[[], T]) -> list[T]:
    """The results of `call` in all processes, in the order of processes. If it raises in one process, all raise.

    An interrupt that any process has received since the last call is raised here in all processes. Here they can still
    act together, which they must do to write a checkpoint.
    """
    if not is_multihost():
        return [call()]
    result, error = None, None
    try:
        _State.raise_at_once = True
        if _State.interrupted:
            raise KeyboardInterrupt
        result = call()
    except BaseException as raised:  # noqa: BLE001  raised again below, in all processes
        error = raised
    finally:
        _State.raise_at_once = False
    message = None  # "" for an interrupt
    if error is not None:
        message = "" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
    results = allgather_objects((result, message))
    failed = {process: words for process, (_, words) in enumerate(results) if words is not None}
    if not failed:
        return [part for part, _ in results]
    _State.all_raised = True
    if error is not None:
        raise error
    process, words = max(failed.items(), key=lambda item: item[1] != "")
    raise HostError(f"process {process} of the run has failed: {words}") if words else KeyboardInterrupt


def all_can_act() -> bool:
    """While an error is handled: whether all processes are at this place, so that they can act together."""
    return _State.all_raised or not is_multihost()


@contextmanager
def primary_first() -> Iterator[None]:
    """Process 0 runs the block alone, then the others run it: for files that the first process makes for all."""
    if not is_primary():
        barrier()
    yield
    if is_primary():
        barrier()


def defer_interrupts() -> None:
    """With several processes, let Ctrl-C and SIGTERM wait for the next `run_on_all`. A second one ends this process.

    In a run of one process, `launcher.Interrupts` handles both signals.
    """
    if not is_multihost():
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _receive_interrupt)


def _receive_interrupt(*_: object) -> None:
    if _State.interrupted:
        os._exit(130)
    _State.interrupted = True
    if _State.raise_at_once:
        _State.raise_at_once = False
        raise KeyboardInterrupt
    print("interrupted: this step is finished first; once more ends at once", file=sys.stderr, flush=True)


@contextmanager
def exit_on_failure() -> Iterator[None]:
    """If the block fails in one of several processes, end that process at once, so that the others notice."""
    try:
        yield
    except BaseException as error:
        if not _State.joined or (isinstance(error, SystemExit) and not error.code):
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        exit_process(1)


def exit_process(status: int) -> None:
    """End this process now. JAX's regular shutdown would wait for the others, which may wait for this process."""
    if _State.joined and _State.all_raised:
        jax.distributed.shutdown()  # all processes arrive here; one that left without shutdown would count as dead
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class NullWriter:
    """Replaces a writer in the processes that write nothing: it takes every call and does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None
