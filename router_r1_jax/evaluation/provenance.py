"""Provenance of a result: the commit of the source code and the versions of the packages that numbers depend on."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def commit() -> str:
    """The commit of the source tree, with "+" if files were changed since; "" outside a checkout."""
    source = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(source), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if head and git("status", "--porcelain", "--untracked-files=no") else "")
    except OSError:
        return ""


def versions() -> dict[str, str]:
    """The versions of Python and of PACKAGES."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
