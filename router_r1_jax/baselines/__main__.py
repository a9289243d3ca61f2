"""Measure baselines on the questions, pool and tape of a run, and write a table beside its own results.

    python -m router_r1_jax.baselines --config=configs/demo.py --workdir=runs/demo [--only=knn,mlp] [--tries=500]

Single-call baselines ask the chosen model through the pool; with a star (`knn*`) the question is first cut into parts,
each routed by itself. `--tries` train questions are put to every model to fit them. Baselines of the router's own
language model start from the run's first checkpoint, or from the warm start where there is none. Each leaves its
episodes; one that has them already, made with the same questions, pool, weights and settings, is not measured again, so
the same command goes on where it was cut. With `evaluation.tape` or `pool.tape` it pays for no call twice.

It writes baselines.json and baselines.md. Where `evaluate` has left episodes of the trained router on the same
questions, each baseline's line also says by how much the router is ahead, paired by question.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from router_r1_jax.baselines import ask, own
from router_r1_jax.baselines.cascade import Cascade
from router_r1_jax.baselines.decompose import Decompose, by_model, by_pattern
from router_r1_jax.baselines.features import RouterFeatures
from router_r1_jax.baselines.graph_router import GraphRouter
from router_r1_jax.baselines.interface import Baseline, TrainRecord
from router_r1_jax.baselines.router_dc import RouterDC
from router_r1_jax.baselines.simple import (
    LinearClassifier,
    NearestNeighbours,
    OneModel,
    Perceptron,
    RandomModel,
    largest,
)
from router_r1_jax.checkpoint import CheckpointStore
from router_r1_jax.cli import launch
from router_r1_jax.config import ConfigError
from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.evaluate import records_identity, with_tape
from router_r1_jax.evaluation.figures import compare_records, policy_figures
from router_r1_jax.evaluation.journal import measured_once
from router_r1_jax.evaluation.records import Answered, Record, make_records
from router_r1_jax.experience import steady_costs
from router_r1_jax.model import Params, add_adapters
from router_r1_jax.pool.cards import at_step, route_names
from router_r1_jax.pool.outcomes import PoolError, provider_fault
from router_r1_jax.report.writer import EPISODES_FOLDER, MetricsWriter, read_lines, replace_file
from router_r1_jax.reward import episode_cost, score
from router_r1_jax.session import Session, open_session
from router_r1_jax.train import config_hash
from router_r1_jax.warmstart import warm_start
from router_r1_jax.weights import fingerprint, first_costs

TRIES = 500
ORACLE = "oracle of one call"
# The router's own language model.
OWN = ("direct", "chain of thought", "prompt only", "fine-tuned")
NOT_LIKE_FOR_LIKE = "Single-call baselines choose among all {models} models, the router among the {shown} it is shown."
STAR = "*"  # behind the name of a single-call baseline: the question is decomposed first


class Bench:
    """What baselines are made from; each part is made when it is first asked for."""

    def __init__(self, config: ConfigDict, session: Session, tries: int) -> None:
        self.config, self.session, self.tries = config, session, tries
        self._records: list[TrainRecord] | None = None
        self._params: Params | None = None
        folder = session.workdir / "checkpoints"
        self.costs = first_costs(folder) if folder.exists() else None  # that the router is judged by
        self._fitted: dict[str, Baseline] = {}

    @property
    def makers(self) -> dict[str, Callable[[], Baseline]]:
        """Single-call baselines by name."""
        cards, alpha, seed = self.session.cards, self.config.reward.alpha, self.config.seed
        return {
            "random": lambda: RandomModel(seed),
            **{f"{card.key} alone": lambda card=card: OneModel(card.key) for card in cards},
            "largest": lambda: OneModel(largest(cards).key),
            "knn": lambda: NearestNeighbours(alpha),
            "mlp": lambda: Perceptron(alpha, seed),
            "classifier": lambda: LinearClassifier(self._features(), alpha),
            "routerdc": lambda: RouterDC(alpha, seed),
            "graphrouter": lambda: GraphRouter(cards, alpha, seed),
            "cascade": lambda: Cascade(cards, alpha),
        }

    def names(self) -> list[str]:
        """All baselines, as --only and the table name them."""
        single = list(self.makers)
        return [*OWN[:2], *single, ORACLE, *(name + STAR for name in single), *OWN[2:]]

    def params(self) -> Params:
        """Of the router before RL."""
        session, folder = self.session, self.session.workdir / "checkpoints"
        if self._params is None and folder.exists():
            with CheckpointStore(folder, keep=None) as store:
                first = store.first()
                if first is not None:
                    self._params = store.restore_params(first, session.abstract_params)
        if self._params is None:
            writer = MetricsWriter(session.workdir / "baselines")
            self._params = add_adapters(session.model, warm_start(session, writer), session.mesh, self.config.seed)
            writer.close()
        return self._params

    def records(self) -> list[TrainRecord]:
        """The train questions that every model was tried on; a random choice of them."""
        if self._records is None:
            questions = self.session.questions("train")
            order = np.random.default_rng(self.config.seed).permutation(len(questions))[: self.tries]
            chosen = [questions[i] for i in order]
            print(f"trying {len(self.session.cards)} models on {len(chosen)} train questions")
            tried = self.try_all(chosen, "train", "trying all models")
            # A provider's failure says nothing of its model: such a question is left out.
            whole = [r for r in tried if not any(provider_fault(t.reply.outcome) for t in r.trials.values())]
            print(f"{len(tried) - len(whole)} of them left out: a provider failed")
            if not whole:
                faults = [t.reply for r in tried for t in r.trials.values() if provider_fault(t.reply.outcome)]
                by_model = Counter(f"{reply.model} {reply.outcome} ({reply.error})" for reply in faults)
                (worst, count), *_ = by_model.most_common()
                raise PoolError(
                    f"each of the {len(tried)} train questions to fit on failed at a provider, {count} at {worst}; "
                    "python -m router_r1_jax.pool.check asks each model, correct what does not answer and run again"
                )
            self._records = whole
        return self._records

    def try_all(self, questions: Sequence[QuestionRecord], split: str, label: str) -> list[TrainRecord]:
        """Every question put to every model, under a bar."""
        with tqdm(total=len(questions), desc=label, unit="question", dynamic_ncols=True) as bar:
            return ask.try_all(self.session.pool, self.session.cards, questions, split=split, on_finish=bar.update)

    def fitted(self, name: str) -> Baseline:
        """A single-call baseline, ready to choose."""
        if name not in self._fitted:
            baseline = self.makers[name]()
            if not isinstance(baseline, (RandomModel, OneModel)):
                baseline.fit(self.records())
            self._fitted[name] = baseline
        return self._fitted[name]

    def decompose(self) -> Decompose:
        """By pattern in the synthetic world, else by the largest model of the pool."""
        return by_pattern if self.session.world is not None else by_model(largest(self.session.cards))

    def _features(self) -> RouterFeatures:
        return RouterFeatures(self.session.model, self.params(), self.session.tokenizer)


def measure(bench: Bench, name: str, questions: Sequence[QuestionRecord]) -> list[Record]:
    """A record per question of one baseline."""
    session, split = bench.session, bench.config.evaluation.split
    if name in OWN:
        return measure_own(bench, name, questions)
    if name == ORACLE:
        tried = bench.try_all(questions, split, name)
        return judged(bench, questions, ask.hindsight(tried, session.cards), name)
    baseline = bench.fitted(name.removesuffix(STAR))
    decompose = bench.decompose() if name.endswith(STAR) else None
    with tqdm(total=len(questions), desc=name, unit="question", dynamic_ncols=True) as bar:
        episodes = ask.answer_all(
            session.pool, session.cards, baseline, questions, split=split, name=name, decompose=decompose,
            on_finish=bar.update,
        )  # fmt: skip
    return judged(bench, questions, episodes, name)


def measure_own(bench: Bench, name: str, questions: Sequence[QuestionRecord]) -> list[Record]:
    """A record per question of the router's own language model, as `name` of OWN asks it."""
    config, session, params = bench.config, bench.session, bench.params()
    router = session.router
    if name == "fine-tuned":
        with tqdm(total=config.steps, desc="sampling to fine-tune", unit="rollout", dynamic_ncols=True) as bar:
            params = own.fine_tune(config, session, params, on_finish=bar.update)
    elif name != "prompt only":
        router = own.AloneRouter(session, own.DIRECT if name == "direct" else own.CHAIN)
    router.push(params)
    split = config.evaluation.split
    with tqdm(total=len(questions), desc=name, unit="question", dynamic_ncols=True) as bar:
        return own.answer_greedily(
            config, router, questions, policy=name, split=split, costs=bench.costs, on_finish=bar.update
        )


