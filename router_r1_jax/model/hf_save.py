"""Hugging Face checkpoints: export (save_hf) of config.json, safetensors in shards, and tokenizer files."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from router_r1_jax.distributed.mesh import abstract_mesh
from router_r1_jax.model import hf_tensors
from router_r1_jax.model.config import ModelConfig
from router_r1_jax.model.hf_config import WeightsError, config_to_hf
from router_r1_jax.model.init_params import abstract_params
from router_r1_jax.model.lora import merge_adapters
from router_r1_jax.model.transformer import Params


def check_export_folder(folder: Path) -> None:
    """Raise WeightsError unless the folder is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(
            f"{folder} is not an empty folder; name a new one, so that no older file mixes with the export"
        )


def save_hf(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a checkpoint that `transformers` loads: config.json, safetensors, and the files of the tokenizer.

    Args:
      path: a new or empty folder.
      config: the model's configuration.
      params: stacked parameters of `config.dtype`, all addressable by this process. Adapters are merged.
      tokenizer: also gives the ids of the special tokens to config.json. None writes no tokenizer.
      max_shard_bytes: larger weights are divided into several files with an index. One file is in memory at a time.

    Raises:
      WeightsError: the folder is not empty, `params` do not belong to `config`, or the disk is full (the incomplete
        folder is removed).
    """
    folder = Path(path)
    leaves = flatten_dict(merge_adapters(config, params), sep="/")
    config = config.base
    expected = flatten_dict(abstract_params(config, abstract_mesh(1, 1, 1, 1)), sep="/")
    hf_tensors.refuse_differences(
        "the parameters do not belong to the configuration",
        leaves,
        {name: (leaf.shape, [str(leaf.dtype)]) for name, leaf in expected.items()},
    )
    check_export_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _write_weights(folder, leaves, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        # config.json comes last, so that a folder that has one is a complete checkpoint.
        (folder / "config.json").write_text(json.dumps(config_to_hf(config, tokenizer), indent=2) + "\n")
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise WeightsError(f"{folder} could not be written ({error}); free space or name another folder") from error
        raise


def _write_weights(folder: Path, leaves: dict[str, Any], max_shard_bytes: int) -> None:
    shards: list[list[hf_tensors.Tensor]] = []
    total = free = 0
    for tensor in hf_tensors.checkpoint_tensors(leaves):
        size = math.prod(tensor.shape) * leaves[tensor.leaf].dtype.itemsize
        if size > free:  # a tensor that is larger than the limit gets a file of its own
            shards.append([])
            free = max_shard_bytes
        shards[-1].append(tensor)
        total, free = total + size, free - size
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        # transformers before 5 refuses files whose metadata do not name the framework of the layout.
        values = {tensor.name: _stored_values(leaves[tensor.leaf], tensor) for tensor in shard}
        save_file(values, folder / file, metadata={"format": "pt"})
        weight_map |= {tensor.name: file for tensor in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / hf_tensors.INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _stored_values(x: jax.Array, tensor: hf_tensors.Tensor) -> np.ndarray:
    x = np.asarray(x if tensor.layer is None else x[tensor.layer])
    inputs = hf_tensors.TENSOR_SPECS[tensor.leaf].inputs
    if inputs is not None:
        x = x.transpose(*range(inputs, x.ndim), *range(inputs))
    return np.ascontiguousarray(x.reshape(tensor.shape))
