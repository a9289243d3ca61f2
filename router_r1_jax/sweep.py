"""Sweep: train and evaluate a configuration under many overrides, and gather what came of it.

    python -m router_r1_jax.sweep --config=configs/sweeps/demo_alpha.py --workdir=runs/demo_alpha [--workers=N]

The configuration file has a `get_sweep()` beside its `get_config()`: a list of runs, each a dict from field to value,
made with `choices`, `product` and `zipped` (and `+`). Every run is parsed and checked as its own process will do it,
before any is started. Each has a folder of its own below the workdir. The same command goes on where a sweep was cut:
finished runs are left alone, the others continue from their checkpoints.

    --dry_run    starts nothing and prints one command per line for each run that is not finished, for a scheduler:
                 sed -n "${SLURM_ARRAY_TASK_ID}p" commands.txt | bash
    --workers=0  starts nothing and gathers what is finished

It leaves sweep.json, sweep.md (a line per run and one per setting, over its seeds) and sweep.png in the workdir.
"""

import dataclasses
import fcntl
import itertools
import json
import math
import re
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ml_collections import ConfigDict, config_flags
from scipy import stats

from router_r1_jax.cli import FIELDS, failed_program, launch
from router_r1_jax.config import ConfigError, validate
from router_r1_jax.model import from_arch, lora_from
from router_r1_jax.pool.cards import cards_from_config
from router_r1_jax.prompts import load_template
from router_r1_jax.report.writer import replace_file
from router_r1_jax.train import config_hash

Overrides = dict[str, Any]  # field, such as "reward.alpha" -> value

MAINS = ("train", "evaluate")
SEED = "seed"  # runs that differ in it alone are one setting
# Keys of a policy in results.json -> heads of the table.
FIGURES = {
    "em": "EM",
    "f1": "F1",
    "dollars_per_question": "dollars/question",
    "calls_per_question": "calls",
    "best_model_share": "best model",
    "malformed_share": "malformed",
}


# ---- what to run ----------------------------------------------------------------------------------------------------


def choices(field: str, *values: Any) -> list[Overrides]:
    """One run for each value of a field."""
    return [{field: value} for value in values]


