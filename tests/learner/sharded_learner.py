"""Run by test_update.py with eight CPU devices: three updates per mesh, compared with one device; prints JSON."""

import json
import math

import jax
import numpy as np
import optax
from tiny_learner import LOSS, make_config, make_params, make_rows_batch, with_old_policies

from router_r1_jax.learner import Learner, abstract_state, init_state, make_optimizer
from router_r1_jax.mesh import make_mesh
from router_r1_jax.model import LoRA, abstract_params, add_adapters, attention, split_trainable

CONFIG = make_config()
LORA = make_config(lora=LoRA(rank=4, alpha=8.0))
attention.SCORE_ROWS = 1  # each device takes its rows one after the other
SIZES = ((1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2))


def place(params, abstract):
    """NumPy parameters on their mesh."""
    return jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), params, abstract)


def three_updates(config, mesh, start, batches):
    """Parameters after three steps of SGD, the losses on the way, and log-probs of the first batch before them."""
    abstract = abstract_params(config, mesh)
    optimizer = optax.sgd(0.5)
    learner = Learner(config, optimizer, LOSS, mesh, abstract, micro_batch=8, chunk=16)
    state = init_state(optimizer, place(start, abstract), abstract, mesh)
    logps, losses = learner.reference_logprobs(state.params, batches[0]), []
    for batch in batches:
        state, metrics = learner.update(state, batch)
        losses.append(metrics["loss"])
    return jax.device_get(state.params), losses, logps


def apart(mesh, start):
    """Moments of AdamW whose sharding is not their parameter's, in a real state and in an abstract one."""
    abstract = abstract_params(CONFIG, mesh)
    optimizer, _ = make_optimizer(
        learning_rate=1e-3, warmup=2, total=9, decay=False, weight_decay=0.1, max_grad_norm=1.0
    )
    state, sketch = (
        init_state(optimizer, place(start, abstract), abstract, mesh),
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
    one = make_mesh(1, 1, 1, jax.devices()[:1])
    start, lora = make_params(CONFIG), make_params(LORA)
    batches = [with_old_policies(CONFIG, start, make_rows_batch(rows=16, seed=seed)) for seed in range(3)]
    report, truth = {}, None
    for sizes in SIZES:
        mesh = one if sizes == (1, 1, 1) else make_mesh(*sizes)
        params, losses, logps = three_updates(CONFIG, mesh, start, batches)
        adapted, *_ = three_updates(LORA, mesh, lora, batches)
        fresh = jax.device_get(split_trainable(add_adapters(LORA, {}, mesh, seed=0))[0])
        truth = truth or (params, logps, adapted, fresh)
        moments, sketch = apart(mesh, start)
        report[",".join(map(str, sizes))] = {
            "losses": losses,
            "worst_parameter": worst(params, truth[0]),
            "worst_logprob": worst(logps, truth[1]),
            "moved": worst(params, start),
            "worst_adapter": worst(adapted, truth[2]),
            "adapters_moved": worst(adapted, lora),
            "fresh_adapters": worst(fresh, truth[3]),
            "moments_apart": moments,
            "abstract_apart": sketch,
            "stored": stored_share(mesh),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
