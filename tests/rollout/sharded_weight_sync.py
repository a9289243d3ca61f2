"""Run by test_weight_sync.py with eight CPU devices: reshards weights of several meshes for replicas; prints JSON."""

import json

import jax
import numpy as np
from tiny_router import MODEL

from router_r1_jax.distributed.mesh import make_mesh
from router_r1_jax.model import abstract_params, init_params
from router_r1_jax.rollout import WeightSync
from router_r1_jax.rollout.weight_sync import take_local

fetched = []  # shapes of arrays that were copied to the host


def watch_fetches():
    """Note every array that JAX brings to the host."""
    array = type(jax.device_put(0))
    fetch = array._value.fget

    def noted(self):
        fetched.append(self.shape)
        return fetch(self)

    array._value = property(noted)


def lacking(params, targets):
    """Bytes that devices do not hold before and hold after, counted element by element."""
    total = 0
    for x, target in zip(jax.tree.leaves(params), targets, strict=True):
        for device, index in target.devices_indices_map(x.shape).items():
            missing = np.zeros(x.shape, bool)
            missing[index] = True
            missing[x.sharding.devices_indices_map(x.shape)[device]] = False
            total += int(missing.sum()) * x.dtype.itemsize
    return total


def main():
    watch_fetches()
    truth = jax.device_get(init_params(MODEL, make_mesh(1, 1, 1, jax.devices()[:1]), seed=0))
    report = {"fetches of the truth": len(fetched)}
    for sizes in ((8, 1, 1), (1, 8, 1), (2, 2, 2)):
        for tensor in (1, 2):
            mesh = make_mesh(*sizes)
            params = init_params(MODEL, mesh, seed=0)
            fetched.clear()
            weight_sync = WeightSync(MODEL, mesh, tensor)
            laid_out = weight_sync(params)
            groups = [jax.devices()[i : i + tensor] for i in range(0, 8, tensor)]
            meshes = [make_mesh(1, 1, tensor, group) for group in groups]
            shardings = [jax.tree.map(lambda x: x.sharding, abstract_params(MODEL, m)) for m in meshes]
            replicas = [jax.tree.map(take_local, laid_out, s) for s in shardings]
            jax.block_until_ready(replicas)
            found = {"fetches": len(fetched), "bytes": weight_sync.nbytes}
            found["lacking"] = lacking(params, [x.sharding for x in jax.tree.leaves(laid_out)])
            found["equal"] = all(
                np.array_equal(x, y)
                for replica in replicas
                for x, y in zip(jax.tree.leaves(replica), jax.tree.leaves(truth), strict=True)
            )
            where = [{d for x in jax.tree.leaves(replica) for d in x.sharding.device_set} for replica in replicas]
            found["at home"] = where == [set(group) for group in groups]
            report[f"{','.join(map(str, sizes))} for {tensor}"] = found
    print(json.dumps(report))


if __name__ == "__main__":
    main()
