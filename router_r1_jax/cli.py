"""What every main shares: the flags, the compilation cache, and errors as one clear line instead of a traceback."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from router_r1_jax.checkpoint import CheckpointError
from router_r1_jax.config import ConfigError, validate
from router_r1_jax.data.questions import DataError
from router_r1_jax.pool.outcomes import PoolError

# Errors whose message already says what is wrong, where, and what to do.
PLAIN_ERRORS = (CheckpointError, ConfigError, DataError, PoolError)


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


def launch(main: Callable[..., None], **strings: str) -> None:
    """Parse --config, --workdir and the given string flags (name=help), and call main(config, workdir, **strings).

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
        main(settings, Path(workdir.value).absolute(), **{name: flag.value for name, flag in extra.items()})

    run_guarded(lambda: app.run(guarded))


def run_guarded(call: Callable[[], Any]) -> None:
    """Run `call`, turning errors that users can act on into one line and an exit status."""
    try:
        call()
    except PLAIN_ERRORS as error:
        fail(error)
    except (AttributeError, KeyError, TypeError) as error:
        if not _raised_by_config(error):
            raise
        fail(str(error).strip("\"'").splitlines()[0])
    except OSError as error:
        if error.errno is None:
            raise
        fail(f"{error.filename or 'a file'}: {error.strerror}; free space or correct the path, then run again")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _raised_by_config(error: BaseException) -> bool:
    """Whether ml_collections refused an override (unknown field, wrong type), rather than our code failing."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return trace is not None and "ml_collections" in trace.tb_frame.f_code.co_filename
