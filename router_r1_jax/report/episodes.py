"""Readable episodes for the report: which ones to show, and their HTML with every external character escaped."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import zip_longest
from typing import Any

from router_r1_jax.protocol import ANSWER, INFORMATION, SEARCH, THINK, parse_response
from router_r1_jax.report.style import dollars

Episode = Mapping[str, Any]

_COLUMNS = 3  # episodes of one question side by side
_LABELS = {THINK: "think", SEARCH: "route", INFORMATION: "reply", ANSWER: "answer", "text": "other"}


def choose_questions(episodes: Iterable[Episode], *, per_split: Mapping[str, int]) -> list[list[Episode]]:
    """A varied sample of questions, each with its episodes from the earliest checkpoint to the latest.

    Of one policy at one step a question keeps one episode, and at most three in all. Questions that more policies
    answered come first; among them hops and outcomes (right, wrong, improved, spoilt) take turns, so that a rare case
    is seen even in a large file.

    Args:
        episodes: records of episodes/*.jsonl.
        per_split: how many questions to take of each split, in the order in which the splits shall come.
    """
    questions: dict[tuple[str, str], dict[tuple[str, int], Episode]] = {}
    for episode in episodes:
        answers = questions.setdefault((str(episode.get("split")), str(episode.get("id"))), {})
        answers.setdefault((str(episode.get("policy")), episode.get("step") or 0), episode)
    chosen: list[list[Episode]] = []
    for split, limit in per_split.items():
        inside = [_thin(list(answers.values())) for (name, _), answers in questions.items() if name == split]
        compared = [question for width in range(_COLUMNS, 0, -1) for question in _take_turns(inside, width)]
        chosen.extend(compared[:limit])
    return chosen


def _take_turns(questions: Iterable[list[Episode]], width: int) -> list[list[Episode]]:
    """The questions that have `width` episodes, one of each kind in turn; those that training put right begin."""
    kinds: dict[tuple, list[list[Episode]]] = {}
    for question in questions:
        if len(question) == width:
            right = [is_right(episode) for episode in question]
            kinds.setdefault((not right[-1], *right, -int(question[0].get("hops") or 0)), []).append(question)
    turns = zip_longest(*(kinds[kind] for kind in sorted(kinds)))
    return [question for turn in turns for question in turn if question is not None]


def is_right(episode: Episode) -> bool:
    """Whether the answer matched a gold answer exactly."""
    return bool(episode.get("exact_match"))


def render_question(episodes: Sequence[Episode], colours: Mapping[str, str]) -> str:
    """One question with its gold answers and all its episodes; `colours` maps model names to CSS colours."""
    first = episodes[0]
    golds = " · ".join(escape(str(gold)) for gold in first.get("golds") or ())
    hops = first.get("hops") or "?"
    facts = f"{escape(str(first.get('split')))} · {escape(str(first.get('id')))} · {escape(str(hops))}-hop"
    change = f"{_verdict(episodes[0])}-{_verdict(episodes[-1])}" if len(episodes) > 1 else ""
    return (
        f'<article class="question" data-hops="{escape(str(hops))}" data-split="{escape(str(first.get("split")))}" '
        f'data-change="{change}"><h3>{escape(str(first.get("question")))}</h3>'
        f'<p class="facts"><span class="gold">gold: {golds}</span> {facts}</p>'
        f'<div class="episodes">{"".join(_render_episode(episode, colours) for episode in episodes)}</div></article>'
    )


def _thin(episodes: list[Episode]) -> list[Episode]:
    """At most three, by step: the first, the middle and the last."""
    ordered = sorted(episodes, key=lambda episode: episode.get("step") or 0)
    if len(ordered) <= _COLUMNS:
        return ordered
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def _verdict(episode: Episode) -> str:
    return "right" if is_right(episode) else "wrong"


def _render_episode(episode: Episode, colours: Mapping[str, str]) -> str:
    policy, verdict = escape(str(episode.get("policy"))), _verdict(episode)
    reward = episode.get("reward") or {}
    parts = " · ".join(f"{name} {_number(reward.get(name))}" for name in ("format", "outcome", "cost"))
    segments = parse_response(str(episode.get("response") or ""))
    body = "".join(_render_segment(segment.kind, segment.text, colours) for segment in segments)
    calls = "".join(_render_call(call, colours) for call in episode.get("calls") or ())
    return (
        f'<section class="episode {verdict}" data-policy="{policy}" data-verdict="{verdict}">'
        f'<header><b>{policy}</b> <span class="muted">step {escape(str(episode.get("step")))}</span>'
        f'<span class="verdict">{verdict}</span></header>'
        f'<p class="score">reward <b>{_number(reward.get("total"))}</b> · cost <b>{dollars(episode.get("dollars"))}</b>'
        f" · F1 {_number(episode.get('f1'))}</p>"
        f'<p class="score muted">{parts} · ended by {escape(str(episode.get("stop")))}</p>'
        f'<div class="response">{body}</div>'
        + (f'<ol class="calls">{calls}</ol>' if calls else '<p class="calls muted">no call</p>')
        + "</section>"
    )


def _render_segment(kind: str, text: str, colours: Mapping[str, str]) -> str:
    body = escape(text.strip())
    if kind == SEARCH:
        name, _, query = text.partition(":")
        if name.strip() in colours:
            body = f"{_model(name.strip(), colours)}: {escape(query.strip())}"
    return f'<div class="segment {kind}"><span class="tag">{_LABELS[kind]}</span><bdi>{body}</bdi></div>'


def _render_call(call: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    latency = call.get("latency")
    seconds = "–" if latency is None else f"{latency:.2f} s"
    return (
        f"<li>{_model(str(call.get('model')), colours)} "
        f'<span class="outcome">{escape(str(call.get("outcome")))}</span> '
        f"{escape(str(call.get('completion_tokens')))} tokens · {dollars(call.get('charged'))} · {seconds}</li>"
    )


def _model(name: str, colours: Mapping[str, str]) -> str:
    dot = f'<i class="dot" style="background:{colours[name]}"></i>' if name in colours else ""
    return f'<span class="model">{dot}{escape(name)}</span>'


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
