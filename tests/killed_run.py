"""Run by test_restart.py: forks of one process, each the training main, killed at a moment of its own; prints statuses.

killed_run.py '[[MOMENT, COUNT, STDERR, [main's arguments]], ...]'

A fork kills itself with SIGKILL at the COUNT-th time that its moment comes; "" never comes. Imports are made once.
"""

import gc
import json
import os
import re
import signal
import sys

from router_r1_jax import launcher, train
from router_r1_jax.learner import Learner
from router_r1_jax.pool.call_cache import CallCache
from router_r1_jax.pool.ledger import Ledger
from router_r1_jax.rollout.host_callback import HostCallback
from router_r1_jax.router import Router
from router_r1_jax.storage.json_lines import JsonLines


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Countdown:
    """True at the count-th call that asks."""

    def __init__(self, count):
        self.left = count

    def __call__(self):
        self.left -= 1
        return self.left == 0


def around(owner, name, *, before=lambda *args: None, after=lambda *args: None):
    """Call `before` and `after` with the arguments of each call of the method."""
    method = getattr(owner, name)

    def wrapped(self, *args, **kwargs):
        before(self, *args)
        result = method(self, *args, **kwargs)
        after(self, *args)
        return result

    setattr(owner, name, wrapped)


def torn(now, file_of, encode):
    """Before a write: half of the line reaches the file, then the process is gone."""

    def before(self, content):
        if now():
            data = encode(content)
            os.write(file_of(self).fileno(), data[: len(data) // 2])
            die()

    return before


def on_file_event(event, pattern, now):
    """At a system call on a file: Python tells its audit hooks before it makes one."""

    def hook(name, args):
        if name == event and re.search(pattern, " ".join(map(str, args))) and now():
            die()

    sys.addaudithook(hook)


def arm(moment, count):
    """Install what kills this process."""
    now = Countdown(count)

    def if_now(*_):
        if now():
            die()

    encoded = lambda content: json.dumps(content).encode()  # noqa: E731
    moments = {
        "": lambda: None,
        "a ledger line is half written": lambda: around(
            Ledger, "_write", before=torn(now, lambda self: self._file, encoded)
        ),
        "a line of metrics or episodes is half written": lambda: around(
            JsonLines, "write", before=torn(now, lambda self: self._file, encoded)
        ),
        "a reply is on the call cache but not in the ledger": lambda: around(CallCache, "keep", after=if_now),
        "a call has looked at the call_cache": lambda: around(CallCache, "find", after=if_now),
        "the rollout meets the host": lambda: around(HostCallback, "__call__", before=if_now),
        "the rollout has ended": lambda: around(Router, "answer", after=if_now),
        "an update was made, nobody has heard of it": lambda: around(Learner, "update", after=if_now),
        "new weights are on their way": lambda: around(Router, "sync_weights", before=if_now),
        "a checkpoint's files are made": lambda: on_file_event("os.mkdir", r"checkpoints/.*tmp", now),
        "a checkpoint's files are written": lambda: on_file_event("open", r"checkpoints/.*tmp", now),
        "a checkpoint or a part of it gets its name": lambda: on_file_event("os.rename", r"checkpoints/", now),
        "a file is replaced": lambda: on_file_event("os.rename", r"\.new ", now),
    }
    moments[moment]()


def main():
    gc.freeze()  # or each fork would copy all memory when it collects garbage at its end
    for moment, count, stderr, argv in json.loads(sys.argv[1]):
        if os.fork() == 0:
            os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
            os.dup2(2, 1)
            arm(moment, count)
            sys.argv = argv
            launcher.launch(train.main)
            sys.exit(0)
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)


if __name__ == "__main__":
    main()
