"""The mesh and the table of logical axes, on meshes that need no devices."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from router_r1_jax.distributed.mesh import AXES, abstract_mesh, make_mesh, param_shardings, replicated, rows_sharding


def mesh_of(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def leaf(shape, *names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, np.float32), names)


def test_one_device_takes_any_size_that_is_left():
    for sizes in ((-1, 1, 1), (1, -1, 1), (1, 1, -1), (1, 1, 1)):
        mesh = make_mesh(*sizes, devices=jax.devices()[:1])
        assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
        assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, -1, 1), "data=-1, fsdp=-1, tensor=1; .* at most one may be -1"),
        ((2, 1, 1), "needs 2 devices; there are 1"),
        ((-1, 3, 2), "data=1, fsdp=3, tensor=2, which needs 6 devices; there are 1"),
        ((-1, 0, 1), "fsdp=0, .* at least 1"),
        ((-2, 1, 1), "data=-2, .* at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(*sizes, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match=message):
        abstract_mesh(*sizes, devices=1)


def test_an_abstract_mesh_is_that_of_devices_that_are_not_there():
    assert abstract_mesh(-1, 8, 2, devices=64) == mesh_of(4, 8, 2)


def test_the_picture_of_the_module_docstring():
    """A kernel [D, F] on (2, 2, 2): four blocks [D/2, F/2], each on two devices."""
    (sharding,) = param_shardings([leaf((8, 12), "embed", "mlp")], mesh_of(2, 2, 2))
    assert sharding.spec == PartitionSpec("fsdp", "tensor")
    assert sharding.shard_shape((8, 12)) == (4, 6)


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        (("layers", "embed", "heads", None), (2, 16, 4, 8), PartitionSpec(None, "fsdp", "tensor", None)),
        (("layers", "embed", "kv_heads", None), (2, 16, 2, 8), PartitionSpec(None, "fsdp", None, None)),
        (("layers", "embed"), (2, 16), PartitionSpec(None, "fsdp")),
        (("vocab", "embed"), (48, 16), PartitionSpec("tensor", "fsdp")),
        (("vocab", "embed"), (50, 15), PartitionSpec(None, None)),
    ],
    ids=["heads", "few kv heads are replicated", "norm", "embedding", "nothing divides"],
)
def test_axes_that_do_not_divide_are_replicated(names, shape, expected):
    (sharding,) = param_shardings([leaf(shape, *names)], mesh_of(1, 2, 4))
    assert sharding.spec == expected


def test_rows_are_split_over_data_and_fsdp_and_nothing_else():
    mesh = mesh_of(2, 2, 2)
    assert rows_sharding(mesh).shard_shape((8, 5)) == (2, 5)
    assert rows_sharding(mesh, axis=1).shard_shape((8, 4, 5)) == (8, 1, 5)
    assert replicated(mesh).shard_shape((8, 5)) == (8, 5)
