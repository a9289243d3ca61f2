"""Hugging Face checkpoints in and out: a folder with config.json, safetensors and tokenizer files.

`load_hf` reads weights straight into their places on the mesh: each device's block is read from the files when that
device's turn comes, so that the host never holds more than one parameter beside what is already placed. `save_hf`
writes a folder that `transformers` and the servers built on it load. Both follow one table, `_TENSORS`:

    ours     layers/attention/q/kernel               [L, D, N, H]   all layers, inputs before outputs
    theirs   model.layers.3.self_attn.q_proj.weight  [N*H, D]       one per layer, outputs (flat) before inputs

Which settings of a config.json are understood, and which are refused, stands in `hf_config.py`.
"""

import dataclasses
import functools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from router_r1_jax.mesh import make_mesh
from router_r1_jax.model.config import ModelConfig
from router_r1_jax.model.hf_config import WeightsError, config_from_hf, config_to_hf
from router_r1_jax.model.init import abstract_params
from router_r1_jax.model.lora import merge_adapters
from router_r1_jax.model.transformer import Params

_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names -> NumPy's
_LISTED = 20  # faults that one error message spells out


class _Tensor(NamedTuple):
    """Where one of our leaves lies in a checkpoint.

    `inputs` of our axes (after L) lead and are the columns there; the others are flattened into rows. None: unchanged.
    """

    name: str
    inputs: int | None


_LAYER = "model.layers.{i}."
_TENSORS = {
    "embed": _Tensor("model.embed_tokens.weight", None),
    "layers/attention_norm/scale": _Tensor(_LAYER + "input_layernorm.weight", None),
    "layers/attention/q/kernel": _Tensor(_LAYER + "self_attn.q_proj.weight", 1),
    "layers/attention/q/bias": _Tensor(_LAYER + "self_attn.q_proj.bias", 0),
    "layers/attention/k/kernel": _Tensor(_LAYER + "self_attn.k_proj.weight", 1),
    "layers/attention/k/bias": _Tensor(_LAYER + "self_attn.k_proj.bias", 0),
    "layers/attention/v/kernel": _Tensor(_LAYER + "self_attn.v_proj.weight", 1),
    "layers/attention/v/bias": _Tensor(_LAYER + "self_attn.v_proj.bias", 0),
    "layers/attention/o/kernel": _Tensor(_LAYER + "self_attn.o_proj.weight", 2),
    "layers/attention/q_norm/scale": _Tensor(_LAYER + "self_attn.q_norm.weight", None),
    "layers/attention/k_norm/scale": _Tensor(_LAYER + "self_attn.k_norm.weight", None),
    "layers/mlp_norm/scale": _Tensor(_LAYER + "post_attention_layernorm.weight", None),
    "layers/mlp/gate/kernel": _Tensor(_LAYER + "mlp.gate_proj.weight", 1),
    "layers/mlp/up/kernel": _Tensor(_LAYER + "mlp.up_proj.weight", 1),
    "layers/mlp/down/kernel": _Tensor(_LAYER + "mlp.down_proj.weight", 1),
    "final_norm/scale": _Tensor("model.norm.weight", None),
    "head": _Tensor("lm_head.weight", None),
}


