"""What a main opens before it starts: tokenizer, model, mesh, data and the pool, from one configuration.

A simulated pool is served by a process of its own, over HTTP like any other provider; it ends with the session.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from router_r1_jax import hosts, prompts
from router_r1_jax.config import SPLITS, ConfigError
from router_r1_jax.data import synthetic
from router_r1_jax.data.draw import Drawn, draw_split, take_turns
from router_r1_jax.data.questions import DataError, QuestionRecord
from router_r1_jax.data.sets import open_sets
from router_r1_jax.data.tokenizer import corpus, train_tokenizer
from router_r1_jax.data.world import World
from router_r1_jax.mesh import make_mesh
from router_r1_jax.model import (
    ModelConfig,
    Params,
    abstract_params,
    check_attention,
    from_arch,
    init_params,
    load_hf,
    load_hf_config,
    lora_from,
)
from router_r1_jax.pool.cards import Card, all_in_prompts, cards_from_config
from router_r1_jax.pool.ledger import Ledger, spent_dollars
from router_r1_jax.pool.pool import Pool
from router_r1_jax.pool.server import simulated_providers, start_server
from router_r1_jax.report.writer import replace_file
from router_r1_jax.router import Router

LEDGER = "ledger.jsonl"
DRAWS = "data.json"  # what was drawn of each set
EMPTY_POOL: dict[str, Any] = {"ledger": {}, "ledger_size": 0}
VOCABULARY_MULTIPLE = 64  # a random start rounds its vocabulary up to it, so that it divides over devices


@dataclasses.dataclass
class Session:
    """The opened parts. A context manager that closes the pool and its server."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    cards: tuple[Card, ...]
    tokenizer: PreTrainedTokenizerBase
    model: ModelConfig
    abstract_params: Params
    data_dirs: Mapping[str, Path]  # by set
    world: World | None
    pool: Pool
    router: Router
    _initial: Params | None
    _closing: ExitStack
    _left: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # by process 0, see `restore_pools`
    _spent: float = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._closing.__exit__(*exception)

    def questions(self, split: str) -> list[QuestionRecord]:
        """The questions that the configuration chooses for a split; what was drawn is noted in <workdir>/data.json."""
        drawn = draw_split(self.config.data, self.data_dirs, split)
        if hosts.first():
            _note_draw(self.workdir / DRAWS, self.config.data, split, drawn)
        records = take_turns(drawn)
        refuse_long(records, self.tokenizer, self.config.prompt.question_tokens)
        return records

    def drawn(self, split: str) -> dict[str, Any]:
        """What `questions` last drew: the seed, and of each set how many, of how many, and a hash of their ids."""
        return json.loads((self.workdir / DRAWS).read_text())[split]

    def pool_states(self) -> list[dict[str, Any]]:
        """What a checkpoint needs of the pools of all processes, by process. All processes call it."""
        mine = (self.pool.state(), self.pool.paid, self._left)
        states, paid, left = zip(*hosts.gather(mine), strict=True)
        self.pool.paid_elsewhere = sum(paid) - self.pool.paid
        self._spent = sum(spent_dollars(state["ledger"]) for state in (*states, *left[0]))
        return [*states, *left[0]]

    def restore_pools(self, states: Sequence[dict[str, Any]], step: int) -> None:
        """Go on from what `pool_states` returned after `step`.

        Where there were more processes then, process 0 takes back what the others' ledgers hold of later steps.
        """
        padded = [*states, *[EMPTY_POOL] * jax.process_count()]
        self.pool.restore(padded[jax.process_index()], step)
        self._left = []
        process = jax.process_count()
        while hosts.first() and (path := hosts.own_file(self.workdir / LEDGER, process)).exists():
            ledger = Ledger(path)
            state = padded[process] if process < len(states) else EMPTY_POOL
            ledger.restore(state["ledger"], state["ledger_size"], step)
            self._left.append({"ledger": ledger.state(), "ledger_size": ledger.size})
            ledger.close()
            process += 1

    @property
    def spent(self) -> float:
        """Dollars that all processes have paid, as of the last `pool_states`."""
        return self._spent

    @property
    def abstract_base(self) -> Params:
        """Shapes and shardings of the parameters without LoRA's adapters: what a warm start trains."""
        return abstract_params(self.model.base, self.mesh)

    def initial_params(self, seed: int) -> Params:
        """The base parameters that training starts from: those of model.source, or random ones from `seed`."""
        if self._initial is not None:
            return self._initial
        return init_params(self.model.base, self.mesh, seed)


class Opened(NamedTuple):
    """A router's own parts, without questions and pool."""

    mesh: Mesh
    tokenizer: PreTrainedTokenizerBase
    model: ModelConfig
    initial: Params | None  # the weights of model.source, where they were asked for


def open_router(config: ConfigDict, workdir: Path, *, load_source: bool) -> Opened:
    """Mesh, tokenizer, model; `load_source` also reads the weights of model.source. Raises ConfigError."""
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with hosts.first_before_others():
        tokenizer = _load_tokenizer(config, workdir)
    model, initial = _load_model(config, tokenizer, mesh, load_source)
    return Opened(mesh, tokenizer, model, initial)


