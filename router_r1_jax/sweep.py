"""Sweep expansion (choices, product, zipped): train and evaluate one configuration under many overrides, and gather.

    python -m router_r1_jax.sweep --config=configs/sweeps/demo_alpha.py --workdir=runs/demo_alpha [--workers=N]

The configuration file has a `get_sweep()` beside its `get_config()`. It returns a list of runs, each a dict from field
to value, made with `choices`, `product`, `zipped` and `+`. Before any run starts, every run is parsed and checked as
its own process will do it. Each run has a folder below the workdir. The same command continues an interrupted sweep: it
leaves finished runs alone, and the others continue from their checkpoints.

    --dry_run    starts nothing and prints one command per line for each run that is not finished, for a scheduler:
                 sed -n "${SLURM_ARRAY_TASK_ID}p" commands.txt | bash
    --workers=0  starts nothing and gathers what is finished

The sweep writes sweep.json, sweep.md (one line per run, and one per setting over its seeds) and sweep.png.
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
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path
from scipy import stats

from router_r1_jax.config import ConfigError, config_hash
from router_r1_jax.config_checks import validate
from router_r1_jax.launcher import Flag, failed_program, launch, parse_flags
from router_r1_jax.pool.cards import cards_from_config
from router_r1_jax.prompts import load_template
from router_r1_jax.report import sweep_plot
from router_r1_jax.report.tables import SWEEP_METRICS, sweep_markdown
from router_r1_jax.setup.model import random_model, with_settings
from router_r1_jax.storage.json_lines import replace_file

Overrides = dict[str, Any]  # field, such as "reward.alpha" -> value

COMMANDS = ("train", "evaluate")  # of every run, one after the other
SEED = "seed"  # runs that differ in this field alone are one setting
POLL_SECONDS = 0.2  # between two looks at a running process


# ---- expansion ------------------------------------------------------------------------------------------------------


def choices(field: str, *values: Any) -> list[Overrides]:
    """One run for each value of a field."""
    return [{field: value} for value in values]


def product(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """Every combination of one run of each sweep; the last varies fastest. Raises ConfigError for a field set twice."""
    return [_merge(runs) for runs in itertools.product(*sweeps)]


def zipped(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """The first runs of all sweeps merged, then the second, and so on.

    Raises ConfigError for sweeps of different lengths and for a field set twice.
    """
    if len({len(sweep) for sweep in sweeps}) > 1:
        lengths = ", ".join(str(len(sweep)) for sweep in sweeps)
        raise ConfigError(f"zipped() was given sweeps of {lengths} runs; give each as many")
    return [_merge(runs) for runs in zip(*sweeps, strict=True)]


def _merge(runs: Sequence[Overrides]) -> Overrides:
    merged: Overrides = {}
    for run in runs:
        if twice := merged.keys() & run.keys():
            raise ConfigError(f"{sorted(twice)[0]} is set by two parts of one run in get_sweep(); keep one of them")
        merged |= run
    return merged


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
      overrides: the fields that get_sweep() sets.
      folder: the run's workdir.
      hash: hash of the whole configuration, as in results.json.
      commands: processes of the run, one after the other; each must succeed.
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


def expand_runs(config_file: str, common: Overrides, workdir: Path) -> list[Run]:
    """Expand `get_sweep()` of a configuration file into runs, each parsed and checked; `common` overrides hold for all.

    Raises ConfigError for the first override that the run's process would refuse, and for two equal runs.
    """
    file, *arg = config_file.partition(":")
    file = str(Path(file).absolute())  # the hash holds paths of files beside the configuration: use one spelling
    sweep, config_file = _read_sweep(file), "".join([file, *arg])
    short = _short_names({field for run in sweep for field in run})
    runs: dict[str, Run] = {}
    for overrides in sweep:
        name = ",".join(f"{short[field]}={_flag_value(value)}" for field, value in overrides.items()) or "base"
        folder = workdir / re.sub(r"[^\w.,=+-]+", "-", name)
        if folder.name in runs:
            raise ConfigError(f"get_sweep() holds {name} twice; runs differ in what they set")
        config = _parse(config_file, common | overrides)
        hash_of_run = config_hash(config)
        if same := next((run.name for run in runs.values() if run.hash == hash_of_run), None):
            raise ConfigError(f"get_sweep() holds {same} and {name}, which are one configuration; keep one of them")
        try:
            _check(config)
        except ConfigError as error:
            raise ConfigError(f"get_sweep(), run {name}: {error}") from error
        arguments = (f"--config={config_file}", f"--workdir={folder}", *_arguments(common | overrides))
        commands = tuple((sys.executable, "-m", f"router_r1_jax.{command}", *arguments) for command in COMMANDS)
        runs[folder.name] = Run(overrides, folder, hash_of_run, commands)
    return list(runs.values())


def _read_sweep(path: str) -> list[Overrides]:
    get_sweep = runpy.run_path(path).get("get_sweep")
    if get_sweep is None:
        raise ConfigError(f"{path} has no get_sweep(); return a list of dicts from field to value, see configs/sweeps")
    try:
        sweep = list(get_sweep() or ())
    except ConfigError:
        raise
    except Exception as error:  # the configuration file is a program and may fail in any way
        raise ConfigError(failed_program(error)) from error
    if not sweep:
        raise ConfigError(f"{path}: get_sweep() is empty; return at least one dict from field to value")
    for i, run in enumerate(sweep):
        if not isinstance(run, dict) or not all(isinstance(field, str) for field in run):
            raise ConfigError(f"{path}: get_sweep()[{i}] is {run!r}; a run is a dict from field to value")
    return sweep


def _flag_value(value: Any) -> str:
    """A value as it is written in a flag."""
    return value if isinstance(value, str) else repr(value)


def _arguments(overrides: Overrides) -> list[str]:
    return [f"--config.{field}={_flag_value(value)}" for field, value in overrides.items()]


def _parse(config_file: str, overrides: Overrides) -> ConfigDict:
    """The configuration that a process with these overrides gets; ConfigError if the process would refuse one."""
    argv = ["sweep", f"--config={config_file}", *_arguments(overrides)]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    parse_flags(argv, values)
    config = values["config"].value
    for field, value in overrides.items():
        parsed = config_path.get_value(field, config)
        if parsed != value:
            raise ConfigError(
                f"get_sweep() sets {field} to {value!r}: it would be read as {parsed!r}; "
                f"write it as a {type(parsed).__name__}"
            )
    return config


def _check(config: ConfigDict) -> None:
    """Raise ConfigError for anything that a run refuses when it starts, except for its machine, data and weights."""
    validate(config)
    cards_from_config(config.pool)
    load_template(config.prompt.template)
    if not config.model.source:
        with_settings(random_model(config, 1), config.model)


def _short_names(fields: set[str]) -> dict[str, str]:
    """Field -> its last part, or the whole field if two end in the same part."""
    last = [field.rpartition(".")[2] for field in fields]
    return {field: end if last.count(end) == 1 else field for field, end in zip(fields, last, strict=True)}


# ---- running --------------------------------------------------------------------------------------------------------


def finished(run: Run) -> bool:
    """Whether the run has its results. Raises ConfigError if they come from another configuration."""
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


def run_all(runs: Sequence[Run], workers: int, log: Callable[[str], None] = print) -> dict[str, str]:
    """Run the commands of all runs, `workers` runs at a time; a failing run stops no other.

    Returns how runs failed, by name. On Ctrl-C, each running process is asked once to end, which keeps its last step.
    Then KeyboardInterrupt is raised.
    """
    errors, stop = {}, threading.Event()

    def timed(run: Run) -> tuple[str, str, float]:
        started = time.monotonic()
        return run.name, _execute(run, stop), time.monotonic() - started

    with ThreadPoolExecutor(workers) as threads:
        try:
            for i, future in enumerate(as_completed([threads.submit(timed, run) for run in runs]), 1):
                name, error, seconds = future.result()
                log(f"[{i}/{len(runs)}] {name}: {error or 'finished'}, {seconds:.0f} s")
                if error:
                    errors[name] = error
        except BaseException:
            stop.set()
            raise
    return errors


def _execute(run: Run, stop: threading.Event) -> str:
    """Run the commands of one run until `stop` is set; returns how it failed, or ""."""
    run.folder.mkdir(parents=True, exist_ok=True)
    # The processes inherit the lock. If this process is killed, a second sweep sees that they still run.
    with open(run.folder / "sweep.lock", "w") as lock, open(run.folder / "sweep.log", "ab") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "failed: a process of an earlier sweep still works in its folder"
        for command in run.commands:
            if stop.is_set():
                return "interrupted"
            # A new session keeps a terminal's Ctrl-C from the process: a second signal would interrupt its update.
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                pass_fds=(lock.fileno(),),
                start_new_session=True,
            )
            while process.poll() is None:
                if stop.wait(POLL_SECONDS):
                    process.terminate()
                    process.wait()
            if status := process.returncode:
                last_line = re.split(r"[\r\n]+", Path(log.name).read_text(errors="replace").strip())[-1][:300]
                return f"failed with status {status}: {last_line}"
    return ""


# ---- gathering ------------------------------------------------------------------------------------------------------


def gather(runs: Sequence[Run], errors: Mapping[str, str]) -> dict[str, Any]:
    """Results of the finished runs (`runs`), their means over seeds (`settings`), and all other runs (`failed`).

    A row of `runs` holds the overrides and the metrics of the run's first policy. A row of `settings` holds each
    metric's mean over seeds and, from two seeds on, Student's 95 % interval of the mean. `failed` maps name to error.
    """
    rows, groups, failed = [], {}, {}
    for run in runs:
        if not finished(run):
            failed[run.name] = errors.get(run.name, "not finished")
            continue
        policy = json.loads((run.folder / "results.json").read_text())["policies"][0]
        metrics = {key: policy[key] for key in (*SWEEP_METRICS, "em_ci") if key in policy}
        rows.append({"name": run.name, "overrides": run.overrides} | metrics)
        _, group = groups.setdefault(json.dumps(run.setting), (run.setting, []))
        group.append(rows[-1])
    means = [
        {"setting": setting, "seeds": len(group)}
        | {metric: seed_mean([r[metric] for r in group]) for metric in SWEEP_METRICS if all(metric in r for r in group)}
        for setting, group in groups.values()
    ]
    return {"runs": rows, "settings": means, "failed": failed}


def seed_mean(values: Sequence[float]) -> dict[str, Any]:
    """Mean of one metric over seeds; `ci` is Student's 95 % interval of the mean, or None for a single seed."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return {"mean": mean, "ci": None}
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return {"mean": mean, "ci": [mean - half, mean + half]}


