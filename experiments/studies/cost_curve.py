"""Cost curve: exact match against dollars per question for five values of alpha, the weight of the cost reward.

    python experiments/studies/cost_curve.py --runs=runs/demo_alpha [--trained_only]

Each dot is a run of `configs/sweeps/demo_alpha.py`. Beside them stand each model alone and the oracle's front: what a
policy reaches at each alpha if it knows which model knows which fact (`router_r1_jax.synthetic.oracle`).

Result and what it shows: experiments/studies/README.md.
"""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation
from runner import (
    Variant,
    arguments,
    format_mean,
    greedy_records,
    mean_over_seeds,
    open_checkpoint,
    run_config,
    run_metrics,
    save,
    trained_runs,
)

from router_r1_jax.pool.cards import Card
from router_r1_jax.report.tables import Table
from router_r1_jax.synthetic.oracle import always, best_by_domain, oracle, policy_value, random_cost_bounds, trees
from router_r1_jax.synthetic.world import World

COLOURS = ("#D55E00", "#E69F00", "#009E73", "#0072B2", "#CC79A7")
FRONT = np.round(np.linspace(0, 0.95, 20), 3)


def computed_policies(world: World, cards: tuple[Card, ...], ids: set[str]) -> dict:
    """EM and dollars of policies that need no run, on the same questions."""
    forest = trees(world, [q for q in world.questions("test") if q.id in ids], cards)
    bounds = random_cost_bounds(forest)
    alone = {card.key: policy_value(forest, always(cards, card.key)) for card in cards}
    fronts = {
        "oracle": [oracle(forest, float(alpha), bounds) for alpha in FRONT],
        "best by domain": [best_by_domain(forest, float(alpha), bounds) for alpha in FRONT],
    }
    return {
        "alone": {name: [value.em, value.dollars_per_question] for name, value in alone.items()},
        "fronts": {name: [[value.em, value.dollars_per_question] for value in front] for name, front in fronts.items()},
    }


def draw(results: dict) -> Figure:
    """All points, and beside them the points near the fronts at a larger scale: a dot per run, by alpha."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    whole, near = figure.subplots(1, 2)
    fronts = results["references"]["fronts"]
    for axes in (whole, near):
        for (name, front), style in zip(fronts.items(), ("*-", ".--"), strict=True):
            em, dollars = np.array(sorted(front, key=lambda p: p[1])).T
            axes.plot(dollars, em, style, color="#8a8a8a", markersize=9, label=f"{name}, alpha 0 to .95")
        for i, (alpha, lines) in enumerate(results["each"].items()):
            at = [(p["dollars_per_question"], p["em"]) for p in lines.values()]
            # Runs of different alphas often end at the same policy. Their dots stand beside each other.
            aside = ScaledTranslation(0.07 * i if axes is near else 0, 0, figure.dpi_scale_trans)
            axes.plot(
                *np.array(at).T,
                "o",
                color=COLOURS[i],
                alpha=0.8,
                markersize=5,
                label=f"router, alpha {alpha}",
                transform=axes.transData + aside,
            )
        axes.set_xlabel("dollars per question")
        axes.grid(color="#e4e4e4")
        axes.spines[["top", "right"]].set_visible(False)
    for name, (em, dollars) in results["references"]["alone"].items():
        whole.plot([dollars], [em], "s", color="#7f7f7f", markersize=4)
        whole.annotate(
            f"{name} alone", (dollars, em), textcoords="offset points", xytext=(0, 6), fontsize=8, ha="center"
        )
    whole.set_xscale("log")
    whole.set(ylim=(0, 1), ylabel="exact match, test split")
    best = max(em for em, _ in fronts["oracle"])
    worst = min(line["em"] for lines in results["each"].values() for line in lines.values())
    near.set(ylim=(worst - 0.2 * (best - worst), best + 0.1 * (best - worst)), xlim=(0, None))
    near.legend(frameon=False, fontsize=8, loc="lower right")
    whole.set_title("With each model alone", loc="left", fontsize=10)
    near.set_title("Near the fronts (dots of one place side by side)", loc="left", fontsize=10)
    return figure


def main() -> None:
    options = arguments(__doc__, "demo_alpha")
    each: dict[str, dict[int, dict]] = {}
    found = {}
    for run in trained_runs(options):
        with open_checkpoint(run_config(options, run), run.folder) as checkpoint:
            session = checkpoint.session
            questions = session.questions("test")[: options.questions]
            records = greedy_records(checkpoint, Variant("as trained"), questions, study="routing")
            line = run_metrics(records, session.cards)
            each.setdefault(str(run.overrides["reward.alpha"]), {})[run.overrides["seed"]] = line
            ids = {question.id for question in questions}
            found = found or computed_policies(session.environment.world, session.cards, ids)
    alphas = {alpha: mean_over_seeds(lines) for alpha, lines in each.items()}
    results = {"alphas": alphas, "references": found, "each": each}
    rows = [
        [
            alpha,
            str(len(a["seeds"])),
            format_mean(a["em"]),
            format_mean(a["dollars_per_question"], ".2e"),
            format_mean(a.get("best_model_share")),
        ]
        for alpha, a in alphas.items()
    ]
    table = Table(["alpha", "seeds", "EM", "dollars/question", "best model"], rows)
    save("cost_curve", results, table, draw(results))


if __name__ == "__main__":
    main()
