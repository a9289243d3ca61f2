"""The warm start: supervised training on scripted episodes, which teaches the format before RL begins.

    python -m router_r1_jax.training.warmstart --config=configs/demo.py --workdir=runs/warmstart

The command trains a warm start and writes it to `config.warmstart.file`, or to `<workdir>/warmstart.safetensors` if
that is empty. A run with `warmstart.file` starts from the kept file.

A router that starts at random must first learn to think, call, copy and answer. The scripted choice of model is random,
so that RL decides which model to ask. All base parameters are trained, also if RL will train LoRA adapters only.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from router_r1_jax import prompts
from router_r1_jax.config import ConfigError
from router_r1_jax.distributed import multihost
from router_r1_jax.distributed.mesh import place
from router_r1_jax.launcher import launch
from router_r1_jax.model import Params
from router_r1_jax.setup.session import Session, open_session
from router_r1_jax.storage.metrics_writer import MetricsWriter
from router_r1_jax.training.supervised import train_supervised

COMMAND = "python -m router_r1_jax.training.warmstart"
# Fields of a model card that the warm start's rows depend on. What else a card holds changes no row.
CARD_FIELDS = "name provider model price_in price_out latency performance description aliases".split()


def recipe(session: Session) -> str:
    """A hash of everything that the warm start's result depends on; a kept file carries it.

    The keys are the recipe's own. A field of the configuration that is renamed keeps its key here, so that kept files
    stay valid.
    """
    config, w = session.config, session.config.warmstart
    environment = session.environment.recipe() if session.environment else {}
    fields = environment | {
        "arch": config.model.arch.to_dict(),
        "template": prompts.load_template(config.prompt.template),
        "max_calls": config.rollout.max_calls,
        "models": [_card_fields(model.to_dict()) for model in config.pool.models],
        "roster": {"shown": config.pool.candidates, "shuffle": config.pool.shuffle, "rename": config.pool.rename}
        | ({"names": config.pool.names} if config.pool.names else {}),
        "warmstart": environment.get("warmstart", {})
        | {"seed": w.seed, "steps": w.steps, "batch": w.batch, "learning_rate": w.learning_rate, "warmup": w.warmup},
    }
    if config.model.tokenizer:  # otherwise it is trained on what the other fields describe
        fields["tokenizer"] = _vocabulary(config.model.tokenizer)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _card_fields(card: dict[str, Any]) -> dict[str, Any]:
    failure_rate = card["simulated"]["failure_rate"]
    return {name: card[name] for name in CARD_FIELDS} | {"simulated": {"failure_rate": failure_rate}}


def _vocabulary(tokenizer: str) -> Any:
    """Tokens and their ids if `tokenizer` is a folder; the name itself if it is a hub name."""
    file = Path(tokenizer) / "tokenizer.json"
    return json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"] if file.exists() else tokenizer


def train_warm_start(session: Session, writer: MetricsWriter) -> Params:
    """Train from the initial parameters, stage by stage, with a line of metrics per update.

    Every stage has a learning-rate schedule of its own; only the last one decays. With one decay over all stages the
    last one learns too little.
    """
    c, w = session.config, session.config.warmstart
    if session.environment is None:
        raise ConfigError(
            f"warmstart.steps is {w.steps}, but only the set 'synthetic' has scripted episodes; set it to 0 and start "
            "from an instruction-tuned model.source"
        )
    params, step = session.initial_params(w.seed), 0
    stages = session.environment.warmstart_phases(session.router)
    with tqdm(
        total=w.steps, desc="warm start", unit="step", dynamic_ncols=True, disable=not multihost.is_primary()
    ) as bar:

        def on_update(step: int, metrics: dict[str, float]) -> None:
            bar.update()
            bar.set_postfix(loss=f"{metrics['loss']:.3f}")
            writer.write(step, {"phase": "warmstart"} | {f"warmstart/{k}": v for k, v in metrics.items()})

        for number, phases in enumerate(stages, start=1):
            params = train_supervised(
                session.model.base,
                session.mesh,
                session.abstract_base,
                params,
                phases,
                learning_rate=w.learning_rate,
                warmup=w.warmup,
                decay=number == len(stages),
                micro_tokens=c.learner.micro_tokens,
                logit_chunk=c.learner.logit_chunk,
                first_step=step,
                on_update=on_update,
            )
            step += sum(phase.updates for phase in phases)
    return params


def save_warm_start(path: Path, params: Params, session: Session) -> None:
    """Write parameters to one safetensors file, with the recipe that made them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    leaves = {name: np.asarray(jax.device_get(leaf)) for name, leaf in flatten_dict(params, sep="/").items()}
    save_file(leaves, path, metadata={"recipe": recipe(session)})


def load_warm_start(path: Path, session: Session) -> Params:
    """Read a kept warm start onto the session's mesh. ConfigError if it is unreadable or has another recipe."""
    rebuild = f"build it anew with {COMMAND}, or set warmstart.file='' to train it in the run"
    try:
        with safe_open(path, framework="numpy") as file:
            made_by = (file.metadata() or {}).get("recipe")
            if made_by != recipe(session):
                raise ConfigError(f"warmstart.file {path} was made by another configuration ({made_by}); {rebuild}")
            targets = flatten_dict(session.abstract_base, sep="/").items()
            leaves = {name: place(file.get_tensor(name).astype(x.dtype), x.sharding) for name, x in targets}
            return unflatten_dict(leaves, sep="/")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"warmstart.file {path} cannot be read ({error}); {rebuild}") from error


def warm_start(session: Session, writer: MetricsWriter) -> Params:
    """The parameters that RL starts from: the kept file, else a warm start trained now, else the initial ones."""
    w = session.config.warmstart
    if w.file and Path(w.file).exists():
        multihost.log_primary(f"warm start: read from {w.file}")
        return load_warm_start(Path(w.file), session)
    return train_warm_start(session, writer) if w.steps else session.initial_params(session.config.seed)


def main(config: ConfigDict, workdir: Path) -> None:
    """Train the warm start and keep it in one file."""
    target = Path(config.warmstart.file) if config.warmstart.file else workdir / "warmstart.safetensors"
    config.warmstart.file = ""
    with open_session(config, workdir, load_source=True) as session:
        writer = MetricsWriter(workdir)
        save_warm_start(target, warm_start(session, writer), session)
        writer.close()
    print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    launch(main)