def product(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """Every combination of one run of each sweep; the last varies fastest. Raises ConfigError for a field set twice."""
    return [_joined(runs) for runs in itertools.product(*sweeps)]


def zipped(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """The first runs of all sweeps joined, then the second, and so on.

    Raises ConfigError for sweeps of different lengths and for a field set twice.
    """
    if len({len(sweep) for sweep in sweeps}) > 1:
        raise ConfigError(
            f"zipped() was given sweeps of {', '.join(str(len(sweep)) for sweep in sweeps)} runs; give each as many"
        )
    return [_joined(runs) for runs in zip(*sweeps, strict=True)]


def _joined(runs: Sequence[Overrides]) -> Overrides:
    joined: Overrides = {}
    for run in runs:
        if twice := joined.keys() & run.keys():
            raise ConfigError(f"{sorted(twice)[0]} is set by two parts of one run in get_sweep(); keep one of them")
        joined |= run
    return joined


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
      overrides: what get_sweep() sets in it.
      folder: its workdir.
      hash: of its whole configuration, as results.json states it.
      commands: processes that must end well, one after the other.
    """

    overrides: Overrides
    folder: Path
    hash: str
    commands: tuple[tuple[str, ...], ...]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def setting(self) -> Overrides:
        """The overrides without the seed."""
        return {field: value for field, value in self.overrides.items() if field != SEED}


def plan(config_file: str, common: Overrides, workdir: Path) -> list[Run]:
    """All runs of a configuration file's `get_sweep()`, each parsed and checked; `common` overrides hold for all.

    Raises ConfigError for the first override that its process would refuse, and for two runs that are the same.
    """
    file, *arg = config_file.partition(":")
    file = str(Path(file).absolute())  # a configuration names files beside its own: one spelling, one configuration
    sweep, config_file = _read_sweep(file), "".join([file, *arg])
    for field, value in {
        (field, repr(value)): (field, value) for run in sweep for field, value in run.items()
    }.values():
        _parse(config_file, common | {field: value}, field)
    short = _short_names({field for run in sweep for field in run})
    runs: dict[str, Run] = {}
    for overrides in sweep:
        name = ",".join(f"{short[field]}={_spelt(value)}" for field, value in overrides.items()) or "base"
        folder = workdir / re.sub(r"[^\w.,=+-]+", "-", name)
        if folder.name in runs:
            raise ConfigError(f"get_sweep() holds {name} twice; runs differ in what they set")
        config = _parse(config_file, common | overrides, name)
        made = config_hash(config)
        if same := next((run.name for run in runs.values() if run.hash == made), None):
            raise ConfigError(f"get_sweep() holds {same} and {name}, which are one configuration; keep one of them")
        try:
            _check(config)
        except ConfigError as error:
            raise ConfigError(f"get_sweep(), run {name}: {error}") from error
        arguments = (f"--config={config_file}", f"--workdir={folder}", *_arguments(common | overrides))
        commands = tuple((sys.executable, "-m", f"router_r1_jax.{main}", *arguments) for main in MAINS)
        runs[folder.name] = Run(overrides, folder, made, commands)
    return list(runs.values())


def _read_sweep(path: str) -> list[Overrides]:
    get_sweep = runpy.run_path(path).get("get_sweep")
    if get_sweep is None:
        raise ConfigError(f"{path} has no get_sweep(); return a list of dicts from field to value, see configs/sweeps")
    try:
        sweep = list(get_sweep() or ())
    except ConfigError:
        raise
    except Exception as error:  # it is a program and may fail in any way
        raise ConfigError(failed_program(error)) from error
    if not sweep:
        raise ConfigError(f"{path}: get_sweep() is empty; return at least one dict from field to value")
    for i, run in enumerate(sweep):
        if not isinstance(run, dict) or not all(isinstance(field, str) for field in run):
            raise ConfigError(f"{path}: get_sweep()[{i}] is {run!r}; a run is a dict from field to value")
    return sweep


def _spelt(value: Any) -> str:
    """A value as a flag has it."""
    return value if isinstance(value, str) else repr(value)


def _arguments(overrides: Overrides) -> list[str]:
    return [f"--config.{field}={_spelt(value)}" for field, value in overrides.items()]


def _parse(config_file: str, overrides: Overrides, what: str) -> ConfigDict:
    """The configuration that a process with these overrides has; ConfigError where it would refuse one."""
    argv = ["sweep", f"--config={config_file}", *_arguments(overrides)]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    refusal = f"get_sweep() sets {what}" + (f" to {overrides[what]!r}" if what in overrides else "")
    try:
        values(argv)
        config = values["config"].value
    except (AttributeError, LookupError) as error:
        raise ConfigError(f"{refusal}: there is no such field; {FIELDS}") from error
    except (flags.Error, TypeError, ValueError) as error:
        raise ConfigError(f"{refusal}: {str(error).partition(chr(10))[0]}; {FIELDS}") from error
    for field, value in overrides.items():
        if (parsed := _field(config, field)) != value:
            raise ConfigError(f"{refusal}: it would be read as {parsed!r}; write it as a {type(parsed).__name__}")
    return config


def _check(config: ConfigDict) -> None:
    """Raise ConfigError for what a run refuses when it opens, as far as machine, data and weights play no part."""
    validate(config)
    cards_from_config(config.pool)
    load_template(config.prompt.template)
    field, model = "model", config.model
    try:
        lora_from(model.lora)
        field = "model.arch"
        if not model.source:
            from_arch(model.arch, 1, dtype=model.dtype, remat=model.remat)
    except ValueError as error:
        raise ConfigError(f"{field}.{error}") from error


def _field(config: ConfigDict, field: str) -> Any:
    for part in field.split("."):
        config = config[part]
    return config


def _short_names(names: set[str]) -> dict[str, str]:
    """Field -> its last part, or the whole where two fields end alike."""
    last = [name.rpartition(".")[2] for name in names]
    return {name: end if last.count(end) == 1 else name for name, end in zip(names, last, strict=True)}


# ---- running --------------------------------------------------------------------------------------------------------


def finished(run: Run) -> bool:
    """Whether the run has its results. Raises ConfigError where they come from another configuration."""
    path = run.folder / "results.json"
    if not path.exists():
        return False
    made_by = json.loads(path.read_text()).get("config_hash")
    if made_by != run.hash:
        raise ConfigError(
            f"{path} was made by another configuration ({made_by}, not {run.hash}); move the folder away or take "
            "another --workdir"
        )
    return True


class Ended(NamedTuple):
    """How a run ended: "" or what went wrong."""

    run: Run
    error: str
    seconds: float


def run_all(runs: Sequence[Run], workers: int, say: Callable[[str], None] = print) -> list[Ended]:
    """Run the commands of all runs, `workers` runs at a time; a failing run stops no other.

    On Ctrl-C the running ones are asked to end, once, which keeps their last step, and KeyboardInterrupt is raised.
    """
    workshop = _Workshop()
    with ThreadPoolExecutor(workers) as threads:
        futures = [threads.submit(workshop.make, run) for run in runs]
        try:
            ended = []
            for i, future in enumerate(futures, 1):
                ended.append(future.result())
                how = ended[-1].error or "finished"
                say(f"[{i}/{len(runs)}] {ended[-1].run.name}: {how}, {ended[-1].seconds:.0f} s")
            return ended
        except BaseException:
            for future in futures:
                future.cancel()
            workshop.stop()
            raise


class _Workshop:
    """Processes that run now, so that they can be ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen] = set()
        self._stopped = False

    def make(self, run: Run) -> Ended:
        """Run one run's commands; in a thread."""
        started = time.monotonic()
        run.folder.mkdir(parents=True, exist_ok=True)
        # The processes inherit the lock: if this one is killed, a second sweep sees that they still run.
        with open(run.folder / "sweep.lock", "w") as lock, open(run.folder / "sweep.log", "ab") as log:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return Ended(run, "failed: a process of an earlier sweep still works in its folder", 0.0)
            for command in run.commands:
                code = self._wait(command, lock.fileno(), log)
                if code:
                    said = _last_line(run.folder / "sweep.log")
                    return Ended(run, f"failed with status {code}: {said}", time.monotonic() - started)
        return Ended(run, "", time.monotonic() - started)

    def _wait(self, command: Sequence[str], lock: int, log: Any) -> int:
        with self._lock:
            if self._stopped:
                return -signal.SIGTERM
            # In a session of its own: a terminal's Ctrl-C would reach it too, and a second signal cuts an update.
            process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, pass_fds=(lock,), start_new_session=True
            )
            self._processes.add(process)
        code = process.wait()
        with self._lock:
            self._processes.discard(process)
        return code

    def stop(self) -> None:
        """Ask every process to end; no further one is started."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.terminate()


def _last_line(log: Path) -> str:
    lines = re.split(r"[\r\n]+", log.read_text(errors="replace").strip())
    return lines[-1][:300]


# ---- gathering ------------------------------------------------------------------------------------------------------


def gather(runs: Sequence[Run], errors: Mapping[str, str]) -> dict[str, Any]:
    """What finished runs reached: `runs`, a row each, and `settings`, their means over seeds; `failed` names the rest.

    A row holds the overrides and the figures of the run's first policy. A setting holds for each figure its mean over
    seeds and, from two seeds on, Student's 95 % interval of that mean.
    """
    rows = []
    for run in runs:
        if finished(run):
            policy = json.loads((run.folder / "results.json").read_text())["policies"][0]
            figures = {key: policy[key] for key in (*FIGURES, "em_ci") if key in policy}
            rows.append({"name": run.name, "overrides": run.overrides, "setting": run.setting} | figures)
    settings = []
    for setting in {json.dumps(row["setting"]): row["setting"] for row in rows}.values():
        members = [row for row in rows if row["setting"] == setting]
        means = {key: seed_mean([row[key] for row in members]) for key in FIGURES if all(key in r for r in members)}
        settings.append({"setting": setting, "seeds": len(members)} | means)
    missing = [run.name for run in runs if run.name not in {row["name"] for row in rows}]
    failed = {name: errors.get(name, "not finished") for name in missing}
    return {
        "runs": [{k: v for k, v in r.items() if k != "setting"} for r in rows],
        "settings": settings,
        "failed": failed,
    }


def seed_mean(values: Sequence[float]) -> dict[str, Any]:
    """Mean of one figure over seeds; `ci`, Student's 95 % interval of it, is None for a single seed."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return {"mean": mean, "ci": None}
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return {"mean": mean, "ci": [mean - half, mean + half]}


