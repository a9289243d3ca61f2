"""A fake run that looks like a real one: metrics, results and episodes of a router that learns, from one seed."""

import json

import numpy as np

from router_r1_jax.evaluation.aggregates import METRICS
from router_r1_jax.storage.json_lines import write_episodes
from router_r1_jax.storage.metrics_writer import MetricsWriter

PRICES = {"Aria": 0.3, "Boreal": 0.2, "Corvid": 0.9, "Dune": 0.25, "Titan": 6.0}  # dollars per million tokens
TOPICS = ("films", "songs", "clubs", "people", "places")


def curve(rng, start, end, steps, noise, middle=0.35):
    """An S-shaped path from start to end with noise, clipped to what a share can be."""
    time = np.arange(steps) / steps
    values = start + (end - start) / (1 + np.exp(-12 * (time - middle))) + noise * rng.standard_normal(steps)
    return np.clip(values, 0, None)


def fake_metrics(steps=120, seed=0):
    rng = np.random.default_rng(seed)
    lines = [
        {"step": s, "phase": "warmstart", "warmstart/loss": 4 * gap}
        for s, gap in ((s, float(np.exp(-s / 90))) for s in range(0, 450, 10))
    ]
    shares = np.stack([curve(rng, 0.2, end, steps, 0.015) for end in (0.3, 0.22, 0.17, 0.25, 0.06)])
    shares /= shares.sum(axis=0)
    columns = {
        "em": np.minimum(curve(rng, 0.24, 0.72, steps, 0.035), 1),
        "best_model_share": np.minimum(curve(rng, 0.22, 0.88, steps, 0.03), 1),
        "reward/format": -curve(rng, 0.08, 0.005, steps, 0.006, 0.1),
        "reward/cost": curve(rng, 0.5, 0.62, steps, 0.02),
        "malformed_share": curve(rng, 0.08, 0.005, steps, 0.006, 0.1),
        "calls_per_question": curve(rng, 1.5, 1.48, steps, 0.03),
        "dollars_per_question": curve(rng, 2.6e-5, 1.2e-5, steps, 1e-6),
        "rollout_seconds": curve(rng, 1.9, 1.6, steps, 0.1),
        "update_seconds": curve(rng, 0.8, 0.8, steps, 0.03),
        "tokens_per_second": curve(rng, 2100, 2600, steps, 80),
        "response_tokens": curve(rng, 62, 58, steps, 1.0),
        "kl": curve(rng, 0.0, 0.09, steps, 0.003),
        "entropy": curve(rng, 0.45, 0.12, steps, 0.01),
        "clip_share": curve(rng, 0.002, 0.004, steps, 0.0008),
        "zero_variance_groups": np.round(curve(rng, 1, 9, steps, 1.2)),
        "grad_norm": curve(rng, 0.9, 0.5, steps, 0.1),
        "loss": 0.02 * rng.standard_normal(steps),
        "learning_rate": np.full(steps, 1e-4),
        "logp_diff_mean": 2e-7 + 1e-8 * rng.random(steps),
        "logp_diff_max": 3e-6 + 1e-6 * rng.random(steps),
    }
    columns["reward/outcome"] = columns["em"]
    columns["reward/total"] = columns["em"] + columns["reward/format"]
    for index in range(steps):
        line = {"step": index + 1, "spent_dollars": 0.0} | {
            key: float(column[index]) for key, column in columns.items()
        }
        line |= {f"calls/share/{name}": float(shares[i, index]) for i, name in enumerate(PRICES)}
        if (index + 1) % 20 == 0:
            for key in ("em", "dollars_per_question", "calls_per_question", "best_model_share"):
                line[f"val/{key}"] = line[key] * 1.03
        lines.append(line)
    lines[60]["grad_norm"] = None  # one step that was not finite
    return lines


def fake_table(em, questions, shares):
    """What `evaluation.aggregates` computes for one dataset, or for the mean over datasets."""
    keys = ("em", "f1", "sub_em", "malformed_share", "failed_share")
    values = dict.fromkeys(keys, em) | {"calls_per_question": 1.2, "call_seconds_per_question": 0.8}
    values |= {"dollars_per_question": 1.3e-5, "raw_cost_per_question": 11.2}
    return (
        values
        | {f"{key}_ci": [0.9 * value, 1.1 * value] for key, value in values.items()}
        | {
            "questions": questions,
            "calls_share": dict(zip(PRICES, shares, strict=True)),
            "stops": {"answer": 0.95, "call_limit": 0.05},
            "call_seconds": {"median": 0.4, "p95": 2.1},
        }
    )