def judged(
    bench: Bench, questions: Sequence[QuestionRecord], episodes: Sequence[ask.CalledEpisode], name: str
) -> list[Record]:
    """Scores by the router's own code."""
    reward = bench.config.reward
    rewards = score(
        [episode.text for episode in episodes],
        [question.golds for question in questions],
        np.array([episode_cost(reward.cost, episode.replies, 0, reward.router_price) for episode in episodes]),
        route_names(bench.session.cards),
        preset=reward.preset, alpha=reward.alpha, metric=reward.metric, groups=np.arange(len(episodes)),
        normalizer=steady_costs(bench.config, bench.costs),
        valid=np.array([not any(provider_fault(reply.outcome) for reply in e.replies) for e in episodes]),
    )  # fmt: skip
    answered = Answered(questions, episodes, bench.session.cards)
    return make_records(answered, rewards, step=0, split=bench.config.evaluation.split, policy=name)


def file_name(split: str, name: str) -> str:
    """Of a baseline's episodes, without suffix."""
    safe = re.sub(r"[^\w.-]+", "_", name.replace(STAR, "_star"))
    return f"{split}_baseline_{safe}"


def trained_records(workdir: Path, split: str, questions: Sequence[QuestionRecord]) -> list[Record] | None:
    """What `evaluate` has left of the trained router on these questions; None where one of them is not there."""
    own = {record["id"]: record for record in read_lines(workdir / EPISODES_FOLDER / f"{split}_trained.jsonl")}
    return [own[question.id] for question in questions] if all(q.id in own for q in questions) else None


