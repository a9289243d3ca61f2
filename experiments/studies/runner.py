"""What the studies share: runs that are trained if they are missing, policies measured on them once, and pages.

A study names the runs of a sweep (`configs/sweeps/`). What is missing is trained and evaluated through the mains, in
processes of their own; what was measured lies as episodes in the run's folder and is read. So a study that was cut goes
on with the same command, and several studies share their runs.
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

from router_r1_jax.baselines.own import answer_greedily
from router_r1_jax.checkpoint import CheckpointStore
from router_r1_jax.config import validate
from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.evaluate import records_identity
from router_r1_jax.evaluation.journal import measured_once
from router_r1_jax.evaluation.records import Record, summarise
from router_r1_jax.evaluation.statistics import bootstrap_mean
from router_r1_jax.pool.cards import Card, route_names
from router_r1_jax.protocol import RouteFault, parse_route
from router_r1_jax.report.writer import read_metrics, replace_file
from router_r1_jax.router import Router
from router_r1_jax.session import Session, open_session
from router_r1_jax.sweep import Run, finished, plan, run_all, seed_mean
from router_r1_jax.weights import fingerprint

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
    """Train once the warm start that all runs of `configs/sweeps/<sweep>.py` read; without it each trains its own."""
    config_file = ROOT / f"configs/sweeps/{sweep}.py"
    target = Path(runpy.run_path(str(config_file))["get_config"]().warmstart.file)
    if not target.exists():
        command = [sys.executable, "-m", "router_r1_jax.warmstart", f"--config={config_file}"]
        subprocess.run([*command, f"--workdir={target.with_suffix('')}"], check=True)


def trained_runs(
    options: argparse.Namespace, wanted: Callable[[Mapping[str, Any]], bool] = lambda _: True
) -> list[Run]:
    """The sweep's runs of these seeds whose overrides are wanted; what is missing is trained and evaluated first.

    Raises SystemExit where a run fails. With --trained_only the missing runs are named and left out.
    """
    config_file = f"configs/sweeps/{options.sweep}.py"
    runs = [
        run
        for run in plan(str(ROOT / config_file), {}, options.runs.absolute())
        if run.overrides.get("seed", 0) in options.seeds and wanted(run.overrides)
    ]
    if options.trained_only:
        there = [run for run in runs if checkpoints(run.folder)]
        for run in runs:
            if run not in there:
                print(f"not trained, left out: {run.name}")
        return there
    failed = [end for end in run_all([run for run in runs if not finished(run)], options.workers) if end.error]
    if failed:
        raise SystemExit("\n".join(f"{end.run.name}: {end.error}" for end in failed))
    return runs


def checkpoints(folder: Path) -> bool:
    """Whether a run was trained to its end."""
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

Choose = Callable[[str, Sequence[Card], str], str]  # (query, roster, name that was called) -> name that is asked


def as_called(query: str, roster: Sequence[Card], called: str) -> str:
    """Whom the router called."""
    return called


@dataclasses.dataclass(frozen=True)
class Variant:
    """A checkpoint under changed circumstances.

    Attributes:
      name: in tables.
      overrides: of the configuration's fields, for the router alone.
      shown: what the cards look like in the prompt, where it is changed; the pool is asked as before.
      choose: whom a call really goes to.
    """

    name: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shown: Callable[[Card], Card] | None = None
    choose: Choose = as_called


class Redirected:
    """A pool that asks another model than the one that was called, under the called one's name.

    `choose` can be replaced between rollouts: routers over one pool share their compiled programs.
    """

    def __init__(self, pool: Any, choose: Choose = as_called) -> None:
        self._pool, self.choose = pool, choose

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def respond(self, route_text: str, *, cards: Sequence[Card], **where: Any) -> Future:
        """As `Pool.respond`; a call that cannot be made goes on as it is."""
        route = parse_route(route_text, route_names(cards))
        if not isinstance(route, RouteFault):
            route_text = f"{self.choose(route.query, cards, route.name)}: {route.query}"
        return self._pool.respond(route_text, cards=cards, **where)


class Checkpoint:
    """Parameters and session of one checkpoint; variants that change only whom a call reaches share a router."""

    def __init__(self, session: Session, params: Any) -> None:
        self.session, self.params = session, params
        self._pool = Redirected(session.pool)
        self._routers: dict[tuple, Router] = {}

    def router(self, variant: Variant) -> Router:
        """Ready to answer as the variant says."""
        self._pool.choose = variant.choose
        key = (tuple(variant.overrides.items()), variant.shown)
        if key not in self._routers:
            session, (config, cards) = self.session, self.circumstances(variant)
            self._routers[key] = Router(config, session.model, session.tokenizer, cards, self._pool, session.mesh)
            self._routers[key].push(self.params)
        return self._routers[key]

    def circumstances(self, variant: Variant) -> tuple[ConfigDict, tuple[Card, ...]]:
        """Configuration and cards of a variant."""
        session, config = self.session, self.session.config.copy_and_resolve_references()
        config.update_from_flattened_dict(dict(variant.overrides))
        return config, tuple(map(variant.shown, session.cards)) if variant.shown else session.cards


@contextmanager
def opened(config: ConfigDict, workdir: Path, checkpoint: str = "best") -> Iterator[Checkpoint]:
    """A checkpoint of a run, with the run's session."""
    with (
        CheckpointStore(workdir / "checkpoints", keep=None) as store,
        open_session(config, workdir, load_source=False) as session,
    ):
        yield Checkpoint(session, store.restore_params(store.resolve(checkpoint), session.abstract_params))


