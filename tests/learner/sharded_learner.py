"""Run by test_update.py with eight CPU devices: three updates per mesh, compared with one device; prints JSON.

sharded_learner.py                          all devices in one process
sharded_learner.py --process=I --port=PORT  one of two processes, with half of them each
"""

import argparse
import json
import math

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from tiny_learner import LOSS, make_config, make_params, make_rows, with_old_policies

from router_r1_jax.distributed import multihost
from router_r1_jax.distributed.mesh import make_mesh, place
from router_r1_jax.learner import Learner, abstract_state, init_state, make_layout, make_optimizer
from router_r1_jax.model import LoRA, abstract_params, add_adapters, attention, split_trainable

CONFIG = make_config()
LORA = make_config(lora=LoRA(rank=4, alpha=8.0))
attention.SCORE_ROWS = 1  # each device takes its rows one after the other
RATE = 0.1
SIZES = ((1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2))


def fetch(tree):
    """All of it as NumPy arrays, also where other processes hold parts."""

    def whole(x):
        return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)


def on_mesh(params, abstract):
    """NumPy parameters where they belong."""
    return place(params, jax.tree.map(lambda a: a.sharding, abstract))


def three_updates(config, mesh, start, batches):
    """Parameters after one and after three steps of SGD, the losses on the way, and log-probs of the first batch."""
    abstract = abstract_params(config, mesh)
    optimizer = optax.sgd(RATE)
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    layout = make_layout(33, buckets=1, tokens=8 * 32 // shares, rows=16, shares=shares)
    learner = Learner(config, optimizer, LOSS, mesh, abstract, layout=layout, chunk=16)
    state = init_state(optimizer, on_mesh(start, abstract), abstract, mesh)
    logps = [scores.logps for scores in learner.score(state.params, *batches[0], base=True)]
    losses, first = [], None
    for batch in batches:
        state, metrics = learner.update(state, *batch)
        losses.append(metrics["loss"])
        first = first or fetch(state.params)
    return first, fetch(state.params), losses, logps


def apart(mesh, start):
    """Moments of AdamW whose sharding is not their parameter's, in a real state and in an abstract one."""
    abstract = abstract_params(CONFIG, mesh)
    optimizer, _ = make_optimizer(
        learning_rate=1e-3, warmup=2, total=9, decay=False, weight_decay=0.1, max_grad_norm=1.0
    )
    state, sketch = (
        init_state(optimizer, on_mesh(start, abstract), abstract, mesh),
        abstract_state(optimizer, abstract, mesh),
    )

    def differing(state):
        found = []
        for name in ("mu", "nu"):
            moments = optax.tree_utils.tree_get(state.opt_state, name)
            for (path, m), p in zip(
                jax.tree_util.tree_leaves_with_path(moments), jax.tree.leaves(abstract), strict=True
            ):
                if not m.sharding.is_equivalent_to(p.sharding, p.ndim):
                    found.append(name + jax.tree_util.keystr(path))
        return found

    wrong = [
        jax.tree_util.keystr(path)
        for (path, x), s in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(sketch), strict=True)
        if (x.shape, x.dtype) != (s.shape, s.dtype) or not x.sharding.is_equivalent_to(s.sharding, x.ndim)
    ]
    return differing(state) + differing(sketch), wrong


def stored_share(mesh):
    """Part of all parameters that one device holds."""
    leaves = jax.tree.leaves(abstract_params(CONFIG, mesh))
    return sum(math.prod(x.sharding.shard_shape(x.shape)) for x in leaves) / sum(x.size for x in leaves)


def worst(a, b):
    """Largest difference of two trees."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.max(np.abs(x - y))), a, b)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--process", type=int)
    parser.add_argument("--port")
    args = parser.parse_args()
    if args.process is not None:
        jax.distributed.initialize(f"127.0.0.1:{args.port}", num_processes=2, process_id=args.process)
    one = make_mesh(1, 1, 1, jax.local_devices()[:1])
    start, lora = make_params(CONFIG), make_params(LORA)
    batches = []
    for seed in range(3):
        prefix, rows = make_rows(rows=16, seed=seed)
        batches.append((prefix, with_old_policies(CONFIG, start, prefix, rows)))
    report, truth, lora_truth = {}, None, None
    for sizes in SIZES:
        multihost.barrier()  # what a process computes for itself may take one longer than a collective waits
        mesh = one if sizes == (1, 1, 1) else make_mesh(*sizes)
        first, params, losses, logps = three_updates(CONFIG, mesh, start, batches)
        truth = truth or (params, logps, first)
        found = report[",".join(map(str, sizes))] = {
            "losses": losses,
            "processes": len({device.process_index for device in mesh.devices.flat}),
            "worst_parameter": worst(params, truth[0]),
            "worst_gradient": worst(first, truth[2]) / RATE,
            "largest_gradient": worst(first, start) / RATE,
            "worst_logprob": worst(logps, truth[1]),
            "moved": worst(params, start),
            "stored": stored_share(mesh),
        }
        if args.process is None:
            adapted = three_updates(LORA, mesh, lora, batches)[1]
            fresh = fetch(split_trainable(add_adapters(LORA, {}, mesh, seed=0))[0])
            lora_truth = lora_truth or (adapted, fresh)
            found["worst_adapter"], found["adapters_moved"] = worst(adapted, lora_truth[0]), worst(adapted, lora)
            found["fresh_adapters"] = worst(fresh, lora_truth[1])
            found["moments_apart"], found["abstract_apart"] = apart(mesh, start)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
