"""Run by test_sharding.py in a process of its own with 8 fake devices: one model on several meshes.

    python sharded_model.py CHECKPOINT OUT

writes to OUT/results.json, for each mesh, how far logits and gradients are from those of one device, and whether the
checkpoint came to the mesh unchanged and as split as it should be; OUT/export_<mesh> is the model saved from there.
"""

import json
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from router_r1_jax.distributed.mesh import RULES, make_mesh, rows_sharding
from router_r1_jax.model import RouterLM, abstract_params, attention, load_hf, save_hf

MESHES = [(8, 1, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2)]
ROWS, LENGTH = 16, 12
attention.SCORE_ROWS = 1  # each device takes its rows one after the other
attention.QUERY_BLOCK = 5  # and of each three blocks of queries


def logits_and_gradients(config, params, tokens, mesh):
    """Logits [B, T, V] and the gradients of a mean over all tokens, as the learner would have them computed."""

    def loss(params):
        logits = RouterLM(config).apply({"params": params}, tokens)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1).mean(), logits

    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return np.asarray(logits), jax.tree.map(np.asarray, gradients)


def error(a, b):
    """max|a - b| / max|b|, the worst over a tree."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max() / np.abs(y).max()), a, b)))


def main(checkpoint, out):
    assert jax.device_count() == 8, jax.devices()
    single = make_mesh(1, 1, 1, jax.devices()[:1])
    config, params = load_hf(checkpoint)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(ROWS, LENGTH), dtype=np.int32)
    logits, gradients = logits_and_gradients(config, params, tokens, single)
    results = {}
    for sizes in MESHES:
        mesh = make_mesh(*sizes)
        _, split = load_hf(checkpoint, mesh=mesh)
        placed = jax.tree.map(lambda x, y: x.sharding == y.sharding, split, abstract_params(config, mesh))
        same = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), split, params)
        rows = jax.device_put(tokens, rows_sharding(mesh))
        mesh_logits, mesh_gradients = logits_and_gradients(config, split, rows, mesh)
        name = "x".join(map(str, sizes))
        save_hf(Path(out) / f"export_{name}", config, split)
        results[name] = {
            "logits": error(mesh_logits, logits),
            "gradients": error(mesh_gradients, gradients),
            "placed": all(jax.tree.leaves(placed)),
            "same": all(jax.tree.leaves(same)),
            "embed_block": split["embed"].addressable_shards[0].data.shape,
            "q_block": split["layers"]["attention"]["q"]["kernel"].addressable_shards[0].data.shape,
        }
    (Path(out) / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
