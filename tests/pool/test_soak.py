"""The soak of `experiments/soak_pool.py`, at a size that a test can afford."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "experiments"))
from soak_pool import soak  # noqa: E402


@pytest.mark.slow
def test_no_call_is_lost_or_charged_twice_whatever_fails():
    """A server process, every kind of fault, more calls than threads."""
    result = soak(600)
    assert (result["calls"], result["lost"], result["double_charged"]) == (600, 0, 0)
    assert result["requests"] > 480  # different calls are made, and some again
