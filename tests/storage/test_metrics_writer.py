"""metrics.jsonl: what is written is read back, a killed run resumes as if never killed, and mirrors get the numbers."""

import json
import subprocess
import sys
import types

import numpy as np
import pytest

from router_r1_jax.storage.metrics_writer import MetricsWriter, read_metrics


def play(workdir, first, last, resume_step=None):
    writer = MetricsWriter(workdir, resume_step=resume_step)
    for step in range(first, last + 1):
        writer.write(step, {"loss": step * 0.5})
    writer.close()


def test_lines_are_flat_plain_and_strict_json(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(
        3,
        {
            "loss": float("nan"),
            "kl": np.float32("inf"),
            "em": np.float32(0.5),
            "groups": np.int64(7),
            "calls/share": {"A": np.array(0.25), "B": 0.75},
            "phase": "warmstart",
        },
    )
    writer.close()

    def refuse(constant):
        raise AssertionError(constant)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {
        "step": 3,
        "loss": None,
        "kl": None,
        "em": 0.5,
        "groups": 7,
        "calls/share/A": 0.25,
        "calls/share/B": 0.75,
        "phase": "warmstart",
    }
    assert read_metrics(tmp_path) == [line]


def test_a_line_is_on_disk_before_the_writer_is_closed(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 1.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]
    writer.close()


@pytest.mark.parametrize("torn", [b"", b'{"step": 8, "lo', b'{"step": 8, "loss": 4.0}', b"\x00\x00"])
def test_resume_equals_the_uninterrupted_run(tmp_path, torn):
    play(tmp_path / "whole", 1, 10)
    play(tmp_path / "killed", 1, 7)
    with (tmp_path / "killed" / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert [line["step"] for line in read_metrics(tmp_path / "killed")] == list(range(1, 8))
    play(tmp_path / "killed", 5, 10, resume_step=4)
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_kill_9_in_mid_run_loses_no_earlier_line(tmp_path):
    script = (
        "import os, signal, sys; from router_r1_jax.storage.metrics_writer import MetricsWriter\n"
        "w = MetricsWriter(sys.argv[1])\n"
        "for step in range(1, 6): w.write(step, {'loss': step * 0.5})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path / "killed")]).returncode == -9
    play(tmp_path / "killed", 4, 6, resume_step=3)
    play(tmp_path / "whole", 1, 6)
    assert read_metrics(tmp_path / "killed") == read_metrics(tmp_path / "whole")


def test_resume_keeps_the_warm_start_and_a_new_run_keeps_nothing(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(500, {"phase": "warmstart", "warmstart/loss": 0.1})
    writer.write(1, {"loss": 1.0})
    writer.write(2, {"loss": 2.0})
    writer.close()
    MetricsWriter(tmp_path, resume_step=1).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [500, 1]
    MetricsWriter(tmp_path).close()
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("broken", ["{oops}", "[1]", ""])
def test_a_broken_line_in_the_middle_is_named(tmp_path, broken):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + broken + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is .*delete that line"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match="line 2"):
        MetricsWriter(tmp_path, resume_step=3)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3  # refused, not cut


def test_no_file_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []


def test_a_full_disk_names_the_file_and_leaves_whole_lines(tmp_path):
    script = (
        "import resource, signal, sys; from router_r1_jax.storage.metrics_writer import MetricsWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"  # then the limit acts like a full disk
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "w = MetricsWriter(sys.argv[1])\n"
        "w.write(1, {'loss': 1.0}); w.write(2, {'text': 'x' * 200})"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode != 0
    assert f"File too large: '{tmp_path}/metrics.jsonl'" in done.stderr
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'


class Recorder(types.ModuleType):
    """A module whose functions and objects only note how they were called."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs)) or self


def test_tensorboard_gets_every_number_and_purges_on_resume(tmp_path, monkeypatch):
    board = Recorder("tensorboardX")
    monkeypatch.setitem(sys.modules, "tensorboardX", board)
    writer = MetricsWriter(tmp_path, tensorboard=True, resume_step=4)
    writer.write(5, {"loss": 2.0, "kl": float("nan"), "calls/share": {"A": 1}})
    writer.close()
    assert ("SummaryWriter", (), {"logdir": str(tmp_path / "tensorboard/train"), "purge_step": 5}) in board.calls
    assert [args for name, args, _ in board.calls if name == "add_scalar"] == [
        ("loss", 2.0, 5),
        ("calls/share/A", 1, 5),
    ]
    assert board.calls[-1][0] == "close"


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    wandb = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for resume_step in (None, 4, None):
        writer = MetricsWriter(tmp_path, wandb="routing", resume_step=resume_step)
        writer.write(5, {"loss": 2.0})
        writer.write(7, {"phase": "warmstart", "warmstart/loss": 1.0})
        writer.close()
    first, resumed, anew = (kwargs for name, _, kwargs in wandb.calls if name == "init")
    assert first["id"] == resumed["id"] != anew["id"] and first["project"] == "routing"
    logged = [args[0] for name, args, _ in wandb.calls if name == "log"]
    assert logged[:2] == [{"loss": 2.0, "step": 5}, {"warmstart/loss": 1.0, "warmstart/step": 7}]


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        ("tensorboardX", {"tensorboard": True}, r"logging.tensorboard is True.*router_r1_jax\[tensorboard\]"),
        ("wandb", {"wandb": "routing"}, r"logging.wandb is 'routing'.*router_r1_jax\[wandb\]"),
    ],
)
def test_a_missing_extra_is_named_and_nothing_is_cut(tmp_path, monkeypatch, module, options, message):
    play(tmp_path, 1, 3)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        MetricsWriter(tmp_path, **options)
    assert len(read_metrics(tmp_path)) == 3