def measured(
    checkpoint: Checkpoint, variant: Variant, questions: Sequence[QuestionRecord], *, study: str
) -> list[Record]:
    """Greedy records of a variant; read where they were measured on these very questions, weights and circumstances."""
    session, (config, cards) = checkpoint.session, checkpoint.circumstances(variant)
    made_with = records_identity(config, cards, questions, fingerprint(checkpoint.params))

    def measure() -> list[Record]:
        router, split = checkpoint.router(variant), config.evaluation.split
        return answer_greedily(config, router, questions, policy=variant.name, split=split)

    name, ids = f"{study}_{variant.name}".replace(" ", "_"), [question.id for question in questions]
    return measured_once(session.workdir / "studies", name, made_with, ids, measure)


# ---- results and pages ----------------------------------------------------------------------------------------------

FIGURES = ("em", "f1", "dollars_per_question", "calls_per_question", "best_model_share", "malformed_share")


def figures(records: Sequence[Record], cards: Sequence[Card]) -> dict[str, Any]:
    """What one run's records say: FIGURES, a bootstrap interval of EM over questions, and the share of each model."""
    summary = summarise(records, cards)
    em = bootstrap_mean([record["exact_match"] for record in records], resamples=10_000, seed=0)
    chosen = {key: summary[key] for key in FIGURES if key in summary}
    return chosen | {"em_ci": [em.low, em.high], "calls_share": summary["calls/share"], "questions": len(records)}


def over_seeds(each: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Per figure its mean over seeds, with Student's 95 % interval where there are two or more.

    For a single seed EM has the bootstrap interval over its questions; "em_ci_over" says which it is.
    """
    keys = [key for key in FIGURES if all(key in line for line in each.values())]
    means = {key: seed_mean([line[key] for line in each.values()]) for key in keys}
    if len(each) == 1 and "em_ci" in (only := next(iter(each.values()))):
        means["em"]["ci"] = only["em_ci"]
    return means | {"seeds": sorted(each), "em_ci_over": "seeds" if len(each) > 1 else "questions"}


def spelt(figure: Mapping[str, Any] | None, digits: str = ".3f") -> str:
    """ "0.912 [0.90 .. 0.93]", or without the interval for one seed."""
    if figure is None:
        return ""
    text = f"{figure['mean']:{digits}}"
    return text if figure["ci"] is None else f"{text} [{figure['ci'][0]:{digits}} .. {figure['ci'][1]:{digits}}]"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)) + "\n"


def last_result(name: str) -> dict[str, Any]:
    """What `save` wrote last; {} where there is nothing."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save(name: str, results: Mapping[str, Any], table: str, figure: Figure | None) -> None:
    """results/NAME.json, .md (the table) and .png; prints the table and one JSON line."""
    RESULTS.mkdir(exist_ok=True)
    dated = {"study": name, "date": datetime.date.today().isoformat()} | dict(results)
    replace_file(RESULTS / f"{name}.json", (json.dumps(dated, indent=1) + "\n").encode())
    replace_file(RESULTS / f"{name}.md", table.encode())
    if figure is not None:
        FigureCanvasAgg(figure)
        figure.savefig(RESULTS / f"{name}.png", dpi=110)
    print(table)
    print(json.dumps({key: value for key, value in dated.items() if key != "each"}))
