"""Watches for episodes that earn their reward without routing: habits that a rising reward can hide.

All of it reads records (`evaluation.records`); comparisons are of words, normalised as answers are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from router_r1_jax.protocol import ANSWER, INFORMATION, SEARCH, THINK, parse_response
from router_r1_jax.reward import extract_answer, normalize_answer

Record = Mapping[str, Any]


def hacking_rates(records: Sequence[Record]) -> dict[str, float]:
    """Shares of episodes or calls with a habit, 0 where there is nothing to count.

    Keys:
      watch/answer_from_question: of the answers, those whose words stand in the question and in no reply.
      watch/reply_ignored: of the replies that told something new, those of whose new words none is written afterwards.
      watch/query_is_question: of the calls, those that pass on the whole question.
      watch/repeated_call: of the calls, those that an episode made before, to the same model in the same words.
    """
    answered, copied, told, ignored, calls, passed_on, repeated = 0, 0, 0, 0, 0, 0, 0
    for record in records:
        question = _padded(record["question"])
        answer = normalize_answer(extract_answer(record["response"]) or "")
        if answer:
            answered += 1
            replies = (_padded(call["reply"]) for call in record["calls"])
            copied += f" {answer} " in question and not any(f" {answer} " in reply for reply in replies)
        before: set[tuple[str, str]] = set()
        replied_at, last_written = _places(record["response"])
        for call, at in zip(record["calls"], replied_at, strict=False):
            new = set(_words(call["reply"])) - set(_words(call["query"])) - set(_words(record["question"]))
            told += bool(new)
            ignored += bool(new) and not any(last_written.get(word, -1) > at for word in new)
        for call in record["calls"]:
            calls += 1
            query = _padded(call["query"])
            passed_on += query == question
            repeated += (call["model"], query) in before
            before.add((call["model"], query))
    return {
        "watch/answer_from_question": copied / max(answered, 1),
        "watch/reply_ignored": ignored / max(told, 1),
        "watch/query_is_question": passed_on / max(calls, 1),
        "watch/repeated_call": repeated / max(calls, 1),
    }


def _places(response: str) -> tuple[list[int], dict[str, int]]:
    """Segment numbers: of each reply, and for each word of the last one in which the router itself has written it, be
    it in a thought, a call or an answer."""
    replied_at, last_written = [], {}
    for i, segment in enumerate(parse_response(response)):
        if segment.kind == INFORMATION:
            replied_at.append(i)
        elif segment.kind in (THINK, SEARCH, ANSWER):
            last_written |= dict.fromkeys(_words(segment.text), i)
    return replied_at, last_written


def _words(text: str) -> list[str]:
    return normalize_answer(text).split()


def _padded(text: str) -> str:
    """Normalised, with a blank at both ends, so that whole words can be looked for."""
    return f" {normalize_answer(text)} "
