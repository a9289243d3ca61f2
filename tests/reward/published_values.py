"""What the published reward gives for texts, costs and whole responses, and the names of its models."""

import json
from pathlib import Path
from typing import Any


def _read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(__file__).parents[1] / "vectors" / name).open(encoding="utf-8")]


ANSWERS, COSTS, FORMATS, REWARDS = (_read(f"{kind}.jsonl") for kind in ("answers", "cost", "format", "reward"))
NAMES = [
    "Qwen2.5-7B-Instruct",
    "LLaMA-3.1-70B-Instruct",
    "LLaMA-3.1-8B-Instruct",
    "Mistral-7B-Instruct",
    "Mixtral-8x22B-Instruct",
    "Gemma-2-27B-Instruct",
]
