"""Oracle policy of the synthetic world, and other routing policies: their exact match and dollars are computed exactly.

    python -m router_r1_jax.synthetic.oracle --config=configs/demo.py

prints the policies of `reference_policies` for the split of `config.evaluation`. The calls of a question form a small
tree with one branch per model at each hop. All paths of the tree are followed, and none is sampled. This is exact,
because replies are deterministic. If the first reply is wrong, the second query asks about a wrong entity, and its
answer may still be right. Failed requests do not count, because they are retried.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from router_r1_jax.launcher import launch
from router_r1_jax.pool.cards import Card, cards_from_config
from router_r1_jax.reward import cost_bounds, normalize_costs
from router_r1_jax.synthetic.world import Fact, Question, World, claim, count_tokens, query_text

ALPHAS = (0.0, 0.6)  # weights of cost for which `reference_policies` has the best policies


class Path(NamedTuple):
    """One way to answer a question: a sequence of calls, and the result.

    Attributes:
      cards: index of the card that each call asks.
      facts: the fact that each call asks for.
      em: 1.0 if the last reply is a gold answer, else 0.0.
      dollars: of input and output tokens.
      raw_cost: completion tokens x dollars per million tokens.
    """

    cards: tuple[int, ...]
    facts: tuple[Fact, ...]
    em: float
    dollars: float
    raw_cost: float


class PolicyValue(NamedTuple):
    """What a policy reaches: expected values, as means over questions."""

    em: float
    dollars_per_question: float
    raw_cost_per_question: float
    calls_per_question: float


Tree = Sequence[Path]


def trees(world: World, questions: Sequence[Question], cards: Sequence[Card]) -> list[Tree]:
    """Per question all len(cards) ** len(hops) paths. A query asks about the entity in the path's last reply."""
    return [
        [
            _walk(world, question, cards, chosen)
            for chosen in itertools.product(range(len(cards)), repeat=len(question.hops))
        ]
        for question in questions
    ]


def _walk(world: World, question: Question, cards: Sequence[Card], chosen: tuple[int, ...]) -> Path:
    entity, facts, dollars, raw_cost = question.hops[0].subject, [], 0.0, 0.0
    for hop, i in zip(question.hops, chosen, strict=True):
        fact = world.fact(hop.relation, entity)
        query = query_text(fact.relation, entity)
        completion = count_tokens(world.reply(query, cards[i].performance))
        raw_cost += cards[i].raw_cost(completion)
        dollars += cards[i].dollars(count_tokens(query), completion)
        facts.append(fact)
        entity = claim(fact, cards[i].performance)
    return Path(chosen, tuple(facts), float(entity in question.golds), dollars, raw_cost)


def policy_value(forest: Sequence[Tree], choose: Callable[[Fact], Sequence[float]]) -> PolicyValue:
    """The value of a policy that asks hop by hop and picks card i for a fact with probability choose(fact)[i]."""
    weighted = []
    for tree in forest:
        for path in tree:
            chances = [choose(fact)[i] for fact, i in zip(path.facts, path.cards, strict=True)]
            weighted.append((float(np.prod(chances)), path))
    return _mean(weighted, len(forest))


def uniform(cards: Sequence[Card]) -> Callable[[Fact], Sequence[float]]:
    """The random policy, as `policy_value` takes it."""
    chances = [1 / len(cards)] * len(cards)
    return lambda fact: chances


def always(cards: Sequence[Card], key: str) -> Callable[[Fact], Sequence[float]]:
    """The policy that always asks one model, as `policy_value` takes it."""
    chances = [float(card.key == key) for card in cards]
    return lambda fact: chances


def random_cost_bounds(forest: Sequence[Tree]) -> tuple[float, float]:
    """5th and 95th percentile of sqrt(raw cost) under the random policy.

    They stand for the reward's cost window when training starts. During training the window follows the policy.
    """
    costs = np.array([path.raw_cost for tree in forest for path in tree])
    return cost_bounds(costs, weights=np.array([1 / len(tree) for tree in forest for _ in tree]))


def path_reward(path: Path, alpha: float, bounds: tuple[float, float]) -> float:
    """The published reward of a well-formed episode, with the cost normalised by fixed `bounds` of sqrt(raw cost)."""
    if not path.em:
        return 0.0
    return float((1 - alpha) * path.em + alpha * normalize_costs(np.array(path.raw_cost), *bounds))


def oracle(forest: Sequence[Tree], alpha: float, bounds: tuple[float, float]) -> PolicyValue:
    """The upper bound: it knows which model knows which fact, and makes the calls with the greatest reward.

    If rewards are equal, the path with fewer dollars wins. So at alpha 0 this is the cheapest right path.
    """
    best = [max(tree, key=lambda path: (path_reward(path, alpha, bounds), -path.dollars)) for tree in forest]
    return _mean([(1.0, path) for path in best], len(forest))


def best_by_domain(forest: Sequence[Tree], alpha: float, bounds: tuple[float, float]) -> PolicyValue:
    """The best policy that only knows the domains of a question's hops: all that cards can teach a router.

    For each sequence of domains it makes the calls with the greatest mean reward over these questions.
    """
    groups = defaultdict(list)
    for tree in forest:
        groups[tuple(fact.domain for fact in tree[0].facts)].append(tree)
    taken = []
    for members in groups.values():
        same_calls = zip(*members, strict=True)  # the paths with the same cards, one of each question
        best = max(same_calls, key=lambda paths: float(np.mean([path_reward(path, alpha, bounds) for path in paths])))
        taken += [(1.0, path) for path in best]
    return _mean(taken, len(forest))


def _mean(weighted: Sequence[tuple[float, Path]], questions: int) -> PolicyValue:
    columns = [(weight, path.em, path.dollars, path.raw_cost, len(path.cards)) for weight, path in weighted]
    weights, *values = np.array(columns, dtype=np.float64).T
    return PolicyValue(*(float(weights @ value) / questions for value in values))


def reference_policies(world: World, questions: Sequence[Question], cards: Sequence[Card]) -> dict[str, PolicyValue]:
    """Policies to compare a router with, by name: oracle, best by domain, each model alone, random choice."""
    forest = trees(world, questions, cards)
    bounds = random_cost_bounds(forest)
    named = {f"oracle (alpha {alpha:g})": oracle(forest, alpha, bounds) for alpha in ALPHAS}
    for alpha in ALPHAS:
        named[f"best by domain (alpha {alpha:g})"] = best_by_domain(forest, alpha, bounds)
    for card in cards:
        named[f"{card.key} alone"] = policy_value(forest, always(cards, card.key))
    named["random choice"] = policy_value(forest, uniform(cards))
    return named


def main(config: ConfigDict) -> None:
    """Print what the reference policies reach on the configuration's world, pool and evaluation split."""
    from router_r1_jax.report.tables import Table  # imported here, so that an environment loads no plot library

    world, cards = World(config.synthetic.world), cards_from_config(config.pool)
    questions = world.questions(config.evaluation.split)
    formats = (".3f", ".3e", ".1f", ".2f")
    rows = [[name, *map(format, value, formats)] for name, value in reference_policies(world, questions, cards).items()]
    print(f"{len(questions)} questions of the {config.evaluation.split} split")
    print(Table(["policy", "EM", "dollars/question", "raw cost", "calls"], rows).text())


if __name__ == "__main__":
    launch(main, workdir=False)
