"""A checkpoint is read straight into its places: the host never holds the parameters and the files at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from router_r1_jax.distributed.mesh import make_mesh
from router_r1_jax.model import ModelConfig, init_params, save_hf

SCRIPT = Path(__file__).parent / "load_memory.py"
SHARD = 20_000_000
# A stacked parameter (12 layers' gates: 50 MB) is larger than a file, and must still not be held twice.
BIG = ModelConfig(
    vocab_size=8192, num_layers=12, width=512, mlp=2048, num_heads=8, num_kv_heads=8, head_dim=64, family="llama"
)
TINY = ModelConfig(vocab_size=64, num_layers=2, width=32, mlp=64, num_heads=2, num_kv_heads=1, head_dim=16)
# What is neither a parameter nor a part of a file: allocator arenas that stay after a block is freed, headers, traces.
SLACK = 8_000_000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_is_the_parameters_and_about_one_shard(tmp_path):
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    for name, config in (("tiny", TINY), ("big", BIG)):
        save_hf(tmp_path / name, config, init_params(config, mesh, seed=0), max_shard_bytes=SHARD)
    shards = [file.stat().st_size for file in (tmp_path / "big").glob("*.safetensors")]
    assert len(shards) > 8 and max(shards) > SHARD // 2
    command = [sys.executable, SCRIPT, tmp_path / "tiny", tmp_path / "big"]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    growth = found["peak"] - found["before"]
    assert growth >= found["parameters"]  # the measurement sees them
    assert growth <= found["parameters"] + 1.25 * max(shards) + SLACK, found
