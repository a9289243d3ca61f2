"""Records as `evaluation.records.make_records` leaves them, with scores chosen by the test."""


def record(number, em=1.0, *, suite="nq", calls=(("Titan", 2e-5, 0.5),), **fields):
    """`calls` are (model, dollars, seconds)."""
    calls = [
        {"model": model, "charged": charged, "latency": seconds, "outcome": "ok", "query": "q", "reply": "r"}
        for model, charged, seconds in calls
    ]
    return {
        "id": f"{suite}-{number}", "suite": suite, "split": "test", "step": 3, "policy": "trained",
        "question": f"question {number} of {suite}?", "golds": [f"gold {number}"], "hops": 1, "domains": [],
        "shown": ["Titan"], "response": "<think>a</think><answer>b</answer>", "calls": calls,
        "reward": {"total": em, "format": 0.0, "outcome": em, "cost": 0.5}, "exact_match": em, "f1": em,
        "sub_exact_match": em, "dollars": sum(call["charged"] for call in calls), "raw_cost": 1.0, "faults": [],
        "stop": "answer", "failed": False,
    } | fields  # fmt: skip