# ---- main -----------------------------------------------------------------------------------------------------------


def main(config: ConfigDict, workdir: Path, dry_run: bool, workers: int) -> int:
    """Train and evaluate a configuration under many overrides, and gather the results in one table."""
    del config  # every run parses the configuration anew, with its overrides
    flag = flags.FLAGS["config"]
    runs = expand_runs(config_flags.get_config_filename(flag), config_flags.get_override_values(flag), workdir)
    left = [run for run in runs if not finished(run)]
    if dry_run:
        print(f"{len(runs)} runs, {len(runs) - len(left)} finished; a command for each other", file=sys.stderr)
        for run in left:
            print(" && ".join(shlex.join(command) for command in run.commands))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's notice is handled like Ctrl-C
    print(f"{len(runs)} runs, {len(runs) - len(left)} finished, {workers} at a time")
    gathered = gather(runs, run_all(left, workers) if workers else {})
    workdir.mkdir(parents=True, exist_ok=True)
    replace_file(workdir / "sweep.json", (json.dumps(gathered, indent=2) + "\n").encode())
    replace_file(workdir / "sweep.md", sweep_markdown(gathered).encode())
    if gathered["runs"]:
        sweep_plot(gathered, workdir / "sweep.png")
    print(f"\n{sweep_markdown(gathered)}\nresults {workdir / 'sweep.json'}")
    return 1 if gathered["failed"] else 0


if __name__ == "__main__":
    launch(
        main,
        {
            "dry_run": Flag(False, "print a command per run that is not finished, and start nothing"),
            "workers": Flag(1, "runs at a time; 0 only gathers", least=0),
        },
    )
