"""Export a trained router as a Hugging Face folder, for `transformers` and the servers built on it.

    python -m router_r1_jax.export --config=configs/demo.py --workdir=runs/demo --folder=exports/demo \
        [--checkpoint=best|last|first|STEP]

LoRA's adapters are merged into the weights. The folder also serves as `model.source` of a further run.
"""

from pathlib import Path

from ml_collections import ConfigDict

from router_r1_jax.checkpoint import CheckpointStore
from router_r1_jax.cli import launch
from router_r1_jax.config import ConfigError
from router_r1_jax.model import abstract_params, check_export_folder, save_hf
from router_r1_jax.session import open_router


def main(config: ConfigDict, workdir: Path, checkpoint: str = "", folder: str = "") -> None:
    """Restore a checkpoint and write it with its tokenizer."""
    if not folder:
        raise ConfigError("--folder is empty; name a new folder for the export")
    check_export_folder(Path(folder))  # before a large checkpoint is read
    with CheckpointStore(workdir / "checkpoints", keep=None) as store:
        step = store.resolve(checkpoint)
        mesh, tokenizer, model, _ = open_router(config, workdir, load_source=False)
        save_hf(folder, model, store.restore_params(step, abstract_params(model, mesh)), tokenizer)
    print(f"step {step} is exported to {folder}")


if __name__ == "__main__":
    launch(main, checkpoint="best, last, first or a step; best by validation if empty", folder="new folder to write")
