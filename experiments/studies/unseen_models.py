"""Unseen models: three routers meet models that they were not trained with; the share of calls that these models get.

    python experiments/studies/unseen_models.py --runs=runs

The first router was trained with three of the demo's five models. The second was trained with all five, which is what
retraining gives. The third was trained with 240 other models, five at a time under sampled names
(`configs/sweeps/demo_cards.py`), and with none of the five. The names of the five are among the sampled names, because
a small router cannot say a word that it never met. Each router answers the test questions with the three models in
prompt and pool, with all five, and with all five under permuted names. The third one also answers with models of its
training pool. A gain without a call to a new model is no generalisation, so the share of calls stands beside the gain.
With --trained_only a router without runs keeps its metrics of the last results.

Result and what it shows: experiments/studies/README.md.
"""

import argparse
import dataclasses
import datetime
import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from runner import (
    ROOT,
    Variant,
    arguments,
    format_mean,
    greedy_records,
    last_result,
    mean_over_seeds,
    open_checkpoint,
    run_config,
    run_metrics,
    save,
    trained_runs,
)

from router_r1_jax import prompts
from router_r1_jax.evaluation.episode_records import Record
from router_r1_jax.pool.cards import Card, all_in_prompts, cards_from_config
from router_r1_jax.prompts import score_text
from router_r1_jax.report.tables import Table
from router_r1_jax.sweep import seed_mean
from router_r1_jax.synthetic.tokenizer import corpus, train_tokenizer
from router_r1_jax.synthetic.world import World

