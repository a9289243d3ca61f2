"""What every main shares: the flags, the compilation cache, and errors as one clear line instead of a traceback."""

import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import router_r1_jax.config
from router_r1_jax import hosts
from router_r1_jax.alarms import CollapseError
from router_r1_jax.checkpoint import CheckpointError
from router_r1_jax.config import ConfigError, validate
from router_r1_jax.data.questions import DataError
from router_r1_jax.evaluation.figures import CompareError
from router_r1_jax.hosts import HostError
from router_r1_jax.model import WeightsError
from router_r1_jax.pool.outcomes import PoolError
from router_r1_jax.report.writer import BrokenFileError, MissingExtraError
from router_r1_jax.rollout import PromptError

# Errors whose message already says what is wrong, where, and what to do.
PLAIN_ERRORS = (
    BrokenFileError, CheckpointError, CollapseError, CompareError, ConfigError, DataError, HostError, MissingExtraError,
    PoolError, PromptError, WeightsError,
)  # fmt: skip
# The system's words for a disk that takes nothing more. Libraries pass them on without the file's name.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
FIELDS = "every field stands with its type and meaning in router_r1_jax/config.py"


def fail(message: object) -> None:
    """Print one line to standard error and exit with status 1."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(1)


def enable_compilation_cache() -> None:
    """Keep compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "router_r1_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def launch(main: Callable[..., None], *, several: bool = False, **strings: str) -> None:
    """Parse --config, --workdir and the given string flags (name=help), and call main(config, workdir, **strings).

    `several`: the main can be one of several processes (`hosts`).
    Exit status: 0 done, 1 an error that names its fix, 130 interrupted.
    """
    config = config_flags.DEFINE_config_file("config", help_string="Configuration file, such as configs/demo.py.")
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run: metrics, checkpoints, episodes, report.")
    extra = {name: flags.DEFINE_string(name, "", text) for name, text in strings.items()}
    flags.mark_flags_as_required(["config", "workdir"])

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            fail(f"{argv[1]!r} is no flag; overrides are written --config.field=value")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.ERROR)  # what libraries have to say of themselves is for --verbosity
        settings: ConfigDict = config.value
        validate(settings)
        enable_compilation_cache()
        if settings.distributed.coordinator and not several:
            raise ConfigError("distributed.coordinator is set, but only train and evaluate run as several processes")
        hosts.join(settings.distributed)
        main(settings, Path(workdir.value).absolute(), **{name: flag.value for name, flag in extra.items()})

    with hosts.failing_alone():
        run_guarded(lambda: app.run(guarded, flags_parser=_parse_flags))


class Interrupts:
    """Ctrl-C, and a scheduler's SIGTERM, as KeyboardInterrupt: at once, or at the end of work that must be whole.

    A second one is heard at once. One that was raised where Python drops it (a finalizer, or the callback that JAX has
    in the garbage collector: it happened once in 29 trainings) is raised again at the end of the next such work.
    """

    def __init__(self) -> None:
        """Take both signals over; one that is ignored, as in a background job of a shell, stays so."""
        self._held = self._heard = False
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._hear)

    def hold(self) -> None:
        """From here on work must be whole."""
        self._held = True

    def let_go(self) -> None:
        """Work is whole: raise what came meanwhile."""
        self._held = False
        if self._heard:
            raise KeyboardInterrupt

    def _hear(self, *_: object) -> None:
        first, self._heard = not self._heard, True
        if not (first and self._held):
            raise KeyboardInterrupt


def run_guarded(call: Callable[[], Any]) -> None:
    """Run `call`, turning errors that users can act on into one line and an exit status."""
    try:
        call()
    except PLAIN_ERRORS as error:
        fail(error)
    except (AttributeError, LookupError, TypeError, OSError) as error:
        refusal = _refused_config(error) or _failed_file(error)
        if refusal is None:
            raise
        fail(refusal)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        # All files are closed and the server has ended; taking JAX's programs apart keeps a terminal for seconds more.
        hosts.leave(130)


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with its errors as one line that also says where to look."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        said = str(error).strip().splitlines()[0]
        raise ConfigError(_refused_config(error) or f"{said}; {FIELDS}") from error
    except Exception as error:  # the configuration file is a program and may fail in any way
        raise ConfigError(_refused_config(error) or failed_program(error)) from error


def failed_program(error: BaseException) -> str:
    """Where a configuration file fails, and how."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{frame.filename}, line {frame.lineno}, {frame.line!r}"
    if isinstance(error, SyntaxError):
        where = f"{error.filename}, line {error.lineno}, {(error.text or '').strip()!r}"
    said = str(error).partition("\n")[0].partition(" (")[0]
    return f"{where}: {type(error).__name__}: {said}; correct the configuration file"


def _refused_config(error: BaseException | None) -> str | None:
    """What ml_collections refused (unknown field, wrong type, no such file) and where; None if our own code failed."""
    if error is None:
        return None
    if inner := _refused_config(error.__context__):  # absl and ml_collections wrap what they have caught
        return inner
    frames = traceback.extract_tb(error.__traceback__)
    # Of interest is the line that asked: neither ml_collections' own nor model_card's and provider's in config.py.
    ours = router_r1_jax.config.__file__
    caller = next((f for f in reversed(frames) if "ml_collections" not in f.filename and f.filename != ours), None)
    if caller is None or "ml_collections" not in frames[-1].filename:
        return None
    said = re.sub(r"[\"'\\]", "", " ".join(str(error).replace("\\n", " ").split()))  # it quotes quotes
    said = said.partition(" Other fields present")[0]
    if isinstance(error, OSError):
        return f"--config: {said.rpartition('] ')[2]}; name a file such as configs/demo.py"
    if "absl" in Path(caller.filename).parts:
        what = f"there is no such field ({said})" if isinstance(error, (AttributeError, LookupError)) else said
        return f"{_refused_override(said)}: {what}; {FIELDS}"
    return f"{caller.filename}, line {caller.lineno}, {caller.line!r}: {said}; {FIELDS}"


def _refused_override(said: str) -> str:
    """The override that ml_collections speaks of: it begins with the last part of the field's name."""
    overrides = [arg for arg in sys.argv[1:] if arg.lstrip("-").startswith("config.")]
    name = said.partition(" ")[0]
    return " ".join([arg for arg in overrides if name in arg.partition("=")[0].split(".")] or overrides)


def _failed_file(error: BaseException) -> str | None:
    """A file that the system refused; None for any other error."""
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}; free space or correct the path, then run again"
    if error.strerror != os.strerror(error.errno):  # our own writers put path and fix into the text
        return error.strerror
    if error.errno in DISK_ERRORS and "workdir" in flags.FLAGS:
        return f"{flags.FLAGS['workdir'].value}: {error.strerror}; free space there, then run again"
    return None
