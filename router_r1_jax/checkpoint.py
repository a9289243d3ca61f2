"""Checkpoints: save without stopping the run, keep the right ones, restore them on any mesh.

A store is one folder with one sub-folder per step, written by Orbax. A step holds `params`, `train` (optimizer state,
step), `run` (what the host must know to go on: data iterator, RNG, cost window, ledger totals) and `index` (the metric,
and the shapes that a restore is checked against). Orbax writes into a temporary folder and renames it at the end, so a
step that is listed was written to its end, whenever the process was killed.
"""

import contextlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
from orbax.checkpoint import v1 as ocp

PyTree = Any

# What Orbax and TensorStore raise for files that cannot be written, and for files that are missing or make no sense.
# JAX's runtime errors (out of memory, a failed computation) do not speak of the folder and pass through.
_WRITE_ERRORS = (OSError, ValueError)
_READ_ERRORS = (OSError, ValueError, KeyError, TypeError)

# On a full disk Orbax logs about a thousand lines of tracebacks, from each of its threads, before the exception
# arrives. The exception says it all, so Orbax's own records are dropped.
_ORBAX_SOURCES = os.path.join("orbax", "checkpoint", "")
logging.getLogger("absl").addFilter(lambda record: _ORBAX_SOURCES not in record.pathname)


def _without_late_callbacks(hook: Callable[[Any], None]) -> Callable[[Any], None]:
    """`hook`, not called for TensorStore's reports to an event loop that is closed.

    A failed write ends Orbax's loop while others are on their way; each would print a traceback when it is done.
    """

    def unraisablehook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    return unraisablehook


sys.unraisablehook = _without_late_callbacks(sys.unraisablehook)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, found or read. The message names the folder, what is wrong and the fix."""


class Restored(NamedTuple):
    """One checkpoint in memory: arrays in their target shardings, and the `run` dict as it was saved."""

    params: PyTree
    train: PyTree
    run: dict[str, Any]
    step: int


def best_step(metrics: Mapping[int, float | None]) -> int | None:
    """The step with the highest metric, the earliest of equals; None where no step has one."""
    measured = {step: metric for step, metric in metrics.items() if metric is not None}
    return min(measured, key=lambda step: (-measured[step], step), default=None)


def kept_steps(metrics: Mapping[int, float | None], keep: int) -> set[int]:
    """The steps that stay: the first (the reference policy), the best by metric, and the last `keep` (at least 1)."""
    steps = sorted(metrics)
    return {*steps[:1], *steps[-keep:], *({best_step(metrics)} - {None})}


class _Preservation:
    """`kept_steps` in the form in which Orbax asks for it. `metrics` is the store's own dict, up to date."""

    def __init__(self, keep: int, metrics: Mapping[int, float | None]):
        self.keep = keep
        self.metrics = metrics

    def should_preserve(self, checkpoints: Sequence[ocp.training.CheckpointMetadata], *, context: Any) -> list[bool]:
        kept = kept_steps({c.step: self.metrics.get(c.step) for c in checkpoints}, self.keep)
        return [c.step in kept for c in checkpoints]


