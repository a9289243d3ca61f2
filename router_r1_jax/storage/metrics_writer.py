"""Metrics writer: one line per step in metrics.jsonl, also sent to TensorBoard and W&B if the configuration asks."""

import importlib
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from router_r1_jax.errors import UserError
from router_r1_jax.storage.json_lines import JsonLines, plain_json, read_lines, up_to_step

METRICS_FILE = "metrics.jsonl"


class MissingExtraError(UserError, ImportError):
    """The configuration asks for a package that is not installed. The message names the extra."""


def import_extra(module: str, extra: str, reason: str) -> ModuleType:
    """Import a package that an extra installs. `reason` begins the message of MissingExtraError: who needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f"{reason} and {module} is missing: pip install 'router_r1_jax[{extra}]'"
        raise MissingExtraError(message) from error


class MetricsWriter:
    """Writes one JSON line per step to `<workdir>/metrics.jsonl`, and to TensorBoard and W&B if asked.

    In a run of several processes only process 0 may have one.

    Args:
        workdir: folder of the run. It is made if it is missing.
        tensorboard: also write event files to `<workdir>/tensorboard` (extra `tensorboard`).
        wandb: also log to this W&B project (extra `wandb`), unless it is "".
        resume_step: step of the restored checkpoint. Later lines are removed. Lines whose "phase" is "warmstart" stay,
            because the warm start counts its own steps and comes before every checkpoint. None starts a new file.

    Raises:
        MissingExtraError: TensorBoard or W&B is asked for and not installed.
        BrokenFileError: a line of metrics.jsonl before the last is no JSON object.
    """

    def __init__(
        self, workdir: str | Path, *, tensorboard: bool = False, wandb: str = "", resume_step: int | None = None
    ) -> None:
        workdir = Path(workdir)
        self._mirrors: list[_TensorBoard | _Wandb] = []
        if tensorboard:
            self._mirrors.append(_TensorBoard(workdir / "tensorboard", resume_step))
        if wandb:
            self._mirrors.append(_Wandb(workdir, wandb, resume_step))
        self._lines = JsonLines(workdir / METRICS_FILE, keep=up_to_step(resume_step))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append {"step": step, **metrics}.

        Nested mappings are flattened with "/": {"calls/share": {"A": 1}} becomes "calls/share/A". Array scalars become
        Python numbers. JSON has no NaN or infinity, so these are written as null, and strict parsers can read the file.
        """
        record = plain_json({"step": int(step)} | dict(_flatten(metrics)))
        self._lines.write([record])
        numbers = {k: v for k, v in record.items() if k != "step" and isinstance(v, (int, float))}
        for mirror in self._mirrors:
            mirror.write(record["step"], record.get("phase", "train"), numbers)

    def close(self) -> None:
        """Close the file and finish the mirrors."""
        self._lines.close()
        for mirror in self._mirrors:
            mirror.close()


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """All lines of `<workdir>/metrics.jsonl` in order; [] if there is no such file. A torn last line is left out.

    Raises BrokenFileError if a line before the last is no JSON object.
    """
    return read_lines(Path(workdir) / METRICS_FILE)


def _flatten(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


class _TensorBoard:
    """Event files, written through tensorboardX. The warm start counts its own steps, so it is a run of its own."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        self._tensorboard = import_extra("tensorboardX", "tensorboard", "logging.tensorboard is True")
        self._folder = folder
        self._purge_step = None if resume_step is None else resume_step + 1
        self._runs: dict[str, Any] = {}

    def write(self, step: int, phase: str, numbers: Mapping[str, float]) -> None:
        if phase not in self._runs:
            purge_step = self._purge_step if phase == "train" else None
            self._runs[phase] = self._tensorboard.SummaryWriter(logdir=str(self._folder / phase), purge_step=purge_step)
        for key, value in numbers.items():
            self._runs[phase].add_scalar(key, value, step)
        self._runs[phase].flush()

    def close(self) -> None:
        for run in self._runs.values():
            run.close()


class _Wandb:
    """A W&B run. Its id is kept in `<workdir>/wandb_id`, so that a resumed run continues the same W&B run.

    The step is logged as a metric, because W&B's own step counter refuses to go back after a resume.
    """

    def __init__(self, workdir: Path, project: str, resume_step: int | None) -> None:
        wandb = import_extra("wandb", "wandb", f"logging.wandb is {project!r}")
        id_file = workdir / "wandb_id"
        if resume_step is None or not id_file.exists():
            workdir.mkdir(parents=True, exist_ok=True)
            id_file.write_text(secrets.token_hex(8))
        self._run = wandb.init(
            project=project, id=id_file.read_text(), resume="allow", name=workdir.name, dir=str(workdir)
        )
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("warmstart/*", step_metric="warmstart/step")

    def write(self, step: int, phase: str, numbers: Mapping[str, float]) -> None:
        self._run.log({**numbers, "warmstart/step" if phase == "warmstart" else "step": step})

    def close(self) -> None:
        self._run.finish()
