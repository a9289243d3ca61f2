"""What the benchmarks share: taking turns, the same weights in torch, and which machine it was."""

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
    """Of one call, which returns when its work is done."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call. All run once unmeasured; then they take turns, so that noise falls on all."""
    for call in calls.values():
        call()
    times = [{name: seconds_of(call) for name, call in calls.items()} for _ in range(repeats)]
    return {name: statistics.median(t[name] for t in times) for name in calls}


def load_torch(config: ModelConfig, params: Params) -> Any:
    """The `transformers` model in torch with these parameters, float32, on all cores."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        save_hf(Path(folder) / "model", config, params)
        return transformers.AutoModelForCausalLM.from_pretrained(
            Path(folder) / "model", dtype=torch.float32, attn_implementation="sdpa"
        )


def describe_machine() -> dict[str, Any]:
    """Device, processor, cores and versions."""
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
