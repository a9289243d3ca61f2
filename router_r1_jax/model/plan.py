"""Does a configuration fit? The bytes of a training run on its busiest device, without a device and without memory.

    python -m router_r1_jax.model.plan --config=configs/qwen25_3b_grpo.py --config.mesh.fsdp=8 --devices=8 --hbm_gb=80

Exit status: 0 it fits, 2 it does not, 1 an error that names its fix. A device also runs the rollout: it keeps a whole
copy of the weights (its share, with rollout.tensor) beside its part of the training state. Three moments are compared:

- *update*: gradients, what the backward pass keeps (`model.remat`), and the working memory of one block or of the head
  (and, with rollout.ahead, the rollout's);
- *rollout*: the KV caches of all slots and the working memory of a step;
- *push*: new weights on their way to the rollout, gathered on its device and then cut into layers.

Parameters, optimizer, caches and batch are exact. Activations are closed forms: what jax keeps of a block, counted, and
working memory whose factors were fitted to XLA's buffers for small float32 models on a CPU (`tests/model/test_plan.py`
holds the sum to 15 % there). They are those of attention "einsum": "xla" needs more, since it forms all scores of a
block, and keeps them where `model.remat` is none. LoRA of some projections only needs less (about a quarter, measured):
nothing is kept for the gradients of the others.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import AbstractMesh, Mesh
from ml_collections import config_flags

from router_r1_jax.mesh import abstract_mesh
from router_r1_jax.model.attention import query_blocks, rows_at_once
from router_r1_jax.model.config import ModelConfig, from_arch, lora_from
from router_r1_jax.model.hf import load_hf_config
from router_r1_jax.model.init import abstract_params, count_params
from router_r1_jax.model.lora import split_trainable
from router_r1_jax.model.presets import preset
from router_r1_jax.model.transformer import Params

GB = 10**9  # a device of "16 GB" has 16 GiB: the 7 % between them are for the runtime itself
TAG_STATES = 32  # of the automaton over the closing tags, at most
TAG_TOKENS = 32  # around a reply, as rollout.engine has it
ROW_BUCKET, PREFIX_BUCKET = 32, 64  # what is read of rows and prefixes is padded to multiples of them
CACHE_BUCKET, SHORT_CACHE = 128, 256  # to which a cache at its longest is padded, and up to where none is


@dataclasses.dataclass(frozen=True)
class UpdateShape:
    """Sizes of one update: rows of the whole batch, rows of a micro-batch of the longest bucket, and tokens."""

    rows: int
    micro_batch: int
    row_tokens: int  # T, behind the shared prefix
    prefix_tokens: int  # P
    logit_chunk: int  # positions whose logits are held at a time
    buckets: int = 1  # lengths that rows are padded to, each half of the next


@dataclasses.dataclass(frozen=True)
class RolloutShape:
    """Sizes of the sampling loop, as `rollout.state.Limits` has them, and the shared prefix."""

    slots: int
    lanes: int
    row_tokens: int  # S
    turn_tokens: int
    feed_tokens: int
    chunk: int
    feed_rows: int
    prefix_tokens: int  # P
    tensor: int = 1  # devices that share a replica


def param_bytes(config: ModelConfig, mesh: Mesh | AbstractMesh) -> int:
    """Bytes of parameters that one device of the mesh stores."""
    return _stored_bytes(abstract_params(config, mesh))


def trainable(config: ModelConfig, mesh: Mesh | AbstractMesh) -> Params:
    """The parameters that training changes, abstract: with LoRA the adapters, else all."""
    return split_trainable(abstract_params(config, mesh))[0]


def _stored_bytes(abstract: Params, *, least: int = 0) -> int:
    """Bytes on one device; a value takes `least` bytes or more."""
    leaves = jax.tree.leaves(abstract)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * max(x.dtype.itemsize, least) for x in leaves)


def optimizer_bytes(config: ModelConfig, mesh: Mesh | AbstractMesh) -> int:
    """Bytes per device of AdamW's two moments, and the counters of updates, of moments and of the schedule.

    Both are float32 at least, as are the copies that half-precision parameters are trained on.
    """
    abstract = trainable(config, mesh)
    float32 = _stored_bytes(abstract, least=4)
    return 2 * float32 + (float32 if _stored_bytes(abstract) < float32 else 0) + 3 * 4


def gradient_bytes(config: ModelConfig, mesh: Mesh | AbstractMesh) -> int:
    """Bytes per device of the sum over micro-batches, one micro-batch's, and what comes back through the prefix."""
    abstract = trainable(config, mesh)
    return _stored_bytes(abstract, least=4) + 2 * _stored_bytes(abstract)


