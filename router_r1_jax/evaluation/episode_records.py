"""Episode records, one plain dict per episode (episodes/*.jsonl), and their mean metrics: EM, F1, calls, dollars."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from router_r1_jax.evaluation.reward_hacking import hacking_rates
from router_r1_jax.pool.cards import Card
from router_r1_jax.pool.outcomes import provider_fault
from router_r1_jax.reward import FAULTS, Rewards, extract_answer, sub_exact_match
from router_r1_jax.router import RolloutBatch

Record = dict[str, Any]

# Metric -> its value for one episode. Dollars are those charged; raw cost is in the paper's unit, output tokens x
# dollars per million; seconds are those spent in calls.
EPISODE_METRICS: dict[str, Callable[[Record], float]] = {
    "em": lambda r: r["exact_match"],
    "f1": lambda r: r["f1"],
    "calls_per_question": lambda r: float(len(r["calls"])),
    "dollars_per_question": lambda r: r["dollars"],
    "raw_cost_per_question": lambda r: r["raw_cost"],
    "call_seconds_per_question": lambda r: sum(call["latency"] for call in r["calls"]),
    "malformed_share": lambda r: float(r["reward"]["format"] < 0),
}
REWARD_PARTS = ("total", "format", "outcome", "cost")
# Fields of pool.Reply.
CALL_FIELDS = ("model", "query", "outcome", "completion_tokens", "charged", "latency", "raw_cost", "thought")


def make_records(batch: RolloutBatch, rewards: Rewards, *, step: int, split: str, policy: str) -> list[Record]:
    """One record per episode. "candidates" holds the keys of the models that the policy could choose from."""
    candidates = [card.key for card in batch.candidates]
    records = []
    for i, (question, episode) in enumerate(zip(batch.questions, batch.episodes, strict=True)):
        answer = extract_answer(episode.text)
        calls = [
            {"reply": reply.text} | {field: getattr(reply, field) for field in CALL_FIELDS} for reply in episode.replies
        ]
        records.append(
            {
                "id": question.id,
                "dataset": question.dataset,
                "split": split,
                "step": step,
                "policy": policy,
                "question": question.question,
                "golds": list(question.golds),
                "hops": question.hops,
                "domains": list(question.domains),
                "candidates": candidates,
                "response": episode.text,
                "calls": calls,
                "reward": {part: float(getattr(rewards, part)[i]) for part in REWARD_PARTS},
                "exact_match": float(rewards.exact_match[i]),
                "f1": float(rewards.f1[i]),
                "sub_exact_match": 0.0 if answer is None else sub_exact_match(answer, question.golds),
                "dollars": sum(call["charged"] for call in calls),
                "raw_cost": sum(call["raw_cost"] for call in calls),
                "faults": list(rewards.faults[i]),
                "stop": episode.stop,
                "failed": any(provider_fault(reply.outcome) for reply in episode.replies),
            }
        )
    return records


def best_models(cards: Sequence[Card]) -> dict[str, str]:
    """Domain -> key of the model whose card states the highest score for it."""
    domains = {domain for card in cards for domain in card.performance}
    return {d: max(cards, key=lambda card, d=d: card.performance.get(d, -1.0)).key for d in domains}


def summarise(records: Sequence[Record], cards: Sequence[Card]) -> dict[str, Any]:
    """Mean metrics over episodes.

    Keys:
      em ... malformed_share: EPISODE_METRICS.
      reward/total, reward/format, reward/outcome, reward/cost: components of the reward.
      calls/share: per model key, the share of the calls that reached a model.
      format/<fault>: share of the episodes with the fault, for each of reward.FAULTS.
      reward_hacking/<habit>: see `reward_hacking.hacking_rates`.
      best_model_share: share of the calls that went to the best candidate for their domain, by the cards; only if
        questions carry domains. The first call belongs to the first domain, and so on; further calls are not counted.
      two_hop_two_calls: share of the two-hop questions with exactly two calls; only if there are two-hop questions.
    """
    called = [call["model"] for r in records for call in r["calls"] if call["model"]]
    metrics: dict[str, Any] = {
        **{name: _mean([metric(r) for r in records]) for name, metric in EPISODE_METRICS.items()},
        **{f"reward/{part}": _mean([r["reward"][part] for r in records]) for part in REWARD_PARTS},
        "calls/share": {card.key: called.count(card.key) / max(len(called), 1) for card in cards},
        **{f"format/{fault}": _mean([fault in r["faults"] for r in records]) for fault in FAULTS},
    }
    return metrics | hacking_rates(records) | _routing_metrics(records, cards)


def _routing_metrics(records: Sequence[Record], cards: Sequence[Card]) -> dict[str, float]:
    best: dict[tuple[str, ...], Mapping[str, str]] = {}  # candidates -> best model per domain
    for r in records:
        if (keys := tuple(r["candidates"])) not in best:
            best[keys] = best_models([card for card in cards if card.key in keys])
    to_best = [
        best[tuple(r["candidates"])].get(domain) == call["model"]
        for r in records
        for domain, call in zip(r["domains"], r["calls"], strict=False)
    ]
    two_calls = [len(r["calls"]) == 2 for r in records if r["hops"] == 2]
    metrics = {}
    if any(r["domains"] for r in records):
        metrics["best_model_share"] = _mean(to_best)
    if two_calls:
        metrics["two_hop_two_calls"] = _mean(two_calls)
    return metrics


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
