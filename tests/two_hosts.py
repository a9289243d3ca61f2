"""Run by test_hosts.py as one of two processes: two_hosts.py COORDINATOR PROCESS TASK; prints JSON."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from router_r1_jax import hosts


def attempt(call):
    """What `hosts.together` gives or raises, as JSON."""
    try:
        return hosts.together(call)
    except BaseException as error:
        return [type(error).__name__, str(error), hosts.in_step()]


def messages(process):
    """What the processes tell each other."""

    def fail():
        if process == 1:
            raise ValueError("the disk is full")

    def interrupted():
        if process == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)  # is cut

    sizes = [len(value["text"]) for value in hosts.gather({"text": "x" * (1 + 70_000 * process)})]
    found = {
        "sizes": sizes,
        "order": hosts.together(lambda: process),
        "mine": [i for i in range(5) if hosts.is_mine(i)],
        "file": hosts.own_file(Path("runs/ledger.jsonl")).name,
        "failure": attempt(fail),
        "again": hosts.together(lambda: "both"),
        "interrupt": attempt(interrupted),
    }
    print(json.dumps(found), flush=True)
    hosts.leave(0)


def kept(process):
    """An interrupt that comes outside of `together` is raised in the next one, in both."""
    if process == 1:
        os.kill(os.getpid(), signal.SIGINT)
    print(json.dumps({"interrupt": attempt(lambda: time.sleep(0.1))}), flush=True)
    hosts.leave(0)


def death(process):
    """One is killed while the other waits for it."""
    hosts.meet()
    if process == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with hosts.failing_alone():
        hosts.meet()
    print(json.dumps({"end": "nobody was missed"}), flush=True)


def failure(process):
    """One fails away from the other, which waits for it."""
    hosts.meet()
    with hosts.failing_alone():
        if process == 0:
            raise ValueError("the disk is full")
        hosts.meet()
    print(json.dumps({"end": "nobody was missed"}), flush=True)


def main():
    coordinator, process, task = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    hosts.join(ConfigDict(dict(coordinator=coordinator, processes=2, process=process)))
    hosts.hear_interrupts()
    {"messages": messages, "kept": kept, "death": death, "failure": failure}[task](jax.process_index())


if __name__ == "__main__":
    main()
