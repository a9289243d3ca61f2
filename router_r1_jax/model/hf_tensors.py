"""Hugging Face checkpoints: names and shapes of the tensors, by the parameter leaf to which they belong.

our leaf        layers/attention/q/kernel               [L, D, N, H]   all layers, inputs before outputs
their tensor    model.layers.3.self_attn.q_proj.weight  [N*H, D]       one layer, outputs (flat) before inputs
"""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from router_r1_jax.model.hf_config import WeightsError

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # names of safetensors -> names of NumPy
_LISTED = 20  # differences that one error message names


class TensorSpec(NamedTuple):
    """The tensors of one leaf. The first `inputs` axes of our layer (after L) are the columns of their tensor.

    The other axes are flattened into rows. None: the shape is the same.
    """

    name: str
    inputs: int | None

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of their tensor for one layer of ours with this shape."""
        if self.inputs is None:
            return shape
        rows = math.prod(shape[self.inputs :])
        return (rows, math.prod(shape[: self.inputs])) if self.inputs else (rows,)


_LAYER = "model.layers.{i}."
TENSOR_SPECS = {
    "embed": TensorSpec("model.embed_tokens.weight", None),
    "layers/attention_norm/scale": TensorSpec(_LAYER + "input_layernorm.weight", None),
    "layers/attention/q/kernel": TensorSpec(_LAYER + "self_attn.q_proj.weight", 1),
    "layers/attention/q/bias": TensorSpec(_LAYER + "self_attn.q_proj.bias", 0),
    "layers/attention/k/kernel": TensorSpec(_LAYER + "self_attn.k_proj.weight", 1),
    "layers/attention/k/bias": TensorSpec(_LAYER + "self_attn.k_proj.bias", 0),
    "layers/attention/v/kernel": TensorSpec(_LAYER + "self_attn.v_proj.weight", 1),
    "layers/attention/v/bias": TensorSpec(_LAYER + "self_attn.v_proj.bias", 0),
    "layers/attention/o/kernel": TensorSpec(_LAYER + "self_attn.o_proj.weight", 2),
    "layers/attention/q_norm/scale": TensorSpec(_LAYER + "self_attn.q_norm.weight", None),
    "layers/attention/k_norm/scale": TensorSpec(_LAYER + "self_attn.k_norm.weight", None),
    "layers/mlp_norm/scale": TensorSpec(_LAYER + "post_attention_layernorm.weight", None),
    "layers/mlp/gate/kernel": TensorSpec(_LAYER + "mlp.gate_proj.weight", 1),
    "layers/mlp/up/kernel": TensorSpec(_LAYER + "mlp.up_proj.weight", 1),
    "layers/mlp/down/kernel": TensorSpec(_LAYER + "mlp.down_proj.weight", 1),
    "final_norm/scale": TensorSpec("model.norm.weight", None),
    "head": TensorSpec("lm_head.weight", None),
}


class Tensor(NamedTuple):
    """One tensor of a checkpoint: layer `layer` of our leaf `leaf`, or all of the leaf if `layer` is None."""

    name: str
    leaf: str
    layer: int | None
    shape: tuple[int, ...]


def checkpoint_tensors(leaves: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors of a checkpoint with these leaves, in the order of TENSOR_SPECS, layer after layer."""
    layered = [leaf for leaf in TENSOR_SPECS if leaf in leaves and leaf.startswith("layers/")]
    for leaf, spec in TENSOR_SPECS.items():
        if leaf in leaves and leaf not in layered:
            yield Tensor(spec.name, leaf, None, spec.stored_shape(leaves[leaf].shape))
    for layer in range(leaves[layered[0]].shape[0]):
        for leaf in layered:
            spec = TENSOR_SPECS[leaf]
            yield Tensor(spec.name.format(i=layer), leaf, layer, spec.stored_shape(leaves[leaf].shape[1:]))


def refuse_differences(
    what: str, found: Mapping[str, Any], expected: Mapping[str, tuple[tuple[int, ...], Collection[str]]]
) -> None:
    """Raise WeightsError, with all differences in one message, if `found` has other names, shapes or dtypes.

    Args:
      what: the first words of the message.
      found: name -> anything that has `shape` and `dtype`.
      expected: name -> shape, and the dtypes that are possible.
    """
    faults = [f"missing {name}" for name in expected if name not in found]
    faults += [f"left over {name} {list(found[name].shape)}" for name in sorted(found.keys() - expected.keys())]
    for name in [name for name in expected if name in found]:
        (shape, dtypes), tensor = expected[name], found[name]
        if tensor.shape != shape:
            faults.append(f"{name} has shape {list(tensor.shape)}, not {list(shape)}")
        if str(tensor.dtype) not in dtypes:
            faults.append(f"{name} is stored as {tensor.dtype}, not as {' or '.join(dtypes)}")
    if faults:
        more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        raise WeightsError(f"{what}: {'; '.join(faults[:_LISTED])}{more}")
