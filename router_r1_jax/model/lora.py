"""LoRA: split adapters from the frozen base, add fresh adapters, and merge them into the base (LoRA merge).

Adapters are leaves `lora_a` and `lora_b` beside the kernel that they adapt (`transformer.Projection`), so that layouts,
shardings and checkpoints treat them like any other parameter.
"""

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from router_r1_jax.model.config import ModelConfig
from router_r1_jax.model.init_params import abstract_params, random_params
from router_r1_jax.model.transformer import Params

_ADAPTER = ("lora_a", "lora_b")


def split_trainable(params: Params) -> tuple[Params, Params]:
    """(trainable, frozen) parameters: adapters and base, or without adapters all parameters and {}."""
    flat = flatten_dict(params)
    adapters = {path: leaf for path, leaf in flat.items() if path[-1] in _ADAPTER}
    if not adapters:
        return params, {}
    base = {path: leaf for path, leaf in flat.items() if path not in adapters}
    return unflatten_dict(adapters), unflatten_dict(base)


def join(trainable: Params, frozen: Params) -> Params:
    """The inverse of `split_trainable`."""
    return unflatten_dict(flatten_dict(trainable) | flatten_dict(frozen))


def add_adapters(config: ModelConfig, base: Params, mesh: Mesh, seed: int) -> Params:
    """Stacked base parameters with fresh adapters of `config.lora` beside them; `base` itself if it has none."""
    if config.lora is None:
        return base
    shardings = jax.tree.map(lambda x: x.sharding, split_trainable(abstract_params(config, mesh))[0])
    make = jax.jit(lambda key: split_trainable(random_params(config, key))[0], out_shardings=shardings)
    return join(make(jax.random.key(seed)), base)


def merge_adapters(config: ModelConfig, params: Params) -> Params:
    """Parameters of `config.base` with the same logits up to rounding: each kernel W becomes W + alpha / rank A B.

    The sum is computed in the adapters' dtype and rounded once. The parameters are stacked; `jax.jit` is possible.
    """
    if config.lora is None:
        return params
    adapters, base = (flatten_dict(part) for part in split_trainable(params))
    for *path, name in adapters:
        if name != "lora_a":
            continue
        kernel = base[(*path, "kernel")]
        a, b = adapters[(*path, "lora_a")], adapters[(*path, "lora_b")]
        layers, rank = a.shape[0], a.shape[-1]
        product = a.reshape(layers, -1, rank) @ b.reshape(layers, rank, -1)
        merged = kernel.astype(config.adapter_dtype) + config.lora.scale * product.reshape(kernel.shape)
        base[(*path, "kernel")] = merged.astype(kernel.dtype)
    return unflatten_dict(base)
