"""Command launcher: command-line flags, compilation cache, interrupts (Ctrl-C, SIGTERM), and errors as one clear line.

Every command of the package starts in the same way:

    if __name__ == "__main__":
        launch(main, {"folder": Flag("", "new folder to write")})

JAX is imported only by commands that take a configuration.
"""

import contextlib
import errno
import os
import re
import signal
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, logging
from absl import flags as absl_flags
from ml_collections import config_flags

import router_r1_jax.config
from router_r1_jax.config import ConfigError
from router_r1_jax.config_checks import validate
from router_r1_jax.errors import UserError

# What the system reports for a disk that takes no more data. Libraries pass it on without the file's name.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
FIELDS = "every field stands with its type and meaning in router_r1_jax/config.py"
FLAGS = absl_flags.FLAGS
_DEFINE = {
    bool: absl_flags.DEFINE_bool,
    int: absl_flags.DEFINE_integer,
    float: absl_flags.DEFINE_float,
    str: absl_flags.DEFINE_string,
}


class Flag(NamedTuple):
    """One command-line flag. The type of `default` is the flag's type; a type as default makes the flag required."""

    default: bool | int | float | str | type
    help: str
    least: float | None = None  # a smaller number is refused


def launch(
    main: Callable[..., int | None],
    flags: Mapping[str, Flag] = types.MappingProxyType({}),
    *,
    config: bool = True,
    workdir: bool = True,
    multihost: bool = False,
) -> None:
    """Parse the command line and call `main(config, workdir, **flags)`.

    The process ends with the status that main returns (None is 0), with 1 after an error that names its fix, and with
    130 after an interrupt.

    Args:
      main: the command.
      flags: flags of this command alone, by name.
      config: the command takes --config. The configuration is validated before main is called.
      workdir: the command takes --workdir. Main gets it as an absolute path.
      multihost: the command can run as several processes (`distributed.multihost`).
    """
    holders = {}
    if config:
        text = "configuration file, such as configs/demo.py"
        holders["config"] = config_flags.DEFINE_config_file("config", help_string=text)
    if workdir:
        flags = {"workdir": Flag(str, "folder of the run: metrics, checkpoints, episodes, report")} | dict(flags)
    for name, flag in flags.items():
        kind, default = (flag.default, None) if isinstance(flag.default, type) else (type(flag.default), flag.default)
        bound = {} if flag.least is None else {"lower_bound": flag.least}
        holders[name] = _DEFINE[kind](name, default, flag.help, **bound)

    def call_main(argv: list[str]) -> int | None:
        if len(argv) > 1:
            raise ConfigError(f"{argv[1]!r} is no flag; overrides are written --config.field=value")
        values = {name: holder.value for name, holder in holders.items()}
        missing = [f"--{name} ({FLAGS[name].help})" for name, value in values.items() if value is None]
        if missing:
            raise ConfigError(f"missing flags: {', '.join(missing)}")
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.ERROR)  # libraries' messages are shown with --verbosity only
        if config:
            validate(values["config"])
            _prepare_jax(values["config"], multihost)
        if workdir:
            values["workdir"] = Path(values["workdir"]).absolute()
        positional = [values.pop(name) for name in ("config", "workdir") if name in values]
        return main(*positional, **values)

    exit_process = sys.exit
    with contextlib.ExitStack() as stack:
        if config:
            from router_r1_jax.distributed.multihost import exit_on_failure, exit_process

            stack.enter_context(exit_on_failure())
        _run_guarded(lambda: app.run(call_main, flags_parser=parse_flags), exit_process)


def _prepare_jax(config: Any, multihost: bool) -> None:
    """Set the compilation cache, quiet Orbax, and join the other processes if the configuration names any."""
    import jax

    from router_r1_jax.distributed.multihost import initialize
    from router_r1_jax.storage.checkpoint import quiet_orbax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "router_r1_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    quiet_orbax()
    if config.distributed.coordinator and not multihost:
        raise ConfigError("distributed.coordinator is set, but only train and evaluate run as several processes")
    initialize(config.distributed)


