"""Runs the mains as a user does: as processes of their own, on the tiny configuration, with overrides."""

import os
import subprocess
import sys
from pathlib import Path

CONFIG = Path(__file__).parent / "tiny_config.py"
TIMEOUT = 300  # seconds; only a run that hangs takes as long

# What a run may do otherwise when it is repeated: times, rates, and what was really paid.
UNEQUAL = ("tokens_per_second", "idle_seconds", "spent_dollars", "rollout_seconds", "update_seconds")


def command(main: str, workdir: Path, *overrides: str, config: Path = CONFIG) -> list[str]:
    """`overrides` are "field=value"; anything that begins with a dash is passed as it is."""
    args = [arg if arg.startswith("-") else f"--config.{arg}" for arg in overrides]
    return [sys.executable, "-m", f"router_r1_jax.{main}", f"--config={config}", f"--workdir={workdir}", *args]


def environment(**variables: str) -> dict[str, str]:
    """This process's, with `variables`, and at most one fake device."""
    return {**os.environ, "XLA_FLAGS": "", **variables}


def run(main: str, workdir: Path, *overrides: str, config: Path = CONFIG, **variables: str):
    """The finished process, with its output as text."""
    return subprocess.run(
        command(main, workdir, *overrides, config=config),
        env=environment(**variables), capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip


def succeed(main: str, workdir: Path, *overrides: str, config: Path = CONFIG, **variables: str):
    """As `run`; the process must end well."""
    done = run(main, workdir, *overrides, config=config, **variables)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def repeatable(metrics: list[dict]) -> list[dict]:
    """Metrics lines without what differs between equal runs."""
    return [{key: value for key, value in line.items() if key not in UNEQUAL} for line in metrics]
