"""Weight sync: parameters go from the learner's mesh to the rollout's replicas, from device to device, past the host.

The learner shards parameters over the devices of all processes, and a replica needs them on its few devices. One
program over all devices reshards them so that each device holds what its replica needs. A replica then takes the shards
that lie on its devices.
"""

import functools
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from router_r1_jax.distributed.mesh import AXES
from router_r1_jax.model import ModelConfig, Params, abstract_params


class WeightSync:
    """Reshards stacked parameters for replicas of `tensor` devices each, on all devices of the learner's mesh.

    Attributes:
      nbytes: bytes that devices, of all processes, receive from other devices for it.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, tensor: int) -> None:
        """The devices of a replica are neighbours in `jax.local_devices()`, whose number `tensor` divides."""
        learners = list(mesh.devices.flat)
        order = learners if tensor == 1 else sorted(learners, key=lambda d: (d.process_index, d.id))
        grid = np.array(order).reshape(-1, 1, tensor)
        targets = jax.tree.leaves(abstract_params(model, Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)))
        pairs = list(zip(jax.tree.leaves(abstract_params(model, mesh)), targets, strict=True))
        self._moving = [i for i, (x, y) in enumerate(pairs) if not x.sharding.is_equivalent_to(y.sharding, x.ndim)]
        self.nbytes = sum(_received_bytes(x, y.sharding) for x, y in pairs)
        shardings = [targets[i].sharding for i in self._moving]
        if order == learners:
            self._reshard = jax.jit(lambda arrays: arrays, out_shardings=shardings)
        else:  # a jitted program needs its devices in one order; device_put reorders them
            self._reshard = functools.partial(jax.device_put, device=shardings)

    def __call__(self, params: Params) -> Params:
        """Reshard parameters that lie on the learner's mesh. Those that already lie as wanted are not copied."""
        leaves, tree = jax.tree.flatten(params)
        for i, moved in zip(self._moving, self._reshard([leaves[i] for i in self._moving]), strict=True):
            leaves[i] = moved
        return tree.unflatten(leaves)


def take_local(x: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array with `sharding`, on devices of this process: without a copy if its shards lie there already."""
    if isinstance(x, jax.Array):
        here = {shard.device: shard for shard in x.addressable_shards}
        wanted = sharding.addressable_devices_indices_map(x.shape)
        if all(device in here and here[device].index == index for device, index in wanted.items()):
            return jax.make_array_from_single_device_arrays(x.shape, sharding, [here[d].data for d in wanted])
    return jax.device_put(x, sharding)


def _received_bytes(source: jax.ShapeDtypeStruct, target: NamedSharding) -> int:
    """Bytes of the target's shards that their devices do not hold before."""
    shape, held = source.shape, source.sharding.devices_indices_map(source.shape)

    def common(device: jax.Device, index: tuple[slice, ...]) -> int:
        spans = [(a.indices(n), b.indices(n)) for a, b, n in zip(index, held[device], shape, strict=True)]
        return math.prod(max(0, min(a[1], b[1]) - max(a[0], b[0])) for a, b in spans)

    whole = math.prod(target.shard_shape(shape))
    scalars = sum(whole - common(device, index) for device, index in target.devices_indices_map(shape).items())
    return scalars * source.dtype.itemsize
