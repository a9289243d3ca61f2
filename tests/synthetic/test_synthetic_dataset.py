"""The synthetic data set on disk against the world that it was built from."""

import subprocess
import sys

import pytest

from router_r1_jax.config import base_config
from router_r1_jax.data.questions import StoredQuestions
from router_r1_jax.synthetic import tfds_builder
from router_r1_jax.synthetic.world import SPLITS, World


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The world's settings, and the folder of its data set."""
    world = base_config().synthetic.world
    return world, tfds_builder.prepare(world, tmp_path_factory.mktemp("work"))


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_on_disk_is_the_worlds_split(prepared, split):
    world, folder = prepared
    expected = {
        question.id: (
            question.text,
            question.golds,
            len(question.hops),
            tuple(fact.domain for fact in question.hops),
            tuple(fact.relation for fact in question.hops),
        )
        for question in World(world).questions(split)
    }
    records = list(StoredQuestions(folder, split))
    assert {r.id: (r.question, r.golds, r.hops, r.domains, r.relations) for r in records} == expected
    assert len(records) == len(expected)
    assert {record.dataset for record in records} == {"synthetic"}


def test_prepare_finds_what_lies_there_and_keeps_worlds_apart(prepared):
    world, folder = prepared
    root = folder.parents[2]
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert tfds_builder.prepare(world, root) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    other = base_config().synthetic.world
    other.seed = 8
    assert tfds_builder.prepare(other, root) != folder
    assert tfds_builder.prepare(other, root / "elsewhere").is_relative_to(root / "elsewhere")


def test_neither_tensorflow_nor_jax_is_imported(prepared):
    code = (
        "import sys; from router_r1_jax.config import base_config;"
        "from router_r1_jax.data.questions import StoredQuestions; from router_r1_jax.synthetic import tfds_builder;"
        "folder = tfds_builder.prepare(base_config().synthetic.world, sys.argv[1]);"
        "list(StoredQuestions(folder, 'test'));"
        "print(*sorted({'jax', 'tensorflow', 'torch'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(prepared[1].parents[2])]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == ""