class _Stored(NamedTuple):
    """One tensor of a checkpoint as its file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class _Part(NamedTuple):
    """One tensor of a checkpoint as a part of one of our leaves: layer `layer`, or all of it where that is None."""

    name: str
    leaf: str
    layer: int | None
    shape: tuple[int, ...]


def load_hf(
    path: str | os.PathLike[str], dtype: str | None = None, mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """Read a checkpoint of a Qwen2, Qwen3 or Llama model.

    Args:
      path: a folder, or a name on the Hugging Face hub such as "Qwen/Qwen2.5-3B-Instruct" (needs network once).
      dtype: "float32", "bfloat16" or "float16" for parameters and activations; None takes the files'.
      mesh: where the parameters go, split as `mesh.RULES` says; one device by default.

    Returns:
      The configuration, and stacked parameters as `init_params` makes them.

    Raises:
      WeightsError: no such checkpoint, a setting that this model does not have, pickled weights, damaged files, or
        tensors that are missing, left over or of a wrong shape (all of them in one message).
    """
    folder = _find_folder(path, ["config.json", "*.safetensors", _INDEX])
    config = _read_config(folder)
    stored = _read_headers(folder)
    config = dataclasses.replace(config, dtype=_choose_dtype(stored, dtype, folder))
    mesh = make_mesh(1, 1, 1, jax.local_devices()[:1]) if mesh is None else mesh
    abstract = abstract_params(config, mesh)
    _check_tensors(_flatten(abstract), stored, folder, tied=config.tie_embeddings)
    return config, jax.tree.map_with_path(lambda keys, leaf: _load_leaf(_path_name(keys), leaf, stored), abstract)


def load_hf_config(path: str | os.PathLike[str], dtype: str) -> ModelConfig:
    """The configuration alone, as `load_hf` gives it; no weights are read or fetched. Raises WeightsError."""
    return dataclasses.replace(_read_config(_find_folder(path, ["config.json"])), dtype=dtype)


def check_export_folder(folder: Path) -> None:
    """Raise WeightsError where something is in the way of an export."""
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
    """Write a checkpoint that `transformers` loads: config.json, safetensors, and the tokenizer's files if it is given.

    Args:
      path: a new or empty folder.
      config: the model's configuration.
      params: stacked parameters of `config.dtype`, all of them addressable by this process; adapters are merged.
      tokenizer: also gives the ids of the special tokens to config.json.
      max_shard_bytes: larger weights are cut into several files with an index; one file is in memory at a time.

    Raises:
      WeightsError: the folder is not empty, `params` are not those of `config`, or the disk is full (the incomplete
        folder is removed).
    """
    folder = Path(path)
    leaves = _flatten(merge_adapters(config, params))
    config = config.base
    _check_params(leaves, _flatten(abstract_params(config, make_mesh(1, 1, 1, jax.local_devices()[:1]))))
    check_export_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _write_weights(folder, leaves, config.num_layers, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        # Last, so that a folder with a config.json is a whole checkpoint.
        (folder / "config.json").write_text(json.dumps(config_to_hf(config, tokenizer), indent=2) + "\n")
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise WeightsError(f"{folder} could not be written ({error}); free space or name another folder") from error
        raise


# Names and shapes


def _path_name(keys: tuple[Any, ...]) -> str:
    return "/".join(key.key for key in keys)


def _flatten(params: Params) -> dict[str, Any]:
    return {_path_name(keys): leaf for keys, leaf in jax.tree.leaves_with_path(params)}


def _parts(leaves: dict[str, Any], num_layers: int) -> Iterator[_Part]:
    """The checkpoint's tensors for these leaves, in the order of `_TENSORS`, layer after layer."""

    def part(leaf: str, layer: int | None) -> _Part:
        tensor, shape = _TENSORS[leaf], leaves[leaf].shape[layer is not None :]
        return _Part(tensor.name.format(i=layer), leaf, layer, _stored_shape(shape, tensor.inputs))

    layered = [leaf for leaf in _TENSORS if leaf in leaves and leaf.startswith("layers/")]
    for leaf in _TENSORS:
        if leaf in leaves and leaf not in layered:
            yield part(leaf, None)
    for layer in range(num_layers):
        yield from (part(leaf, layer) for leaf in layered)


def _stored_shape(shape: tuple[int, ...], inputs: int | None) -> tuple[int, ...]:
    """Shape in a checkpoint of one layer's parameter, which has shape `shape` here."""
    if inputs is None:
        return shape
    rows = math.prod(shape[inputs:])
    return (rows, math.prod(shape[:inputs])) if inputs else (rows,)


# Reading


def _find_folder(path: str | os.PathLike[str], wanted: list[str]) -> Path:
    folder, name = Path(path).expanduser(), os.fspath(path)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise WeightsError(
            f"{name!r} is neither a folder nor a hub name like 'Qwen/Qwen2.5-3B-Instruct'; correct the path"
        )
    from huggingface_hub import snapshot_download  # only where the network is asked for

    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub's client lets some errors of its HTTP library through (proxy, broken download)
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise WeightsError(
            f"{name!r} is no folder here, and the Hugging Face hub did not give it ({reason}); "
            f"correct the path or name, or download it where there is network and name that folder"
        ) from error


def _read_config(folder: Path) -> ModelConfig:
    return config_from_hf(_read_json(folder / "config.json"), source=folder / "config.json")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"{file} is missing; a checkpoint folder holds config.json and safetensors") from error
    except OSError as error:
        raise WeightsError(f"{file} cannot be read ({error}); correct its rights, or copy it again") from error
    except ValueError as error:
        raise WeightsError(f"{file} is not JSON ({error}); copy the checkpoint again") from error
    if not isinstance(fields, dict):
        raise WeightsError(
            f"{file} holds a {type(fields).__name__}; it must be a JSON object: copy the checkpoint again"
        )
    return fields