def fake_results():
    def policy(name, step, em, f1, cost, best, two, malformed, shares):
        table = fake_table(em, 400, shares) | {
            "em_ci": [em - 0.044, em + 0.043],
            "f1": f1,
            "dollars_per_question": cost,
            "calls_per_question": 1.49,
            "malformed_share": malformed,
        }
        head = {"name": name, "checkpoint": step, "best_model_share": best, "two_hop_two_calls": two}
        return head | table | {"datasets": {"synthetic": table}, "paper": {}}

    signs = {"better": 220, "worse": 14, "equal": 166, "p": 3.4e-49}
    references = [
        ("oracle (alpha 0)", 0.842, 1.6e-5),
        ("oracle (alpha 0.6)", 0.801, 5.1e-6),
        ("random choice", 0.231, 2.5e-5),
    ]
    alone = [("Aria", 0.214, 3.1e-6), ("Boreal", 0.198, 2.4e-6), ("Corvid", 0.203, 9.3e-6), ("Dune", 0.221, 2.6e-6)]
    alone += [("Titan", 0.552, 6.3e-5)]
    return {
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "versions": {"python": "3.11.9", "jax": "0.10.2", "flax": "0.12.8", "router_r1_jax": "0.1.0"},
        "config_hash": "9f2c11aa40be",
        "seeds": {"train": 0, "world": 7, "bootstrap": 0},
        "price_date": "2025-05-01",
        "split": "test",
        "questions": 400,
        "policies": [
            policy("trained", 120, 0.753, 0.771, 1.24e-5, 0.891, 0.985, 0.0025, [0.3, 0.22, 0.17, 0.25, 0.06]),
            policy("warm start", 0, 0.2375, 0.262, 2.55e-5, 0.22, 0.97, 0.04, [0.21, 0.19, 0.2, 0.2, 0.2]),
        ],
        "reference_policies": [
            {"name": name, "em": em, "dollars_per_question": cost, "calls_per_question": 1.5}
            for name, em, cost in references + [(f"{name} alone", em, cost) for name, em, cost in alone]
        ],
        "paper_model": "Qwen2.5-3B-Instruct",
        "changes": [],
        "gain": dict.fromkeys(METRICS, {"mean": 0.5155, "ci": [0.4625, 0.568], "sign_test": signs})
        | {"dollars_per_question": {"mean": -1.31e-5, "ci": [-1.5e-5, -1.1e-5], "sign_test": signs}},
        "comparison": {},
    }


def fake_datasets(em=0.4):
    """What `evaluation.aggregates` computes for four datasets, three of them the paper's, and their mean."""
    rng = np.random.default_rng(3)

    def table(em, questions):
        return fake_table(em, questions, rng.dirichlet(np.ones(len(PRICES))))

    sizes = {"nq": 500, "popqa": 500, "bamboogle": 125, "synthetic": 490}
    datasets = {name: table(em + 0.1 * i, size) for i, (name, size) in enumerate(sizes.items())}
    paper = {
        name: {"em": 0.41, "difference": table["em"] - 0.41, "ci": [-0.06, 0.04], "verdict": verdict}
        for (name, table), verdict in zip(datasets.items(), ("within noise", "differs", "differs"), strict=False)
    }
    return table(em + 0.15, sum(sizes.values())) | {"datasets": datasets, "paper": paper}


def fake_episode(rng, number, policy, step, skill):
    """One- or two-hop episode whose every call is right with probability `skill`."""
    hops = 1 + number % 2
    response, calls, right = "", [], True
    for hop in range(hops):
        name = list(PRICES)[rng.integers(len(PRICES))]
        topic, entity = TOPICS[(number + hop) % len(TOPICS)], f"Kessan{number}"
        good = rng.random() < skill
        right &= good
        reply = f"Veltara{number + hop}" if good else "I do not know."
        tokens = int(rng.integers(4, 12))
        query = f"birthplace of {entity}?"
        response += f"<think> birthplace of {entity} : {topic} : {name} </think>\n<search> {name}: {query} </search>"
        response += f"\n\n<information> {reply} </information>\n\n"
        calls.append(
            {
                "model": name,
                "query": query,
                "reply": reply,
                "outcome": "ok",
                "completion_tokens": tokens,
                "charged": tokens * PRICES[name] / 1e6,
                "latency": 0.08 + 0.2 * rng.random(),
                "thought": "",
            }
        )
    answer = f"Veltara{number + hops - 1}" if right else "Ondo"
    response += f"<think> the reply says it </think>\n<answer> {answer} </answer>"
    return {
        "id": f"test-{number}",
        "dataset": "synthetic",
        "split": "test",
        "step": step,
        "policy": policy,
        "question": f"In which city was the lead singer of song {number} born?",
        "golds": [f"Veltara{number + hops - 1}"],
        "hops": hops,
        "response": response,
        "calls": calls,
        "reward": {"total": float(right), "format": 0.0, "outcome": float(right), "cost": 0.61},
        "exact_match": float(right),
        "f1": float(right),
        "dollars": sum(call["charged"] for call in calls),
        "faults": [],
        "stop": "answer",
    }


def write_run(workdir, questions=40):
    """Everything a finished run leaves, but the plots."""
    rng = np.random.default_rng(1)
    writer = MetricsWriter(workdir)
    for line in fake_metrics():
        writer.write(line["step"], {key: value for key, value in line.items() if key != "step"})
    writer.close()
    for policy, step, skill in (("warm start", 0, 0.3), ("trained", 120, 0.85)):
        episodes = (fake_episode(rng, number, policy, step, skill) for number in range(questions))
        write_episodes(workdir, policy.replace(" ", "_"), episodes)
    (workdir / "config.json").write_text(json.dumps({"seed": 0, "reward": {"alpha": 0.0, "preset": "official"}}))
