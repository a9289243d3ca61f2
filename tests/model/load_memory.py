"""Run by test_load_memory.py in a process of its own: the resident memory that load_hf needs at its worst.

    python load_memory.py TINY BIG

loads TINY first, so that libraries, JAX's device and tracing are paid for, then BIG, and prints as JSON, in bytes, the
resident memory in between (`before`), the peak while BIG was loaded (`peak`) and BIG's parameters (`parameters`).
"""

import json
import sys
from pathlib import Path

import jax

from router_r1_jax.model import load_hf


def resident(field):
    """VmRSS (now) or VmHWM (highest) of this process, in bytes; mapped pages of files are counted too."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main(tiny, big):
    jax.block_until_ready(load_hf(tiny))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = resident("VmRSS")
    _, params = load_hf(big)
    jax.block_until_ready(params)
    peak = resident("VmHWM")
    print(json.dumps({"before": before, "peak": peak, "parameters": sum(x.nbytes for x in jax.tree.leaves(params))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
