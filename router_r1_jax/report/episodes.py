"""Readable episodes for the report: which ones the page holds, and their data for the script that draws them.

The page draws a question when a reader comes to it. Its data stand in a block of JSON in which no character means
anything to HTML, and the script puts them into the page as text, never as markup.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from router_r1_jax.protocol import parse_response

Episode = Mapping[str, Any]

MOST_BYTES = 24_000_000  # of episodes in a page; a browser reads that much in about a second
TRAINING_BYTES = 2_000_000  # of it, for what training has left; the rest is for evaluations
TRAINING = ("train", "validation")


class Packed(NamedTuple):
    """The data block, and how many of the episodes are in it."""

    data: str
    shown: int
    total: int


def pack(
    episodes: Sequence[Episode], colours: Mapping[str, str], order: Sequence[str] = (), *, most_bytes: int = MOST_BYTES
) -> Packed:
    """JSON of the episodes, question by question, evaluated ones first, for a <script type="application/json">.

    Where there are too many, sets and outcomes take turns, so that a rare case is kept even of a large file; questions
    that more policies answered come first.

    Args:
        episodes: records of episodes/*.jsonl.
        colours: model name -> CSS colour.
        order: policies that come first, in this order: the page opens with the first two.
        most_bytes: room for all of them; training episodes get at most TRAINING_BYTES of it.
    """
    groups: dict[tuple[bool, str, str, str], list[Episode]] = {}
    for episode in episodes:
        split = str(episode.get("split"))
        key = (split in TRAINING, split, str(episode.get("suite") or ""), str(episode.get("id")))
        groups.setdefault(key, []).append(episode)
    met = dict.fromkeys(str(episode.get("policy")) for own in _by_place(groups) for episode in own)
    names = [*(name for name in order if name in met), *(name for name in met if name not in order)]
    left, shown, packed = most_bytes, 0, []
    for training in (False, True):
        left = min(left, TRAINING_BYTES) if training else left
        for own in _take_turns((own for key, own in groups.items() if key[0] == training), names):
            text = json.dumps(_question(own, names), separators=(",", ":"))
            if (left := left - len(text)) < 0:
                break
            packed.append(text)
            shown += len(own)
    head = json.dumps({"policies": names, "colours": list(colours.items())}, separators=(",", ":"))
    data = f'{head[:-1]},"questions":[{",".join(packed)}]}}'
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return Packed(data, shown, len(episodes))


def is_right(episode: Episode) -> bool:
    """Whether the answer matched a gold answer exactly."""
    return bool(episode.get("exact_match"))


def _by_place(groups: Mapping[tuple, list[Episode]]) -> Iterator[list[Episode]]:
    """Evaluated questions before those of training: their policies come first in every list."""
    return (groups[key] for key in sorted(groups, key=lambda key: key[0]))


def _take_turns(questions: Iterable[list[Episode]], names: Sequence[str]) -> list[list[Episode]]:
    """One question of each kind in turn; those that the most policies answered begin, of them those that part them."""
    widths: dict[int, dict[tuple, list[list[Episode]]]] = {}  # policies that answered -> kind -> questions
    for own in questions:
        first: dict[str, bool] = {}
        for episode in own:
            first.setdefault(str(episode.get("policy")), is_right(episode))
        wrong = tuple(not first[name] for name in names if name in first)
        kind = (len(set(wrong[:2])) == 1, wrong, str(own[0].get("suite") or ""), str(own[0].get("split")))
        widths.setdefault(len(first), {}).setdefault(kind, []).append(own)
    turns = [zip_longest(*(own for _, own in sorted(kinds.items()))) for _, kinds in sorted(widths.items())]
    return [own for width in reversed(turns) for turn in width for own in turn if own is not None]


def _question(episodes: Sequence[Episode], names: Sequence[str]) -> dict[str, Any]:
    """One question with all its episodes, by step."""
    first = episodes[0]
    ordered = sorted(episodes, key=lambda episode: episode.get("step") or 0)
    return {
        "id": str(first.get("id")),
        "set": str(first.get("suite") or ""),
        "split": str(first.get("split")),
        "hops": first.get("hops"),
        "question": str(first.get("question")),
        "golds": [str(gold) for gold in first.get("golds") or ()],
        "episodes": [_episode(episode, names.index(str(episode.get("policy")))) for episode in ordered],
    }


def _episode(episode: Episode, policy: int) -> dict[str, Any]:
    reward = episode.get("reward") or {}
    segments = parse_response(str(episode.get("response") or ""))
    return {
        "policy": policy,
        "step": episode.get("step"),
        "right": int(is_right(episode)),
        "f1": _rounded(episode.get("f1")),
        "stop": str(episode.get("stop")),
        "dollars": episode.get("dollars"),
        "reward": [_rounded(reward.get(part)) for part in ("total", "format", "outcome", "cost")],
        "faults": [str(fault) for fault in episode.get("faults") or ()],
        "segments": [[segment.kind, segment.text.strip()] for segment in segments],
        "calls": [
            [
                str(call.get("model") or ""), str(call.get("outcome")), call.get("completion_tokens"),
                call.get("charged"), _rounded(call.get("latency")),
            ]
            for call in episode.get("calls") or ()
        ],
    }  # fmt: skip


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
