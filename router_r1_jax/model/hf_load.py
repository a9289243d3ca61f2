"""Hugging Face checkpoints: import (load_hf) of safetensors straight onto the mesh, and every refusal with its fix.

The block of each device is read from the files in that device's turn, so that the host never holds more than one
parameter beside those that are already placed. `hf_config.py` says which settings of config.json are understood.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from router_r1_jax.distributed.mesh import make_mesh
from router_r1_jax.model.config import ModelConfig
from router_r1_jax.model.hf_config import WeightsError, config_from_hf
from router_r1_jax.model.hf_tensors import DTYPES, INDEX, TENSOR_SPECS, checkpoint_tensors, refuse_differences
from router_r1_jax.model.init_params import abstract_params
from router_r1_jax.model.transformer import Params


class _Stored(NamedTuple):
    """One tensor of a checkpoint as the header of its file describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def load_hf(
    path: str | os.PathLike[str], dtype: str | None = None, mesh: Mesh | None = None
) -> tuple[ModelConfig, Params]:
    """Read a checkpoint of a Qwen2, Qwen3 or Llama model.

    Args:
      path: a folder, or a name on the Hugging Face hub such as "Qwen/Qwen2.5-3B-Instruct" (needs network once).
      dtype: "float32", "bfloat16" or "float16" for parameters and activations; None takes that of the files.
      mesh: where the parameters go, split as `mesh.RULES` says; one device by default.

    Returns:
      The configuration, and stacked parameters like those of `init_params`.

    Raises:
      WeightsError: there is no such checkpoint, a setting is not supported, the weights are pickled, files are damaged,
        or tensors are missing, left over or of a wrong shape (all of them in one message).
    """
    folder = _find_folder(path, ["config.json", "*.safetensors", INDEX])
    config = _read_config(folder)
    stored = _read_headers(folder)
    config = dataclasses.replace(config, dtype=_choose_dtype(stored, dtype, folder))
    mesh = make_mesh(1, 1, 1, jax.local_devices()[:1]) if mesh is None else mesh
    leaves = flatten_dict(abstract_params(config, mesh), sep="/")
    _check_tensors(leaves, stored, folder, tied=config.tie_embeddings)
    return config, unflatten_dict({name: _load_leaf(name, leaf, stored) for name, leaf in leaves.items()}, sep="/")


def load_hf_config(path: str | os.PathLike[str], dtype: str) -> ModelConfig:
    """The configuration alone, as `load_hf` returns it; no weights are read or downloaded. Raises WeightsError."""
    return dataclasses.replace(_read_config(_find_folder(path, ["config.json"])), dtype=dtype)


def _find_folder(path: str | os.PathLike[str], wanted: list[str]) -> Path:
    folder, name = Path(path).expanduser(), os.fspath(path)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise WeightsError(
            f"{name!r} is neither a folder nor a hub name like 'Qwen/Qwen2.5-3B-Instruct'; correct the path"
        )
    from huggingface_hub import snapshot_download  # imported only if the network is needed

    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub's client passes on errors of its HTTP library (proxy, broken download)
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise WeightsError(
            f"{name!r} is no folder here, and the Hugging Face hub did not give it ({reason}); "
            f"correct the path or name, or download it where there is network and name that folder"
        ) from error


@contextlib.contextmanager
def _reading(file: Path, kind: str) -> Iterator[None]:
    """Turn the errors of a missing or damaged file into a WeightsError that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise WeightsError(
            f"{file} is missing; a checkpoint folder holds config.json and all safetensors files that its index names"
        ) from error
    except OSError as error:
        raise WeightsError(f"{file} cannot be read ({error}); correct its rights, or copy it again") from error
    except (ValueError, SafetensorError) as error:
        raise WeightsError(f"{file} is not {kind} or is damaged ({error}); copy the checkpoint again") from error


def _read_config(folder: Path) -> ModelConfig:
    return config_from_hf(_read_json(folder / "config.json"), source=folder / "config.json")


def _read_json(file: Path) -> dict[str, Any]:
    with _reading(file, "JSON"):
        fields = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise WeightsError(
            f"{file} holds a {type(fields).__name__}; it must be a JSON object: copy the checkpoint again"
        )
    return fields


def _read_headers(folder: Path) -> dict[str, _Stored]:
    """All tensors of a checkpoint, from the headers of its files alone."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.exists():
        return _read_header(single)
    if not index.exists():
        pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in sorted(folder.glob(pattern))]
        found = f"; {pickled[0]} is a pickle, which can run code, and is not read" if pickled else ""
        raise WeightsError(
            f"{folder} holds neither model.safetensors nor {INDEX}{found}: "
            f"get the safetensors version, or convert it once with transformers' save_pretrained"
        )
    weight_map = _read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    if not all(isinstance(name, str) and re.fullmatch(r"[^/\\]+\.safetensors", name) for name in names):
        raise WeightsError(
            f"{index}: weight_map must map tensors to safetensors files of this folder; copy the checkpoint again"
        )
    headers = {name: _read_header(folder / name) for name in sorted(set(names))}
    # Tensors that a file holds although the index does not list them are kept, so that they are reported as left over.
    unlisted = {tensor: stored for header in headers.values() for tensor, stored in header.items()}
    listed = {tensor: headers[file].get(tensor) for tensor, file in weight_map.items()}
    return {tensor: stored for tensor, stored in (unlisted | listed).items() if stored is not None}


