"""Append-only JSON-lines files of a run (metrics.jsonl, episodes/*.jsonl) and what mirrors the metrics elsewhere.

A line is written in one piece and flushed, so `kill -9` can tear at most the last one. A resumed run cuts that line and
every line after the restored step; the steps are then played again and the files read as if nothing had happened.
"""

import json
import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

METRICS_FILE = "metrics.jsonl"
EPISODES_FOLDER = "episodes"


class BrokenFileError(ValueError):
    """A file of the run that is not what was written. The message names the file, the line and the fix."""


class MissingExtraError(ImportError):
    """A package that the configuration asks for and that is not installed. The message names the extra."""


def replace_file(path: Path, content: bytes) -> None:
    """Write a whole file: after a crash or on a full disk the old one is there or the new one, never half of it.

    Raises OSError that names the path and the fix.
    """
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.write_bytes(content)
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        message = f"cannot be written ({error.strerror}); free space there and start again"
        raise OSError(error.errno, f"{path}: {message}") from error


class MetricsWriter:
    """Writes one JSON line per step to `<workdir>/metrics.jsonl`, and to TensorBoard and W&B where asked.

    Only process 0 of a run may hold one.

    Args:
        workdir: folder of the run; made if missing.
        tensorboard: also write event files to `<workdir>/tensorboard` (extra `tensorboard`).
        wandb: also log to this W&B project (extra `wandb`); "" does not.
        resume_step: step of the restored checkpoint: later lines are cut. Lines whose "phase" is "warmstart" count
            their own steps and are kept, because every checkpoint lies behind the warm start. None begins anew.

    Raises:
        MissingExtraError: TensorBoard or W&B is asked for and not installed.
        BrokenFileError: metrics.jsonl holds a broken line that is not the last one.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        tensorboard: bool = False,
        wandb: str = "",
        resume_step: int | None = None,
    ) -> None:
        workdir = Path(workdir)
        self._mirrors: list[_Mirror] = []
        if tensorboard:
            self._mirrors.append(_TensorBoard(workdir / "tensorboard", resume_step))
        if wandb:
            self._mirrors.append(_Wandb(workdir, wandb, resume_step))
        self._lines = JsonLines(workdir / METRICS_FILE, keep=_until(resume_step))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append {"step": step, **metrics}.

        Nested mappings are flattened with "/" ({"calls/share": {"A": 1}} becomes "calls/share/A"), and array scalars
        become Python numbers. JSON has no NaN or infinity: they are written as null, which every reader here takes as
        "was not a finite number", so that the file stays readable for strict parsers.
        """
        record = {"step": int(step)} | dict(_flatten(metrics))
        self._lines.append([record])
        for mirror in self._mirrors:
            mirror.write(record)

    def close(self) -> None:
        """Close the file and finish the mirrors."""
        self._lines.close()
        for mirror in self._mirrors:
            mirror.close()


class EpisodeWriter:
    """Appends episodes to `<workdir>/episodes/<name>.jsonl`; `resume_step` as in `MetricsWriter`."""

    def __init__(self, workdir: str | Path, name: str, *, resume_step: int | None = None) -> None:
        self._lines = JsonLines(Path(workdir) / EPISODES_FOLDER / f"{name}.jsonl", keep=_until(resume_step))

    def write(self, episodes: Iterable[Mapping[str, Any]]) -> None:
        """Append one line per episode, all in one piece. Numbers that are not finite become null."""
        self._lines.append([_plain(episode) for episode in episodes])

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """All lines of `<workdir>/metrics.jsonl` in order; [] where there is no such file. A torn last line is left out.

    Raises:
        BrokenFileError: a line before the last is no JSON object.
    """
    return read_lines(Path(workdir) / METRICS_FILE)


def read_episodes(workdir: str | Path) -> list[dict[str, Any]]:
    """All episodes of `<workdir>/episodes/*.jsonl`, file by file in order of name. Errors as `read_metrics`."""
    return [
        episode for path in sorted((Path(workdir) / EPISODES_FOLDER).glob("*.jsonl")) for episode in read_lines(path)
    ]


