"""Where the prepared sets lie that a configuration names."""

import re
from pathlib import Path

from ml_collections import ConfigDict

from router_r1_jax.config import SPLITS, ConfigError
from router_r1_jax.data import synthetic
from router_r1_jax.data.questions import OPEN_QA

_VERSION = re.compile(r"\d+\.\d+\.\d+")  # other folders there are what is left of an interrupted build


def open_sets(data: ConfigDict, workdir: str | Path) -> dict[str, Path]:
    """Folder of each set that `config.data` names. The synthetic world's is built where it is missing.

    Raises ConfigError with the command that prepares a set that is not there.
    """
    root = Path(data.dir) if data.dir else Path(workdir) / "data"
    names = dict.fromkeys(name for split in SPLITS for name in data[split])
    return {name: synthetic.prepare(data, workdir) if name == synthetic.SUITE else _find(root, name) for name in names}


def _find(root: Path, name: str) -> Path:
    """The newest version of a set below `root`."""
    folder = root / OPEN_QA / name
    found = [path for path in folder.iterdir() if _VERSION.fullmatch(path.name)] if folder.is_dir() else []
    if not found:
        raise ConfigError(
            f"data.dir is {str(root)!r}, where no set {name!r} is prepared; run "
            f"python -m router_r1_jax.data.prepare --sets={name} --source=DIR_OR_URL --dir={root}"
        )
    return max(found, key=lambda path: [int(number) for number in path.name.split(".")])
