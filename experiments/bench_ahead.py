"""Training that samples one step ahead (`rollout.ahead`) against training that does not, where models answer slowly.

What it shows: seconds per training step of the demo's router, whose models here take so long that a rollout mostly
waits. Sampled ahead, the next step's episodes wait while the update computes; at best a step then costs the longer of
the two instead of their sum. Both take two turns, each a run of its own from the demo's warm start; a run's first steps
compile and are left out, and so is the last. Medians are divided: above 1 means that sampling ahead takes less time.

    python experiments/bench_ahead.py           calls of 1 s, six minutes
    python experiments/bench_ahead.py --full    also calls of 0 and 4 s

The last line is one JSON object; its top-level keys hold the worst value over the latencies that ran.

Result, 26 November 2026, 2 cores of an AMD EPYC (Zen 4), jax 0.10.2, idle, calls of 1 s: 6.24 s a step without, 5.32 s
with: `ratio` 1.17 (after one run of each 6.10 and 5.77: medians of eight steps vary by some percent). `--full` has not
been run.
"""

import argparse
import json
import runpy
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from router_r1_jax.report import read_metrics
from router_r1_jax.warmstart import recipe

STEPS, WARM = 12, 3
LATENCIES = (1.0, 0.0, 4.0)
DEMO = Path(__file__).parents[1] / "configs" / "demo.py"


def get_config(latency: str) -> ConfigDict:
    """The demo's, with this many seconds for every call: this file is its runs' configuration too."""
    c = runpy.run_path(str(DEMO))["get_config"]()
    for model in c.pool.models:
        model.latency = float(latency)
    c.warmstart.file = str(Path(tempfile.gettempdir()) / f"bench_ahead_{latency}.safetensors")
    c.steps = STEPS
    c.rollout.slots = c.rollout.questions * c.rollout.group  # as many as there are episodes: none waits for a slot
    c.validation.questions = 0
    c.checkpoint.every = STEPS
    return c


def keep_warm_start(latency: float) -> None:
    """The demo's warm start as this latency's: a kept one says what it was made with, and prompts state latencies."""
    config, kept = get_config(str(latency)), DEMO.with_name("demo_warmstart.safetensors")
    save_file(load_file(kept), config.warmstart.file, metadata={"recipe": recipe(config)})


def step_seconds(latency: float, ahead: bool) -> list[float]:
    """Of each step of one run that counts: the wait for its episodes, and its update."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "router_r1_jax.train", f"--config={__file__}:{latency}", f"--workdir={folder}",
            f"--config.rollout.ahead={ahead}",
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        lines = [line for line in read_metrics(Path(folder)) if line.get("phase") != "warmstart"]
    return [line["rollout_seconds"] + line["update_seconds"] for line in lines[WARM:-1]]


def compare(latency: float) -> dict[str, Any]:
    """Figures at one latency."""
    keep_warm_start(latency)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for ahead in (False, True, False, True):
        seconds[ahead] += step_seconds(latency, ahead)
        print(
            f"calls of {latency} s, ahead {ahead}: median {statistics.median(seconds[ahead]):.2f} s a step", flush=True
        )
    plain, ahead = (statistics.median(seconds[key]) for key in (False, True))
    return {"seconds_plain": round(plain, 3), "seconds_ahead": round(ahead, 3), "ratio": round(plain / ahead, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="also calls that take no time, and 4 s")
    args = parser.parse_args()
    from measure import describe_machine  # not where this file is read as a configuration

    latencies = {f"{latency} s": compare(latency) for latency in LATENCIES[: 3 if args.full else 1]}
    worst = {"ratio": min(figures["ratio"] for figures in latencies.values())}
    print(json.dumps(worst | {"sizes": latencies, "machine": describe_machine()}))


if __name__ == "__main__":
    main()