def _read_headers(folder: Path) -> dict[str, _Stored]:
    """All tensors of a checkpoint, from the headers of its files alone."""
    single, index = folder / "model.safetensors", folder / _INDEX
    if single.exists():
        return _read_header(single)
    if not index.exists():
        pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in sorted(folder.glob(pattern))]
        found = f"; {pickled[0]} is a pickle, which can run code, and is not read" if pickled else ""
        raise WeightsError(
            f"{folder} holds neither model.safetensors nor {_INDEX}{found}: "
            f"get the safetensors version, or convert it once with transformers' save_pretrained"
        )
    weight_map = _read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    if not all(isinstance(name, str) and re.fullmatch(r"[^/\\]+\.safetensors", name) for name in names):
        raise WeightsError(
            f"{index}: weight_map must map tensors to safetensors files of this folder; copy the checkpoint again"
        )
    headers = {name: _read_header(folder / name) for name in sorted(set(names))}
    # What a file holds beside the tensors that the index lists there is left over, and must not pass unseen.
    unlisted = {tensor: part for header in headers.values() for tensor, part in header.items()}
    listed = {tensor: headers[file].get(tensor) for tensor, file in weight_map.items()}
    return {tensor: part for tensor, part in (unlisted | listed).items() if part is not None}


def _read_header(file: Path) -> dict[str, _Stored]:
    try:
        with safe_open(file, framework="np") as handle:
            # Old Llama files also hold tables of rotary frequencies, which follow from config.json.
            names = [name for name in handle.keys() if not name.endswith("rotary_emb.inv_freq")]
            slices = {name: handle.get_slice(name) for name in names}
            return {name: _Stored(file, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except FileNotFoundError as error:
        raise WeightsError(f"{file} is missing though the index names it; copy the checkpoint again") from error
    except SafetensorError as error:
        raise WeightsError(f"{file} is damaged or no safetensors file ({error}); copy the checkpoint again") from error
    except OSError as error:
        raise WeightsError(f"{file} cannot be read ({error}); correct its rights, or copy it again") from error


def _choose_dtype(stored: dict[str, _Stored], dtype: str | None, folder: Path) -> str:
    if dtype is not None:
        if dtype not in _DTYPES.values():
            raise WeightsError(f"dtype is {dtype!r}; choose one of {', '.join(_DTYPES.values())}")
        return dtype
    found = sorted({tensor.dtype for tensor in stored.values()})
    if len(found) != 1 or found[0] not in _DTYPES:
        raise WeightsError(
            f"{folder} stores tensors as {', '.join(found) or 'nothing'}; name one dtype to load them as: "
            f"{', '.join(_DTYPES.values())}"
        )
    return _DTYPES[found[0]]


def _check_tensors(leaves: dict[str, Any], stored: dict[str, _Stored], folder: Path, *, tied: bool) -> None:
    num_layers = next(leaf.shape[0] for name, leaf in leaves.items() if name.startswith("layers/"))
    expected = {part.name: part.shape for part in _parts(leaves, num_layers)}
    left_over = stored.keys() - expected.keys()
    if tied and _TENSORS["head"].name in left_over and _same_values(stored, "head", "embed"):
        left_over.remove(_TENSORS["head"].name)  # some writers store the tied head once more
    faults = [f"missing {name}" for name in expected if name not in stored]
    faults += [f"left over {name} {list(stored[name].shape)}" for name in sorted(left_over)]
    faults += [
        f"{name} has shape {list(stored[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    # Integers and 8-bit floats are quantised weights, whose scales lie elsewhere.
    faults += [
        f"{name} is stored as {stored[name].dtype}, not as one of {', '.join(_DTYPES)}"
        for name in expected
        if name in stored and stored[name].dtype not in _DTYPES
    ]
    if faults:
        raise WeightsError(f"{folder}: the tensors are not those that config.json describes: {_enumerate(faults)}")


def _enumerate(faults: list[str]) -> str:
    rest = len(faults) - _LISTED
    return "; ".join(faults[:_LISTED]) + (f"; and {rest} more" if rest > 0 else "")


def _same_values(stored: dict[str, _Stored], a: str, b: str) -> bool:
    first, second = (stored.get(_TENSORS[leaf].name) for leaf in (a, b))
    if second is None or first[1:] != second[1:]:
        return False
    with safe_open(first.file, "np") as x, safe_open(second.file, "np") as y:
        x, y = x.get_slice(_TENSORS[a].name), y.get_slice(_TENSORS[b].name)
        rows = (slice(i, min(i + 4096, first.shape[0])) for i in range(0, first.shape[0], 4096))
        return all(np.array_equal(x[part], y[part]) for part in rows)


def _load_leaf(leaf: str, target: jax.ShapeDtypeStruct, stored: dict[str, _Stored]) -> jax.Array:
    """One parameter on its devices; every distinct block is read once."""

    @functools.cache
    def read(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        name, inputs = _TENSORS[leaf]
        block = _empty([stop - start for start, stop in bounds], target.dtype)
        if not leaf.startswith("layers/"):
            block[...] = _read_block(stored[name].file, name, bounds, target.shape, inputs)
            return block
        for place, i in enumerate(range(*bounds[0])):
            layer = name.format(i=i)
            block[place] = _read_block(stored[layer].file, layer, bounds[1:], target.shape[1:], inputs)
        return block

    def place(index: tuple[slice, ...]) -> np.ndarray:
        return read(tuple(part.indices(size)[:2] for part, size in zip(index, target.shape, strict=True)))

    return jax.make_array_from_callback(target.shape, target.sharding, place)


def _empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Memory that begins at a multiple of 64 bytes: JAX on a CPU then takes it over instead of copying it.

    A stacked parameter can be several times larger than a file, so that a second copy would be the peak of a load.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _read_block(
    file: Path, name: str, bounds: tuple[tuple[int, int], ...], shape: tuple[int, ...], inputs: int | None
) -> np.ndarray:
    """The block `bounds` of one layer's parameter, in our layout. The file is mapped only while it is read."""
    sizes = [stop - start for start, stop in bounds]
    if inputs is None:
        index = tuple(slice(*b) for b in bounds)
    else:
        rows = _flat_slice(bounds[inputs:], shape[inputs:])
        index = (rows, _flat_slice(bounds[:inputs], shape[:inputs])) if inputs else (rows,)
    with safe_open(file, framework="np") as handle:
        block = handle.get_slice(name)[index]
    if inputs is None:
        return block
    outputs = len(shape) - inputs
    block = block.reshape(sizes[inputs:] + sizes[:inputs])
    return block.transpose(*range(outputs, len(shape)), *range(outputs))


def _flat_slice(bounds: tuple[tuple[int, int], ...], shape: tuple[int, ...]) -> slice:
    """Where a block of the given axes lies once they are flattened; only the first axis (heads) is ever cut."""
    inner = math.prod(shape[1:])
    return slice(bounds[0][0] * inner, bounds[0][1] * inner)


# Writing


def _check_params(leaves: dict[str, Any], expected: dict[str, Any]) -> None:
    faults = [f"missing {name}" for name in expected if name not in leaves]
    faults += [f"unknown {name}" for name in leaves if name not in expected]
    faults += [
        f"{name} is {x.dtype}{list(x.shape)}, not {expected[name].dtype}{list(expected[name].shape)}"
        for name, x in leaves.items()
        if name in expected and (x.shape, x.dtype) != (expected[name].shape, expected[name].dtype)
    ]
    if faults:
        raise WeightsError(f"the parameters are not those of the configuration: {_enumerate(faults)}")


def _write_weights(folder: Path, leaves: dict[str, Any], num_layers: int, max_shard_bytes: int) -> None:
    def nbytes(part: _Part) -> int:
        return math.prod(part.shape) * leaves[part.leaf].dtype.itemsize

    shards = _cut(list(_parts(leaves, num_layers)), nbytes, max_shard_bytes)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        # transformers before 5 refuses files whose metadata do not say which framework's layout they have.
        save_file({part.name: _export(leaves, part) for part in shard}, folder / file, metadata={"format": "pt"})
        weight_map |= {part.name: file for part in shard}
    if len(shards) > 1:
        total = sum(nbytes(part) for shard in shards for part in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _cut(parts: list[_Part], nbytes: Callable[[_Part], int], limit: int) -> list[list[_Part]]:
    """Consecutive groups of at most `limit` bytes; a tensor above it stands alone."""
    groups: list[list[_Part]] = [[]]
    size = 0
    for part in parts:
        if groups[-1] and size + nbytes(part) > limit:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += nbytes(part)
    return groups


def _export(leaves: dict[str, Any], part: _Part) -> np.ndarray:
    x = leaves[part.leaf]
    x = np.asarray(x if part.layer is None else x[part.layer])
    inputs = _TENSORS[part.leaf].inputs
    if inputs is not None:
        x = x.transpose(*range(inputs, x.ndim), *range(inputs))
    return np.ascontiguousarray(x.reshape(part.shape))
