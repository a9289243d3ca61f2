"""The warm start: supervised learning of the format, on scripted episodes whose choice of model is random.

A router that starts at random must first learn to think, call, copy and answer; whom to ask is left to RL. All of it is
trained, also where RL will train adapters only (LoRA): the base they then stand on is the reference policy. The result
can be kept in one safetensors file, so that a demo starts from it:

    python -m router_r1_jax.warmstart --config=configs/demo.py --workdir=runs/warmstart

trains anew and writes `config.warmstart.file`, or `<workdir>/warmstart.safetensors` where that is empty.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from router_r1_jax import hosts, lessons, prompts
from router_r1_jax.cli import launch
from router_r1_jax.config import ConfigError
from router_r1_jax.data import synthetic
from router_r1_jax.data.scripted import recited_cards, repeating_sequences, scripted_episode
from router_r1_jax.learner import Learner, Row, SupervisedLoss, init_state, make_layout, make_optimizer
from router_r1_jax.mesh import place
from router_r1_jax.model import Params
from router_r1_jax.pool.cards import Card, all_in_prompts, roster, roster_settings
from router_r1_jax.report.writer import MetricsWriter
from router_r1_jax.rollout import common_prefix
from router_r1_jax.session import Session, open_session

COPY_LENGTH = 96  # tokens of an exercise, at most
RECITED = 24  # names recited in an exercise that follows a prompt

Report = Callable[[int, dict[str, float]], None]


class _Phase(NamedTuple):
    """Updates, tokens of their longest row, lengths that rows are padded to (at most), and rows of an update."""

    updates: int
    longest: int
    buckets: int
    rows: int


def recipe(config: ConfigDict) -> str:
    """A hash of what the warm start's result depends on; a kept file carries it."""
    fields = {
        "arch": config.model.arch.to_dict(),
        "world": {"version": str(synthetic.Synthetic.VERSION)} | config.data.world.to_dict(),
        "template": prompts.load_template(config.prompt.template),
        "max_calls": config.rollout.max_calls,
        # Later prices, those of cached tokens and what the server does wrong are not seen here, but for one such field.
        "models": [
            {name: value for name, value in model.to_dict().items() if name not in ("price_changes", "price_cached")}
            | {"simulated": {"failure_rate": model.simulated.failure_rate}}
            for model in config.pool.models
        ],
        "roster": {name: value for name, value in roster_settings(config.pool).items() if name != "names" or value},
        "warmstart": {name: value for name, value in config.warmstart.to_dict().items() if name != "file"},
    }
    if config.model.tokenizer:  # else it is trained on the world, the template and the models
        fields["tokenizer"] = _vocabulary(config.model.tokenizer)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _vocabulary(tokenizer: str) -> Any:
    """Tokens and their ids in a tokenizer's folder; of a hub name, the name."""
    file = Path(tokenizer) / "tokenizer.json"
    return json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"] if file.exists() else tokenizer


def own_rosters(pool_config: ConfigDict) -> bool:
    """Whether each row shows a roster of its own: where names are dealt anew, or other models are shown each time.

    With one roster for all rows an update mostly learns its few names, and the next one has to unlearn them
    (experiments/studies/README.md). Where names stay, rows share a roster, which is then read once for all.
    """
    return pool_config.rename or pool_config.shown > 0


def scripted_rows(session: Session, step: int) -> tuple[list[int], list[Row]]:
    """The shared prefix and the rows of one supervised update: lessons, then episodes, at first with exercises.

    Lessons have a room of their own (`lessons.py`). The exercises beside scripted episodes are random sequences that
    repeat, to learn copying from; and where names are dealt anew, prompts whose cards are recited.
    """
    config, w = session.config, session.config.warmstart
    rng = np.random.default_rng([w.seed, step])
    for kind, updates, *numbers in w.lessons:
        if step < updates:
            return lessons.ROWS[kind](session, rng, *numbers)
        step -= updates
    exercises = w.batch // 2 if step < w.copy_steps else 0
    recited = exercises // 2 if config.pool.rename else 0
    copies = exercises - recited
    prefix, rows = _prompted_rows(session, rng, w.batch - copies, recited)
    if copies:
        vocabulary = len(session.tokenizer)
        tokens, repeats = repeating_sequences(rng, copies, COPY_LENGTH, vocabulary, periods=w.copy_periods)
        rows += [Row([], t, m) for t, m in zip(tokens, repeats, strict=True)]
    return prefix, rows


def _prompted_rows(session: Session, rng: np.random.Generator, count: int, recited: int) -> tuple[list[int], list[Row]]:
    """Rows that begin with a prompt, and what all of them share: the first `recited` recite, the others act."""
    pool, template = session.config.pool, session.router.template

    def draw() -> tuple[Card, ...]:
        return roster(session.cards, rng, **roster_settings(pool))

    rosters = [draw() for _ in range(count)] if own_rosters(pool) else [draw()] * count
    questions = session.world.questions("train")
    asked = [questions[i] for i in rng.integers(len(questions), size=count)]
    ids = [session.router.prompt_ids(question.text, cards) for cards, question in zip(rosters, asked, strict=True)]
    shared, rows = common_prefix(ids), []
    for i, (cards, question, prompt) in enumerate(zip(rosters, asked, ids, strict=True)):
        if i < recited:
            said = recited_cards(cards, rng, RECITED, template=template)
            tokens, mask = (x[:COPY_LENGTH] for x in lessons.token_ids(session, said))
        else:
            said = scripted_episode(question, session.world, cards, rng, template=template)
            tokens, mask = lessons.token_ids(session, said)
        rows.append(Row(prompt[shared:], tokens, mask))
    return ids[0][:shared], rows


