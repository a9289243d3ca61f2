"""The tiny configuration under two seeds, one of which cannot start: its warm start is from another recipe."""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from router_r1_jax.sweep import Overrides, choices, zipped


def get_config(arg: str | None = None) -> ConfigDict:
    c = runpy.run_path(str(Path(__file__).parent / "tiny_config.py"))["get_config"]()
    c.steps = 1
    c.validation.questions = 0
    c.evaluation.update(dict(questions=8, baseline=""))
    return c


def get_sweep() -> list[Overrides]:
    return zipped(choices("seed", 0, 1), choices("warmstart.batch", 32, 16))
