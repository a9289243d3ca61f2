"""A session: everything that a main opens from one configuration, and the questions of its splits.

If the configuration simulates the external models, they are served by a process of their own, over HTTP like any other
provider. The process ends with the session.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from router_r1_jax.config import SYNTHETIC
from router_r1_jax.data.questions import DataError, QuestionRecord
from router_r1_jax.data.splits import SampledDataset, find_datasets, interleave, sample_split
from router_r1_jax.distributed import multihost
from router_r1_jax.model import ModelConfig, Params, abstract_params, init_params
from router_r1_jax.pool.cards import Card, cards_from_config
from router_r1_jax.pool.ledger import Ledger, spent_dollars
from router_r1_jax.pool.pool import Pool
from router_r1_jax.router import Router
from router_r1_jax.setup.environment import open_environment
from router_r1_jax.setup.model import open_model
from router_r1_jax.storage.json_lines import replace_file

if TYPE_CHECKING:
    from router_r1_jax.setup.environment import SyntheticEnvironment

LEDGER = "ledger.jsonl"
DATA_FILE = "data.json"  # which questions were sampled from each data set
EMPTY_POOL: dict[str, Any] = {"ledger": {}, "ledger_size": 0}


@dataclasses.dataclass
class Session:
    """The opened parts."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    cards: tuple[Card, ...]
    tokenizer: PreTrainedTokenizerBase
    model: ModelConfig
    abstract_params: Params
    datasets: Mapping[str, Path]  # name of the data set -> its folder
    environment: "SyntheticEnvironment | None"
    pool: Pool
    router: Router
    _initial: Params | None
    _former: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # see `restore_pools`; process 0 only
    spent: float = 0.0  # dollars that all processes have paid, as of the last `pool_states`

    def questions(self, split: str) -> list[QuestionRecord]:
        """The questions that the configuration chooses for a split; <workdir>/data.json says which were sampled."""
        sampled = sample_split(self.config.data, self.datasets, split)
        if multihost.is_primary():
            _write_summary(self.workdir / DATA_FILE, self.config.data, split, sampled)
        records = interleave(sampled)
        refuse_long(records, self.tokenizer, self.config.prompt.question_tokens)
        return records

    def data_summary(self, split: str) -> dict[str, Any]:
        """What `questions` last sampled: the seed, and for each set the count, the available and a hash of the ids."""
        return json.loads((self.workdir / DATA_FILE).read_text())[split]

    def pool_states(self) -> list[dict[str, Any]]:
        """What a checkpoint needs of the pools, by process. All processes call it."""
        mine = (self.pool.ledger.state(), self.pool.ledger.paid, self._former)
        states, paid, former = zip(*multihost.allgather_objects(mine), strict=True)
        self.pool.paid_elsewhere = sum(paid) - self.pool.ledger.paid
        self.spent = sum(spent_dollars(state) for state in (*states, *former[0]))
        return [*states, *former[0]]

    def restore_pools(self, states: Sequence[dict[str, Any]], step: int) -> None:
        """Continue from what `pool_states` returned after `step`.

        If the run had more processes then, process 0 takes over the ledgers of the processes that are gone.
        """
        padded = [*states, *[EMPTY_POOL] * jax.process_count()]
        self.pool.ledger.restore(padded[jax.process_index()], step)
        self._former = []
        process = jax.process_count()
        while multihost.is_primary() and (path := multihost.process_file(self.workdir / LEDGER, process)).exists():
            ledger = Ledger(path)
            state = padded[process] if process < len(states) else EMPTY_POOL
            ledger.restore(state, step)
            self._former.append(ledger.state())
            ledger.close()
            process += 1

    @property
    def abstract_base(self) -> Params:
        """Shapes and shardings of the parameters without LoRA's adapters: what a warm start trains."""
        return abstract_params(self.model.base, self.mesh)

    def initial_params(self, seed: int) -> Params:
        """The base parameters that training starts from: those of model.source, or random ones from `seed`."""
        if self._initial is not None:
            return self._initial
        return init_params(self.model.base, self.mesh, seed)


@contextmanager
def open_session(config: ConfigDict, workdir: Path, *, load_source: bool) -> Iterator[Session]:
    """Open everything, and at the end close the pool and the simulated models' server.

    `load_source` also reads the weights of model.source (an evaluation restores a checkpoint). Raises ConfigError,
    DataError or PoolError, with what to mend, before anything is computed.
    """
    cards = cards_from_config(config.pool)
    environment = open_environment(config, cards)
    with multihost.primary_first():  # before weights are read, so that a missing data set is reported at once
        datasets = find_datasets(config.data, workdir)
        if environment is not None:
            datasets[SYNTHETIC] = environment.prepare_dataset(Path(config.data.dir or workdir / "data"))
    opened = open_model(config, workdir, environment, load_source=load_source)
    with ExitStack() as stack:
        shared = _share_of_limits(config, jax.process_count())
        if config.synthetic.simulate_models:
            stack.enter_context(environment.serve(shared.pool))
        pool = stack.enter_context(_open_pool(shared.pool, workdir, cards))
        pool.check()
        router = Router(shared, opened.config, opened.tokenizer, cards, pool, opened.mesh)
        yield Session(
            config=config,
            workdir=workdir,
            mesh=opened.mesh,
            cards=cards,
            tokenizer=opened.tokenizer,
            model=opened.config,
            abstract_params=abstract_params(opened.config, opened.mesh),
            datasets=datasets,
            environment=environment,
            pool=pool,
            router=router,
            _initial=opened.initial,
        )


def refuse_long(records: Sequence[QuestionRecord], tokenizer: PreTrainedTokenizerBase, most: int) -> None:
    """Raise DataError if a question has more than `most` tokens; else a run would end when it meets that question.

    Tokens that a chat template adds behind the question are not counted here. The engine counts the whole prompt.
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


def _write_summary(path: Path, data: ConfigDict, split: str, sampled: Sequence[SampledDataset]) -> None:
    summary = json.loads(path.read_text()) if path.exists() else {}
    sets = {one.dataset: one.summary() for one in sampled}
    summary[split] = {"seed": data.seed, "per_set": data.per_set[split], "sets": sets}
    replace_file(path, (json.dumps(summary, indent=2) + "\n").encode())


def _share_of_limits(config: ConfigDict, processes: int) -> ConfigDict:
    """The configuration with one process's share of what a provider allows to all processes together."""

    def share(limit: int) -> int:
        return -(-limit // processes)  # 0, which means no limit, stays 0

    config = config.copy_and_resolve_references()
    config.pool.concurrency = share(config.pool.concurrency)
    providers = [entry.copy_and_resolve_references() for entry in config.pool.providers]
    for entry in providers:
        for field in ("requests_per_minute", "tokens_per_minute", "concurrency"):
            entry[field] = share(entry[field])
    config.pool.providers = tuple(providers)
    return config


def _open_pool(pool_config: ConfigDict, workdir: Path, cards: tuple[Card, ...]) -> Pool:
    settings = pool_config.call_cache
    cache = Path(settings.path) if settings.path else workdir / "call_cache.sqlite"
    if settings.mode != "strict":  # SQLite's write-ahead log works within one machine only
        cache = multihost.process_file(cache)
    return Pool(pool_config, cards, ledger_path=multihost.process_file(workdir / LEDGER), cache_path=cache)