def longest_row(session: Session) -> int:
    """Tokens of a row behind the shared prefix, at most: with the prompt's cards where each row has its own.

    Then those of the longest cards, all under the longest name.
    """
    pool, longest = session.config.pool, max(session.config.rollout.max_tokens, COPY_LENGTH)
    if not own_rosters(pool):
        return longest

    def prompt(*cards: Card) -> tuple[int, ...]:
        return session.router.prompt_ids("?", cards)

    names = [card.name for card in all_in_prompts(session.cards, pool)]
    name = max(names, key=lambda name: len(session.tokenizer.encode(f" {name}")))
    named = [dataclasses.replace(card, name=name) for card in session.cards]
    cards = sorted(named, key=lambda card: len(prompt(card)))[-(pool.shown or len(named)) :]
    return longest + len(prompt(*cards)) - common_prefix([prompt(card) for card in session.cards])


def train_warm_start(session: Session, report: Report) -> Params:
    """Supervised updates from the initial parameters; `report(step, metrics)` is called after each."""
    if session.world is None:
        raise ConfigError(
            f"warmstart.steps is {session.config.warmstart.steps}, but only the set 'synthetic' has scripted "
            "episodes; set it to 0 and start from an instruction-tuned model.source"
        )
    c, w = session.config, session.config.warmstart
    taught = []
    for kind, updates, *numbers in w.lessons:
        longest = lessons.longest_row(session, kind, *numbers)
        rows = lessons.row_count(session, longest)  # they are all about as long
        taught.append(_Phase(min(updates, w.steps - sum(phase.updates for phase in taught)), longest, 1, rows))
    begun = sum(phase.updates for phase in taught)
    episodes = _Phase(w.steps - begun, longest_row(session), c.learner.length_buckets, w.batch)
    params = session.initial_params(w.seed)
    if taught:
        params = _trained(session, params, 0, taught, report, decay=False)
    return _trained(session, params, begun, [episodes], report, decay=True)


def _trained(
    session: Session, params: Params, step: int, phases: Sequence[_Phase], report: Report, *, decay: bool
) -> Params:
    """The parameters after these phases, the first of which begins at `step`, with a warm-up of their own.

    Episodes begin anew where lessons come before them: at the end of one decay over both, copying was not learnt.
    """
    c, w, mesh = session.config, session.config.warmstart, session.mesh
    total = sum(phase.updates for phase in phases)
    optimizer, _ = make_optimizer(
        learning_rate=w.learning_rate, warmup=w.warmup, total=total, decay=decay, weight_decay=0.0, max_grad_norm=1.0
    )
    state, shares = init_state(optimizer, params, session.abstract_base, mesh), mesh.shape["data"] * mesh.shape["fsdp"]
    for updates, longest, buckets, rows in phases:
        layout = make_layout(longest, buckets=buckets, tokens=c.learner.micro_tokens, rows=rows, shares=shares)
        learner = Learner(
            session.model.base, optimizer, SupervisedLoss(), mesh, session.abstract_base,
            layout=layout, chunk=c.learner.logit_chunk,
        )  # fmt: skip
        for _ in range(updates):
            state, metrics = learner.update(state, *scripted_rows(session, step))
            step += 1
            report(step, metrics)
    return state.params


def save_warm_start(path: Path, params: Params, config: ConfigDict) -> None:
    """Write parameters to one safetensors file, with the recipe that made them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    leaves = {
        jax.tree_util.keystr(key, simple=True, separator="/"): np.asarray(jax.device_get(leaf))
        for key, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    save_file(leaves, path, metadata={"recipe": recipe(config)})


def load_warm_start(path: Path, session: Session) -> Params:
    """Read a kept warm start onto the session's mesh. ConfigError if it is unreadable or from another recipe."""
    rebuild = "build it anew with python -m router_r1_jax.warmstart, or set warmstart.file='' to train it in the run"
    try:
        with safe_open(path, framework="numpy") as file:
            made_by = file.metadata().get("recipe")
            if made_by != recipe(session.config):
                raise ConfigError(f"warmstart.file {path} was made by another configuration ({made_by}); {rebuild}")

            def read(key: tuple, target: jax.ShapeDtypeStruct) -> jax.Array:
                value = file.get_tensor(jax.tree_util.keystr(key, simple=True, separator="/"))
                return place(value, target.sharding)

            return jax.tree_util.tree_map_with_path(read, session.abstract_base)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"warmstart.file {path} cannot be read ({error}); {rebuild}") from error


def warm_start(session: Session, writer: MetricsWriter) -> Params:
    """The parameters that RL starts from: the kept file, or scripted training now, or the initial ones as they are."""
    w = session.config.warmstart
    if w.file and Path(w.file).exists():
        hosts.say(f"warm start: read from {w.file}")
        return load_warm_start(Path(w.file), session)
    if w.steps == 0:
        return session.initial_params(session.config.seed)
    with tqdm(total=w.steps, desc="warm start", unit="step", dynamic_ncols=True, disable=not hosts.first()) as bar:

        def report(step: int, metrics: dict[str, float]) -> None:
            bar.update()
            bar.set_postfix(loss=f"{metrics['loss']:.3f}")
            writer.write(step, {"phase": "warmstart"} | {f"warmstart/{k}": v for k, v in metrics.items()})

        return train_warm_start(session, report)


def main(config: ConfigDict, workdir: Path) -> None:
    """Train the warm start and keep it in one file."""
    target = Path(config.warmstart.file) if config.warmstart.file else workdir / "warmstart.safetensors"
    config.warmstart.file = ""
    with open_session(config, workdir, load_source=True) as session:
        writer = MetricsWriter(workdir)
        save_warm_start(target, warm_start(session, writer), config)
        writer.close()
    print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    launch(main)
