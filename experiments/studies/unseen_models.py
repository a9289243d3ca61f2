"""Unseen models: two models are added at test time, with and without retraining, and the share of calls they receive.

    python experiments/studies/unseen_models.py --runs=runs/demo_unseen --retrained=runs/demo_alpha

Runs of `configs/sweeps/demo_unseen.py` have been trained with three models. They answer the test questions with those
three, then with all five in the prompt and the pool. "Retrained" are the demo's runs at alpha 0, trained with all five.
A gain that comes with no call to a new model is no generalisation; so the share of calls stands beside it.

Result and what it shows: experiments/studies/README.md.
"""

import argparse
import runpy
import sys
from pathlib import Path

from matplotlib.figure import Figure
from ml_collections import ConfigDict
from runner import ROOT, Variant, arguments, figures, markdown, measured, opened, over_seeds, run_config, save, spelt
from runner import trained_runs as runs_of

from router_r1_jax import prompts
from router_r1_jax.data.tokenizer import corpus, train_tokenizer
from router_r1_jax.data.world import World
from router_r1_jax.pool.cards import cards_from_config
from router_r1_jax.sweep import seed_mean

SWEEP = runpy.run_path(str(ROOT / "configs/sweeps/demo_unseen.py"))
CASES = ("three models", "two added, not retrained", "two added, retrained")


def all_models(options: argparse.Namespace) -> ConfigDict:
    """The held out models' configuration with all five in the pool."""
    config = SWEEP["get_config"]("all")
    config.evaluation.questions = options.questions
    return config


def make_tokenizer() -> None:
    """The demo's, which knows all five names, where the sweep's configuration looks for it."""
    if not SWEEP["TOKENIZER"].exists():
        c = SWEEP["get_config"]("all")
        template = prompts.load_template(c.prompt.template)
        texts = corpus(World(c.data.world), cards_from_config(c.pool), template, c.rollout.max_calls)
        train_tokenizer(texts, SWEEP["TOKENIZER"])


def draw(results: dict) -> Figure:
    """EM and share of calls of the three cases."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("em", "unseen_share"), strict=True):
        for y, name in enumerate(results["each"]):
            values = [line[key] for line in results["each"][name].values()]
            axes.plot(values, [y] * len(values), "o", color="#0072B2", alpha=0.6)
        axes.set_yticks(range(len(results["each"])), list(results["each"]))
        axes.set_xlim(0, 1)
        axes.set_xlabel(
            {"em": "exact match, test split", "unseen_share": "share of calls to the two added models"}[key]
        )
        axes.grid(axis="x", color="#e4e4e4")
    axes.invert_yaxis()
    return figure


def take_retrained() -> Path:
    """--retrained, taken out of the command line before the shared arguments are read."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--retrained", type=Path, default=ROOT / "runs" / "demo_alpha")
    own, sys.argv[1:] = parser.parse_known_args()
    return own.retrained


def main() -> None:
    retrained = take_retrained()
    options = arguments(__doc__, "demo_unseen")
    make_tokenizer()
    each: dict[str, dict[int, dict]] = {name: {} for name in CASES}

    def measure(case: str, config: ConfigDict, folder: Path, seed: int) -> None:
        with opened(config, folder) as checkpoint:
            session = checkpoint.session
            questions = session.questions("test")[: options.questions]
            line = figures(measured(checkpoint, Variant(case), questions, study="unseen"), session.cards)
            share = sum(line["calls_share"].get(key, 0.0) for key in SWEEP["UNSEEN"])
            each[case][seed] = line | {"unseen_share": share}

    for run in runs_of(options):
        seed = run.overrides["seed"]
        measure(CASES[0], run_config(options, run), run.folder, seed)
        config = all_models(options)
        config.seed = seed
        measure(CASES[1], config, run.folder, seed)
    options.runs, options.sweep = retrained, "demo_alpha"
    for run in runs_of(options, lambda overrides: overrides["reward.alpha"] == 0.0):
        measure(CASES[2], run_config(options, run), run.folder, run.overrides["seed"])

    each = {name: lines for name, lines in each.items() if lines}
    cases = {
        name: over_seeds(lines) | {"unseen_share": seed_mean([line["unseen_share"] for line in lines.values()])}
        for name, lines in each.items()
    }
    rows = [
        [name, str(len(c["seeds"])), spelt(c["em"]), spelt(c["dollars_per_question"], ".2e"), spelt(c["unseen_share"])]
        for name, c in cases.items()
    ]
    table = markdown(["", "seeds", "EM", "dollars/question", "calls to the two added models"], rows)
    results = {"cases": cases, "each": each}
    save("unseen_models", results, table, draw(results))


if __name__ == "__main__":
    main()
