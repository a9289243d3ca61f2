"""Time of the reward: 10,000 episodes of 2,000 characters, and megabytes of hostile text.

Training scores every episode of every step with `reward.score`, so it must take little time, and no text may make it
slow. An episode holds thoughts, two calls, replies and an answer; the preset is `official`.

    python experiments/bench_reward.py

The last line is one JSON object: `seconds_10k` (aim: at most 2 on one core), `chars_per_s`, and `worst_megabyte_s`, the
longest time for one hostile response of a megabyte; `hostile` has each of them.

Result, 26 November 2026, one core of an AMD EPYC, Python 3.11: 0.51 s for 10,000 episodes, 0.25 s for the worst
megabyte. (The day before, in a slower hour of the same kind of machine: 1.52 s and 0.65 s.)
"""

import json
import statistics
import time

import numpy as np

from router_r1_jax.reward import CostNormalizer, score

EPISODES, LENGTH, MEGABYTE = 10_000, 2_000, 1_000_000
NAMES = ("Qwen2.5-7B-Instruct", "LLaMA-3.1-70B-Instruct", "Mixtral-8x22B-Instruct")
HOSTILE = (
    "<think>",
    "</think>",
    "<think></",
    "<answer></answer>",
    "<search>:</search>",
    "<search>a:b</search><information>",
    ":",
    " ",
    "<",
    "the ",
    "\u200b",
    "Qwen2.5-7B-Instruct:",
)


def make_response(rng: np.random.Generator) -> str:
    """Two calls and an answer, LENGTH characters."""

    def words(n: int) -> str:
        return " ".join("".join(map(chr, rng.integers(97, 123, 5))) for _ in range(n))

    text = f"<think>{words(40)}</think>"
    for _ in range(2):
        name = NAMES[rng.integers(len(NAMES))]
        text += f"<search>{name}: {words(12)}?</search><information>{words(60)}</information><think>{words(30)}</think>"
    tail = f"<think></think><answer>{words(3)}</answer>"
    return text + tail.replace("<think>", "<think>" + "x" * (LENGTH - len(text) - len(tail)))


def seconds(responses: list[str]) -> float:
    golds, costs = [["abcde fghij"]] * len(responses), np.linspace(0, 500, len(responses))
    start = time.perf_counter()
    score(responses, golds, costs, NAMES, preset="official", alpha=0.5, metric="f1", normalizer=CostNormalizer())
    return time.perf_counter() - start


def main() -> None:
    rng = np.random.default_rng(0)
    responses = [make_response(rng) for _ in range(EPISODES)]
    assert {len(response) for response in responses} == {LENGTH}
    taken = statistics.median(seconds(responses) for _ in range(5))
    hostile = {piece: round(seconds([piece * (MEGABYTE // len(piece))]), 3) for piece in HOSTILE}
    for piece, value in hostile.items():
        print(f"{value:8.3f} s for a megabyte of {piece!r}")
    print(
        json.dumps(
            {
                "seconds_10k": round(taken, 3),
                "chars_per_s": round(EPISODES * LENGTH / taken),
                "worst_megabyte_s": max(hostile.values()),
                "hostile": hostile,
            }
        )
    )


if __name__ == "__main__":
    main()
