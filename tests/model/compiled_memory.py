"""What XLA says that the learner's update and the rollout's step need, from shapes alone: nothing is run or allocated.

Run by test_plan.py with eight CPU devices, it prints as JSON {mesh: [arguments, all]} in bytes per device.
"""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp

from router_r1_jax.learner import Layout, Learner, PolicyLoss, Row, abstract_state, make_optimizer
from router_r1_jax.mesh import RULES, make_mesh
from router_r1_jax.model import ModelConfig, Prefix, RouterLM, abstract_params, empty_cache, unroll
from router_r1_jax.model.plan import TAG_STATES, UpdateShape
from router_r1_jax.rollout.lanes import empty_caches
from router_r1_jax.rollout.state import Limits, empty_rows
from router_r1_jax.rollout.step import Sampler, work

# Machine code is never run here: LLVM need not try at all. Buffers are assigned before it.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
MESHES = [(1, 8, 1), (2, 2, 2), (1, 1, 8)]
SHARDED = (
    ModelConfig(vocab_size=2048, num_layers=4, width=256, mlp=768, num_heads=8, num_kv_heads=4, head_dim=32),
    UpdateShape(rows=32, micro_batch=16, row_tokens=128, prefix_tokens=64, logit_chunk=32),
)
Shape = jax.ShapeDtypeStruct


def needed(lowered):
    """Bytes of arguments, and of arguments and all that is made of them; results lie in donated arguments."""
    memory = lowered.compile(QUICK_COMPILE).memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes, memory.argument_size_in_bytes + memory.temp_size_in_bytes + new


def compiled_update(config, mesh, shape):
    """(arguments, all) of the learner's own update."""
    abstract = abstract_params(config, mesh)
    optimizer, _ = make_optimizer(
        learning_rate=1e-6, warmup=2, total=9, decay=False, weight_decay=0.0, max_grad_norm=1.0
    )
    loss = PolicyLoss(clip_low=0.2, clip_high=0.2, kl_coef=0.001)
    layout = Layout((shape.row_tokens,), (shape.micro_batch,))
    learner = Learner(config, optimizer, loss, mesh, abstract, layout=layout, chunk=shape.logit_chunk)
    batch = learner.place([0] * shape.prefix_tokens, [Row([0], [0] * shape.row_tokens)] * shape.rows)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        return needed(learner._update.lower(abstract_state(optimizer, abstract, mesh), batch))


def compiled_step(config, shape):
    """(arguments, all) of the step that both drivers of the rollout run, compiled as the engine compiles it."""
    c = config
    limits = Limits(
        slots=shape.slots, lanes=shape.lanes, row_tokens=shape.row_tokens, turn_tokens=shape.turn_tokens,
        episode_tokens=shape.row_tokens, feed_tokens=shape.feed_tokens, chunk=shape.chunk, feed_rows=shape.feed_rows,
        feed_wait=8, exchange_rows=shape.slots, poll_every=8,
    )  # fmt: skip
    stacked = abstract_params(c, make_mesh(1, 1, 1, jax.devices()[:1]))
    params = jax.eval_shape(lambda p: unroll(p, c.num_layers), stacked)
    shared = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], empty_cache(c, 1, shape.prefix_tokens)))
    prefix = Prefix(shared, Shape((), jnp.int32))
    number, key = Shape((), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
    sampler = Sampler(
        Shape((TAG_STATES, c.vocab_size), jnp.uint8), number, number, Shape((), jnp.float32), key, None
    )  # fmt: skip
    caches = jax.eval_shape(lambda: empty_caches(c, limits, shape.row_tokens))
    rows = jax.eval_shape(lambda: empty_rows(limits))
    step = jax.jit(functools.partial(work, RouterLM(c, unrolled=True), limits), donate_argnums=(3, 4))
    return needed(step.lower(params, prefix, sampler, caches, rows))


if __name__ == "__main__":
    config, shape = SHARDED
    print(json.dumps([compiled_update(config, make_mesh(*sizes), shape) for sizes in MESHES]))
