"""TFDS builder of the synthetic world's questions. `prepare` builds the data set unless it is on disk already.

TensorFlow is never imported. The files have the format array_record, and `data.questions.StoredQuestions` reads them.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from router_r1_jax.synthetic.world import COUNTS, SPLITS, World


@dataclasses.dataclass(kw_only=True)
class WorldConfig(tfds.core.BuilderConfig):
    """The settings of a world. The name of the configuration spells them, so that each world has a separate folder."""

    world: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Synthetic(tfds.core.GeneratorBasedBuilder):
    """Questions, gold answers and, for each hop, the domain and the relation to ask for."""

    VERSION = tfds.core.Version("1.1.0")  # raise it when the same settings give other questions
    RELEASE_NOTES = {"1.1.0": "One- and two-hop questions in five domains; every entity is a subject in train."}

    def _info(self) -> tfds.core.DatasetInfo:
        text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
        features = {"id": text, "question": text, "golden_answers": texts, "domains": texts, "relations": texts}
        features["hops"] = tfds.features.Scalar(dtype=np.int32)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        world = World(self.builder_config.world)
        return {split: self._generate_examples(world, split) for split in SPLITS}

    def _generate_examples(self, world: World, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for question in world.questions(split):
            example = {
                "id": question.id,
                "question": question.text,
                "golden_answers": list(question.golds),
                "hops": len(question.hops),
                "domains": [fact.domain for fact in question.hops],
                "relations": [fact.relation for fact in question.hops],
            }
            yield question.id, example


def prepare(world: Mapping[str, int], root: Path) -> Path:
    """Build the data set of `world` (config.synthetic.world) below `root`, unless it is there; returns its folder.

    If the build is interrupted, the next call starts it again.
    """
    settings = {field: world[field] for field in sorted(world)}
    name = "_".join(f"{field}{settings[field]}" for field in ("seed", *COUNTS.values()))
    builder = Synthetic(data_dir=root, config=WorldConfig(name=name, world=settings), file_format="array_record")
    tfds.disable_progress_bar()  # less than a second of work
    builder.download_and_prepare()
    return Path(builder.data_dir)
