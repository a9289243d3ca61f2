"""Policy weights of a main: checkpoint resolution (--checkpoint, a step or a Hugging Face folder), loading, hash."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from router_r1_jax.config import ConfigError
from router_r1_jax.model import Params
from router_r1_jax.setup.session import Session
from router_r1_jax.storage.checkpoint import CheckpointStore


@dataclasses.dataclass(frozen=True)
class PolicyWeights:
    """Parameters that can be loaded into a session.

    Attributes:
      name: name of the policy in results, plots and files.
      source: the folder that the parameters come from.
      step: step of the checkpoint in `source`; None if `source` is in Hugging Face format.
    """

    name: str
    source: str
    step: int | None

    def load(self, session: Session) -> Params:
        """The parameters, in the session's sharding. Raises CheckpointError."""
        if self.step is None:
            return session.initial_params(session.config.seed)
        with CheckpointStore(self.source, keep=None) as store:
            return store.restore(self.step, params=session.abstract_params)["params"]


def find_policy_weights(config: ConfigDict, workdir: Path, checkpoint: str) -> tuple[ConfigDict, PolicyWeights]:
    """Find the weights that `checkpoint` names. Returns the configuration that fits them, and the weights.

    Args:
      config: the run's configuration.
      workdir: the run's folder.
      checkpoint: best, last, first or a step of this run. "" is the best, or model.source if the run has no checkpoints
        and model.source is set. Or a folder: of another run (its best), of one checkpoint (runs/other/checkpoints/40),
        or in Hugging Face format.

    Raises CheckpointError or ConfigError.
    """
    checkpoints, folder = workdir / "checkpoints", Path(checkpoint)
    if checkpoint and folder.is_dir():
        folder = folder.absolute()
        if (folder / "checkpoints").is_dir():
            return _of_run(config, folder, "")
        if folder.parent.name == "checkpoints" and folder.name.isdecimal():
            return _of_run(config, folder.parent.parent, folder.name)
        if (folder / "config.json").is_file():
            return _hugging_face(config, str(folder))
        raise ConfigError(
            f"--checkpoint={checkpoint} is neither a run's folder, nor one of its checkpoints/STEP, nor a folder in "
            "Hugging Face format (it has no config.json); correct the path"
        )
    if "/" in checkpoint:
        raise ConfigError(f"--checkpoint={checkpoint} does not exist; name a folder, or best, last, first or a step")
    if not checkpoint and config.model.source and not checkpoints.exists():
        return _hugging_face(config, config.model.source)
    return config, _checkpoint(checkpoints, checkpoint)


def first_cost_window(folder: str | Path) -> dict[str, Any] | None:
    """The reward's cost window after the first rollout of the run with the checkpoint folder `folder`.

    The window is in the unit of that run's `reward.cost`. None if it is empty, as in the first checkpoint, which is
    written before any rollout.
    """
    with CheckpointStore(folder, keep=None) as store:
        for step in (store.best(), store.latest()):
            window = None if step is None else store.restore(step, run=None)["run"]["first_cost_window"]
            if window and window["sqrt_costs"]:
                return window
    return None


def fingerprint(params: Params) -> str:
    """A hash of all bits of the parameters, 16 hexadecimal digits. It is the same on every mesh.

    It holds two sums of the bit patterns modulo 2**32: a plain one, and one that is weighted by the bits' place. They
    are sums of integers, so the order of the summation does not matter.
    """
    plain, placed = jax.jit(_bit_sums)(params)
    return f"{int(plain):08x}{int(placed):08x}"


def _bit_sums(params: Params) -> tuple[jax.Array, jax.Array]:
    plain = placed = jnp.uint32(0)
    for number, leaf in enumerate(jax.tree.leaves(params), start=1):
        unsigned = {2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        place = jnp.full(leaf.shape, number, jnp.uint32)  # fused into the sum, so it never is an array in memory
        for axis in range(leaf.ndim):
            place = place * jnp.uint32(2654435761) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        plain += jnp.sum(bits, dtype=jnp.uint32)
        placed += jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
    return plain, placed


def _checkpoint(folder: Path, checkpoint: str) -> PolicyWeights:
    with CheckpointStore(folder, keep=None) as store:
        step = store.resolve(checkpoint)
        return PolicyWeights("warm start" if step == store.first() == 0 else "trained", str(folder), step)


def _of_run(config: ConfigDict, run: Path, checkpoint: str) -> tuple[ConfigDict, PolicyWeights]:
    config = config.copy_and_resolve_references()
    tokenizer = run / "tokenizer"  # exists if the run has trained a tokenizer
    if not config.model.tokenizer and not config.model.source and tokenizer.is_dir():
        config.model.tokenizer = str(tokenizer)
    return config, _checkpoint(run / "checkpoints", checkpoint)


def _hugging_face(config: ConfigDict, source: str) -> tuple[ConfigDict, PolicyWeights]:
    config = config.copy_and_resolve_references()
    config.model.source = source
    config.model.lora.rank = 0  # such a folder holds no adapters
    return config, PolicyWeights(Path(source).name, source, None)
