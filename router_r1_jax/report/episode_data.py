"""Episode browser of the report page: selection of episodes by size, and their JSON for the page's script.

The script draws a question when a reader opens it. The data stand in a block of JSON without a character that means
anything to HTML, and the script puts them into the page as text, never as markup.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from router_r1_jax.protocol import parse_response

Episode = Mapping[str, Any]

MOST_BYTES = 24_000_000  # of all episodes in a page: a browser reads that much in about a second
TRAINING_BYTES = 2_000_000  # of the episodes that training wrote; the rest is for evaluations
TRAINING_SPLITS = ("train", "validation")


class EpisodeData(NamedTuple):
    """The JSON block, the number of episodes in it, and the number of all episodes."""

    json: str
    shown: int
    total: int


def pack_episodes(
    episodes: Sequence[Episode], colours: Mapping[str, str], order: Sequence[str] = (), *, most_bytes: int = MOST_BYTES
) -> EpisodeData:
    """JSON of the episodes, question by question, for a <script type="application/json">.

    Questions of evaluations come before questions of training. Questions that more policies answered come first. If
    there are too many, datasets and outcomes take turns, so that the page keeps rare cases of a large file.

    Args:
        episodes: records of episodes/*.jsonl.
        colours: model name -> CSS colour.
        order: names of the first policies; the page opens with the first two.
        most_bytes: size of all episodes; those of training get at most TRAINING_BYTES of it.
    """
    groups: dict[bool, dict[tuple[str, str, str], list[Episode]]] = {False: {}, True: {}}
    for episode in episodes:
        question = (episode["split"], episode["dataset"], episode["id"])
        groups[episode["split"] in TRAINING_SPLITS].setdefault(question, []).append(episode)
    found = [e["policy"] for questions in groups.values() for group in questions.values() for e in group]
    policies = list(dict.fromkeys([*(name for name in order if name in found), *found]))
    left, shown, packed = most_bytes, 0, []
    for training, questions in groups.items():
        left = min(left, TRAINING_BYTES) if training else left
        for group in _take_turns(questions.values(), policies):
            text = json.dumps(_question(group, policies), separators=(",", ":"))
            if (left := left - len(text)) < 0:
                break
            packed.append(text)
            shown += len(group)
    head = json.dumps({"policies": policies, "colours": list(colours.items())}, separators=(",", ":"))
    data = f'{head[:-1]},"questions":[{",".join(packed)}]}}'
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return EpisodeData(data, shown, len(episodes))


def _take_turns(questions: Iterable[list[Episode]], policies: Sequence[str]) -> list[list[Episode]]:
    """One question of each kind in turn. Kinds that more policies answered, or on which the first two differ, lead."""
    kinds: dict[int, dict[tuple, list[list[Episode]]]] = defaultdict(lambda: defaultdict(list))
    for group in questions:
        first_right: dict[str, bool] = {}
        for episode in group:
            first_right.setdefault(episode["policy"], bool(episode["exact_match"]))
        wrong = tuple(not first_right[name] for name in policies if name in first_right)
        same = len(set(wrong[:2])) == 1
        kind = (same, wrong, group[0]["dataset"], group[0]["split"])
        kinds[len(first_right)][kind].append(group)
    turns = [zip_longest(*(groups for _, groups in sorted(kinds[count].items()))) for count in sorted(kinds)[::-1]]
    return [group for rounds in turns for turn in rounds for group in turn if group is not None]


def _question(episodes: Sequence[Episode], policies: Sequence[str]) -> dict[str, Any]:
    """One question with all its episodes, ordered by step."""
    ordered = sorted(episodes, key=lambda episode: episode["step"])
    return {key: episodes[0][key] for key in ("id", "dataset", "split", "hops", "question", "golds")} | {
        "episodes": [_episode(episode, policies.index(episode["policy"])) for episode in ordered],
    }


def _episode(episode: Episode, policy: int) -> dict[str, Any]:
    return {key: episode[key] for key in ("step", "stop", "dollars", "faults")} | {
        "policy": policy,
        "right": int(episode["exact_match"]),
        "f1": round(episode["f1"], 3),
        "reward": [round(episode["reward"][part], 3) for part in ("total", "format", "outcome", "cost")],
        "segments": [[segment.kind, segment.text.strip()] for segment in parse_response(episode["response"])],
        "calls": [_call(call) for call in episode["calls"]],
    }


def _call(call: Mapping[str, Any]) -> list[Any]:
    kept = [call[key] for key in ("model", "outcome", "completion_tokens", "charged")]
    return [*kept, round(call["latency"], 3), call.get("thought", "")]  # older files have no thoughts
