"""The launcher: flags, errors, exit status and interrupts; and the list of all commands."""

import signal
import subprocess
import sys

import pytest

import router_r1_jax.__main__
from router_r1_jax.launcher import Interrupts

COMMAND = """
import sys
from router_r1_jax.errors import UserError
from router_r1_jax.launcher import Flag, launch
def main(*arguments, word, number, fail):
    if fail == "error":
        raise UserError("this is wrong; write that")
    if fail == "interrupt":
        raise KeyboardInterrupt
    print(arguments, word, number, "jax" in sys.modules)
    return 2
flags = {"word": Flag(str, "a word"), "number": Flag(3, "a number"), "fail": Flag("", "how to fail")}
launch(main, flags, config=CONFIG, workdir=CONFIG)
"""


def run_command(*flags, config=False):
    code = COMMAND.replace("CONFIG", str(config))
    return subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, timeout=120)


def test_a_command_without_configuration_gets_its_flags_and_gives_the_exit_status():
    done = run_command("--word=a", "--number=4")
    assert (done.returncode, done.stdout, done.stderr) == (2, "() a 4 False\n", "")


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ([], 1, "error: missing flags: --word (a word)"),
        (["--wrod=a"], 1, "error: Unknown command line flag 'wrod'. Did you mean: word ?; --help lists the flags"),
        (["--word=a", "--number=x"], 1, "error: flag --number=x: invalid literal for int() with base 10: 'x'; --help"),
        (["--word=a", "more"], 1, "error: 'more' is no flag; overrides are written --config.field=value"),
        (["--word=a", "--fail=error"], 1, "error: this is wrong; write that"),
        (["--word=a", "--fail=interrupt"], 130, "interrupted"),
    ],
)
def test_what_ends_a_command_is_one_line(flags, status, message):
    done = run_command(*flags)
    assert done.returncode == status and done.stdout == ""
    assert done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1


def test_all_missing_flags_are_named_at_once():
    done = run_command(config=True)
    assert done.returncode == 1
    assert all(name in done.stderr for name in ("missing flags: --config (", ", --workdir (", ", --word ("))
    assert len(done.stderr.splitlines()) == 1


def test_the_package_lists_its_commands():
    done = subprocess.run([sys.executable, "-m", "router_r1_jax"], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    names = [line.split()[2].removeprefix("router_r1_jax.") for line in lines]
    assert done.returncode == 0 and names == sorted(router_r1_jax.__main__.list_commands())
    assert set(names) == set(
        "train evaluate sweep export plan baselines training.warmstart data.prepare pool.check pool.call_cache "
        "synthetic.oracle".split()
    )
    assert all(line.endswith(".") and len(line.split()) > 5 for line in lines)


@pytest.fixture
def interrupts():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Interrupts()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_work_that_must_be_whole_and_a_second_one_does_not(interrupts, number):
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    interrupts = Interrupts()
    interrupts.hold()
    signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt):
        interrupts.release()
    interrupts = Interrupts()
    interrupts.hold()
    signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


def test_work_that_nobody_interrupts_goes_on(interrupts):
    interrupts.hold()
    interrupts.release()


def test_an_interrupt_that_python_drops_is_raised_again(interrupts, monkeypatch):
    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: dropped.append(unraisable.exc_type))

    class Dropped:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    Dropped()
    assert dropped == [KeyboardInterrupt]
    with pytest.raises(KeyboardInterrupt):
        interrupts.release()


def test_a_background_job_goes_on_ignoring_ctrl_c(interrupts):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Interrupts().hold()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
