"""Scores a batch of episodes: every component beside the sum, so that metrics and presets can use them all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from router_r1_jax.reward.answers import exact_match, extract_answer, f1_score
from router_r1_jax.reward.cost import CostNormalizer
from router_r1_jax.reward.format import check_format

# The cost component of an episode whose pool failed: neither cheap nor dear, as in a flat window.
_NO_COST = 0.5


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


def official(format: np.ndarray, outcome: np.ndarray, cost: np.ndarray, alpha: float) -> np.ndarray:
    """The published code's rule [B]: -1 if malformed; 0 if wrong; else outcome and cheapness, mixed by alpha."""
    mixed = np.where(outcome > 0, (1.0 - alpha) * outcome + alpha * cost, 0.0)
    return np.where(format < 0, -1.0, mixed)


# Preset -> how the components [B] become the total [B].
PRESETS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]] = {"official": official}


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
    valid: np.ndarray | None = None,
) -> Rewards:
    """Score B episodes.

    Args:
        responses: [B] text behind the prompt, replies included.
        golds: [B] gold answers per question.
        raw_costs: [B] sum over an episode's calls of completion tokens x dollars per million tokens.
        names: the models that may be asked, as for `protocol.parse_route`.
        preset: a key of PRESETS.
        alpha: weight of the cost component, in [0, 1].
        metric: "em" or "f1", the outcome that is rewarded.
        normalizer: the run's cost window; the valid costs enter it in order.
        valid: bool [B], False where the pool failed. Such a cost says nothing about the policy: it stays out of the
            window and its component is 0.5. None: all are valid.

    Raises:
        ValueError: for an unknown preset or metric, an alpha outside of [0, 1], or lengths that differ.
    """
    raw_costs = np.asarray(raw_costs, dtype=np.float64)
    valid = np.ones(len(responses), dtype=bool) if valid is None else np.asarray(valid, dtype=bool)
    _check(responses, golds, raw_costs, valid, preset, alpha, metric)

    # The published format rule also forbids later colons and the model's name in a query, which only parity needs.
    reports = [check_format(response, names, strict=preset == "official") for response in responses]
    answers = [extract_answer(response) for response in responses]
    pairs = list(zip(answers, golds, strict=True))
    em = np.array([0.0 if answer is None else exact_match(answer, gold) for answer, gold in pairs])
    f1 = np.array([0.0 if answer is None else f1_score(answer, gold) for answer, gold in pairs])
    format = np.array([0.0 if report.ok else -1.0 for report in reports])
    cost = np.full(len(responses), _NO_COST)
    cost[valid] = normalizer(raw_costs[valid])
    outcome = em if metric == "em" else f1
    return Rewards(
        total=PRESETS[preset](format, outcome, cost, alpha),
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
) -> None:
    """Raise before the cost window has changed."""
    if preset not in PRESETS:
        raise ValueError(f"reward.preset is {preset!r}; choose one of {', '.join(PRESETS)}")
    if metric not in ("em", "f1"):
        raise ValueError(f"reward.metric is {metric!r}; choose em or f1")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"reward.alpha is {alpha}; the weight of the cost term lies in [0, 1]")
    for name, shape in (("golds", (len(golds),)), ("raw_costs", raw_costs.shape), ("valid", valid.shape)):
        if shape != (len(responses),):
            raise ValueError(f"{name} has shape {shape}; {len(responses)} responses need ({len(responses)},)")