SWEEP = runpy.run_path(str(ROOT / "configs/sweeps/demo_unseen.py"))
DEMO = runpy.run_path(SWEEP["DEMO"])["get_config"]()
ROUTERS = {  # name -> its sweep
    "trained with three": "demo_unseen",
    "trained with all five": "demo_alpha",
    "trained with 240 others": "demo_cards",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """The models in the prompt and in the pool."""

    name: str
    held_out: bool
    rename: bool = False
    training_pool: bool = False  # models sampled from the router's training pool, as in its training

    def models(self) -> tuple[ConfigDict, ...]:
        """The demo's models, with or without the two that one router has not met."""
        return tuple(m for m in DEMO.pool.models if self.held_out or m.name not in SWEEP["UNSEEN"])


CASES = (
    Case("three models", False),
    Case("all five", True),
    Case("all five, names dealt anew", True, rename=True),
    Case("five of its own", False, training_pool=True),
)
LOOKS = ("#7f7f7f", "#0072B2", "#D55E00", "#009E73"), "so^D"  # colours and marks of the cases


def make_tokenizer(folder: Path, config: ConfigDict) -> None:
    """Make the tokenizer of the runs of `config`, unless it exists. The demo's five names are words of it."""
    if not folder.exists():
        pools = (config.pool, DEMO.pool)
        cards = tuple(card for pool in pools for card in all_in_prompts(cards_from_config(pool), pool))
        template = prompts.load_template(config.prompt.template)
        train_tokenizer(corpus(World(DEMO.synthetic.world), cards, template, DEMO.rollout.max_calls), folder)


def measure(options: argparse.Namespace, router: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Case -> seed -> metrics of one router's runs; {} if none is trained."""
    options.sweep, options.runs = ROUTERS[router], options.folder / ROUTERS[router]
    lines: dict[str, dict[int, dict[str, Any]]] = {}
    for run in trained_runs(options, lambda overrides: overrides.get("reward.alpha", 0.0) == 0.0):
        for case in CASES:
            config = run_config(options, run)
            if case.training_pool and not config.pool.candidates:
                continue
            if not case.training_pool:
                config.pool.update(dict(models=case.models(), names=(), candidates=0, rename=case.rename))
            with open_checkpoint(config, run.folder) as checkpoint:
                session = checkpoint.session
                questions = session.questions("test")[: options.questions]
                records = greedy_records(checkpoint, Variant(case.name), questions, study="unseen")
                line = run_metrics(records, session.cards) | {"stated_share": stated_share(records, session.cards)}
            share = 0.0 if case.training_pool else sum(line["calls_share"].get(key, 0.0) for key in SWEEP["UNSEEN"])
            lines.setdefault(case.name, {})[run.overrides["seed"]] = line | {"unseen_share": share}
            print(f"{router}, {case.name}, seed {run.overrides['seed']}: EM {line['em']:.3f}, share {share:.2f}")
    return lines


def stated_share(records: Sequence[Record], cards: Sequence[Card]) -> float:
    """Share of the scores in think segments before a call that a card in the prompt states for the domain."""
    skills, found = {card.key: card.performance for card in cards}, []
    for record in records:
        for domain, score in re.findall(r" : (\w+) (\d+)(?: :)? [^<]* </think>\s*<search>", record["response"]):
            stated = [skills[key].get(domain) for key in record["candidates"]]
            found.append(score in [score_text(skill) for skill in stated if skill is not None])
    return float(np.mean(found)) if found else 0.0


def draw(results: Mapping[str, Any]) -> Figure:
    """EM, and the share of calls to the two held out models: a dot per seed."""
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    labels = {"em": "exact match", "unseen_share": "share of calls to the two held out models"}
    names = list(results["each"])
    for axes, (key, label) in zip(figure.subplots(1, 2, sharey=True), labels.items(), strict=True):
        for i, (case, colour, mark) in enumerate(zip(CASES, *LOOKS, strict=True)):
            for y, name in enumerate(names):
                values = [line[key] for line in results["each"][name].get(case.name, {}).values()]
                height = y + 0.18 * (i - 1.5)
                axes.plot(values, [height] * len(values), mark, color=colour, alpha=0.7, label="" if y else case.name)
        axes.set_xlim(-0.02, 1.02)
        axes.set_title(label, loc="left", fontsize=10, fontweight="bold")
        axes.set_yticks(range(len(names)), [name.capitalize() for name in names])
        axes.grid(axis="x", color="#e4e4e4")
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def main() -> None:
    options = arguments(__doc__, "")
    options.folder = options.runs
    if not options.trained_only:
        for sweep in ("demo_unseen", "demo_cards"):
            fields = runpy.run_path(str(ROOT / f"configs/sweeps/{sweep}.py"))
            make_tokenizer(fields["TOKENIZER"], fields["get_config"]())
    each, measured_on = {}, {}
    before = last_result("unseen_models")
    for name in ROUTERS:
        if lines := measure(options, name):
            each[name], measured_on[name] = lines, datetime.date.today().isoformat()
        elif name in before.get("each", {}):  # its runs are missing
            each[name], measured_on[name] = before["each"][name], before["measured_on"][name]
    shares = ("unseen_share", "stated_share")
    cases = {
        router: {
            name: mean_over_seeds(lines)
            | {key: seed_mean([line[key] for line in lines.values()]) for key in shares if key in lines[min(lines)]}
            for name, lines in of_router.items()
        }
        for router, of_router in each.items()
    }
    rows = [
        [
            router,
            name,
            str(len(c["seeds"])),
            format_mean(c["em"]),
            format_mean(c["best_model_share"]),
            format_mean(c["unseen_share"]),
            format_mean(c.get("stated_share")),
            format_mean(c["malformed_share"]),
            format_mean(c["dollars_per_question"], ".2e"),
        ]
        for router, of_router in cases.items()
        for name, c in of_router.items()
    ]
    head = [
        "router",
        "prompt and pool",
        "seeds",
        "EM",
        "calls to the best model",
        "calls to the two held out",
        "scores named that a card states",
        "malformed",
        "dollars/question",
    ]
    results = {"measured_on": measured_on, "cases": cases, "each": each}
    save("unseen_models", results, Table(head, rows), draw(results))


if __name__ == "__main__":
    main()
