"""Where arrays live: the device mesh and the one table that maps logical axes to it.

A parameter names its axes by meaning ("embed", "heads", "mlp", "vocab"); this table says which mesh axis cuts each:

- `data`   copies the parameters and splits the rows of a batch;
- `fsdp`   splits the rows too, and also cuts every parameter along its model width, so that each device stores a part
           and gathers the rest layer by layer;
- `tensor` cuts heads, the feed-forward and the vocabulary, so that one matrix product is shared by several devices.

To see it at work: a kernel ("embed", "mlp") of shape [D, F] on a mesh (data=2, fsdp=2, tensor=2) is stored as four
different blocks [D/2, F/2], each on two devices.
"""

from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

RULES: tuple[tuple[str, Any], ...] = (
    ("batch", ("data", "fsdp")),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", "fsdp"),
    ("rank", "fsdp"),  # of LoRA's adapters: an axis of the mesh goes to the first rule that asks for it
    ("layers", None),
    ("length", None),
    ("embed_act", None),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices with axes data, fsdp, tensor; one size may be -1 for what is left."""
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(data, fsdp, tensor, len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def abstract_mesh(data: int, fsdp: int, tensor: int, devices: int) -> AbstractMesh:
    """The mesh that `make_mesh` makes of so many devices, without them: for shapes and shardings only."""
    return AbstractMesh(_sizes(data, fsdp, tensor, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def _sizes(data: int, fsdp: int, tensor: int, devices: int) -> tuple[int, int, int]:
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"mesh is data={data}, fsdp={fsdp}, tensor={tensor}; sizes are at least 1, and at most one may be -1"
        )
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, devices // -int(np.prod(sizes)))
    if int(np.prod(sizes)) != devices:
        raise ValueError(
            f"mesh is data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]}, which needs {int(np.prod(sizes))} devices; "
            f"there are {devices}"
        )
    return sizes[0], sizes[1], sizes[2]


def _fit(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Drop mesh axes that do not divide the dimension (few kv heads on a wide `tensor` axis are replicated)."""
    sizes = dict(mesh.shape)
    fitted = []
    for dim, names in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec)), strict=True):
        group = (names,) if isinstance(names, str) else (names or ())
        fits = dim % int(np.prod([sizes[n] for n in group])) == 0
        fitted.append(names if fits else None)
    return PartitionSpec(*fitted)


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """NamedShardings of a tree of logically partitioned (abstract) parameters, as `jax.eval_shape(init)` gives them."""
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)
    shapes = nn.meta.unbox(boxed)
    return jax.tree.map(lambda x, spec: NamedSharding(mesh, _fit(spec, x.shape, mesh)), shapes, specs)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Rows, along an array's `axis`, split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ("data", "fsdp")))


def place(arrays: Any, shardings: Any) -> Any:
    """A tree of NumPy arrays, equal in every process, onto its devices; a process copies what its own ones hold."""
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(np.shape(x), s, lambda part: np.asarray(x)[part]), arrays, shardings
    )
