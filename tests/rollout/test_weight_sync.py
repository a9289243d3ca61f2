"""Weights on their way from the learner's mesh to the rollout's replicas."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_replicas_get_the_weights_from_devices_alone():
    """On eight fake devices, from three meshes, for replicas of one device and of two."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    script = Path(__file__).parent / "sharded_weight_sync.py"
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report.pop("fetches of the truth") > 0  # what is counted can be seen
    assert len(report) == 6
    for name, found in report.items():
        assert found["equal"] and found["at home"], name
        assert found["fetches"] == 0, name
        assert found["bytes"] == found["lacking"], name
        assert (found["bytes"] == 0) == name.startswith("8,1,1"), name  # data copies: each device has all of it
