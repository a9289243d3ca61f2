"""What XLA says that the learner's update and the rollout's step need, from shapes alone: nothing is run or allocated.

Run by test_plan.py with eight CPU devices, it prints as JSON {mesh: [arguments, all]} in bytes per device.
"""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp

from router_r1_jax.config import base_config
from router_r1_jax.distributed.mesh import RULES, make_mesh
from router_r1_jax.learner import Learner, PolicyLoss, Row, abstract_state, make_optimizer
from router_r1_jax.model import ModelConfig, Prefix, RouterLM, abstract_params, empty_cache, unroll
from router_r1_jax.rollout import static_shapes
from router_r1_jax.rollout.decode_batch import empty_caches
from router_r1_jax.rollout.row_state import empty_rows
from router_r1_jax.rollout.step import Sampler, step
from router_r1_jax.rollout.stop_tags import STOP_TAGS, build_automaton
from router_r1_jax.training.policy_update import learner_layout, rows_per_update

# Machine code is never run here: LLVM need not try at all. Buffers are assigned before it.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
MESHES = [(1, 8, 1), (2, 2, 2), (1, 1, 8)]
SHARDED = ModelConfig(vocab_size=2048, num_layers=4, width=256, mlp=768, num_heads=8, num_kv_heads=4, head_dim=32)
PREFIX = 64
Shape = jax.ShapeDtypeStruct


def make_config(*, rows, micro_batch, row_tokens, logit_chunk, shares=1):
    """A configuration of updates with one bucket and of so many rows; `shares` devices split a micro-batch."""
    config = base_config()
    config.prompt.question_tokens = 64
    config.rollout.prompts_per_step, config.rollout.num_generations = rows // 2, 2
    config.rollout.max_row_tokens = row_tokens + 1  # the last token is not read
    config.learner.micro_tokens = micro_batch // shares * row_tokens
    config.learner.length_buckets, config.learner.logit_chunk = 1, logit_chunk
    return config


def sharded_config(sizes):
    """Updates of 32 rows in micro-batches of 16 on a mesh of these sizes."""
    data, fsdp, _ = sizes
    return make_config(rows=32, micro_batch=16, row_tokens=128, logit_chunk=32, shares=data * fsdp)


def needed(lowered):
    """Bytes of arguments, and of arguments and all that is made of them; results lie in donated arguments."""
    memory = lowered.compile(QUICK_COMPILE).memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes, memory.argument_size_in_bytes + memory.temp_size_in_bytes + new


def compiled_update(config, model, mesh, prefix_tokens):
    """(arguments, all) of the learner's own update."""
    abstract = abstract_params(model, mesh)
    optimizer, _ = make_optimizer(
        learning_rate=1e-6, warmup=2, total=9, decay=False, weight_decay=0.0, max_grad_norm=1.0
    )
    loss = PolicyLoss(clip_low=0.2, clip_high=0.2, kl_coef=0.001)
    layout = learner_layout(config, mesh)
    learner = Learner(model, optimizer, loss, mesh, abstract, layout=layout, chunk=config.learner.logit_chunk)
    batch = learner.place([0] * prefix_tokens, [Row([0], [0] * layout.lengths[-1])] * rows_per_update(config))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        return needed(learner._update.lower(abstract_state(optimizer, abstract, mesh), batch))


def compiled_step(config, model, prefix_tokens):
    """(arguments, all) of the step that both drivers of the rollout run, compiled as the engine compiles it."""
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    shapes = static_shapes(config.rollout, config.prompt.question_tokens)
    params = jax.eval_shape(lambda p: unroll(p, model.num_layers), abstract_params(model, mesh))
    shared = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], empty_cache(model, 1, prefix_tokens)))
    number, key = Shape((), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
    next_state = Shape((len(build_automaton(STOP_TAGS, [])), model.vocab_size), jnp.uint8)
    sampler = Sampler(params, Prefix(shared, number), next_state, number, Shape((), jnp.float32), key, None)
    caches = jax.eval_shape(lambda: empty_caches(model, shapes, shapes.row_tokens))
    rows = jax.eval_shape(lambda: empty_rows(shapes))
    compiled = jax.jit(functools.partial(step, RouterLM(model, unrolled=True), shapes), donate_argnums=(1, 2))
    return needed(compiled.lower(sampler, caches, rows))


if __name__ == "__main__":
    print(json.dumps([compiled_update(sharded_config(m), SHARDED, make_mesh(*m), PREFIX) for m in MESHES]))
