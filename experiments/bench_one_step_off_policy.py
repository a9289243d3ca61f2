"""Training with one-step off-policy rollouts against training without, if the models answer slowly.

The benchmark measures seconds per training step of the demo's router. The models take so long here that a rollout
mostly waits. With `rollout.one_step_off_policy` the episodes of the next step are sampled while the update computes.
At best a step then costs the longer of the two instead of their sum. Each setting takes two turns, each a run from
the demo's warm start. The first steps of a run compile and are left out, and so is the last one. The printed ratio
divides medians: above 1 means that one-step off-policy training takes less time.

    python experiments/bench_one_step_off_policy.py           calls of 1 s, six minutes
    python experiments/bench_one_step_off_policy.py --full    also calls of 0 and 4 s

The last line is one JSON object. Its top-level keys hold the worst value over the latencies.

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

from router_r1_jax.setup import open_session
from router_r1_jax.storage.metrics_writer import read_metrics
from router_r1_jax.training.warmstart import recipe

STEPS, WARM = 12, 3
LATENCIES = (1.0, 0.0, 4.0)
DEMO = Path(__file__).parents[1] / "configs" / "demo.py"


def get_config(latency: str) -> ConfigDict:
    """The demo's configuration with this many seconds for every call. The runs read it from this file."""
    c = runpy.run_path(str(DEMO))["get_config"]()
    for model in c.pool.models:
        model.latency = float(latency)
    c.warmstart.file = str(Path(tempfile.gettempdir()) / f"bench_one_step_off_policy_{latency}.safetensors")
    c.steps = STEPS
    # One slot per episode, so that no episode waits for a slot.
    c.rollout.slots = c.rollout.prompts_per_step * c.rollout.num_generations
    c.validation.questions = 0
    c.checkpoint.every = STEPS
    return c


def keep_warm_start(latency: float) -> None:
    """Write the demo's warm start with the recipe of this latency. Prompts state latencies, so the recipe differs."""
    config, kept = get_config(str(latency)), DEMO.with_name("demo_warmstart.safetensors")
    with tempfile.TemporaryDirectory() as folder, open_session(config, Path(folder), load_source=False) as session:
        save_file(load_file(kept), config.warmstart.file, metadata={"recipe": recipe(session)})


def step_seconds(latency: float, off_policy: bool) -> list[float]:
    """Seconds of the steps of one run: the wait for the episodes and the update. Without the first and last steps."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "router_r1_jax.train",
            f"--config={__file__}:{latency}",
            f"--workdir={folder}",
            f"--config.rollout.one_step_off_policy={off_policy}",
        ]
        subprocess.run(command, check=True, capture_output=True)
        lines = [line for line in read_metrics(Path(folder)) if line.get("phase") != "warmstart"]
    return [line["rollout_seconds"] + line["update_seconds"] for line in lines[WARM:-1]]


def compare(latency: float) -> dict[str, Any]:
    """Median seconds per step at one latency, and their ratio."""
    keep_warm_start(latency)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for off_policy in (False, True, False, True):
        seconds[off_policy] += step_seconds(latency, off_policy)
        median = statistics.median(seconds[off_policy])
        print(f"calls of {latency} s, one step off-policy {off_policy}: median {median:.2f} s a step", flush=True)
    on, off = (statistics.median(seconds[key]) for key in (False, True))
    return {"seconds_on_policy": round(on, 3), "seconds_off_policy": round(off, 3), "ratio": round(on / off, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="also calls that take no time, and 4 s")
    args = parser.parse_args()
    from measure import describe_machine  # imported here, because a run reads this file as its configuration

    latencies = {f"{latency} s": compare(latency) for latency in LATENCIES[: 3 if args.full else 1]}
    worst = {"ratio": min(compared["ratio"] for compared in latencies.values())}
    print(json.dumps(worst | {"sizes": latencies, "machine": describe_machine()}))


if __name__ == "__main__":
    main()