class Interrupts:
    """Turns Ctrl-C and a scheduler's SIGTERM into KeyboardInterrupt, at once or after work that must be finished.

    A second interrupt is raised at once. Python drops an exception that is raised inside a finalizer or inside JAX's
    callback in the garbage collector. An interrupt that was dropped so is raised again at the end of the next work that
    must not be interrupted.
    """

    def __init__(self) -> None:
        """Handle both signals; a signal that is ignored, as in a shell's background job, stays ignored."""
        self._held = self._received = False
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)

    def hold(self) -> None:
        """Begin work that must not be interrupted."""
        self._held = True

    def release(self) -> None:
        """End work that must not be interrupted, and raise an interrupt that was received."""
        self._held = False
        if self._received:
            raise KeyboardInterrupt

    def _receive(self, *_: object) -> None:
        first, self._received = not self._received, True
        if not (first and self._held):
            raise KeyboardInterrupt


def _run_guarded(call: Callable[[], Any], exit_process: Callable[[int], Any]) -> None:
    """Run `call`; print an error that a user can act on as one line, and exit with a status."""
    try:
        call()
    except (UserError, AttributeError, LookupError, TypeError, OSError) as error:
        message = error if isinstance(error, UserError) else _refused_config(error, sys.argv) or _failed_file(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        # All files are closed and the simulated models' server has ended. Freeing JAX's programs would take seconds.
        exit_process(130)


def parse_flags(argv: list[str], values: absl_flags.FlagValues = FLAGS) -> list[str]:
    """Parse with absl into `values`, and raise its errors as one line that also says where to look."""
    try:
        return values(argv)
    except absl_flags.Error as error:
        message = str(error).strip().splitlines()[0]
        hint = FIELDS if "--config." in message else "--help lists the flags"
        raise ConfigError(_refused_config(error, argv) or f"{message}; {hint}") from error
    except Exception as error:  # the configuration file is a program and may fail in any way
        raise ConfigError(_refused_config(error, argv) or failed_program(error)) from error


def failed_program(error: BaseException) -> str:
    """Say where and how a configuration file fails."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{frame.filename}, line {frame.lineno}, {frame.line!r}"
    if isinstance(error, SyntaxError):
        where = f"{error.filename}, line {error.lineno}, {(error.text or '').strip()!r}"
    message = str(error).partition("\n")[0].partition(" (")[0]
    return f"{where}: {type(error).__name__}: {message}; correct the configuration file"


def _refused_config(error: BaseException | None, argv: Sequence[str]) -> str | None:
    """Say what ml_collections refused (unknown field, wrong type, no such file) and where; None for any other error."""
    if error is None:
        return None
    if inner := _refused_config(error.__context__, argv):  # absl and ml_collections wrap what they have caught
        return inner
    frames = traceback.extract_tb(error.__traceback__)
    # The line to show is the user's: neither one inside ml_collections nor one of model_card or provider in config.py.
    ours = router_r1_jax.config.__file__
    caller = next((f for f in reversed(frames) if "ml_collections" not in f.filename and f.filename != ours), None)
    if caller is None or "ml_collections" not in frames[-1].filename:
        return None
    message = re.sub(r"[\"'\\]", "", " ".join(str(error).replace("\\n", " ").split()))  # its quotes are nested
    message = message.partition(" Other fields present")[0]
    if isinstance(error, OSError):
        return f"--config: {message.rpartition('] ')[2]}; name a file such as configs/demo.py"
    if "absl" in Path(caller.filename).parts:
        unknown = isinstance(error, (AttributeError, LookupError))
        what = f"there is no such field ({message})" if unknown else message
        return f"{_refused_override(message, argv)}: {what}; {FIELDS}"
    return f"{caller.filename}, line {caller.lineno}, {caller.line!r}: {message}; {FIELDS}"


def _refused_override(message: str, argv: Sequence[str]) -> str:
    """Find the override that a message of ml_collections is about: it begins with the last part of the field's name."""
    overrides = [arg for arg in argv[1:] if arg.lstrip("-").startswith("config.")]
    name = message.partition(" ")[0]
    return " ".join([arg for arg in overrides if name in arg.partition("=")[0].split(".")] or overrides)


def _failed_file(error: BaseException) -> str | None:
    """Name the file that the system refused; None for any other error."""
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}; free space or correct the path, then run again"
    if error.errno in DISK_ERRORS and "workdir" in FLAGS:
        return f"{FLAGS['workdir'].value}: {error.strerror}; free space there, then run again"
    return None