class CheckpointStore:
    """The checkpoints of one run, in `directory`. A context manager; every process calls it, with the same arguments.

    `keep` is how many of the latest steps stay beside the first and the best. None opens the store for reading: nothing
    is created, cleaned or deleted, so a run that is still writing there is not disturbed, and `save` is refused.

    Every method first waits for the save in flight, and raises CheckpointError if that save failed.
    """

    def __init__(self, directory: str | ocp.path.PathLike, *, keep: int | None = None):
        path = ocp.path.Path(directory)
        self.directory = path if path.is_absolute() else path.absolute()  # absolute() would spoil a gs:// address
        self.keep = keep
        self._metrics: dict[int, float | None] = {}  # of every step seen; those on disk are the checkpointer's to know
        if keep is None and not self.directory.exists():
            raise CheckpointError(f"{self.directory}: no such checkpoint folder; train first, or name the run's folder")
        context = ocp.Context()
        context.checkpointables.registry = ocp.handlers.local_registry()
        for name in ("run", "index"):  # else Orbax stores a dict as a tree of arrays
            context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self.directory,
                context=context,
                preservation_policy=None if keep is None else _Preservation(keep, self._metrics),
                cleanup_tmp_directories=keep is not None,  # what a killed run left unfinished
            )
        except OSError as error:
            message = f"cannot be opened ({_cause(error)}); mend its permissions or name another folder"
            raise CheckpointError(f"{self.directory}: {message}") from error
        self._metrics.update((c.step, self._read_metric(c.step)) for c in self._checkpointer.checkpoints)

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(
        self, step: int, *, params: PyTree, train: PyTree, run: dict, metric: float | None, wait: bool = False
    ) -> None:
        """Copy the state to the host and write it in the background; with `wait`, return when it is on disk.

        The caller may donate or change everything as soon as this returns. `run` holds JSON types only; `metric` is
        better when higher, None or NaN where this step was not validated.
        """
        if self.keep is None:
            raise CheckpointError(f"{self.directory}: opened for reading, step {step} is not saved; pass keep")
        if step in self._settled():
            raise CheckpointError(f"{self.directory}: step {step} exists; go on from the last, or name another folder")
        run = json.loads(json.dumps(run))  # Orbax serialises it later, in a thread; the run goes on changing its own
        self._metrics[step] = None if metric is None or math.isnan(metric) else float(metric)
        state = {"params": params, "train": train}
        index = {"metric": self._metrics[step], "shapes": _shapes(state)}
        try:
            # force: when to save is the caller's decision, not a policy's
            self._checkpointer.save_checkpointables_async(step, {**state, "run": run, "index": index}, force=True)
        except _WRITE_ERRORS as error:
            self._raise_failed_save(error)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when the save in flight is on disk; CheckpointError if it failed. Earlier steps stay usable."""
        try:
            self._checkpointer.wait()
        except _WRITE_ERRORS as error:
            self._raise_failed_save(error)

    def close(self) -> None:
        """Finish the save in flight and release the threads; CheckpointError if that save failed."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(*_WRITE_ERRORS):  # Orbax repeats some errors of a save that `wait` has raised
                self._checkpointer.close()

    def steps(self) -> list[int]:
        """The steps on disk, ascending."""
        return sorted(self._settled())

    def first(self) -> int | None:
        """The first step: the warm start, which is the reference policy."""
        return min(self._settled(), default=None)

    def latest(self) -> int | None:
        """The step to go on from; None in an empty store."""
        return max(self._settled(), default=None)

    def best(self) -> int | None:
        """The step with the highest metric, the earliest of equals; None where none was measured."""
        return best_step(self._settled())

    def resolve(self, spec: str | int) -> int:
        """The step that "first", "last", "best", a number or its digits mean; CheckpointError if it is not there.

        "" is the best, or the last where none was measured.
        """
        steps, named = self.steps(), {"first": self.first, "last": self.latest, "best": self.best}
        spec = spec if spec != "" else "last" if self.best() is None else "best"
        step = named[spec]() if spec in named else int(spec) if str(spec).isdecimal() else None
        if step not in steps:
            choices = f"first, last, best or one of the steps {_listed(steps)}"
            raise CheckpointError(f"{self.directory}: no checkpoint {spec!r}; choose {choices}")
        return step

    def restore(self, step: int, *, abstract_params: PyTree, abstract_train: PyTree) -> Restored:
        """The whole checkpoint of `step`, in the shapes, dtypes and shardings of the trees of jax.ShapeDtypeStruct.

        The mesh may differ from the one that saved. CheckpointError where the shapes differ or a file is damaged.
        """
        state = self._load(step, {"params": abstract_params, "train": abstract_train, "run": None})
        return Restored(state["params"], state["train"], state["run"], step)

    def restore_params(self, step: int, abstract_params: PyTree) -> PyTree:
        """Only the parameters of `step`, e.g. for evaluation or as the reference policy; otherwise as `restore`."""
        return self._load(step, {"params": abstract_params})["params"]

    def restore_run(self, step: int) -> dict[str, Any]:
        """Only the `run` dict of `step`; otherwise as `restore`."""
        return self._load(step, {"run": None})["run"]

    def _settled(self) -> dict[int, float | None]:
        """The metric of every step on disk, the one in flight included once it is there."""
        self.wait()
        return {c.step: self._metrics.get(c.step) for c in self._checkpointer.checkpoints}

    def _read_metric(self, step: int) -> float | None:
        """A step whose index is damaged cannot be restored, so it is not the best; the others stay usable."""
        try:
            return self._checkpointer.load_checkpointables(step, {"index": None})["index"]["metric"]
        except _READ_ERRORS:
            return None

    def _load(self, step: int, abstract: dict[str, PyTree]) -> dict[str, PyTree]:
        folder = self.directory / str(self.resolve(step))
        try:
            # First the shapes alone: what Orbax says of a tree that does not fit would fill the screen.
            index = self._checkpointer.load_checkpointables(step, {"index": None})["index"]
            difference = _first_difference(index["shapes"], abstract)
            if difference is None:
                return self._checkpointer.load_checkpointables(step, abstract)
        except _READ_ERRORS as error:
            others = [other for other in self.steps() if other != step]
            fix = f"fall back to step {others[-1]}" if others else "start a new run"
            message = f"{folder}: cannot be read ({_cause(error)}); if it is damaged, remove it to {fix}"
            raise CheckpointError(message) from error
        raise CheckpointError(f"{folder}: {difference}; use the model and learner settings it was saved with")

    def _raise_failed_save(self, error: Exception) -> NoReturn:
        self._checkpointer.reload()  # Orbax has already struck the failed step and the ones it was to replace
        raise CheckpointError(
            f"{self.directory}: a checkpoint could not be written ({_cause(error)}); free space or mend the folder and "
            f"start again, steps {_listed(c.step for c in self._checkpointer.checkpoints)} are whole"
        ) from error


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(steps))) or "(none)"


def _cause(error: BaseException) -> str:
    """One line from the root of a chain of errors, without the details that TensorStore appends, [name='...']."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return re.split(r" \[[a-z_ ]+=|\n", f"{type(error).__name__}: {error}")[0]


def _shapes(tree: PyTree) -> dict[str, list[int]]:
    """Shape of every array under its path, e.g. "params/layers/w"; as JSON gives it back."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape) for path, leaf in leaves}


def _first_difference(saved: Mapping[str, list[int]], abstract: Mapping[str, PyTree]) -> str | None:
    """What differs first between the shapes on disk and those asked for; None if they agree."""
    wanted = _shapes({name: tree for name, tree in abstract.items() if name != "run"})
    there = {path: shape for path, shape in saved.items() if path.split("/")[0] in abstract}
    for path in [*wanted, *there]:
        if wanted.get(path) != there.get(path):
            shapes = [f"shape {tuple(tree[path])}" if path in tree else "nothing" for tree in (there, wanted)]
            return f"{path} has {shapes[0]} in the checkpoint and {shapes[1]} in the configuration"
    return None
