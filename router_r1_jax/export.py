"""Hugging Face export of a trained router, for `transformers` and the servers that read its format.

    python -m router_r1_jax.export --config=configs/demo.py --workdir=runs/demo --folder=exports/demo \
        [--checkpoint=best|last|first|STEP]

LoRA adapters are merged into the weights. The folder can also be `model.source` of another run.
"""

from pathlib import Path

from ml_collections import ConfigDict

from router_r1_jax.launcher import Flag, launch
from router_r1_jax.model import abstract_params, check_export_folder, save_hf
from router_r1_jax.pool.cards import cards_from_config
from router_r1_jax.setup.environment import open_environment
from router_r1_jax.setup.model import open_model
from router_r1_jax.storage.checkpoint import CheckpointStore


def main(config: ConfigDict, workdir: Path, folder: str, checkpoint: str) -> None:
    """Write a checkpoint of a run, with its tokenizer, as a folder in Hugging Face format."""
    check_export_folder(Path(folder))  # before a large checkpoint is read
    with CheckpointStore(workdir / "checkpoints", keep=None) as store:
        step = store.resolve(checkpoint)
        environment = open_environment(config, cards_from_config(config.pool))
        opened = open_model(config, workdir, environment, load_source=False)
        params = store.restore(step, params=abstract_params(opened.config, opened.mesh))["params"]
    save_hf(folder, opened.config, params, opened.tokenizer)
    print(f"step {step} is exported to {folder}")


if __name__ == "__main__":
    launch(
        main,
        {
            "folder": Flag(str, "new folder for the export"),
            "checkpoint": Flag("", "best, last, first or a step; best by validation if empty"),
        },
    )
