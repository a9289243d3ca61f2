"""Score of episodes and reward presets (official, paper, group, success_gated): how the reward components combine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from router_r1_jax.reward.answers import exact_match, extract_answer, f1_score
from router_r1_jax.reward.cost import NEUTRAL, CostNormalizer, group_costs
from router_r1_jax.reward.format import check_format


@dataclass(frozen=True)
class Rewards:
    """Rewards of B episodes; every array is float64 [B].

    exact_match, f1 and outcome judge the extracted answer whether or not the response is well-formed. Only `total`
    combines the components.
    """

    total: np.ndarray
    format: np.ndarray  # -1 malformed, 0 well-formed
    outcome: np.ndarray  # exact_match or f1, as `metric` says
    cost: np.ndarray  # 1 cheap .. 0 expensive
    exact_match: np.ndarray
    f1: np.ndarray
    faults: tuple[tuple[str, ...], ...]  # per episode, names of reward.FAULTS

    def take(self, indices: np.ndarray) -> "Rewards":
        """Rewards of the episodes with these indices."""
        arrays = {name: values[indices] for name, values in _arrays(self).items()}
        return Rewards(**arrays, faults=tuple(self.faults[i] for i in indices))

    @classmethod
    def concat(cls, parts: Sequence["Rewards"]) -> "Rewards":
        """Rewards of several batches, one after the other."""
        arrays = {name: np.concatenate([_arrays(part)[name] for part in parts]) for name in _arrays(parts[0])}
        return cls(**arrays, faults=sum((part.faults for part in parts), ()))


def _arrays(rewards: Rewards) -> dict[str, np.ndarray]:
    return {field.name: getattr(rewards, field.name) for field in fields(rewards) if field.name != "faults"}


def official(format: np.ndarray, outcome: np.ndarray, cost: np.ndarray, alpha: float) -> np.ndarray:
    """The published code's rule: -1 if malformed; 0 if wrong; else outcome and cost component, weighted by alpha."""
    mixed = np.where(outcome > 0, (1.0 - alpha) * outcome + alpha * cost, 0.0)
    return np.where(format < 0, -1.0, mixed)


def paper(format: np.ndarray, outcome: np.ndarray, cost: np.ndarray, alpha: float) -> np.ndarray:
    """The paper's Equation 5: like `official`, but a wrong answer gets the cost term too."""
    return np.where(format < 0, -1.0, (1.0 - alpha) * outcome + alpha * cost)


def success_gated(format: np.ndarray, outcome: np.ndarray, cost: np.ndarray, alpha: float) -> np.ndarray:
    """-1 if malformed; 0 if wrong; else the outcome minus alpha times (1 - cost component).

    A fully right answer never gets less than 0. Unlike in `official`, the outcome keeps its whole weight for any alpha.
    """
    return np.where(format < 0, -1.0, np.where(outcome > 0, outcome - alpha * (1.0 - cost), 0.0))


class Preset(NamedTuple):
    """A reward: how components combine, which costs a cost is compared with, and whether the format rule is strict."""

    combine: Callable[..., np.ndarray]  # of (format, outcome, cost, alpha), components [B] -> total [B]
    cost: str = "window"  # window: the run's latest costs | group: the other episodes of the question
    strict: bool = False  # `check_format`: later colons and the model's name in a query are faults; for parity only


PRESETS = {
    "official": Preset(official, strict=True),
    "paper": Preset(paper),
    "group": Preset(official, cost="group"),
    "success_gated": Preset(success_gated),
}


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
        normalizer: the run's cost window. If the preset uses it, the valid costs enter it in order.
        groups: [B] int, equal for episodes of the same question; needed if the preset compares within groups.
        valid: bool [B], False if the pool failed. Such a cost says nothing about the policy: it is compared with no
            other cost, and its component is 0.5. None: all are valid.

    Raises:
        ValueError: for an unknown preset or metric, an alpha outside of [0, 1], lengths that differ, or missing groups.
    """
    raw_costs = np.asarray(raw_costs, dtype=np.float64)
    valid = np.ones(len(responses), dtype=bool) if valid is None else np.asarray(valid, dtype=bool)
    groups = None if groups is None else np.asarray(groups)
    _check_options(preset, alpha, metric, groups)
    columns = {"golds": (len(golds),), "raw_costs": raw_costs.shape, "valid": valid.shape}
    for name, shape in (columns if groups is None else columns | {"groups": groups.shape}).items():
        if shape != (len(responses),):
            raise ValueError(f"{name} has shape {shape}; {len(responses)} responses need ({len(responses)},)")

    rule = PRESETS[preset]
    reports = [check_format(response, names, strict=rule.strict) for response in responses]
    answers = [extract_answer(response) for response in responses]
    pairs = list(zip(answers, golds, strict=True))
    em = np.array([0.0 if answer is None else exact_match(answer, gold) for answer, gold in pairs])
    f1 = np.array([0.0 if answer is None else f1_score(answer, gold) for answer, gold in pairs])
    format = np.array([0.0 if report.ok else -1.0 for report in reports])
    cost = np.full(len(responses), NEUTRAL)
    in_group = rule.cost == "group"
    cost[valid] = group_costs(raw_costs[valid], groups[valid]) if in_group else normalizer(raw_costs[valid])
    outcome = em if metric == "em" else f1
    return Rewards(
        total=rule.combine(format, outcome, cost, alpha),
        format=format,
        outcome=outcome,
        cost=cost,
        exact_match=em,
        f1=f1,
        faults=tuple(report.faults for report in reports),
    )


def _check_options(preset: str, alpha: float, metric: str, groups: np.ndarray | None) -> None:
    if preset not in PRESETS:
        raise ValueError(f"reward.preset is {preset!r}; choose one of {', '.join(PRESETS)}")
    if metric not in ("em", "f1"):
        raise ValueError(f"reward.metric is {metric!r}; choose em or f1")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"reward.alpha is {alpha}; the weight of the cost term lies in [0, 1]")
    if groups is None and PRESETS[preset].cost == "group":
        raise ValueError(f"reward.preset is {preset!r}, which compares the episodes of a question; pass their groups")
