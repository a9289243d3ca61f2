"""The model split over devices: the same numbers as on one, and nothing large left whole where it should be cut."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from safetensors.numpy import load_file

from router_r1_jax.distributed.mesh import AXES, RULES
from router_r1_jax.model import LoRA, abstract_params, preset

SCRIPT = Path(__file__).parent / "sharded_model.py"
MESHES = ["8x1x1", "1x8x1", "4x1x2", "2x2x2"]


@pytest.fixture(scope="module", params=["qwen2_tied", "qwen3_tied", "llama_untied"])
def sharded(request, checkpoint, tmp_path_factory):
    """Results and exports of sharded_model.py on 8 fake devices, and the checkpoint they started from."""
    c, out = checkpoint(request.param), tmp_path_factory.mktemp("sharded")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, SCRIPT, c.folder, out], env=environment, check=True, timeout=300)
    return json.loads((out / "results.json").read_text()), out, c


@pytest.mark.parametrize("mesh", MESHES)
def test_logits_and_gradients_are_those_of_one_device(sharded, mesh):
    results, _, _ = sharded
    assert results[mesh]["logits"] < 1e-5
    assert results[mesh]["gradients"] < 1e-5


@pytest.mark.parametrize("mesh", MESHES)
def test_checkpoint_comes_to_the_mesh_and_back_unchanged(sharded, mesh):
    results, out, c = sharded
    assert results[mesh]["placed"] and results[mesh]["same"]
    saved, original = load_file(out / f"export_{mesh}" / "model.safetensors"), load_file(c.folder / "model.safetensors")
    assert saved.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(saved[name], tensor)


def test_blocks_have_the_sizes_that_the_mesh_says(sharded):
    """The checkpoint's own kernel [L, D, N, H] is cut in D by fsdp, in N by tensor; the embedding in D and V."""
    results, _, c = sharded
    L, D, N, H = c.params["layers"]["attention"]["q"]["kernel"].shape
    for mesh in MESHES:
        _, fsdp, tensor = map(int, mesh.split("x"))
        assert results[mesh]["q_block"] == [L, D // fsdp, N // tensor, H]
        assert results[mesh]["embed_block"] == [c.config.vocab_size // tensor, D // fsdp]


def large_and_whole(config, sizes):
    """Parameters above 1 MB, and those of them of which a device holds more than 1/fsdp."""
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    leaves = jax.tree.leaves_with_path(abstract_params(config, mesh))
    large = {jax.tree_util.keystr(path): x for path, x in leaves if x.size * x.dtype.itemsize > 1e6}
    return large, [name for name, x in large.items() if np.prod(x.sharding.shard_shape(x.shape)) * sizes[1] > x.size]


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen3-0.6B", "Llama-3.2-1B"])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 2, 4), (1, 16, 8), (8, 4, 1)])
def test_no_large_parameter_is_whole_where_fsdp_cuts(name, sizes):
    """Each device holds at most 1/fsdp of every parameter above 1 MB."""
    config = dataclasses.replace(preset(name), lora=LoRA(rank=16, alpha=32.0))
    large, whole = large_and_whole(config, sizes)
    assert len(large) >= 16 and whole == []  # embedding, and the seven kernels of a layer with most of their adapters


def test_a_large_parameter_that_stays_whole_is_found(monkeypatch):
    """A width that fsdp does not divide, and rules that forget the model's width."""
    config = preset("Qwen2.5-0.5B")
    large, whole = large_and_whole(dataclasses.replace(config, width=897), (1, 8, 1))
    assert whole == list(large) != []
    monkeypatch.setattr("router_r1_jax.distributed.mesh.RULES", tuple((dict(RULES) | {"embed": None}).items()))
    large, whole = large_and_whole(config, (1, 8, 1))
    assert whole == list(large) != []
