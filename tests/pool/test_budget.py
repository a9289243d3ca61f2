"""A whole run that has spent its budget: it ends with one line, keeps its last step, and goes on where it was."""

import mains
import pytest
from ledger_totals import ledger_totals
from mains import checkpoint_arrays, train_lines

from router_r1_jax.pool.ledger import read_ledger
from router_r1_jax.storage.checkpoint import CheckpointStore


def finished(workdir):
    with CheckpointStore(workdir / "checkpoints") as store:
        return store.latest()


@pytest.mark.slow
def test_a_run_that_has_spent_its_budget_ends_in_one_line_and_goes_on(finished_run, warm_file, tmp_path):
    paid = sum(line["spent"] for line in read_ledger(finished_run / "ledger.jsonl") if line["split"] != "test")
    settings = (f"warmstart.file={warm_file}", "validation.questions=0")
    done = mains.run("train", tmp_path, *settings, f"pool.budget={paid / 2}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: pool.budget is {paid / 2:g} dollars and ") and "run the same command" in last
    kept, stopped = finished(tmp_path), ledger_totals(tmp_path / "ledger.jsonl")
    assert 0 < kept < 4 and [line["step"] for line in train_lines(tmp_path)] == list(range(1, kept + 1))
    assert stopped["spent"] >= paid / 2  # calls in flight are paid still
    assert "over_budget" in {line["outcome"] for line in read_ledger(tmp_path / "ledger.jsonl")}

    mains.succeed("train", tmp_path, *settings, f"pool.budget={100 * paid}")
    assert finished(tmp_path) == 4 and [line["step"] for line in train_lines(tmp_path)] == [1, 2, 3, 4]
    written, (_, run) = ledger_totals(tmp_path / "ledger.jsonl"), checkpoint_arrays(tmp_path, 4)
    reported = [sum(column) for column in zip(*run["pools"][0]["ledger"].values(), strict=True)]
    assert [written["calls"], written["charged"], written["spent"]] == [
        reported[0],
        reported[1] / 10**12,
        reported[2] / 10**12,
    ]
    assert written["spent"] > stopped["spent"]
