"""TFDS builder of the synthetic world's questions, and `prepare`, which makes sure that a data set lies on disk.

TensorFlow is never imported: the files are array_record and are read by `questions.StoredQuestions`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from router_r1_jax.data.world import COUNTS, SPLITS, World

SUITE = "synthetic"


@dataclasses.dataclass(kw_only=True)
class WorldConfig(tfds.core.BuilderConfig):
    """The world's settings. The configuration's name spells them, so that each world has its own folder."""

    world: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Synthetic(tfds.core.GeneratorBasedBuilder):
    """Questions, gold answers and, for each hop, the domain and the relation to ask for."""

    VERSION = tfds.core.Version("1.1.0")  # raise it when a world of the same settings gets other questions
    RELEASE_NOTES = {
        "1.0.0": "One- and two-hop questions in five domains.",
        "1.1.0": "Every entity is the subject of a question in the train split.",
    }

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "question": tfds.features.Text(),
            "golden_answers": tfds.features.Sequence(tfds.features.Text()),
            "hops": tfds.features.Scalar(dtype=np.int32),
            "domains": tfds.features.Sequence(tfds.features.Text()),
            "relations": tfds.features.Sequence(tfds.features.Text()),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        world = World(self.builder_config.world)
        return {split: self._generate_examples(world, split) for split in SPLITS}

    def _generate_examples(self, world: World, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for question in world.questions(split):
            yield (
                question.id,
                {
                    "id": question.id,
                    "question": question.text,
                    "golden_answers": list(question.golds),
                    "hops": len(question.hops),
                    "domains": [fact.domain for fact in question.hops],
                    "relations": [fact.relation for fact in question.hops],
                },
            )


def prepare(data: ConfigDict, workdir: str | Path) -> Path:
    """Build the data set of `config.data` unless it lies there already; returns its folder, for `StoredQuestions`.

    The folder lies below data.dir, or below `workdir`/data where that is empty. An interrupted build leaves nothing
    that would be taken for a data set.
    """
    settings = {field: data.world[field] for field in sorted(data.world)}
    World(settings)  # refuses wrong settings before a folder is made
    name = "_".join(f"{field}{settings[field]}" for field in ("seed", *COUNTS.values()))
    root = Path(data.dir) if data.dir else Path(workdir) / "data"
    builder = Synthetic(data_dir=root, config=WorldConfig(name=name, world=settings), file_format="array_record")
    tfds.disable_progress_bar()  # less than a second of work
    builder.download_and_prepare()
    return Path(builder.data_dir)
