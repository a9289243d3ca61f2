"""Shared parts of the benchmarks: timing in turns, a torch model with the same weights, the machine's description."""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from router_r1_jax.model import ModelConfig, Params, save_hf


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds of one call, which returns when its work is done."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call. Each runs once unmeasured; then they take turns, so that all share the noise."""
    for call in calls.values():
        call()
    times = [{name: seconds_of(call) for name, call in calls.items()} for _ in range(repeats)]
    return {name: statistics.median(t[name] for t in times) for name in calls}


def load_torch(config: ModelConfig, params: Params) -> Any:
    """The torch model of `transformers` with these parameters, in float32 and on all cores."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        save_hf(Path(folder) / "model", config, params)
        return transformers.AutoModelForCausalLM.from_pretrained(
            Path(folder) / "model", dtype=torch.float32, attn_implementation="sdpa"
        )


def describe_machine() -> dict[str, Any]:
    """The device, the processor, the number of cores, and versions."""
    import torch
    import transformers

    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return {
        "device": jax.devices()[0].device_kind,
        "processor": models[0].partition(": ")[2] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
