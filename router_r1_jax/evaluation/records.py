"""One plain dict per episode, as it stands in episodes/*.jsonl, and the figures that a set of them adds up to."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from router_r1_jax.evaluation.watch import hacking_rates
from router_r1_jax.pool.cards import Card
from router_r1_jax.pool.outcomes import Outcome, provider_fault
from router_r1_jax.reward import FAULTS, Rewards, extract_answer, sub_exact_match

Record = dict[str, Any]


class Answered(NamedTuple):
    """What records are made of; a `router.Answers` will do."""

    questions: Sequence[Any]
    episodes: Sequence[Any]  # rollout.Episode, with the pool's replies; one per question, in step
    roster: Sequence[Card]  # the cards that the prompts showed, or among which a baseline chose


def make_records(answered: Any, rewards: Rewards, *, step: int, split: str, policy: str) -> list[Record]:
    """A record per episode; of `answered` the fields of `Answered` are read."""
    records, shown = [], [card.key for card in answered.roster]
    for i, (question, episode) in enumerate(zip(answered.questions, answered.episodes, strict=True)):
        calls = [
            {
                "model": reply.model, "query": reply.query, "reply": reply.text, "outcome": str(reply.outcome),
                "completion_tokens": reply.completion_tokens, "charged": reply.charged, "latency": reply.latency,
                "raw_cost": reply.raw_cost,
            }
            for reply in episode.replies
        ]  # fmt: skip
        records.append(
            {
                "id": question.id, "suite": question.suite, "split": split, "step": step, "policy": policy,
                "question": question.question, "golds": list(question.golds), "hops": question.hops,
                "domains": list(question.domains), "shown": shown,
                "response": episode.text, "calls": calls,
                "reward": {
                    "total": float(rewards.total[i]), "format": float(rewards.format[i]),
                    "outcome": float(rewards.outcome[i]), "cost": float(rewards.cost[i]),
                },
                "exact_match": float(rewards.exact_match[i]), "f1": float(rewards.f1[i]),
                "sub_exact_match": _sub_exact_match(episode.text, question.golds),
                "dollars": sum(call["charged"] for call in calls),
                "raw_cost": sum(call["raw_cost"] for call in calls), "faults": list(rewards.faults[i]),
                "stop": episode.stop, "failed": any(provider_fault(Outcome(call["outcome"])) for call in calls),
            }
        )  # fmt: skip
    return records


def _sub_exact_match(response: str, golds: Sequence[str]) -> float:
    answer = extract_answer(response)
    return 0.0 if answer is None else sub_exact_match(answer, golds)


def best_models(cards: Sequence[Card]) -> dict[str, str]:
    """Topic -> key of the model whose card states the highest score for it."""
    topics = {topic for card in cards for topic in card.performance}
    return {t: max(cards, key=lambda card, t=t: card.performance.get(t, -1.0)).key for t in topics}


def summarise(records: Sequence[Record], cards: Sequence[Card]) -> dict[str, Any]:
    """Means over episodes.

    Keys: em, f1, reward/{total,format,outcome,cost}, malformed_share, calls_per_question, dollars_per_question
    (charged), raw_cost_per_question (the paper's unit: output tokens x dollars per million), call_seconds_per_question,
    calls/share (per model key, of all calls that reached one), format/<fault> (share of episodes, a key for each of
    reward.FAULTS), watch/<habit> (`evaluation.watch`). Where questions carry their domains also
    best_model_share: of the calls that belong to a hop, those to the model shown that is best for its domain; and
    two_hop_two_calls: of the two-hop questions, those with exactly two calls.
    """
    called = [call["model"] for r in records for call in r["calls"] if call["model"]]
    figures: dict[str, Any] = {
        "em": _mean([r["exact_match"] for r in records]),
        "f1": _mean([r["f1"] for r in records]),
        **{
            f"reward/{part}": _mean([r["reward"][part] for r in records])
            for part in ("total", "format", "outcome", "cost")
        },
        "malformed_share": _mean([r["reward"]["format"] < 0 for r in records]),
        "calls_per_question": _mean([len(r["calls"]) for r in records]),
        "dollars_per_question": _mean([r["dollars"] for r in records]),
        "raw_cost_per_question": _mean([r["raw_cost"] for r in records]),
        "call_seconds_per_question": _mean([sum(call["latency"] for call in r["calls"]) for r in records]),
        "calls/share": {card.key: called.count(card.key) / max(len(called), 1) for card in cards},
    }
    figures |= {f"format/{fault}": _mean([fault in r["faults"] for r in records]) for fault in FAULTS}
    return figures | hacking_rates(records) | _routing(records, cards)


def _routing(records: Sequence[Record], cards: Sequence[Card]) -> dict[str, float]:
    best: dict[tuple[str, ...], Mapping[str, str]] = {}  # per selection of cards
    for r in records:
        if (keys := tuple(r["shown"])) not in best:
            best[keys] = best_models([card for card in cards if card.key in keys])
    chosen = [
        best[tuple(r["shown"])].get(domain) == call["model"]
        for r in records
        for domain, call in zip(r["domains"], r["calls"], strict=False)  # hop by hop; further calls belong to none
    ]
    two_hop = [len(r["calls"]) == 2 for r in records if r["hops"] == 2]
    figures = {}
    if any(r["domains"] for r in records):
        figures["best_model_share"] = _mean(chosen)
    if two_hop:
        figures["two_hop_two_calls"] = _mean(two_hop)
    return figures


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
