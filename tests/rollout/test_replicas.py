"""Several replicas, tensor-parallel ones, and two processes: the same episodes as one loop on one device."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_router
from naive_rollout import NaiveEpisode
from tiny_router import SHAPES, at_once, make_engine, make_prompts, sample

from router_r1_jax.rollout.episode import Episode, Prompt
from router_r1_jax.rollout.work_queue import WorkQueue

SCRIPT = Path(__file__).parent / "replicas.py"
# These programs run for milliseconds and compile for seconds: LLVM need not try hard.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def started(devices, *args):
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, SCRIPT, *args], env=environment, **pipes)


def finished(process):
    out, err = process.communicate(timeout=1200)  # many programs to compile
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def few():
    return finished(started(4, "1x1", "2x1", "1x2", "1x2:2"))


def check_same(report, size, one):
    """Bit for bit as `one`."""
    assert report[size]["episodes"] == report[one]["episodes"]
    assert report[size]["calls"] == report[one]["calls"] > 20


def test_two_replicas_sample_what_one_samples(few):
    check_same(few, "2x1", "1x1")
    assert few["2x1"]["replicas that worked"] == [0, 1]


@pytest.mark.parametrize("size", ["1x2", "1x2:2"], ids=["all rows in the decode batch", "a decode batch of two"])
def test_a_tensor_parallel_replica_is_the_naive_rollout(few, size):
    """Its sums are formed in another order, so it is compared as another shape is: by log-probs, to 1e-4."""
    params = tiny_router.make_params()
    for prompt in make_prompts(24)[:8]:
        tokens, logps, sampled, stop = few[size]["episodes"][str(prompt.episode)]
        episode = Episode(prompt.episode, prompt.tokens, tokens=tokens, sampled=sampled, stop=stop)
        naive = NaiveEpisode(params, episode, prefix_length=9)
        assert (naive.tokens, naive.sampled, naive.stop) == (tokens, sampled, stop)
        np.testing.assert_allclose([float.fromhex(x) for x in logps], naive.logps, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_many_replicas_sample_what_one_samples():
    report = finished(started(8, "1x1", "4x1", "8x1", "1x2", "2x2", "4x2"))
    for size in ("4x1", "8x1"):
        check_same(report, size, "1x1")
    for size in ("2x2", "4x2"):
        check_same(report, size, "1x2")


@pytest.mark.slow
def test_two_processes_sample_what_one_samples(few):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [started(2, f"--process={i}", f"--port={port}") for i in range(2)]
    reports = [finished(process) for process in both]
    assert [report["devices"] for report in reports] == [4, 4]
    first, second = (report["episodes"] for report in reports)
    assert len(first) == len(second) == 12
    assert first | second == few["1x1"]["episodes"]


def test_a_failing_replica_ends_the_run_for_all():
    engine = make_engine("host", devices=[jax.devices()[0]] * 2)
    calls = threading.Semaphore(3)

    def respond(route, *, episode, call):
        if not calls.acquire(blocking=False):
            raise RuntimeError("the pool is down")
        return at_once()(route, episode=episode, call=call)

    with pytest.raises(RuntimeError, match="the pool is down"):
        sample(engine, make_prompts(24), respond)
    assert [t for t in threading.enumerate() if t.name == "rollout" and t.is_alive()] == []
    episodes, stats = sample(engine, make_prompts(24), at_once())
    assert len(episodes) == 24 and {s.row // SHAPES.slots for s in stats.spans} == {0, 1}


# The queue that replicas share.


def taken(work_queue, occupied):
    prompt = work_queue.take(occupied)
    return None if prompt is None else prompt.episode


def test_a_slow_replica_takes_less():
    """Two replicas, of which one takes a question and never finishes it: the other does all the rest."""
    work_queue = WorkQueue([Prompt(i, (1, 2)) for i in range(20)], replicas=2)
    assert taken(work_queue, 0) == 0  # the slow one's
    held = []
    for _ in range(200):
        while (episode := taken(work_queue, len(held))) is not None:
            held.append(episode)
        assert len(held) <= 10  # never more than its share of what is left
        if held:
            work_queue.finish(Episode(held.pop(0), ()))
    assert work_queue.empty and sorted(e.id for e in work_queue.finished) == list(range(1, 20))


def test_questions_are_shared_out_and_none_is_lost_between_threads():
    work_queue = WorkQueue([Prompt(i, (1, 2)) for i in range(500)], replicas=4)
    taken_by = [[] for _ in range(4)]

    def work(mine):
        held = []
        while not (work_queue.empty and not held):
            if (episode := taken(work_queue, len(held))) is not None:
                held.append(episode)
                mine.append(episode)
            elif held:
                work_queue.finish(Episode(held.pop(), ()))

    threads = [threading.Thread(target=work, args=[mine]) for mine in taken_by]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(sum(taken_by, [])) == sorted(e.id for e in work_queue.finished) == list(range(500))
