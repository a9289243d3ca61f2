"""Opens the language model of a run: the mesh, the tokenizer, the model's configuration, and its initial weights."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from router_r1_jax import model, prompts
from router_r1_jax.config import ConfigError
from router_r1_jax.distributed import multihost
from router_r1_jax.distributed.mesh import make_mesh
from router_r1_jax.model import ModelConfig, Params

if TYPE_CHECKING:
    from router_r1_jax.setup.environment import SyntheticEnvironment

VOCABULARY_MULTIPLE = 64  # a random model's vocabulary is rounded up to it, so that it divides over devices


class OpenedModel(NamedTuple):
    """A language model that is ready to use. `initial` holds the weights of model.source if they were asked for."""

    mesh: Mesh
    tokenizer: PreTrainedTokenizerBase
    config: ModelConfig
    initial: Params | None


def open_model(
    config: ConfigDict, workdir: Path, environment: "SyntheticEnvironment | None", *, load_source: bool
) -> OpenedModel:
    """Open mesh, tokenizer and model; `load_source` also reads the weights of model.source. Raises ConfigError."""
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with multihost.primary_first():
        tokenizer = _load_tokenizer(config, workdir, environment)
    m, initial = config.model, None
    if m.source and load_source:
        found, initial = model.load_hf(m.source, dtype=m.dtype, mesh=mesh)
    elif m.source:
        found = model.load_hf_config(m.source, m.dtype)
    else:
        found = random_model(config, len(tokenizer))
    found = with_settings(found, m)
    model.check_attention(found)
    return OpenedModel(mesh, tokenizer, found, initial)


def with_settings(found: ModelConfig, m: ConfigDict) -> ModelConfig:
    """The model with the remat, attention and LoRA of `config.model`. Raises ConfigError."""
    try:
        return dataclasses.replace(found, remat=m.remat, attention=m.attention, lora=model.lora_from(m.lora))
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error


def random_model(config: ConfigDict, tokens: int) -> ModelConfig:
    """The model of `config.model.arch`, for a tokenizer with so many tokens. Raises ConfigError."""
    vocab_size = -(-tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    try:
        return model.from_arch(config.model.arch, vocab_size, dtype=config.model.dtype)
    except ValueError as error:
        raise ConfigError(f"model.arch.{error}") from error


def _load_tokenizer(
    config: ConfigDict, workdir: Path, environment: "SyntheticEnvironment | None"
) -> PreTrainedTokenizerBase:
    """The configured tokenizer; if none is named, one trained on the synthetic world and kept in the workdir."""
    if source := config.model.tokenizer or config.model.source:
        field = "model.tokenizer" if config.model.tokenizer else "model.source"
        return _read_tokenizer(source, f"{field} is {source!r}, whose tokenizer", "name a folder or hub name")
    if environment is None:
        raise ConfigError("model.tokenizer and model.source are empty; name a folder or hub name in one of them")
    folder = workdir / "tokenizer"
    if not folder.exists():
        fresh = workdir / "tokenizer.new"  # renamed when it is whole, so that a full disk leaves no half tokenizer
        environment.train_tokenizer(prompts.load_template(config.prompt.template), fresh)
        fresh.replace(folder)
    return _read_tokenizer(str(folder), str(folder), "remove the folder, so that it is trained anew")


def _read_tokenizer(source: str, what: str, fix: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # transformers and tokenizers raise their own for each kind of damage
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{what} cannot be read ({reason}); {fix}") from error
