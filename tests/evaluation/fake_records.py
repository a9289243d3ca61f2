"""Records as `evaluation.episode_records.make_records` makes them, with scores chosen by the test."""


def record(number, em=1.0, *, dataset="nq", calls=(("Titan", 2e-5, 0.5),), **fields):
    """`calls` are (model, dollars, seconds)."""
    calls = [
        {"model": model, "charged": charged, "latency": seconds, "outcome": "ok", "query": "q", "reply": "r"}
        for model, charged, seconds in calls
    ]
    return {
        "id": f"{dataset}-{number}",
        "dataset": dataset,
        "split": "test",
        "step": 3,
        "policy": "trained",
        "question": f"question {number} of {dataset}?",
        "golds": [f"gold {number}"],
        "hops": 1,
        "domains": [],
        "candidates": ["Titan"],
        "response": "<think>a</think><answer>b</answer>",
        "calls": calls,
        "reward": {"total": em, "format": 0.0, "outcome": em, "cost": 0.5},
        "exact_match": em,
        "f1": em,
        "sub_exact_match": em,
        "dollars": sum(call["charged"] for call in calls),
        "raw_cost": 1.0,
        "faults": [],
        "stop": "answer",
        "failed": False,
    } | fields


def two_sets(rng, em=0.5):
    """40 questions of one set and 10 of another."""
    return [record(i, float(rng.random() < em)) for i in range(40)] + [
        record(i, float(rng.random() < 0.2), dataset="bamboogle") for i in range(10)
    ]
