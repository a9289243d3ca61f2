"""What routing is worth: one trained checkpoint, if its calls or its choices of models are removed or made perfect.

    python experiments/studies/routing_worth.py --runs=runs/demo_alpha [--trained_only] [--questions=500]

A router can gain by its choice of models. It can also gain by decomposing questions and by using replies, whichever
model answers. So the same parameters answer the same test questions greedily under these conditions:
- the router may make no call;
- every call goes to the same model, or to a random one, whichever model the router called (the router is not told);
- the names of the models are permuted among the cards, so that only a router that reads the cards still chooses well;
- the cards state no scores and no description;
- every call goes to the cheapest model that knows the fact (the synthetic world knows which models do).

Result and what it shows: experiments/studies/README.md.
"""

import dataclasses
import zlib

from matplotlib.figure import Figure
from runner import (
    Choose,
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
from router_r1_jax.synthetic.world import World

AS_TRAINED = "as trained"


def random_model(query: str, cards: tuple[Card, ...], called: str) -> str:
    """A uniform choice by the hash of the query, so that it is repeatable."""
    return sorted(card.name for card in cards)[zlib.crc32(query.encode()) % len(cards)]


def knowing_model(world: World) -> Choose:
    """The cheapest model that knows the fact. The called model if no model does, or if the query asks for no fact."""

    def choose(query: str, cards: tuple[Card, ...], called: str) -> str:
        fact = world.lookup(query)
        knowing = [c for c in cards if fact is not None and fact.rank < c.performance.get(fact.domain, 0.0)]
        return min(knowing, key=lambda card: card.price_out).name if knowing else called

    return choose


def variants(cards: tuple[Card, ...], world: World) -> list[Variant]:
    def always(key: str) -> Choose:
        return lambda query, candidates, called: next(card.name for card in candidates if card.key == key)

    return [
        Variant(AS_TRAINED),
        Variant("no calls", {"rollout.max_calls": 0}),
        Variant("random model", choose=random_model),
        *(Variant(f"always {card.key}", choose=always(card.key)) for card in cards),
        Variant("names permuted", {"pool.rename": True}),
        Variant("cards blanked", change_card=lambda card: dataclasses.replace(card, performance={}, description="")),
        Variant("oracle choice", choose=knowing_model(world)),
    ]


def draw(results: dict) -> Figure:
    """EM of each variant: a dot per seed, a bar at the mean."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for y, (name, line) in enumerate(results["variants"].items()):
        axes.plot([line["em"]["mean"]], [y], "|", color="#222222", markersize=16, markeredgewidth=2)
        for each in results["each"].values():
            low, high = each[name]["em_ci"]
            axes.plot([low, high], [y, y], color="#0072B2", alpha=0.35, linewidth=2)
            axes.plot([each[name]["em"]], [y], "o", color="#0072B2", markersize=4)
    axes.set_yticks(range(len(results["variants"])), list(results["variants"]))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("exact match, test split, 95 % bootstrap over questions")
    axes.grid(axis="x", color="#e4e4e4")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def write(each: dict[int, dict]) -> None:
    """Write the results of the seeds so far, so that an interrupted study keeps them."""
    names = next(iter(each.values()))
    results = {
        "variants": {name: mean_over_seeds({seed: lines[name] for seed, lines in each.items()}) for name in names},
        "each": each,
    }
    head = ["the same checkpoint, where", "EM", "dollars/question", "calls", "malformed"]
    table = Table(
        head,
        [
            [
                name,
                format_mean(v["em"]),
                format_mean(v["dollars_per_question"], ".2e"),
                format_mean(v["calls_per_question"], ".2f"),
                format_mean(v["malformed_share"], ".3f"),
            ]
            for name, v in results["variants"].items()
        ],
    )
    save("routing_worth", results, table, draw(results))


def main() -> None:
    options = arguments(__doc__, "demo_alpha")
    each: dict[int, dict] = {}
    for run in trained_runs(options, lambda overrides: overrides["reward.alpha"] == 0.0):
        config = run_config(options, run)
        with open_checkpoint(config, run.folder) as checkpoint:
            session, lines = checkpoint.session, {}
            questions = session.questions("test")[: options.questions]
            for variant in variants(session.cards, session.environment.world):
                # Price and share of a redirected call are those of the model that answers it.
                records = greedy_records(checkpoint, variant, questions, study="routing")
                lines[variant.name] = run_metrics(records, session.cards)
                print(f"seed {run.overrides['seed']}, {variant.name}: EM {lines[variant.name]['em']:.3f}", flush=True)
            each[run.overrides["seed"]] = lines
        write(each)


if __name__ == "__main__":
    main()