def table(gathered: Mapping[str, Any]) -> str:
    """Markdown: a line per setting, a line per run, and the runs that are missing."""
    lines = ["Means over seeds, with Student's 95 % interval.", ""]
    lines += _markdown(
        ["setting", "seeds", *FIGURES.values()],
        [
            [_label(s["setting"]), str(s["seeds"]), *(_interval(s.get(key)) for key in FIGURES)]
            for s in gathered["settings"]
        ],
    )
    lines += ["", "Each run.", ""]
    lines += _markdown(
        ["run", *FIGURES.values()],
        [[r["name"], *(f"{r[key]:.4g}" if key in r else "" for key in FIGURES)] for r in gathered["runs"]],
    )
    lines += ["", *(f"- missing: {name}: {why}" for name, why in gathered["failed"].items())]
    return "\n".join(lines).rstrip() + "\n"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _label(setting: Overrides) -> str:
    return ", ".join(f"{field}={_spelt(value)}" for field, value in setting.items()) or "as configured"


def _interval(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    mean = f"{figure['mean']:.4g}"
    return mean if figure["ci"] is None else f"{mean} [{figure['ci'][0]:.4g} .. {figure['ci'][1]:.4g}]"


def plot(gathered: Mapping[str, Any], path: Path) -> None:
    """EM and dollars per question of every setting: a dot per run, a bar at the mean."""
    labels = [_label(s["setting"]) for s in gathered["settings"]]
    figure = Figure(figsize=(10, 1.4 + 0.34 * len(labels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("em", "dollars_per_question"), strict=True):
        for y, setting in enumerate(gathered["settings"]):
            axes.plot([setting[key]["mean"]], [y], "|", color="#222222", markersize=16, markeredgewidth=2)
        for row in gathered["runs"]:
            setting = {field: value for field, value in row["overrides"].items() if field != SEED}
            axes.plot([row[key]], [labels.index(_label(setting))], "o", color="#0072B2", alpha=0.6, markersize=5)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlabel(FIGURES[key])
        axes.grid(axis="x", color="#e4e4e4")
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    figure.savefig(path, dpi=130)


# ---- main -----------------------------------------------------------------------------------------------------------


def main(config_file: str, common: Overrides, workdir: Path, *, workers: int, dry_run: bool) -> int:
    """Plan, run what is left, gather; returns the number of runs without results."""
    runs = plan(config_file, common, workdir)
    left = [run for run in runs if not finished(run)]
    if dry_run:
        print(f"{len(runs)} runs, {len(runs) - len(left)} finished; a command for each other", file=sys.stderr)
        for run in left:
            print(" && ".join(shlex.join(command) for command in run.commands))
        return len(left)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's notice is handled like Ctrl-C
    print(f"{len(runs)} runs, {len(runs) - len(left)} finished, {workers} at a time")
    ended = run_all(left, workers) if workers else []
    gathered = gather(runs, {end.run.name: end.error for end in ended if end.error})
    workdir.mkdir(parents=True, exist_ok=True)
    replace_file(workdir / "sweep.json", (json.dumps(gathered, indent=2) + "\n").encode())
    replace_file(workdir / "sweep.md", table(gathered).encode())
    if gathered["runs"]:
        plot(gathered, workdir / "sweep.png")
    print(f"\n{table(gathered)}\nresults {workdir / 'sweep.json'}")
    return len(gathered["failed"])


if __name__ == "__main__":
    DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print a command per run that is not finished, start nothing.")
    WORKERS = flags.DEFINE_integer("workers", 1, "Runs at a time; 0 only gathers.", lower_bound=0)

    def _main(config: ConfigDict, workdir: Path) -> None:
        flag = flags.FLAGS["config"]
        common = config_flags.get_override_values(flag)
        file = config_flags.get_config_filename(flag)
        missing = main(file, common, workdir, workers=WORKERS.value, dry_run=DRY_RUN.value)
        if missing and not DRY_RUN.value:
            sys.exit(1)

    launch(_main)
