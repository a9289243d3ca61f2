"""Device mesh (data, FSDP and tensor axes), the logical axis rules that shard parameters, and shardings of batches.

A parameter names its axes by their meaning ("embed", "heads", "mlp", "vocab"). RULES maps each name to a mesh axis:

- `data`   replicates the parameters and splits the rows of a batch;
- `fsdp`   splits the rows too. It also shards every parameter along its model width: each device stores one part and
           gathers the other parts layer by layer;
- `tensor` shards heads, feed-forward and vocabulary, so that several devices share one matrix product.

For example, a kernel ("embed", "mlp") of shape [D, F] on a mesh (data=2, fsdp=2, tensor=2) is stored as four different
blocks [D/2, F/2], each on two devices.
"""

from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from router_r1_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

RULES: tuple[tuple[str, Any], ...] = (
    ("batch", ("data", "fsdp")),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", "fsdp"),
    ("rank", "fsdp"),  # of LoRA adapters; if "embed" is an axis too, it takes fsdp, because its rule comes first
    ("layers", None),
    ("length", None),
    ("embed_act", None),
)


class MeshError(UserError, ValueError):
    """A mesh that does not fit the devices; the message names its sizes."""


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with axes data, fsdp, tensor over `devices` (default: all devices of all processes).

    One size may be -1: it takes the devices that the other sizes leave. Raises MeshError if the sizes do not fit.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(data, fsdp, tensor, len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def abstract_mesh(data: int, fsdp: int, tensor: int, devices: int) -> AbstractMesh:
    """The mesh that `make_mesh` makes of this number of devices, for shapes and shardings only: it needs no device."""
    return AbstractMesh(_sizes(data, fsdp, tensor, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def _sizes(data: int, fsdp: int, tensor: int, devices: int) -> tuple[int, ...]:
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise MeshError(
            f"mesh is data={data}, fsdp={fsdp}, tensor={tensor}; sizes are at least 1, and at most one may be -1"
        )
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, devices // -int(np.prod(sizes)))
    if int(np.prod(sizes)) != devices:
        raise MeshError(
            f"mesh is data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]}, which needs {int(np.prod(sizes))} devices; "
            f"there are {devices}"
        )
    return tuple(sizes)


def _fit(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Drop mesh axes that do not divide their dimension: few kv heads on a large `tensor` axis are replicated."""
    axes = zip(shape, spec, strict=True)
    return PartitionSpec(*(axis if axis and size % mesh.shape[axis] == 0 else None for size, axis in axes))


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """NamedShardings of a tree of logically partitioned parameters, such as `jax.eval_shape(init)` returns."""
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)
    shapes = nn.meta.unbox(boxed)
    return jax.tree.map(lambda x, spec: NamedSharding(mesh, _fit(spec, x.shape, mesh)), shapes, specs)


def row_shares(mesh: Mesh | AbstractMesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array of which every device holds a whole copy."""
    return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding of an array whose rows, along `axis`, are split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ("data", "fsdp")))


def place(arrays: Any, shardings: Any) -> Any:
    """Copy a tree of NumPy arrays, equal in every process, to the devices; each process copies to its own devices."""
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(np.shape(x), s, lambda part: np.asarray(x)[part]), arrays, shardings
    )
