"""What routing policies are worth on the synthetic world: exact match and money, computed, not sampled.

    python -m router_r1_jax.data.reference --config=configs/demo.py

prints, for the split of the configuration's evaluation, the policies of `references`. A question's calls form a small
tree (one branch per model at each hop), which is walked whole: replies are deterministic, and a wrong first reply leads
to the second question about the wrong entity, whose answer may still be right. Failed requests are not counted, since
they are retried.
"""

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from absl import app
from ml_collections import ConfigDict, config_flags

from router_r1_jax.data.world import Fact, Question, World, claim, query_text
from router_r1_jax.pool.cards import cards_from_config


class PricedCard(Protocol):
    """A model with its prices in dollars per million tokens and its skill by domain."""

    key: str
    name: str
    price_in: float
    price_out: float
    performance: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Path:
    """One way to answer a question: the cards called (by index), the facts asked for, and what comes of it."""

    cards: tuple[int, ...]
    facts: tuple[Fact, ...]
    em: float  # 1 where the last reply is a gold answer
    dollars: float  # input and output tokens
    raw_cost: float  # completion tokens x dollars per million tokens


@dataclasses.dataclass(frozen=True)
class PolicyValue:
    """Means over questions of the expected exact match, dollars, raw cost and number of calls."""

    em: float
    dollars: float
    raw_cost: float
    calls: float


