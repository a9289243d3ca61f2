"""Unseen models: three routers meet models that they were not trained with, and the share of calls these receive.

    python experiments/studies/unseen_models.py --runs=runs

The routers: one trained with three of the demo's five models; one with all five, which is what retraining gives; and
one with 240 others, five at a time under names dealt anew (`configs/sweeps/demo_cards.py`), which has met none of the
five. Their names are among those that were dealt, to other models: a small router cannot say a word that it never met.
Each answers the test questions with the three models in prompt and pool, with all five, and with all five under one
another's names, the third one also with models of its own pool. A gain that comes with no call to a new model is no
generalisation, so the share of calls stands beside it. A router whose runs are not there keeps, with --trained_only,
the figures of the last time.

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
    figures,
    last_result,
    markdown,
    measured,
    opened,
    over_seeds,
    run_config,
    save,
    spelt,
    trained_runs,
)

from router_r1_jax import prompts
from router_r1_jax.data.tokenizer import corpus, train_tokenizer
from router_r1_jax.data.world import World
from router_r1_jax.evaluation.records import Record
from router_r1_jax.pool.cards import Card, all_in_prompts, cards_from_config
from router_r1_jax.prompts import score_text
from router_r1_jax.sweep import seed_mean

SWEEP = runpy.run_path(str(ROOT / "configs/sweeps/demo_unseen.py"))
DEMO = runpy.run_path(SWEEP["DEMO"])["get_config"]()
ROUTERS = {  # name -> its sweep
    "trained with three": "demo_unseen",
    "trained with all five": "demo_alpha",
    "trained with 240 others": "demo_cards",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What the prompt shows and the pool answers with."""

    name: str
    held_out: bool
    rename: bool = False
    own: bool = False  # models drawn from the router's own pool, as in its training

    def models(self) -> tuple[ConfigDict, ...]:
        """The demo's models, with or without the two that one router has not met."""
        return tuple(m for m in DEMO.pool.models if self.held_out or m.name not in SWEEP["UNSEEN"])


CASES = (
    Case("three models", False),
    Case("all five", True),
    Case("all five, names dealt anew", True, rename=True),
    Case("five of its own", False, own=True),
)
LOOKS = ("#7f7f7f", "#0072B2", "#D55E00", "#009E73"), "so^D"  # colours and marks of the cases


def make_tokenizer(folder: Path, config: ConfigDict) -> None:
    """One to which the demo's five names are words, where the runs of `config` look for it."""
    if not folder.exists():
        pools = (config.pool, DEMO.pool)
        cards = tuple(card for pool in pools for card in all_in_prompts(cards_from_config(pool), pool))
        template = prompts.load_template(config.prompt.template)
        train_tokenizer(corpus(World(DEMO.data.world), cards, template, DEMO.rollout.max_calls), folder)


def measure(options: argparse.Namespace, router: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Case -> seed -> figures of one router's runs; {} where none is trained."""
    options.sweep, options.runs = ROUTERS[router], options.folder / ROUTERS[router]
    lines: dict[str, dict[int, dict[str, Any]]] = {}
    for run in trained_runs(options, lambda overrides: overrides.get("reward.alpha", 0.0) == 0.0):
        for case in CASES:
            config = run_config(options, run)
            if case.own and not config.pool.shown:
                continue
            if not case.own:
                config.pool.update(dict(models=case.models(), names=(), shown=0, rename=case.rename))
            with opened(config, run.folder) as checkpoint:
                session = checkpoint.session
                questions = session.questions("test")[: options.questions]
                records = measured(checkpoint, Variant(case.name), questions, study="unseen")
                line = figures(records, session.cards) | {"stated_share": stated_share(records, session.cards)}
            share = 0.0 if case.own else sum(line["calls_share"].get(key, 0.0) for key in SWEEP["UNSEEN"])
            lines.setdefault(case.name, {})[run.overrides["seed"]] = line | {"unseen_share": share}
            print(f"{router}, {case.name}, seed {run.overrides['seed']}: EM {line['em']:.3f}, share {share:.2f}")
    return lines


def stated_share(records: Sequence[Record], cards: Sequence[Card]) -> float:
    """Of the scores that think segments name before a call, those that some card shown states for that domain."""
    skills, found = {card.key: card.performance for card in cards}, []
    for record in records:
        for domain, score in re.findall(r" : (\w+) (\d+)(?: :)? [^<]* </think>\s*<search>", record["response"]):
            shown = [skills[key].get(domain) for key in record["shown"]]
            found.append(score in [score_text(skill) for skill in shown if skill is not None])
    return float(np.mean(found)) if found else 0.0


def draw(results: Mapping[str, Any]) -> Figure:
    """EM, and the share of calls that the two held out models receive: a dot per seed."""
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
        elif name in before.get("each", {}):  # its runs are not here any more
            each[name], measured_on[name] = before["each"][name], before["measured_on"][name]
    shares = ("unseen_share", "stated_share")
    cases = {
        router: {
            name: over_seeds(lines)
            | {key: seed_mean([line[key] for line in lines.values()]) for key in shares if key in lines[min(lines)]}
            for name, lines in of_router.items()
        }
        for router, of_router in each.items()
    }
    rows = [
        [router, name, str(len(c["seeds"])), spelt(c["em"]), spelt(c["best_model_share"]), spelt(c["unseen_share"]),
         spelt(c.get("stated_share")), spelt(c["malformed_share"]), spelt(c["dollars_per_question"], ".2e")]
        for router, of_router in cases.items()
        for name, c in of_router.items()
    ]  # fmt: skip
    head = ["router", "prompt and pool", "seeds", "EM", "calls to the best model", "calls to the two held out",
            "scores named that a card states", "malformed", "dollars/question"]  # fmt: skip
    results = {"measured_on": measured_on, "cases": cases, "each": each}
    save("unseen_models", results, markdown(head, rows), draw(results))


if __name__ == "__main__":
    main()