def batch_bytes(shape: UpdateShape, mesh: Mesh | AbstractMesh) -> int:
    """Bytes per device of an update's batch: eight values of 4 bytes per token, the prefix, and counts.

    Every bucket has room for all rows, whichever lengths they have.
    """
    rows = -(-shape.rows // shape.micro_batch) * shape.micro_batch // _row_shares(mesh)
    lengths = [-(-shape.row_tokens // 2**k // ROW_BUCKET) * ROW_BUCKET for k in range(shape.buckets)]
    return sum(8 * 4 * rows * (length + 1) for length in lengths) + (shape.prefix_tokens + 1 + shape.buckets) * 4


def saved_bytes(config: ModelConfig, mesh: Mesh | AbstractMesh, shape: UpdateShape) -> int:
    """Bytes per device that the backward pass finds: of a micro-batch's blocks, of the prefix's, and prefix K/V.

    The prefix is one row on every device. Its keys and values exist three times: they, their summed cotangents, and
    those of a micro-batch.
    """
    share, T, P = _share(config, mesh), shape.row_tokens, shape.prefix_tokens
    of_rows = shape.micro_batch // _row_shares(mesh) * T * _saved_per_token(config, share)
    of_prefix = P * _saved_per_token(config, share)
    prefix_kv = 3 * 2 * P * share.kv_heads * config.head_dim * _itemsize(config)
    return config.num_layers * (of_rows + of_prefix + prefix_kv)


def update_workspace_bytes(config: ModelConfig, mesh: Mesh | AbstractMesh, shape: UpdateShape) -> int:
    """Bytes per device of the widest moment: one block's backward pass, or the head's; and the weights gathered for it.

    Per token of a micro-batch a block holds 6 arrays of the model's width and 6 of the feed-forward's, of which 2 are
    read in place where they were kept, and for one block of queries 3.5 arrays of scores; the head holds two chunks of
    logits. LoRA adds its products, where they are computed anew 3 more of the feed-forward's width.
    """
    share, e = _share(config, mesh), _itemsize(config)
    rows = shape.micro_batch // _row_shares(mesh)
    feed_forward = 4 if config.remat != "full" else 9 if config.lora else 6
    queries = query_blocks(shape.row_tokens)[0][1]
    together = rows_at_once(rows, queries * config.num_heads // config.num_kv_heads)
    scores = 4 * together * share.heads * queries * (shape.row_tokens + shape.prefix_tokens)
    block = 3.5 * scores + rows * e * shape.row_tokens * (feed_forward * share.mlp + 6 * config.width)
    head = rows * (2 * 4 * shape.logit_chunk * share.vocab + 2 * e * shape.row_tokens * config.width)
    return int(max(block, head)) + gathered_bytes(config, mesh)


def gathered_bytes(config: ModelConfig, mesh: Mesh | AbstractMesh) -> int:
    """Bytes per device of weights that `fsdp` cuts and a pass needs whole: the embedding, a layer and its gradient."""
    if mesh.shape["fsdp"] == 1:
        return 0
    share = _share(config, mesh)
    layer = 2 * (share.heads + share.kv_heads) * config.head_dim + 3 * share.mlp
    return (share.vocab + 2 * layer) * config.width * _itemsize(config)


def cache_bytes(config: ModelConfig, shape: RolloutShape) -> int:
    """Bytes of the KV caches of all slots, at their longest, and of the shared prefix, on a device of the rollout.

    Where there are fewer lanes than slots, up to `feed_rows` spare caches are among them.
    """
    longest = (
        -(-shape.row_tokens // CACHE_BUCKET) * CACHE_BUCKET if shape.row_tokens > SHORT_CACHE else shape.row_tokens
    )
    places = shape.slots + min(shape.feed_rows, shape.slots - shape.lanes)
    positions = places * longest + shape.prefix_tokens
    kv_heads = _share(config, abstract_mesh(1, 1, shape.tensor, shape.tensor)).kv_heads
    return 2 * config.num_layers * positions * kv_heads * config.head_dim * _itemsize(config)


def rollout_workspace_bytes(config: ModelConfig, shape: RolloutShape) -> int:
    """Bytes of a step beside weights and caches: the rows' state, the tag table, and the wider of decode and feed."""
    c, e = config, _itemsize(config)
    keys = shape.row_tokens + shape.prefix_tokens
    state = 4 * shape.slots * (shape.feed_tokens + 2 * shape.turn_tokens) + TAG_STATES * c.vocab_size
    layer = 2 * shape.row_tokens * c.num_kv_heads * c.head_dim * e  # of a row that is fed
    decode = shape.lanes * max(8 * c.num_heads * keys, 2 * 4 * c.vocab_size)
    tokens = shape.feed_rows * shape.chunk
    feed = tokens * (3 * c.num_heads * keys + e * (2 * c.mlp + c.width)) + shape.feed_rows * layer
    return state + int(max(decode, feed))


def plan(
    config: ModelConfig,
    mesh: Mesh | AbstractMesh,
    update: UpdateShape,
    rollout: RolloutShape,
    *,
    reference: bool = True,
    ahead: bool = False,
) -> dict[str, dict[str, int]]:
    """Bytes on the busiest device: {moment: {part: bytes}}, moments "update", "rollout" and "push" (module docstring).

    `reference`: a run without LoRA keeps the policy it started from, as learner.kl asks for. `ahead`: the rollout goes
    on during an update (rollout.ahead).

    Raises ValueError where a micro-batch does not divide over the devices that share its rows.
    """
    if update.micro_batch % _row_shares(mesh):
        raise ValueError(
            f"a micro-batch has {update.micro_batch} rows; it must have a multiple of mesh.data x mesh.fsdp "
            f"({_row_shares(mesh)}), so that each device takes as many rows"
        )
    params = param_bytes(config, mesh)
    whole = param_bytes(config.base, abstract_mesh(1, 1, rollout.tensor, rollout.tensor))
    resident = {
        "parameters": params,
        "optimizer": optimizer_bytes(config, mesh),
        "reference parameters (KL)": params if reference and not config.lora else 0,  # LoRA's base is the reference
        "rollout's copy of the weights": whole,
    }
    sampling = {
        "KV caches": cache_bytes(config, rollout),
        "sampling at work": rollout_workspace_bytes(config, rollout),
    }
    return {
        "update": resident
        | {
            "gradients": gradient_bytes(config, mesh),
            "activations kept (remat)": saved_bytes(config, mesh, update),
            "activations at work": update_workspace_bytes(config, mesh, update),
            "batch": batch_bytes(update, mesh),
        }
        | (sampling if ahead else {}),
        "rollout": resident | sampling,
        # The rollout drops its old copy first. On one device the learner's parameters are read where they lie.
        "push": resident | {"weights on their way": 0 if mesh.size == 1 else whole},
    }


def _itemsize(config: ModelConfig) -> int:
    return jnp.dtype(config.dtype).itemsize


def _row_shares(mesh: Mesh | AbstractMesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


class _Share(NamedTuple):
    """What one device of a `tensor` group computes; what does not divide is computed whole."""

    heads: int
    kv_heads: int
    mlp: int
    vocab: int


def _share(config: ModelConfig, mesh: Mesh | AbstractMesh) -> _Share:
    tensor = mesh.shape["tensor"]
    whole = config.num_heads, config.num_kv_heads, config.mlp, config.vocab_size
    return _Share(*(n if n % tensor else n // tensor for n in whole))


def _saved_per_token(config: ModelConfig, share: _Share) -> int:
    """Bytes that jax keeps of one block for a token; norms and the sums of attention's weights are float32."""
    c, e = config, _itemsize(config)
    q, kv = share.heads * c.head_dim, share.kv_heads * c.head_dim
    if c.remat == "full":
        return e * c.width
    if c.remat == "dots":
        return e * (2 * c.width + 2 * q + 2 * kv + 2 * share.mlp) + 4 * share.heads
    norms = (4 * e + 2 * 4) * c.width + ((e + 4) * (q + kv) if c.qk_norm else 0)
    return norms + 4 * share.heads + e * (2 * (q + kv) + 6 * share.mlp)


# The main


def model_of(model: Any, vocab_size: int) -> ModelConfig:
    """The ModelConfig of a configuration's `model` block: of a folder, a preset's hub name, or `model.arch`.

    `vocab_size` is that of the tokenizer, used where `model.arch` names none. Raises ValueError for any other source.
    """
    if not model.source:
        vocab_size = min(vocab_size, model.arch.get("vocab_size", vocab_size))
        config = from_arch(model.arch, vocab_size, dtype=model.dtype, remat=model.remat)
    elif (folder := Path(model.source).expanduser()).is_dir():
        config = load_hf_config(folder, model.dtype)
    else:
        try:
            config = preset(model.source)
        except ValueError as error:
            raise ValueError(f"model.source: {error}; download the checkpoint and name its folder") from error
    return dataclasses.replace(config, dtype=model.dtype, remat=model.remat, lora=lora_from(model.lora))


def shapes_of(config: Any, prefix_tokens: int, mesh: Mesh | AbstractMesh) -> tuple[UpdateShape, RolloutShape]:
    """The sizes that a run's configuration asks for, every row at its longest."""
    r, c = config.rollout, config.learner
    prefix = -(-max(prefix_tokens, 1) // PREFIX_BUCKET) * PREFIX_BUCKET
    longest = -(-(r.max_tokens - 1) // ROW_BUCKET) * ROW_BUCKET  # what the model reads of a row
    rows, shares = r.questions * r.group // c.minibatches, _row_shares(mesh)
    micro_batch = min(max(c.micro_tokens // longest, 1), -(-rows // shares)) * shares
    update = UpdateShape(rows, micro_batch, longest, prefix, c.logit_chunk, c.length_buckets)
    feed_tokens, lanes = max(r.reply_tokens + TAG_TOKENS, config.prompt.question_tokens), r.lanes or r.slots
    return update, RolloutShape(
        r.slots, lanes, r.max_tokens, r.max_turn_tokens, feed_tokens, r.chunk, min(r.feed_rows, lanes), prefix, r.tensor
    )


def table(moments: dict[str, dict[str, int]], hbm_gb: float) -> str:
    """The plan as text: a line per part, a column per moment, GB of 10**9 bytes, and the verdict."""
    parts = list(dict.fromkeys(part for moment in moments.values() for part in moment))
    totals = {name: sum(moment.values()) for name, moment in moments.items()}
    width = max(map(len, parts)) + 2
    lines = ["GB (10^9 bytes)".ljust(width) + "".join(f"{name:>10}" for name in moments)]
    for part in parts:
        cells = (f"{moment[part] / GB:10.3f}" if part in moment else " " * 10 for moment in moments.values())
        lines.append(part.ljust(width) + "".join(cells).rstrip())
    lines.append("total".ljust(width) + "".join(f"{total / GB:10.3f}" for total in totals.values()))
    widest = max(totals, key=totals.get)
    verdict = "fits in" if totals[widest] <= hbm_gb * GB else "does not fit in"
    lines += ["", f"{verdict} {hbm_gb:g} GB: the most is {totals[widest] / GB:.3f} GB, in the {widest}"]
    return "\n".join(lines)


def main(config: Any, devices: int, hbm_gb: float, prefix_tokens: int, vocab_size: int) -> int:
    """Print the plan of a configuration; returns the exit status."""
    mesh = abstract_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    model = model_of(config.model, vocab_size)
    update, rollout = shapes_of(config, prefix_tokens, mesh)
    moments = plan(model, mesh, update, rollout, reference=config.learner.kl != "none", ahead=config.rollout.ahead)
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    abstract = abstract_params(model, mesh)
    count, trained = count_params(abstract), count_params(split_trainable(abstract)[0])
    adapters = f" ({trained / 1e6:,.1f} M of them trained)" if model.lora else ""
    print(f"{count / 1e6:,.1f} M parameters{adapters}, {model.dtype}, remat {model.remat}; {devices} devices: {sizes}")
    print(f"{update}\n{rollout}\n\nThe busiest device, the one that also runs the rollout:\n")
    print(table(moments, hbm_gb))
    return 0 if max(sum(moment.values()) for moment in moments.values()) <= hbm_gb * GB else 2


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", help_string="Configuration file, such as configs/demo.py.")
    _DEVICES = flags.DEFINE_integer("devices", 1, "Devices of the planned machine; none of them is needed here.", 1)
    _HBM = flags.DEFINE_float("hbm_gb", 16.0, "Memory of one device in GB.", 0.0)
    _PREFIX = flags.DEFINE_integer("prefix_tokens", 1024, "Tokens that all prompts share: instructions and cards.", 0)
    _VOCAB = flags.DEFINE_integer("vocab_size", 2048, "Of the tokenizer, where model.arch names none.", 1)
    flags.mark_flag_as_required("config")

    def _run(argv: list[str]) -> int:
        del argv
        jax.config.update("jax_platforms", "cpu")  # a GPU may be busy with a run: take nothing from it
        try:
            return main(_CONFIG.value, _DEVICES.value, _HBM.value, _PREFIX.value, _VOCAB.value)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    app.run(_run)
