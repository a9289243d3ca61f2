"""Run by test_multihost.py as one of two processes: two_hosts.py COORDINATOR PROCESS TASK; prints JSON."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from router_r1_jax.distributed import multihost


def attempt(call):
    """What `multihost.run_on_all` returns or raises, as JSON."""
    try:
        return multihost.run_on_all(call)
    except BaseException as error:
        return [type(error).__name__, str(error), multihost.all_can_act()]


def messages(process):
    """What the processes tell each other."""

    def fail():
        if process == 1:
            raise ValueError("the disk is full")

    def interrupted():
        if process == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)  # is interrupted

    sizes = [len(value["text"]) for value in multihost.allgather_objects({"text": "x" * (1 + 70_000 * process)})]
    found = {
        "sizes": sizes,
        "order": multihost.run_on_all(lambda: process),
        "mine": [i for i in range(5) if multihost.owns_item(i)],
        "file": multihost.process_file(Path("runs/ledger.jsonl")).name,
        "failure": attempt(fail),
        "again": multihost.run_on_all(lambda: "both"),
        "interrupt": attempt(interrupted),
    }
    print(json.dumps(found), flush=True)
    multihost.exit_process(0)


def kept(process):
    """An interrupt that comes outside of `run_on_all` is raised in the next one, in both."""
    if process == 1:
        os.kill(os.getpid(), signal.SIGINT)
    print(json.dumps({"interrupt": attempt(lambda: time.sleep(0.1))}), flush=True)
    multihost.exit_process(0)


def death(process):
    """One is killed while the other waits for it."""
    multihost.barrier()
    if process == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with multihost.exit_on_failure():
        multihost.barrier()
    print(json.dumps({"end": "nobody was missed"}), flush=True)


def failure(process):
    """One fails away from the other, which waits for it."""
    multihost.barrier()
    with multihost.exit_on_failure():
        if process == 0:
            raise ValueError("the disk is full")
        multihost.barrier()
    print(json.dumps({"end": "nobody was missed"}), flush=True)


def main():
    coordinator, process, task = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    multihost.initialize(ConfigDict(dict(coordinator=coordinator, processes=2, process=process)))
    multihost.defer_interrupts()
    {"messages": messages, "kept": kept, "death": death, "failure": failure}[task](jax.process_index())


if __name__ == "__main__":
    main()
