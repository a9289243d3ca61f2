"""Memory plan: the bytes of a training run on its busiest device, computed without a device and without memory.

    python -m router_r1_jax.plan --config=configs/qwen25_3b_grpo.py --config.mesh.fsdp=8 --devices=8 --hbm_gb=80

Exit status: 0 if the run fits, 2 if it does not, 1 after an error that names its fix. The busiest device also runs the
rollout: beside its part of the training state it holds a whole copy of the weights (its share, with rollout.tensor).
The plan compares three moments:

- *update*: gradients, the activations that the backward pass keeps (`model.remat`), and the working memory of one block
  or of the head; with rollout.one_step_off_policy also the memory of the rollout;
- *rollout*: the KV caches of all slots, and the working memory of a step;
- *weight sync*: new weights on their way to the rollout, gathered on its device and then divided into layers.

Parameters, optimizer, caches and batch are exact. Activations are closed forms: the arrays that JAX keeps of a block
are counted, and the factors of the working memory were fitted to XLA's buffers for small float32 models on a CPU
(`tests/test_plan.py` holds the sum to 15 % there). The closed forms describe attention "einsum". Attention "xla" needs
more, because it forms all scores of a block, and keeps them if `model.remat` is none. LoRA of some projections only
needs about a quarter less, because nothing is kept for the gradients of the other projections.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from router_r1_jax import model as lm
from router_r1_jax.config import ConfigError
from router_r1_jax.distributed.mesh import abstract_mesh, row_shares
from router_r1_jax.launcher import Flag, launch
from router_r1_jax.learner import Layout
from router_r1_jax.learner.micro_batches import Rows
from router_r1_jax.model import ModelConfig, Params
from router_r1_jax.model.attention import query_blocks, rows_at_once
from router_r1_jax.rollout import StaticShapes, static_shapes
from router_r1_jax.rollout.replica import cache_lengths
from router_r1_jax.rollout.stop_tags import STOP_TAGS, build_automaton
from router_r1_jax.setup.model import random_model, with_settings
from router_r1_jax.training.policy_update import learner_layout, rows_per_update

GB = 10**9  # a device of "16 GB" has 16 GiB: the 7 % between them are for the runtime itself


def plan(config: Any, model: ModelConfig, mesh: Mesh | AbstractMesh, prefix_tokens: int) -> dict[str, dict[str, int]]:
    """Bytes on the busiest device as {moment: {part: bytes}}; the moments are "update", "rollout" and "weight sync".

    Args:
      config: the run's configuration. Every row is planned at its longest.
      model: the run's model (`planned_model`).
      mesh: the run's mesh, which may be abstract.
      prefix_tokens: tokens that all prompts share.
    """
    layout = learner_layout(config, mesh)
    shapes = static_shapes(config.rollout, config.prompt.question_tokens)
    prefix, tensor = len(lm.pad_prefix(range(prefix_tokens))), config.rollout.tensor
    params = lm.abstract_params(model, mesh)
    trainable, _ = lm.split_trainable(params)
    stored, trained, float32 = stored_bytes(params), stored_bytes(trainable), stored_bytes(trainable, at_least=4)
    weights = stored_bytes(lm.abstract_params(model.base, abstract_mesh(1, 1, tensor, tensor)))
    has_reference = config.learner.kl != "none" and not model.lora  # the base of LoRA is the reference
    resident = {
        "parameters": stored,
        # AdamW's two moments, float32 copies of half-precision parameters, and three counters.
        "optimizer": 2 * float32 + (float32 if trained < float32 else 0) + 3 * 4,
        "reference parameters (KL)": stored if has_reference else 0,
        "rollout's copy of the weights": weights,
    }
    update = {
        # The float32 sum over micro-batches, those of one micro-batch, and those that come back through the prefix.
        "gradients": float32 + 2 * trained,
        "activations kept (remat)": kept_bytes(model, mesh, layout, prefix),
        "activations at work": update_workspace_bytes(model, mesh, layout, prefix, config.learner.logit_chunk),
        "batch": batch_bytes(mesh, layout, prefix, rows_per_update(config)),
    }
    sampling = {
        "KV caches": cache_bytes(model, shapes, prefix, tensor),
        "sampling at work": step_workspace_bytes(model, shapes, prefix),
    }
    return {
        "update": resident | update | (sampling if config.rollout.one_step_off_policy else {}),
        "rollout": resident | sampling,
        # The rollout drops its old copy first. A single device reads the learner's parameters in place.
        "weight sync": resident | {"weights on their way": 0 if mesh.size == 1 else weights},
    }


def stored_bytes(abstract: Params, *, at_least: int = 0) -> int:
    """Bytes of a parameter tree on one device of its mesh; a value takes `at_least` bytes or more."""
    leaves = jax.tree.leaves(abstract)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * max(x.dtype.itemsize, at_least) for x in leaves)


def batch_bytes(mesh: Mesh | AbstractMesh, layout: Layout, prefix: int, rows: int) -> int:
    """Bytes per device of an update's batch: fields of 4 bytes per token, the prefix, and counts.

    Every bucket has room for all rows, because any row may be short.
    """
    per_token = 4 * len(dataclasses.fields(Rows))
    tokens = sum(-(-rows // size) * size * (length + 1) for length, size in zip(*layout, strict=True))
    return per_token * tokens // row_shares(mesh) + 4 * (prefix + 1 + len(layout.lengths))


def kept_bytes(model: ModelConfig, mesh: Mesh | AbstractMesh, layout: Layout, prefix: int) -> int:
    """Bytes per device that the backward pass needs of a micro-batch's blocks and of the prefix's, and prefix K/V.

    The prefix is one row on every device. Its keys and values exist three times: themselves, the sum of their
    gradients, and their gradients from one micro-batch.
    """
    device, T = _PerDevice.of(model, mesh), layout.lengths[-1]
    tokens = layout.rows[-1] // row_shares(mesh) * T + prefix
    prefix_kv = 3 * 2 * prefix * device.kv_heads * model.head_dim * _itemsize(model)
    return model.num_layers * (tokens * _kept_per_token(model, device) + prefix_kv)


def _kept_per_token(model: ModelConfig, device: "_PerDevice") -> int:
    """Bytes that JAX keeps of one block for a token; norms and the sums of attention weights are float32."""
    e, q, kv = _itemsize(model), device.heads * model.head_dim, device.kv_heads * model.head_dim
    if model.remat == "full":
        return e * model.width
    if model.remat == "dots":
        return e * (2 * model.width + 2 * q + 2 * kv + 2 * device.mlp) + 4 * device.heads
    norms = (4 * e + 2 * 4) * model.width + ((e + 4) * (q + kv) if model.qk_norm else 0)
    return norms + 4 * device.heads + e * (2 * (q + kv) + 6 * device.mlp)


def update_workspace_bytes(
    model: ModelConfig, mesh: Mesh | AbstractMesh, layout: Layout, prefix: int, logit_chunk: int
) -> int:
    """Bytes per device of the widest moment (one block's backward pass, or the head's), and of gathered weights.

    Per token of a micro-batch a block holds 6 arrays of the model's width and 6 of the feed-forward's, of which 2 are
    read in place if they were kept; for one block of queries it holds 3.5 arrays of scores. The head holds two chunks
    of logits. LoRA adds its products: 3 more arrays of the feed-forward's width if they are recomputed.
    """
    device, e, T = _PerDevice.of(model, mesh), _itemsize(model), layout.lengths[-1]
    rows = layout.rows[-1] // row_shares(mesh)
    feed_forward = 4 if model.remat != "full" else 9 if model.lora else 6
    queries = query_blocks(T)[0][1]
    together = rows_at_once(rows, queries * model.num_heads // model.num_kv_heads)
    scores = 4 * together * device.heads * queries * (T + prefix)
    block = 3.5 * scores + rows * e * T * (feed_forward * device.mlp + 6 * model.width)
    head = rows * (2 * 4 * logit_chunk * device.vocab + 2 * e * T * model.width)
    # Weights that fsdp divides and a pass needs whole: the embedding, a layer and its gradient.
    layer = 2 * (device.heads + device.kv_heads) * model.head_dim + 3 * device.mlp
    gathered = 0 if mesh.shape["fsdp"] == 1 else (device.vocab + 2 * layer) * model.width * e
    return int(max(block, head)) + gathered


def cache_bytes(model: ModelConfig, shapes: StaticShapes, prefix: int, tensor: int) -> int:
    """Bytes of the KV caches of all slots at their longest, and of the shared prefix, on a device of the rollout."""
    positions = shapes.num_caches * cache_lengths(shapes.row_tokens)[-1] + prefix
    kv_heads = _PerDevice.of(model, abstract_mesh(1, 1, tensor, tensor)).kv_heads
    return 2 * model.num_layers * positions * kv_heads * model.head_dim * _itemsize(model)


def step_workspace_bytes(model: ModelConfig, shapes: StaticShapes, prefix: int) -> int:
    """Bytes of a rollout step beside weights and caches: row state, stop-tag table, and the wider of its two halves.

    The halves are decode and chunked prefill.
    """
    e, keys = _itemsize(model), shapes.row_tokens + prefix
    tag_states = len(build_automaton(STOP_TAGS, []))
    state = 4 * shapes.slots * (shapes.prefill_tokens + 2 * shapes.turn_tokens) + tag_states * model.vocab_size
    decode = shapes.decode_batch * max(8 * model.num_heads * keys, 2 * 4 * model.vocab_size)
    row_cache = 2 * shapes.row_tokens * model.num_kv_heads * model.head_dim * e  # one layer's, copied for a prefill
    per_token = 3 * model.num_heads * keys + e * (2 * model.mlp + model.width)
    prefill = shapes.prefill_rows * (shapes.prefill_chunk * per_token + row_cache)
    return state + max(decode, prefill)


class _PerDevice(NamedTuple):
    """The sizes that one device of a `tensor` group computes; a size that does not divide is computed whole."""

    heads: int
    kv_heads: int
    mlp: int
    vocab: int

    @classmethod
    def of(cls, model: ModelConfig, mesh: Mesh | AbstractMesh) -> "_PerDevice":
        tensor = mesh.shape["tensor"]
        whole = model.num_heads, model.num_kv_heads, model.mlp, model.vocab_size
        return cls(*(n if n % tensor else n // tensor for n in whole))


def _itemsize(model: ModelConfig) -> int:
    return jnp.dtype(model.dtype).itemsize


def planned_model(config: Any, vocab_size: int) -> ModelConfig:
    """The ModelConfig of `config.model`, without network: of a folder, of a hub name with a preset, or of `model.arch`.

    `vocab_size` is the size of the tokenizer's vocabulary, used if `model.arch` names none. Raises ConfigError or
    WeightsError for any other source, or a wrong setting.
    """
    m, folder = config.model, Path(config.model.source).expanduser()
    if not m.source:
        model = random_model(config, 1 if "vocab_size" in m.arch else vocab_size)
    elif folder.is_dir():
        model = lm.load_hf_config(folder, m.dtype)
    else:
        try:
            model = dataclasses.replace(lm.preset(m.source), dtype=m.dtype)
        except ValueError as error:
            raise ConfigError(f"model.source: {error}; download the checkpoint and name its folder") from error
    return with_settings(model, m)


def table(moments: dict[str, dict[str, int]], hbm_gb: float) -> str:
    """The plan as text: a line per part, a column per moment, GB of 10**9 bytes, and the verdict."""
    parts = list(dict.fromkeys(part for moment in moments.values() for part in moment))
    totals = {name: sum(moment.values()) for name, moment in moments.items()}
    width = max(map(len, parts)) + 2
    lines = ["GB (10^9 bytes)".ljust(width) + "".join(f"{name:>13}" for name in moments)]
    for part in parts:
        cells = (f"{moment[part] / GB:13.3f}" if part in moment else " " * 13 for moment in moments.values())
        lines.append(part.ljust(width) + "".join(cells).rstrip())
    lines.append("total".ljust(width) + "".join(f"{total / GB:13.3f}" for total in totals.values()))
    widest = max(totals, key=totals.get)
    verdict = "fits in" if totals[widest] <= hbm_gb * GB else "does not fit in"
    lines += ["", f"{verdict} {hbm_gb:g} GB: the most is {totals[widest] / GB:.3f} GB, in the {widest}"]
    return "\n".join(lines)


def main(config: Any, devices: int, hbm_gb: float, prefix_tokens: int, vocab_size: int) -> int:
    """Print the memory plan of a configuration: does it fit? Returns the exit status. Raises ConfigError."""
    jax.config.update("jax_platforms", "cpu")  # a GPU may be busy with a run: take nothing from it
    mesh = abstract_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    model = planned_model(config, vocab_size)
    moments = plan(config, model, mesh, prefix_tokens)
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    abstract = lm.abstract_params(model, mesh)
    count, trained = lm.count_params(abstract), lm.count_params(lm.split_trainable(abstract)[0])
    adapters = f" ({trained / 1e6:,.1f} M of them trained)" if model.lora else ""
    print(f"{count / 1e6:,.1f} M parameters{adapters}, {model.dtype}, remat {model.remat}; {devices} devices: {sizes}")
    layout = learner_layout(config, mesh)
    shapes = static_shapes(config.rollout, config.prompt.question_tokens)
    print(f"{rows_per_update(config)} rows per update in micro-batches: {layout}\n{shapes}\n")
    print(f"The busiest device, the one that also runs the rollout:\n\n{table(moments, hbm_gb)}")
    return 0 if max(sum(moment.values()) for moment in moments.values()) <= hbm_gb * GB else 2


if __name__ == "__main__":
    launch(
        main,
        {
            "devices": Flag(1, "devices of the planned machine; none of them is needed here", least=1),
            "hbm_gb": Flag(16.0, "memory of one device in GB", least=0),
            "prefix_tokens": Flag(1024, "tokens that all prompts share: instructions and model cards", least=0),
            "vocab_size": Flag(2048, "size of the tokenizer's vocabulary, used if model.arch names none", least=1),
        },
        workdir=False,
    )
