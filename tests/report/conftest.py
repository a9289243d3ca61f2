"""A fake run for every test of the report."""

import pytest
from fake_run import fake_metrics, fake_results, write_run


@pytest.fixture
def run(tmp_path):
    """Folder of a finished fake run."""
    write_run(tmp_path)
    return tmp_path


@pytest.fixture
def metrics():
    return fake_metrics()


@pytest.fixture
def results():
    return fake_results()
