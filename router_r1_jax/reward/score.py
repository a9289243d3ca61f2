"""Scores a batch of episodes: every component beside the sum, so that metrics and presets can use them all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from router_r1_jax.reward.answers import exact_match, extract_answer, f1_score
from router_r1_jax.reward.cost import FLAT, NEUTRAL, CostNormalizer
from router_r1_jax.reward.format import check_format


@dataclass(frozen=True)
class Rewards:
    """Rewards of B episodes; every array is float64 [B].

    exact_match, f1 and outcome judge the extracted answer whether or not the response is well-formed; only `total`
    joins the components.
    """

    total: np.ndarray
    format: np.ndarray  # -1 malformed, 0 well-formed
    outcome: np.ndarray  # exact_match or f1, as `metric` says
    cost: np.ndarray  # 1 cheap .. 0 dear
    exact_match: np.ndarray
    f1: np.ndarray
    faults: tuple[tuple[str, ...], ...]  # per episode, names of reward.FAULTS

    def take(self, episodes: np.ndarray) -> "Rewards":
        """Those of some episodes, by number."""
        faults = tuple(self.faults[i] for i in episodes)
        arrays = {f.name: getattr(self, f.name)[episodes] for f in fields(self) if f.name != "faults"}
        return Rewards(**arrays, faults=faults)

    @classmethod
    def join(cls, parts: Sequence["Rewards"]) -> "Rewards":
        """Those of several batches, one after the other."""
        names = [f.name for f in fields(cls) if f.name != "faults"]
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return cls(**arrays, faults=sum((part.faults for part in parts), ()))


# How the components [B] of well- and malformed episodes become the total [B]: functions of (format, outcome, cost,
# alpha), with cost 1 for cheap and 0 for dear.
Join = Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]


def official(format: np.ndarray, outcome: np.ndarray, cost: np.ndarray, alpha: float) -> np.ndarray:
    """The published code's rule: -1 if malformed; 0 if wrong; else outcome and cheapness, mixed by alpha."""
    mixed = np.where(outcome > 0, (1.0 - alpha) * outcome + alpha * cost, 0.0)
    return np.where(format < 0, -1.0, mixed)


def paper(format: np.ndarray, outcome: np.ndarray, cost: np.ndarray, alpha: float) -> np.ndarray:
    """The paper's Equation 5: as `official`, but a wrong answer is paid for being cheap too."""
    return np.where(format < 0, -1.0, (1.0 - alpha) * outcome + alpha * cost)


def success_gated(format: np.ndarray, outcome: np.ndarray, cost: np.ndarray, alpha: float) -> np.ndarray:
    """-1 if malformed; 0 if wrong; else the outcome minus alpha times dearness: being right is never worth less than 0
    and, unlike in `official`, an outcome keeps its whole weight whatever alpha is."""
    return np.where(format < 0, -1.0, np.where(outcome > 0, outcome - alpha * (1.0 - cost), 0.0))


class Preset(NamedTuple):
    """A reward: how components are joined, who a cost is compared with, and whether the published format rule holds."""

    join: Join
    cost: str = "window"  # window: the run's latest costs | group: the other episodes of the question
    strict: bool = False  # later colons and the model's name in a query are faults; only parity needs that


PRESETS = {
    "official": Preset(official, strict=True),
    "paper": Preset(paper),
    "group": Preset(official, cost="group"),
    "success_gated": Preset(success_gated),
}


def group_cost(raw_costs: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Cost components [B] of raw costs [B]: 1 for the cheapest of a group, 0 for its dearest, linear in between.

    0.5 where a group's costs are all equal: they say nothing about its questions.
    """
    component = np.full(len(raw_costs), NEUTRAL)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        low, high = raw_costs[members].min(), raw_costs[members].max()
        if high - low >= FLAT:
            component[members] = 1.0 - (raw_costs[members] - low) / (high - low)
    return component


def score(
    responses: Sequence[str],
    golds: Sequence[Sequence[str]],
    raw_costs: np.ndarray,
    names: Sequence[str] | Mapping[str, str],
    *,
    preset: str = "official",
    alpha: float,
    metric: str,
    normalizer: CostNormalizer,
    groups: np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> Rewards:
    """Score B episodes.

    Args:
        responses: [B] text behind the prompt, replies included.
        golds: [B] gold answers per question.
        raw_costs: [B] >= 0, as `episode_cost` gives them; only their order and proportions matter.
        names: the models that may be asked, as for `protocol.parse_route`.
        preset: a key of PRESETS.
        alpha: weight of the cost component, in [0, 1].
        metric: "em" or "f1", the outcome that is rewarded.
        normalizer: the run's cost window; the valid costs enter it in order, where the preset compares with it.
        groups: [B] int, equal for episodes of the same question; needed where the preset compares within a group.
        valid: bool [B], False where the pool failed. Such a cost says nothing about the policy: it is compared with no
            other and its component is 0.5. None: all are valid.

    Raises:
        ValueError: for an unknown preset or metric, an alpha outside of [0, 1], lengths that differ, or missing groups.
    """
    raw_costs = np.asarray(raw_costs, dtype=np.float64)
    valid = np.ones(len(responses), dtype=bool) if valid is None else np.asarray(valid, dtype=bool)
    _check(responses, golds, raw_costs, valid, preset, alpha, metric, groups)

    rule = PRESETS[preset]
    reports = [check_format(response, names, strict=rule.strict) for response in responses]
    answers = [extract_answer(response) for response in responses]
    pairs = list(zip(answers, golds, strict=True))
    em = np.array([0.0 if answer is None else exact_match(answer, gold) for answer, gold in pairs])
    f1 = np.array([0.0 if answer is None else f1_score(answer, gold) for answer, gold in pairs])
    format = np.array([0.0 if report.ok else -1.0 for report in reports])
    cost = np.full(len(responses), NEUTRAL)
    if rule.cost == "group":
        cost[valid] = group_cost(raw_costs[valid], np.asarray(groups)[valid])
    else:
        cost[valid] = normalizer(raw_costs[valid])
    outcome = em if metric == "em" else f1
    return Rewards(
        total=rule.join(format, outcome, cost, alpha),
        format=format,
        outcome=outcome,
        cost=cost,
        exact_match=em,
        f1=f1,
        faults=tuple(report.faults for report in reports),
    )


def _check(
    responses: Sequence[str],
    golds: Sequence[Sequence[str]],
    raw_costs: np.ndarray,
    valid: np.ndarray,
    preset: str,
    alpha: float,
    metric: str,
    groups: np.ndarray | None,
) -> None:
    """Raise before the cost window has changed."""
    if preset not in PRESETS:
        raise ValueError(f"reward.preset is {preset!r}; choose one of {', '.join(PRESETS)}")
    if metric not in ("em", "f1"):
        raise ValueError(f"reward.metric is {metric!r}; choose em or f1")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"reward.alpha is {alpha}; the weight of the cost term lies in [0, 1]")
    if groups is None and PRESETS[preset].cost == "group":
        raise ValueError(f"reward.preset is {preset!r}, which compares the episodes of a question; pass their groups")
    shapes = {"golds": (len(golds),), "raw_costs": raw_costs.shape, "valid": valid.shape}
    if groups is not None:
        shapes["groups"] = np.shape(groups)
    for name, shape in shapes.items():
        if shape != (len(responses),):
            raise ValueError(f"{name} has shape {shape}; {len(responses)} responses need ({len(responses)},)")