def count_tokens(text: str) -> int:
    """Tokens as the simulated models count them: words and marks."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def trees(world: World, questions: Sequence[Question], cards: Sequence[PricedCard]) -> list[list[Path]]:
    """Per question all len(cards) ** len(hops) ways to answer it, each carrying on the entity that a call replied.

    A tree of paths is what all policies below are valued on.
    """
    return [
        [
            _walk(world, question, cards, chosen)
            for chosen in itertools.product(range(len(cards)), repeat=len(question.hops))
        ]
        for question in questions
    ]


def _walk(world: World, question: Question, cards: Sequence[PricedCard], chosen: tuple[int, ...]) -> Path:
    entity, facts, dollars, raw_cost = question.hops[0].subject, [], 0.0, 0.0
    for hop, i in zip(question.hops, chosen, strict=True):
        fact = world.fact(hop.relation, entity)
        query = query_text(fact.relation, entity)
        completion = count_tokens(world.reply(query, cards[i].performance))
        raw_cost += completion * cards[i].price_out
        dollars += (count_tokens(query) * cards[i].price_in + completion * cards[i].price_out) / 1e6
        facts.append(fact)
        entity = claim(fact, cards[i].performance)
    return Path(chosen, tuple(facts), float(entity in question.golds), dollars, raw_cost)


def policy_value(forest: Sequence[Sequence[Path]], choose: Callable[[Fact], Sequence[float]]) -> PolicyValue:
    """The value of a policy that asks hop by hop and picks card i for a fact with probability choose(fact)[i]."""
    weighted = []
    for tree in forest:
        for path in tree:
            chances = [choose(fact)[i] for fact, i in zip(path.facts, path.cards, strict=True)]
            weighted.append((float(np.prod(chances)), path))
    return _mean(weighted, len(forest))


def uniform(cards: Sequence[PricedCard]) -> Callable[[Fact], Sequence[float]]:
    """The choice of a random policy, for `policy_value`."""
    chances = [1 / len(cards)] * len(cards)
    return lambda fact: chances


def always(cards: Sequence[PricedCard], key: str) -> Callable[[Fact], Sequence[float]]:
    """The choice of a policy that asks one model only, for `policy_value`."""
    chances = [float(card.key == key) for card in cards]
    return lambda fact: chances


def cost_range(forest: Sequence[Sequence[Path]]) -> tuple[float, float]:
    """5th and 95th percentile of sqrt(raw cost) under the random policy.

    This is the assumption about the reward's cost normaliser: it stays where it is when training starts. In a run its
    window follows the policy, and the range narrows with the policy's costs.
    """
    costs = [np.sqrt(path.raw_cost) for tree in forest for path in tree]
    weights = [1 / len(tree) for tree in forest for _ in tree]
    low, high = np.quantile(costs, [0.05, 0.95], weights=weights, method="inverted_cdf")
    return float(low), float(high)


def reward(path: Path, alpha: float, bounds: tuple[float, float]) -> float:
    """The published reward of a well-formed episode, with the cost normalised by fixed `bounds` of sqrt(raw cost)."""
    low, high = bounds
    cheapness = 0.5 if high - low < 1e-8 else 1 - np.clip((np.sqrt(path.raw_cost) - low) / (high - low), 0, 1)
    return float((1 - alpha) * path.em + alpha * cheapness) if path.em else 0.0


def oracle(forest: Sequence[Sequence[Path]], alpha: float, bounds: tuple[float, float]) -> PolicyValue:
    """The upper bound: per question the calls of the greatest reward, as if it were known who knows what.

    Equal rewards go to the fewer dollars, so at alpha 0 it is the cheapest right way.
    """
    best = [max(tree, key=lambda path: (reward(path, alpha, bounds), -path.dollars)) for tree in forest]
    return _mean([(1.0, path) for path in best], len(forest))


def best_by_domain(
    forest: Sequence[Sequence[Path]], cards: Sequence[PricedCard], alpha: float, bounds: tuple[float, float]
) -> tuple[PolicyValue, dict[tuple[str, ...], tuple[str, ...]]]:
    """The best policy that knows of a question only the domains of its hops: all that cards can teach a router.

    Per sequence of domains, the calls of the greatest mean reward over these questions. Returns the value and the keys
    of the models called, by domains.
    """
    groups = defaultdict(list)
    for tree in forest:
        groups[tuple(fact.domain for fact in tree[0].facts)].append(tree)
    taken, called = [], {}
    for domains, members in groups.items():
        ways = zip(*members, strict=True)  # the same calls for each question of the group
        best = max(ways, key=lambda way: float(np.mean([reward(path, alpha, bounds) for path in way])))
        taken += [(1.0, path) for path in best]
        called[domains] = tuple(cards[i].key for i in best[0].cards)
    return _mean(taken, len(forest)), called


def _mean(weighted: Sequence[tuple[float, Path]], questions: int) -> PolicyValue:
    columns = [(weight, path.em, path.dollars, path.raw_cost, len(path.cards)) for weight, path in weighted]
    weights, *values = np.array(columns, dtype=np.float64).T
    return PolicyValue(*(float(weights @ value) / questions for value in values))


def references(
    world: World,
    questions: Sequence[Question],
    cards: Sequence[PricedCard],
    alphas: Sequence[float] = (0.0, 0.6),
) -> dict[str, PolicyValue]:
    """The policies that a router is compared with, by name: oracle, best by domain, each model alone, random choice."""
    forest = trees(world, questions, cards)
    bounds = cost_range(forest)
    named = {f"oracle (alpha {alpha:g})": oracle(forest, alpha, bounds) for alpha in alphas}
    for alpha in alphas:
        named[f"best by domain (alpha {alpha:g})"] = best_by_domain(forest, cards, alpha, bounds)[0]
    for card in cards:
        named[f"{card.key} alone"] = policy_value(forest, always(cards, card.key))
    named["random choice"] = policy_value(forest, uniform(cards))
    return named


def table(config: ConfigDict) -> str:
    """The references of a configuration's world and pool on its evaluation split, as text."""
    world = World(config.data.world)
    questions = world.questions(config.evaluation.split)
    cards = cards_from_config(config.pool)
    lines = [f"{len(questions)} questions of the {config.evaluation.split} split"]
    lines.append(f"{'policy':<28}{'EM':>7}{'dollars/question':>19}{'raw cost':>10}{'calls':>7}")
    for name, value in references(world, questions, cards).items():
        lines.append(f"{name:<28}{value.em:>7.3f}{value.dollars:>19.3e}{value.raw_cost:>10.1f}{value.calls:>7.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", help_string="Configuration with data.world and pool.models.")
    app.run(lambda argv: print(table(CONFIG.value)))
