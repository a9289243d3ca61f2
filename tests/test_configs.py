"""The configurations that a user starts from, rehearsed as `runlocal`: the same settings with a small random model."""

from pathlib import Path

import mains
import pytest

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen25_3b_grpo", "paper_ppo"])
def test_a_real_run_can_be_rehearsed_on_a_cpu(name, tmp_path):
    mains.succeed("train", tmp_path, config=f"{CONFIGS / name}.py:runlocal", timeout=2 * mains.TIMEOUT)
    lines = mains.train_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    # In half precision, sampler and learner are the same policy but for its rounding.
    assert all(line["skipped_updates"] == 0 and line["logp_diff_mean"] < 0.05 for line in lines)