class JsonLines:
    """An append-only file of JSON objects, one per line."""

    def __init__(self, path: Path, *, keep: Callable[[Mapping[str, Any]], bool]) -> None:
        """Of an existing file the lines stay that `keep` says; a torn last one goes. Raises BrokenFileError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            replace_file(path, _encode(filter(keep, read_lines(path))))
        self._path = path
        self._file = path.open("ab", buffering=0)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write a line for each, all in one piece. Raises OSError that names the file."""
        data = memoryview(_encode(records))
        whole = self._path.stat().st_size
        try:
            while data:  # one write, unless the system took only part of it
                data = data[self._file.write(data) :]
        except OSError as error:
            self._file.truncate(whole)  # a caller that goes on must not append to half a line
            message = f"cannot append ({error.strerror}); free space there and start again to resume"
            raise OSError(error.errno, f"{self._path}: {message}") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _until(resume_step: int | None) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a line survives going back to this step."""
    if resume_step is None:
        return lambda line: False
    return lambda line: line.get("phase") == "warmstart" or line.get("step", 0) <= resume_step


def _encode(records: Iterable[Mapping[str, Any]]) -> bytes:
    # ASCII escapes keep lone surrogates and U+2028 of external text from breaking the file or its lines.
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode("ascii")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a JSON-lines file, [] where there is none. Errors as `read_metrics`."""
    if not path.exists():
        return []
    complete, _, _ = path.read_bytes().rpartition(b"\n")  # what follows the last line break is torn
    records = []
    for number, line in enumerate(complete.split(b"\n") if complete else (), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise BrokenFileError(f"{path}, line {number} is not JSON ({error}); delete that line") from error
        if not isinstance(record, dict):
            raise BrokenFileError(f"{path}, line {number} is {line[:40]!r}, not a JSON object; delete that line")
        records.append(record)
    return records


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: array scalars and arrays to numbers and lists, not finite to None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # NumPy and JAX, scalars too
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _flatten(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", _plain(value)


class _Mirror(Protocol):
    """Takes the same records as metrics.jsonl."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in record.items() if k != "step" and isinstance(v, (int, float))}


class _TensorBoard:
    """Event files through tensorboardX; the warm start, which counts its own steps, is a run beside the training."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                "logging.tensorboard is True and tensorboardX is missing: pip install 'router_r1_jax[tensorboard]'"
            ) from error
        self._open = SummaryWriter
        self._folder = folder
        self._purge = None if resume_step is None else resume_step + 1
        self._runs: dict[str, Any] = {}

    def write(self, record: Mapping[str, Any]) -> None:
        phase = record.get("phase", "train")
        if phase not in self._runs:
            purge = self._purge if phase == "train" else None
            self._runs[phase] = self._open(logdir=str(self._folder / phase), purge_step=purge)
        for key, value in _numbers(record).items():
            self._runs[phase].add_scalar(key, value, record["step"])
        self._runs[phase].flush()

    def close(self) -> None:
        for run in self._runs.values():
            run.close()


class _Wandb:
    """A W&B run whose id lies in `<workdir>/wandb_id`, so that a resumed run goes on in the same one.

    Steps are logged as a metric, not as W&B's own counter: that one refuses to go back after a resume.
    """

    def __init__(self, workdir: Path, project: str, resume_step: int | None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError(
                f"logging.wandb is {project!r} and wandb is missing: pip install 'router_r1_jax[wandb]'"
            ) from error
        identity = workdir / "wandb_id"
        if resume_step is None or not identity.exists():
            workdir.mkdir(parents=True, exist_ok=True)
            identity.write_text(secrets.token_hex(8))
        self._run = wandb.init(
            project=project, id=identity.read_text(), resume="allow", name=workdir.name, dir=str(workdir)
        )
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("warmstart/*", step_metric="warmstart/step")

    def write(self, record: Mapping[str, Any]) -> None:
        axis = "warmstart/step" if record.get("phase") == "warmstart" else "step"
        self._run.log(_numbers(record) | {axis: record["step"]})

    def close(self) -> None:
        self._run.finish()