def depends(bench: Bench, name: str, questions: Sequence[QuestionRecord]) -> dict[str, Any]:
    """All that a baseline's records depend on."""
    config = bench.config
    reads_model = name in OWN or name.removesuffix(STAR) == "classifier"
    weights = fingerprint(bench.params()) if reads_model else ""
    fitting = {
        "data": config.data.to_dict(), "tries": bench.tries, "steps": config.steps,
        "temperature": config.rollout.temperature, "learner": config.learner.to_dict(), "costs": bench.costs,
    }  # fmt: skip
    return records_identity(config, bench.session.cards, questions, weights) | fitting


def entry(
    config: ConfigDict, session: Session, name: str, records: list[Record], trained: list[Record] | None
) -> dict[str, Any]:
    """One baseline's line of baselines.json, as `evaluate` writes a policy's."""
    resampling = {"resamples": config.evaluation.bootstrap, "seed": config.seed}
    line = {"name": name} | policy_figures(records, session.cards, **resampling)
    if trained is not None:
        line["router_ahead"] = compare_records(trained, records, **resampling)
    return line


def table(results: dict[str, Any]) -> str:
    """Markdown; the router's lead is its EM minus the baseline's, on the same questions."""
    lines = [
        f"{results['questions']} questions of the {results['split']} split, mean of its sets; intervals are 95 % "
        f"bootstrap over questions. \\{STAR}: the question is decomposed first."
        + (f" {NOT_LIKE_FOR_LIKE.format(**results)}" if results["shown"] < results["models"] else ""),
        "",
        "| policy | EM | F1 | dollars/question | calls | trained router ahead, EM |",
        "|---|---|---|---|---|---|",
    ]
    for p in results["policies"]:
        low, high = p["em_ci"]
        ahead = p.get("router_ahead", {}).get("em")
        lead = f"{ahead['mean']:+.3f} [{ahead['ci'][0]:+.3f} .. {ahead['ci'][1]:+.3f}]" if ahead else ""
        lines.append(
            f"| {p['name'].replace(STAR, chr(92) + STAR)} | {p['em']:.3f} [{low:.3f} .. {high:.3f}] | {p['f1']:.3f} "
            f"| {p['dollars_per_question']:.3e} | {p['calls_per_question']:.2f} | {lead} |"
        )
    return "\n".join(lines) + "\n"


def chosen_names(only: str, names: Sequence[str]) -> list[str]:
    """The baselines of --only, or all. Raises ConfigError for a name that is none."""
    wanted = [name.strip() for name in only.split(",") if name.strip()] or list(names)
    for name in wanted:
        if name not in names:
            raise ConfigError(f"--only names {name!r}; choose from {', '.join(names)}")
    return wanted


def main(config: ConfigDict, workdir: Path, only: str = "", tries: str = "") -> None:
    """Measure what has no episodes yet; write and print the table of all that were asked for."""
    if tries and not (tries.isdigit() and int(tries)):
        raise ConfigError(f"--tries is {tries!r}; it is a number of train questions, at least 1")
    if config.evaluation.split == "train":
        raise ConfigError("evaluation.split is 'train', on which baselines are fitted; choose validation or test")
    with open_session(with_tape(config, workdir), workdir, load_source=True) as session:
        bench = Bench(config, session, int(tries or TRIES))
        names = chosen_names(only, bench.names())
        split = config.evaluation.split
        questions = session.questions(split)[: config.evaluation.questions]
        trained = trained_records(workdir, split, questions)
        if trained is None:
            print("no episodes of the trained router on these questions: evaluate the run first to compare with it")
        # At the prices that the trained router was evaluated with.
        session.cards = at_step(session.cards, trained[0]["step"] if trained else 0)
        session.router.show(session.cards)
        entries = [] if trained is None else [entry(config, session, "trained router", trained, None)]
        ids = [question.id for question in questions]
        for name in names:
            made_with = depends(bench, name, questions)
            records = measured_once(
                workdir, file_name(split, name), made_with, ids, lambda name=name: measure(bench, name, questions)
            )
            entries.append(entry(config, session, name, records, trained))
        results = {
            "config_hash": config_hash(config), "alpha": config.reward.alpha, "split": split,
            "questions": len(questions), "tries": bench.tries, "price_date": config.pool.price_date,
            "models": len(session.cards), "shown": config.pool.shown or len(session.cards),
            "policies": entries,
        }  # fmt: skip
    replace_file(workdir / "baselines.json", (json.dumps(results, indent=2) + "\n").encode())
    replace_file(workdir / "baselines.md", table(results).encode())
    print(f"\n{table(results)}\nresults {workdir / 'baselines.json'}")


if __name__ == "__main__":
    launch(main, only="comma-separated baselines; all if empty", tries=f"train questions to fit on; {TRIES} if empty")
