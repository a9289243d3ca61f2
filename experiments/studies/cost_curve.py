"""Cost curve: exact match against dollars per question for five weights of the cost in the reward.

    python experiments/studies/cost_curve.py --runs=runs/demo_alpha [--trained_only]

Each point is the mean over seeds of runs of `configs/sweeps/demo_alpha.py`, beside each model alone and the oracle's
front: what a policy that knows who knows what reaches at each alpha, computed from the world (`data.reference`).

Result and what it shows: experiments/studies/README.md.
"""

import numpy as np
from matplotlib.figure import Figure
from runner import Variant, arguments, figures, markdown, measured, opened, over_seeds, run_config, save, spelt
from runner import trained_runs as runs_of

from router_r1_jax.data.reference import always, best_by_domain, cost_range, oracle, policy_value, trees
from router_r1_jax.data.world import World
from router_r1_jax.pool.cards import Card

FRONT = np.round(np.linspace(0, 0.95, 20), 3)


def references(world: World, cards: tuple[Card, ...], ids: set[str]) -> dict:
    """EM and dollars of what needs no run, on the same questions."""
    forest = trees(world, [q for q in world.questions("test") if q.id in ids], cards)
    bounds = cost_range(forest)
    alone = {card.key: policy_value(forest, always(cards, card.key)) for card in cards}
    fronts = {
        "oracle": [oracle(forest, float(alpha), bounds) for alpha in FRONT],
        "best by domain": [best_by_domain(forest, cards, float(alpha), bounds)[0] for alpha in FRONT],
    }
    points = {name: [v.em, v.dollars] for name, v in alone.items()}
    return {"alone": points, "fronts": {name: [[v.em, v.dollars] for v in front] for name, front in fronts.items()}}


def draw(results: dict) -> Figure:
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for (name, front), style in zip(results["references"]["fronts"].items(), ("-", "--"), strict=True):
        em, dollars = np.array(sorted(front, key=lambda p: p[1])).T
        axes.plot(dollars, em, style, color="#8a8a8a", label=f"{name}, alpha 0 to .95")
    for name, (em, dollars) in results["references"]["alone"].items():
        axes.plot([dollars], [em], "s", color="#D55E00", markersize=4)
        axes.annotate(f"{name} alone", (dollars, em), textcoords="offset points", xytext=(5, 3), fontsize=8)
    for alpha, lines in results["each"].items():
        axes.plot([p["dollars_per_question"] for p in lines.values()], [p["em"] for p in lines.values()], "o",
                  color="#0072B2", alpha=0.5, markersize=4)  # fmt: skip
        mean = results["alphas"][alpha]
        place = (mean["dollars_per_question"]["mean"], mean["em"]["mean"])
        axes.annotate(f"alpha {alpha}", place, textcoords="offset points", xytext=(6, -10), fontsize=8, color="#0072B2")
    axes.set_xscale("log")
    axes.set_xlabel("dollars per question")
    axes.set_ylabel("exact match, test split")
    axes.legend(frameon=False)
    axes.grid(color="#e4e4e4")
    return figure


def main() -> None:
    options = arguments(__doc__, "demo_alpha")
    each: dict[str, dict[int, dict]] = {}
    found = {}
    for run in runs_of(options):
        with opened(run_config(options, run), run.folder) as checkpoint:
            session = checkpoint.session
            questions = session.questions("test")[: options.questions]
            records = measured(checkpoint, Variant("as trained"), questions, study="routing")
            line = figures(records, session.cards)
            each.setdefault(str(run.overrides["reward.alpha"]), {})[run.overrides["seed"]] = line
            found = found or references(session.world, session.cards, {question.id for question in questions})
    alphas = {alpha: over_seeds(lines) for alpha, lines in each.items()}
    results = {"alphas": alphas, "references": found, "each": each}
    rows = [
        [alpha, str(len(a["seeds"])), spelt(a["em"]), spelt(a["dollars_per_question"], ".2e"),
         spelt(a.get("best_model_share"))]
        for alpha, a in alphas.items()
    ]  # fmt: skip
    table = markdown(["alpha", "seeds", "EM", "dollars/question", "best model"], rows)
    save("cost_curve", results, table, draw(results))


if __name__ == "__main__":
    main()
