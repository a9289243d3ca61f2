"""Shared parts of the studies: train missing runs, measure variants of their policies once, write result files.

A study names the runs of a sweep (`configs/sweeps/`). The mains train and evaluate missing runs, each in a separate
process. Measured episodes are kept in the run's folder and are read from there. So an interrupted study goes on with
the same command, and several studies share their runs.
"""

import argparse
import dataclasses
import datetime
import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from router_r1_jax.config_checks import validate
from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.evaluation.answering import answer_questions
from router_r1_jax.evaluation.cache_key import records_key
from router_r1_jax.evaluation.episode_cache import measured_once
from router_r1_jax.evaluation.episode_records import Record, summarise
from router_r1_jax.evaluation.statistics import bootstrap_mean_of_sets
from router_r1_jax.pool.cards import Card, route_names
from router_r1_jax.protocol import RouteFault, parse_route
from router_r1_jax.report.tables import Table
from router_r1_jax.reward import CostNormalizer
from router_r1_jax.router import Router
from router_r1_jax.setup.policy_weights import fingerprint
from router_r1_jax.setup.session import Session, open_session
from router_r1_jax.storage.checkpoint import CheckpointStore
from router_r1_jax.storage.json_lines import replace_file
from router_r1_jax.storage.metrics_writer import read_metrics
from router_r1_jax.sweep import Run, expand_runs, finished, run_all, seed_mean

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"


def arguments(description: str, sweep: str) -> argparse.Namespace:
    """--runs, --seeds, --workers and --questions of a study over `configs/sweeps/<sweep>.py`."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / sweep, help="folder of the sweep's runs")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated; runs of other seeds are left out")
    parser.add_argument("--workers", type=int, default=1, help="runs trained at a time")
    parser.add_argument("--questions", type=int, default=500, help="test questions at most")
    parser.add_argument("--trained_only", action="store_true", help="train nothing; leave out runs that are not there")
    parsed = parser.parse_args()
    if parsed.workers < 1:
        parser.error(f"--workers is {parsed.workers}; at least one run is trained at a time")
    parsed.seeds = {int(seed) for seed in parsed.seeds.split(",")}
    parsed.sweep = sweep
    return parsed


def make_warm_start(sweep: str) -> None:
    """Train the warm start that all runs of `configs/sweeps/<sweep>.py` read. Otherwise each run would train one."""
    config_file = ROOT / f"configs/sweeps/{sweep}.py"
    target = Path(runpy.run_path(str(config_file))["get_config"]().warmstart.file)
    if not target.exists():
        command = [sys.executable, "-m", "router_r1_jax.training.warmstart", f"--config={config_file}"]
        subprocess.run([*command, f"--workdir={target.with_suffix('')}"], check=True)


def trained_runs(
    options: argparse.Namespace, wanted: Callable[[Mapping[str, Any]], bool] = lambda _: True
) -> list[Run]:
    """The sweep's runs of these seeds with wanted overrides. Missing runs are trained and evaluated first.

    With --trained_only missing runs are printed and left out. Raises SystemExit if a run fails.
    """
    config_file = f"configs/sweeps/{options.sweep}.py"
    runs = [
        run
        for run in expand_runs(str(ROOT / config_file), {}, options.runs.absolute())
        if run.overrides.get("seed", 0) in options.seeds and wanted(run.overrides)
    ]
    if options.trained_only:
        trained = [run for run in runs if is_trained(run.folder)]
        for run in runs:
            if run not in trained:
                print(f"not trained, left out: {run.name}")
        return trained
    if failed := run_all([run for run in runs if not finished(run)], options.workers):
        raise SystemExit("\n".join(f"{name}: {error}" for name, error in failed.items()))
    return runs


def is_trained(folder: Path) -> bool:
    """Whether the run in this folder was trained to its last step."""
    config = folder / "config.json"
    done = [line["step"] for line in read_metrics(folder) if line.get("phase") != "warmstart"]
    return config.exists() and max(done, default=-1) >= json.loads(config.read_text())["steps"]


def run_config(options: argparse.Namespace, run: Run, **more: Any) -> ConfigDict:
    """The configuration of a run, read from its sweep, with further overrides."""
    config = runpy.run_path(str(ROOT / f"configs/sweeps/{options.sweep}.py"))["get_config"]()
    config.update_from_flattened_dict(dict(run.overrides) | {"evaluation.questions": options.questions} | more)
    validate(config)
    return config


# ---- variants of a policy -------------------------------------------------------------------------------------------

Choose = Callable[[str, Sequence[Card], str], str]  # (query, candidates, called name) -> name of the model to ask


def as_called(query: str, candidates: Sequence[Card], called: str) -> str:
    """The model that the router called."""
    return called


@dataclasses.dataclass(frozen=True)
class Variant:
    """A checkpoint under changed conditions.

    Attributes:
      name: name in tables.
      overrides: fields of the configuration that change for the router; the pool stays as it is.
      change_card: changes a card in the prompt, or None; the pool is asked as before.
      choose: chooses the model that a call really goes to.
    """

    name: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    change_card: Callable[[Card], Card] | None = None
    choose: Choose = as_called


class Redirected:
    """A pool that asks another model than the called one and passes on its reply.

    `choose` can be replaced between rollouts, so that variants share a router and its compiled programs.
    """

    def __init__(self, pool: Any, choose: Choose = as_called) -> None:
        self._pool, self.choose = pool, choose

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def respond(self, route_text: str, *, cards: Sequence[Card], **where: Any) -> Future:
        """Like `Pool.respond`. A malformed call is passed on as it is."""
        route = parse_route(route_text, route_names(cards))
        if not isinstance(route, RouteFault):
            route_text = f"{self.choose(route.query, cards, route.name)}: {route.query}"
        return self._pool.respond(route_text, cards=cards, **where)


class Checkpoint:
    """Parameters and session of one checkpoint. Variants that differ in `choose` alone share a router."""

    def __init__(self, session: Session, params: Any) -> None:
        self.session, self.params = session, params
        self._pool = Redirected(session.pool)
        self._routers: dict[tuple, Router] = {}

    def router(self, variant: Variant) -> Router:
        """A router that answers under the conditions of the variant."""
        self._pool.choose = variant.choose
        key = (tuple(variant.overrides.items()), variant.change_card)
        if key not in self._routers:
            session, (config, cards) = self.session, self.conditions(variant)
            self._routers[key] = Router(config, session.model, session.tokenizer, cards, self._pool, session.mesh)
            self._routers[key].sync_weights(self.params)
        return self._routers[key]

    def conditions(self, variant: Variant) -> tuple[ConfigDict, tuple[Card, ...]]:
        """The configuration and the cards of a variant."""
        session, config = self.session, self.session.config.copy_and_resolve_references()
        config.update_from_flattened_dict(dict(variant.overrides))
        return config, tuple(map(variant.change_card, session.cards)) if variant.change_card else session.cards


@contextmanager
def open_checkpoint(config: ConfigDict, workdir: Path) -> Iterator[Checkpoint]:
    """The best checkpoint of a run, with an open session."""
    with (
        CheckpointStore(workdir / "checkpoints", keep=None) as store,
        open_session(config, workdir, load_source=False) as session,
    ):
        restored = store.restore(store.resolve("best"), params=session.abstract_params)
        yield Checkpoint(session, restored["params"])


def greedy_records(
    checkpoint: Checkpoint, variant: Variant, questions: Sequence[QuestionRecord], *, study: str
) -> list[Record]:
    """Greedy records of a variant. They are kept, and read if questions, weights and conditions are the same."""
    session, (config, cards) = checkpoint.session, checkpoint.conditions(variant)
    key = records_key(config, cards, questions, fingerprint(checkpoint.params))

    def measure() -> list[Record]:
        return answer_questions(
            checkpoint.router(variant),
            questions,
            step=0,
            split=config.evaluation.split,
            policy=variant.name,
            normalizer=CostNormalizer(config.reward.window),
        )

    name, ids = f"{study}_{variant.name}".replace(" ", "_"), [question.id for question in questions]
    return measured_once(session.workdir / "studies", name, key, ids, measure)


# ---- results --------------------------------------------------------------------------------------------------------

METRICS = ("em", "f1", "dollars_per_question", "calls_per_question", "best_model_share", "malformed_share")


def run_metrics(records: Sequence[Record], cards: Sequence[Card]) -> dict[str, Any]:
    """Metrics of one run's records: METRICS, a bootstrap interval of EM over questions, and the share of each model."""
    summary = summarise(records, cards)
    em = bootstrap_mean_of_sets([[record["exact_match"] for record in records]], resamples=10_000, seed=0)
    chosen = {key: summary[key] for key in METRICS if key in summary}
    return chosen | {"em_ci": [em.low, em.high], "calls_share": summary["calls/share"], "questions": len(records)}


