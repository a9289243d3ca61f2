"""Provenance of a result: the commit of the source code and the versions of the packages that numbers depend on."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def commit() -> str:
    """The commit of the source tree, with "+" if files were changed since; "" outside a checkout."""
    describe = ("describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+")
    try:
        return subprocess.check_output(
            ["git", "-C", Path(__file__).parent, *describe], stderr=subprocess.DEVNULL, text=True
        ).strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return ""


def versions() -> dict[str, str]:
    """The versions of Python and of PACKAGES."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
