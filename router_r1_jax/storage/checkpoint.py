"""Orbax checkpoints: asynchronous saves, retention of the first, best and last steps, restore on any mesh.

A store is one folder with one sub-folder per step, written by Orbax. A step holds `params`, `train` (optimizer state,
step), `run` (the host's state: data iterator, cost window, ledger totals) and `index` (the metric, and the shapes that
a restore is checked against). Orbax writes into a temporary folder and renames it at the end, so every listed step is
complete, no matter when the process was killed.
"""

import contextlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import jax
from orbax.checkpoint import v1 as ocp

from router_r1_jax.errors import UserError

PyTree = Any

# Orbax and TensorStore raise these if files cannot be written, or if they are missing or make no sense.
# JAX's runtime errors (out of memory, a failed computation) are not about the folder and pass through.
_WRITE_ERRORS = (OSError, ValueError)
_READ_ERRORS = (OSError, ValueError, KeyError, TypeError)


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be written, found or read. The message names the folder, what is wrong and the fix."""


def quiet_orbax() -> None:
    """Keep Orbax and TensorStore from printing tracebacks of a failed save. A process calls this once, at its start.

    On a full disk Orbax logs about a thousand lines from its threads before it raises the exception, which says it all.
    A failed save also closes Orbax's event loop while other writes are running. TensorStore then reports every one of
    them to the closed loop, and Python would print a traceback for each.
    """
    orbax_folder, hook = os.path.join("orbax", "checkpoint", ""), sys.unraisablehook

    def unraisablehook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    logging.getLogger("absl").addFilter(lambda record: orbax_folder not in record.pathname)
    sys.unraisablehook = unraisablehook


def best_step(metrics: Mapping[int, float | None]) -> int | None:
    """The step with the highest metric, or the earliest of equals; None if no step has a metric."""
    measured = {step: metric for step, metric in metrics.items() if metric is not None}
    return min(measured, key=lambda step: (-measured[step], step), default=None)


def kept_steps(metrics: Mapping[int, float | None], keep: int) -> set[int]:
    """The steps that stay: the first (the reference policy), the best by metric, and the last `keep` (at least 1)."""
    steps = sorted(metrics)
    return {*steps[:1], *steps[-keep:], *({best_step(metrics)} - {None})}


class CheckpointStore(contextlib.AbstractContextManager):
    """The checkpoints of one run, in `directory`. A context manager; all processes make the same calls.

    `keep` is the number of latest steps that stay beside the first and the best. None opens the store for reading:
    nothing is created, cleaned or deleted, so a run that still writes there is not disturbed.

    Every method first waits for the save in flight, and raises CheckpointError if that save failed.
    """

    def __init__(self, directory: str | ocp.path.PathLike, *, keep: int | None = None):
        path = ocp.path.Path(directory)
        self.directory = path if path.is_absolute() else path.absolute()  # absolute() would spoil a gs:// address
        self.keep = keep
        self._metrics: dict[int, float | None] = {}  # of every step seen, also of those that were deleted
        if keep is None and not self.directory.exists():
            raise CheckpointError(f"{self.directory}: no such checkpoint folder; train first, or name the run's folder")
        context = ocp.Context()
        context.checkpointables.registry = ocp.handlers.local_registry()
        for name in ("run", "index"):  # otherwise Orbax stores a dict as a tree of arrays
            context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self.directory,
                context=context,
                preservation_policy=None if keep is None else SimpleNamespace(should_preserve=self._should_preserve),
                cleanup_tmp_directories=keep is not None,  # unfinished saves of a killed run
            )
        except OSError as error:
            message = f"cannot be opened ({_cause(error)}); mend its permissions or name another folder"
            raise CheckpointError(f"{self.directory}: {message}") from error
        self._metrics.update((c.step, self._read_metric(c.step)) for c in self._checkpointer.checkpoints)

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(self, step: int, *, params: PyTree, train: PyTree, run: dict, metric: float | None) -> None:
        """Copy the state to the host and write it in the background (`wait` returns when it is on disk).

        The caller may donate or change everything as soon as this returns. `run` holds JSON types only. A higher
        `metric` is better; None or NaN means that this step was not validated.
        """
        if step in self._steps_on_disk():
            raise CheckpointError(f"{self.directory}: step {step} exists; go on from the last, or name another folder")
        run = json.loads(json.dumps(run))  # a copy: Orbax writes it later, in a thread, while the run changes its dict
        self._metrics[step] = None if metric is None or math.isnan(metric) else float(metric)
        state = {"params": params, "train": train}
        index = {"metric": self._metrics[step], "shapes": _shapes(state)}
        try:
            # force: the caller decides when to save, not a policy of Orbax
            self._checkpointer.save_checkpointables_async(step, {**state, "run": run, "index": index}, force=True)
        except _WRITE_ERRORS as error:
            self._raise_failed_save(error)

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
            with contextlib.suppress(*_WRITE_ERRORS):  # Orbax repeats some errors that `wait` has already raised
                self._checkpointer.close()

    def steps(self) -> list[int]:
        """The steps on disk, ascending."""
        return sorted(self._steps_on_disk())

    def first(self) -> int | None:
        """The first step, i.e. the warm start and reference policy; None in an empty store."""
        return min(self._steps_on_disk(), default=None)

    def latest(self) -> int | None:
        """The last step, from which a run resumes; None in an empty store."""
        return max(self._steps_on_disk(), default=None)

    def best(self) -> int | None:
        """The step with the highest metric, or the earliest of equals; None if no step has a metric."""
        return best_step(self._steps_on_disk())

    def resolve(self, spec: str | int) -> int:
        """The step that "first", "last", "best", a number or its digits mean; CheckpointError if it is not there.

        "" means the best step, or the last if no step has a metric.
        """
        steps, named = self.steps(), {"first": self.first, "last": self.latest, "best": self.best}
        spec = spec if spec != "" else "last" if self.best() is None else "best"
        step = named[spec]() if spec in named else int(spec) if str(spec).isdecimal() else None
        if step not in steps:
            choices = f"first, last, best or one of the steps {_listed(steps)}"
            raise CheckpointError(f"{self.directory}: no checkpoint {spec!r}; choose {choices}")
        return step

    def restore(self, step: int, **abstract: PyTree) -> dict[str, PyTree]:
        """The named parts of `step`: `params`, `train` or `run`, or several of them.

        Arrays come in the shapes, dtypes and shardings of the given trees of jax.ShapeDtypeStruct; the mesh may differ
        from the one that saved. `run=None` asks for the `run` dict. Raises CheckpointError if the shapes differ or a
        file is damaged.
        """
        folder = self.directory / str(self.resolve(step))
        try:
            # The shapes are compared first, because Orbax's message for a tree that does not fit fills the screen.
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

    def _steps_on_disk(self) -> dict[int, float | None]:
        """Step -> metric, after the save in flight is on disk too."""
        self.wait()
        return {c.step: self._metrics.get(c.step) for c in self._checkpointer.checkpoints}

    def _should_preserve(self, checkpoints: Sequence[ocp.training.CheckpointMetadata], *, context: Any) -> list[bool]:
        """Orbax's interface to `kept_steps`."""
        kept = kept_steps({c.step: self._metrics.get(c.step) for c in checkpoints}, self.keep)
        return [c.step in kept for c in checkpoints]

    def _read_metric(self, step: int) -> float | None:
        """None if the index is damaged: such a step cannot be restored and must not be the best."""
        try:
            return self._checkpointer.load_checkpointables(step, {"index": None})["index"]["metric"]
        except _READ_ERRORS:
            return None

    def _raise_failed_save(self, error: Exception) -> NoReturn:
        # Orbax's list already lacks the failed step and the steps that it was to replace. The disk has the truth.
        self._checkpointer.reload()
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
    """Path of every array, e.g. "params/layers/w" -> its shape, as a list because JSON has no tuples."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape) for path, leaf in leaves}


def _first_difference(saved: Mapping[str, list[int]], abstract: Mapping[str, PyTree]) -> str | None:
    """The first difference between the shapes on disk and the requested ones; None if they agree."""
    wanted = _shapes(abstract)
    there = {path: shape for path, shape in saved.items() if path.split("/")[0] in abstract}
    for path in [*wanted, *there]:
        if wanted.get(path) != there.get(path):
            shapes = [f"shape {tuple(tree[path])}" if path in tree else "nothing" for tree in (there, wanted)]
            return f"{path} has {shapes[0]} in the checkpoint and {shapes[1]} in the configuration"
    return None