def mean_over_seeds(each: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of each metric over seeds, with Student's 95 % interval if there are two seeds or more.

    If there is a single seed, EM has the bootstrap interval over its questions. "em_ci_over" says which interval it is.
    """
    keys = [key for key in METRICS if all(key in line for line in each.values())]
    means = {key: seed_mean([line[key] for line in each.values()]) for key in keys}
    if len(each) == 1 and "em_ci" in (only := next(iter(each.values()))):
        means["em"]["ci"] = only["em_ci"]
    return means | {"seeds": sorted(each), "em_ci_over": "seeds" if len(each) > 1 else "questions"}


def format_mean(mean: Mapping[str, Any] | None, digits: str = ".3f") -> str:
    """ "0.912 [0.900 .. 0.930]", or without the interval if there is one seed."""
    if mean is None:
        return ""
    text = f"{mean['mean']:{digits}}"
    return text if mean["ci"] is None else f"{text} [{mean['ci'][0]:{digits}} .. {mean['ci'][1]:{digits}}]"


def last_result(name: str) -> dict[str, Any]:
    """What `save` wrote last, or {}."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save(name: str, results: Mapping[str, Any], table: Table, figure: Figure, note: str = "") -> None:
    """Write results/NAME.json, .md (the table behind the note) and .png. Print the table and one JSON line."""
    RESULTS.mkdir(exist_ok=True)
    text = note + table.markdown() + "\n"
    dated = {"study": name, "date": datetime.date.today().isoformat()} | dict(results)
    replace_file(RESULTS / f"{name}.json", (json.dumps(dated, indent=1) + "\n").encode())
    replace_file(RESULTS / f"{name}.md", text.encode())
    FigureCanvasAgg(figure)
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    print(text)
    print(json.dumps({key: value for key, value in dated.items() if key != "each"}))
