"""Small versions of the seven data sets, prepared once: questions of this project's own as FlashRAG JSONL."""

from pathlib import Path

import pytest

from router_r1_jax.config import PAPER_SETS
from router_r1_jax.data.prepare import prepare_dataset

FLASHRAG = Path(__file__).with_name("flashrag")


@pytest.fixture(scope="session")
def flashrag() -> Path:
    """The folder with <set>/{train,dev,test}.jsonl."""
    return FLASHRAG


@pytest.fixture(scope="session")
def prepared_root(tmp_path_factory) -> Path:
    """The folder of the seven prepared data sets: data.dir of a configuration."""
    root = tmp_path_factory.mktemp("prepared")
    for dataset in PAPER_SETS:
        prepare_dataset(dataset, str(FLASHRAG), root)
    return root