def open_session(config: ConfigDict, workdir: Path, *, load_source: bool) -> Session:
    """Open everything; `load_source` also reads the weights of model.source (evaluation restores its own).

    Raises ConfigError, DataError or PoolError with what to mend, before anything is computed.
    """
    cards, world = cards_from_config(config.pool), _world(config)
    with hosts.first_before_others():
        data_dirs = open_sets(config.data, workdir)  # before weights are read: a set that is missing is said at once
    mesh, tokenizer, model, initial = open_router(config, workdir, load_source=load_source)
    with ExitStack() as opening:
        own = _part_of_limits(config, jax.process_count())
        pool = opening.enter_context(_open_pool(own, workdir, cards, opening))
        pool.check()
        router = Router(own, model, tokenizer, cards, pool, mesh)
        return Session(
            config, workdir, mesh, cards, tokenizer, model, abstract_params(model, mesh), data_dirs, world, pool,
            router, initial, opening.pop_all(),
        )  # fmt: skip


def refuse_long(records: Sequence[QuestionRecord], tokenizer: PreTrainedTokenizerBase, most: int) -> None:
    """Raise DataError for questions of more than `most` tokens, else a run would end where the first of them is drawn.

    What a chat template adds behind the question is not counted here; the engine counts the whole prompt.
    """
    if not records:
        return
    encoded = tokenizer([record.question for record in records], add_special_tokens=False)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    longest = max(range(len(records)), key=lengths.__getitem__)
    if lengths[longest] > most:
        count = sum(length > most for length in lengths)
        raise DataError(
            f"{count} of {len(records)} questions have more tokens than prompt.question_tokens ({most}); the longest, "
            f"{records[longest].id!r}, has {lengths[longest]}: raise the field, or leave them out of the set"
        )


def _note_draw(path: Path, data: ConfigDict, split: str, drawn: Sequence[Drawn]) -> None:
    """Write what a run was given: by split and set, with the seed of the draw."""
    noted = json.loads(path.read_text()) if path.exists() else {}
    sets = {one.suite: one.summary() for one in drawn}
    noted[split] = {"seed": data.seed, "per_set": data.per_set[split], "sets": sets}
    replace_file(path, (json.dumps(noted, indent=2) + "\n").encode())


def _world(config: ConfigDict) -> World | None:
    used = {name for split in SPLITS for name in config.data[split]}
    return World(config.data.world) if synthetic.SUITE in used else None


def _load_tokenizer(config: ConfigDict, workdir: Path) -> PreTrainedTokenizerBase:
    """The configured tokenizer; where none is named, one trained on the synthetic world and kept in the workdir."""
    if source := config.model.tokenizer or config.model.source:
        field = "model.tokenizer" if config.model.tokenizer else "model.source"
        return _read_tokenizer(source, f"{field} is {source!r}, whose tokenizer", "name a folder or hub name")
    world = _world(config)
    if world is None:
        raise ConfigError("model.tokenizer and model.source are empty; name a folder or hub name in one of them")
    folder = workdir / "tokenizer"
    if not folder.exists():
        template = prompts.load_template(config.prompt.template)
        fresh = workdir / "tokenizer.new"  # renamed when whole: a full disk leaves nothing that a later run would read
        cards = all_in_prompts(cards_from_config(config.pool), config.pool)
        train_tokenizer(corpus(world, cards, template, config.rollout.max_calls), fresh)
        fresh.replace(folder)
    return _read_tokenizer(str(folder), str(folder), "remove the folder, so that it is trained anew")


def _read_tokenizer(source: str, what: str, fix: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # transformers and tokenizers raise their own for each kind of damage
        said = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{what} cannot be read ({said}); {fix}") from error


def _load_model(
    config: ConfigDict, tokenizer: PreTrainedTokenizerBase, mesh: Mesh, load_source: bool
) -> tuple[ModelConfig, Params | None]:
    m = config.model
    params = None
    if m.source and load_source:
        model, params = load_hf(m.source, dtype=m.dtype, mesh=mesh)
    elif m.source:
        model = load_hf_config(m.source, m.dtype)
    else:
        vocab_size = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        try:
            model = from_arch(m.arch, vocab_size, dtype=m.dtype, remat=m.remat)
        except ValueError as error:
            raise ConfigError(f"model.arch.{error}") from error
    try:
        model = dataclasses.replace(model, remat=m.remat, attention=m.attention, lora=lora_from(m.lora))
        check_attention(model)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error
    return model, params


def _part_of_limits(config: ConfigDict, processes: int) -> ConfigDict:
    """The configuration with a process's part of what a provider allows to all of them together."""

    def part(limit: int) -> int:
        return -(-limit // processes)  # 0, no limit, stays 0

    config = config.copy_and_resolve_references()
    config.pool.concurrency = part(config.pool.concurrency)
    providers = [entry.copy_and_resolve_references() for entry in config.pool.providers]
    for entry in providers:
        for field in ("requests_per_minute", "tokens_per_minute", "concurrency"):
            entry[field] = part(entry[field])
    config.pool.providers = tuple(providers)
    return config


def _open_pool(config: ConfigDict, workdir: Path, cards: tuple[Card, ...], opening: ExitStack) -> Pool:
    settings = config.pool
    if settings.simulate:
        server = opening.enter_context(start_server(config.data.world, cards))
        settings = simulated_providers(settings, server.base_url)
    tape = Path(settings.tape.path) if settings.tape.path else workdir / "tape.sqlite"
    if settings.tape.mode != "strict":  # SQLite's write-ahead log is for processes of one machine
        tape = hosts.own_file(tape)
    return Pool(settings, cards, ledger_path=hosts.own_file(workdir / LEDGER), tape_path=tape)
