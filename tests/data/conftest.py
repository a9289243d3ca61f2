"""The seven sets in small, prepared once: questions of this project's own in FlashRAG's form."""

from pathlib import Path

import pytest

from router_r1_jax.config import PAPER_SETS
from router_r1_jax.data.prepare import prepare_set

FLASHRAG = Path(__file__).with_name("flashrag")


@pytest.fixture(scope="session")
def flashrag() -> Path:
    """The folder with <set>/{train,dev,test}.jsonl."""
    return FLASHRAG


@pytest.fixture(scope="session")
def prepared_root(tmp_path_factory) -> Path:
    """A folder with the seven sets prepared: data.dir of a configuration."""
    root = tmp_path_factory.mktemp("prepared")
    for suite in PAPER_SETS:
        prepare_set(suite, str(FLASHRAG), root)
    return root