def _read_header(file: Path) -> dict[str, _Stored]:
    with _reading(file, "a safetensors file"), safe_open(file, framework="np") as handle:
        # Old Llama files also hold tables of rotary frequencies, which follow from config.json.
        names = [name for name in handle.keys() if not name.endswith("rotary_emb.inv_freq")]
        slices = {name: handle.get_slice(name) for name in names}
        return {name: _Stored(file, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}


def _choose_dtype(stored: dict[str, _Stored], dtype: str | None, folder: Path) -> str:
    found = sorted({tensor.dtype for tensor in stored.values()})
    if dtype is None and (len(found) != 1 or found[0] not in DTYPES):
        raise WeightsError(
            f"{folder} stores tensors as {', '.join(found) or 'nothing'}; name one dtype to load them as: "
            f"{', '.join(DTYPES.values())}"
        )
    dtype = DTYPES[found[0]] if dtype is None else dtype
    if dtype not in DTYPES.values():
        raise WeightsError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES.values())}")
    return dtype


def _check_tensors(leaves: dict[str, Any], stored: dict[str, _Stored], folder: Path, *, tied: bool) -> None:
    head = TENSOR_SPECS["head"].name
    if tied and head in stored and _same_values(head, TENSOR_SPECS["embed"].name, stored):
        stored = {name: tensor for name, tensor in stored.items() if name != head}  # some writers store it once more
    # Integers and 8-bit floats are quantised weights, whose scales are stored elsewhere.
    expected = {tensor.name: (tensor.shape, DTYPES) for tensor in checkpoint_tensors(leaves)}
    refuse_differences(f"{folder}: the tensors are not those that config.json describes", stored, expected)


def _same_values(a: str, b: str, stored: dict[str, _Stored]) -> bool:
    first, second = stored[a], stored.get(b)
    if second is None or first[1:] != second[1:]:
        return False
    with safe_open(first.file, "np") as x, safe_open(second.file, "np") as y:
        x, y = x.get_slice(a), y.get_slice(b)
        rows = (slice(i, min(i + 4096, first.shape[0])) for i in range(0, first.shape[0], 4096))
        return all(np.array_equal(x[part], y[part]) for part in rows)


def _load_leaf(leaf: str, target: jax.ShapeDtypeStruct, stored: dict[str, _Stored]) -> jax.Array:
    """One parameter on its devices; every distinct block is read once."""
    (name, inputs), layered = TENSOR_SPECS[leaf], leaf.startswith("layers/")

    @functools.cache
    def read(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        block = _aligned_empty([stop - start for start, stop in bounds], target.dtype)
        for i, layer in zip(range(*bounds[0]), block, strict=True) if layered else [(None, block)]:
            tensor = name.format(i=i)
            layer[...] = _read_block(stored[tensor].file, tensor, bounds[layered:], target.shape[layered:], inputs)
        return block

    def read_index(index: tuple[slice, ...]) -> np.ndarray:
        return read(tuple(part.indices(size)[:2] for part, size in zip(index, target.shape, strict=True)))

    return jax.make_array_from_callback(target.shape, target.sharding, read_index)


def _aligned_empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Memory that begins at a multiple of 64 bytes, which JAX on a CPU takes over instead of copying it.

    A stacked parameter can be several times larger than a file, so that a copy would be the peak of a load.
    """
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _read_block(
    file: Path, name: str, bounds: tuple[tuple[int, int], ...], shape: tuple[int, ...], inputs: int | None
) -> np.ndarray:
    """The block `bounds` of one layer's parameter, in our layout. The file is mapped only while it is read."""
    if inputs is None:
        index = tuple(slice(*b) for b in bounds)
    else:
        rows = _flat_slice(bounds[inputs:], shape[inputs:])
        index = (rows, _flat_slice(bounds[:inputs], shape[:inputs])) if inputs else (rows,)
    with safe_open(file, framework="np") as handle:
        block = handle.get_slice(name)[index]
    if inputs is None:
        return block
    sizes, outputs = [stop - start for start, stop in bounds], len(shape) - inputs
    block = block.reshape(sizes[inputs:] + sizes[:inputs])
    return block.transpose(*range(outputs, len(shape)), *range(outputs))


def _flat_slice(bounds: tuple[tuple[int, int], ...], shape: tuple[int, ...]) -> slice:
    """The slice of flattened axes that holds a block; only the first axis (heads) is ever divided."""
    inner = math.prod(shape[1:])
    return slice(bounds[0][0] * inner, bounds[0][1] * inner)
