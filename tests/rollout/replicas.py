"""Run by test_replicas.py with fake CPU devices: engines of several replicas against one; prints JSON.

replicas.py REPLICASxTENSOR[:DECODE_BATCH] ...  digests and counts of each engine's episodes
replicas.py --process=I --port=PORT      one of two processes, with its half of the prompts
"""

import argparse
import json
import threading
from concurrent.futures import Future

import jax
from tiny_router import SHAPES, Latecomers, Reply, make_engine, make_prompts, reply_text, sample

from router_r1_jax.rollout import common_prefix

PROMPTS = make_prompts(24)
DELAYS = (0.0, 0.01, 0.003, 0.0, 0.02)


def described(episodes):
    """All that must not depend on where an episode was sampled, with every bit of its log-probs."""
    return {str(e.id): [e.tokens, [x.hex() for x in e.logps], e.sampled, e.stop] for e in episodes}


class HeldBack:
    """A pool that replies to nobody before so many calls wait, and then to all at once."""

    def __init__(self, calls):
        self._missing, self._waiting, self._lock = calls, [], threading.Lock()

    def __call__(self, route, *, episode, call):
        future = Future()
        with self._lock:
            self._missing -= 1
            self._waiting.append((future, Reply(reply_text(route, episode, call))))
            if self._missing <= 0:
                for waiting, reply in self._waiting:
                    waiting.set_result(reply)
                self._waiting.clear()
        return future


def run(replicas, tensor, prompts=PROMPTS, devices=None, decode_batch=SHAPES.decode_batch, **kwargs):
    """Episodes and stats. With prompts enough, more calls wait at a time than all replicas but one have rows.

    Not for tensor-parallel ones: fake devices share few threads, and one that waits can starve another's all-reduce.
    """
    devices = (devices or jax.devices())[: replicas * tensor]
    engine = make_engine("jit", devices=devices, tensor=tensor, decode_batch=decode_batch)
    together = (replicas - 1) * SHAPES.slots + 1
    pool = HeldBack(together) if tensor == 1 and together < len(prompts) / 2 else Latecomers(DELAYS)
    return sample(engine, prompts, pool, **kwargs)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("sizes", nargs="*")
    parser.add_argument("--process", type=int)
    parser.add_argument("--port")
    args = parser.parse_args()
    if args.process is not None:
        jax.distributed.initialize(f"127.0.0.1:{args.port}", num_processes=2, process_id=args.process)
        shared = common_prefix([p.tokens for p in PROMPTS])
        mine = PROMPTS[args.process :: 2]
        episodes, _ = run(2, 1, mine, jax.local_devices(), prefix_tokens=shared)
        print(json.dumps({"episodes": described(episodes), "devices": jax.device_count()}))
        jax.distributed.shutdown()  # waits for the other process, which could not do without this one
        return
    report = {}
    for size in args.sizes:
        size_of_mesh, _, decode_batch = size.partition(":")
        replicas, tensor = map(int, size_of_mesh.split("x"))
        episodes, stats = run(replicas, tensor, decode_batch=int(decode_batch or SHAPES.decode_batch))
        rows = {span.row // SHAPES.slots for span in stats.spans}
        report[size] = {
            "episodes": described(episodes),
            "replicas that worked": sorted(rows),
            "calls": stats.calls,
            "decoded": stats.decoded_tokens,
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
