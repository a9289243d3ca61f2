"""What routing is worth: one trained checkpoint, with its choices or its calls taken away, or made perfect.

    python experiments/studies/routing_worth.py --runs=runs/demo_alpha [--trained_only] [--questions=500]

A router can gain by whom it asks, and by splitting questions, copying and carrying on replies, whoever answers. So the
same parameters answer the same test questions, greedily, where
- it may make no call;
- every call goes to one and the same model, or to a random one, whatever it chose (it is not told);
- the names are dealt anew among the cards, which only a router that reads them survives;
- the cards state no scores and no description;
- every call goes to the cheapest model that knows the fact asked for (the simulated world tells).

Result and what it shows: experiments/studies/README.md.
"""

import dataclasses
import zlib

from matplotlib.figure import Figure
from runner import (
    Choose,
    Variant,
    arguments,
    figures,
    markdown,
    measured,
    opened,
    over_seeds,
    run_config,
    save,
    spelt,
    trained_runs,
)

from router_r1_jax.data.world import World
from router_r1_jax.pool.cards import Card

AS_TRAINED = "as trained"


def random_model(query: str, cards: tuple[Card, ...], called: str) -> str:
    """Uniform, by the query's text, so that it is repeatable."""
    return sorted(card.name for card in cards)[zlib.crc32(query.encode()) % len(cards)]


def knowing_model(world: World) -> Choose:
    """The cheapest model that knows the fact; the called one where nobody does, or where it is no question of one."""

    def choose(query: str, cards: tuple[Card, ...], called: str) -> str:
        fact = world.lookup(query)
        knowing = [c for c in cards if fact is not None and fact.rank < c.performance.get(fact.domain, 0.0)]
        return min(knowing, key=lambda card: card.price_out).name if knowing else called

    return choose


def variants(cards: tuple[Card, ...], world: World) -> list[Variant]:
    def always(key: str) -> Choose:
        return lambda query, roster, called: next(card.name for card in roster if card.key == key)

    return [
        Variant(AS_TRAINED),
        Variant("no calls", {"rollout.max_calls": 0}),
        Variant("random model", choose=random_model),
        *(Variant(f"always {card.key}", choose=always(card.key)) for card in cards),
        Variant("names permuted", {"pool.rename": True}),
        Variant("cards blanked", shown=lambda card: dataclasses.replace(card, performance={}, description="")),
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
    """Results of the seeds that are there; a study that is cut keeps them."""
    names = next(iter(each.values()))
    results = {
        "variants": {name: over_seeds({seed: lines[name] for seed, lines in each.items()}) for name in names},
        "each": each,
    }
    head = ["the same checkpoint, where", "EM", "dollars/question", "calls", "malformed"]
    table = markdown(
        head,
        [
            [name, spelt(v["em"]), spelt(v["dollars_per_question"], ".2e"), spelt(v["calls_per_question"], ".2f"),
             spelt(v["malformed_share"], ".3f")]
            for name, v in results["variants"].items()
        ],
    )  # fmt: skip
    save("routing_worth", results, table, draw(results))


def main() -> None:
    options = arguments(__doc__, "demo_alpha")
    each: dict[int, dict] = {}
    for run in trained_runs(options, lambda overrides: overrides["reward.alpha"] == 0.0):
        config = run_config(options, run)
        with opened(config, run.folder) as checkpoint:
            session, lines = checkpoint.session, {}
            questions = session.questions("test")[: options.questions]
            for variant in variants(session.cards, session.world):
                # A model that is asked under another's name still costs its own price and counts as itself.
                records = measured(checkpoint, variant, questions, study="routing")
                lines[variant.name] = figures(records, session.cards)
                print(f"seed {run.overrides['seed']}, {variant.name}: EM {lines[variant.name]['em']:.3f}", flush=True)
            each[run.overrides["seed"]] = lines
        write(each)


if __name__ == "__main__":
    main()
