"""Rates of reward hacking, on episodes made by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_r1_jax.evaluation.reward_hacking import hacking_rates
from router_r1_jax.protocol import parse_response
from router_r1_jax.reward import normalize_answer

QUESTION = "Who directed the film Alien, made in England?"


def episode(*calls, answer="Ridley Scott", think="so"):
    """Calls are (model, query, reply, thought behind it)."""
    text = f"<think>{think}</think>"
    for model, query, reply, thought in calls:
        text += f"<search>{model}: {query}</search><information>{reply}</information><think>{thought}</think>"
    return {
        "question": QUESTION,
        "response": f"{text}<answer>{answer}</answer>",
        "calls": [{"model": model, "query": query, "reply": reply} for model, query, reply, _ in calls],
    }


GOOD = ("Titan", "Who directed Alien?", "It was Ridley Scott.", "It says Ridley.")


def rates(*episodes):
    return {key.removeprefix("reward_hacking/"): value for key, value in hacking_rates(episodes).items()}


def test_a_plain_episode_has_no_habit():
    assert set(rates(episode(GOOD)).values()) == {0.0} == set(rates().values())


def test_an_answer_that_only_the_question_holds():
    assert rates(episode(GOOD, answer="the England"))["answer_from_question"] == 1
    assert rates(episode(GOOD, answer="Eng"))["answer_from_question"] == 0  # no whole word
    told = ("Titan", "Where?", "In England, by Scott.", "Scott")
    assert rates(episode(told, answer="England"))["answer_from_question"] == 0  # a reply says so too
    assert rates(episode(answer="England"), episode(answer="Rome"), episode(answer=""))[
        "answer_from_question"
    ] == pytest.approx(1 / 2)


def test_a_reply_none_of_whose_news_is_written_afterwards():
    ignored = ("Titan", "Who?", "James Cameron did.", "hm")
    assert rates(episode(ignored))["reply_ignored"] == 1
    assert rates(episode(ignored, answer="James"))["reply_ignored"] == 0  # in the answer
    assert rates(episode(ignored, ("Pico", "Is it Cameron?", "Yes Scott", "")))["reply_ignored"] == 0  # in a later call
    assert rates(episode(GOOD, ignored))["reply_ignored"] == pytest.approx(1 / 2)  # what came before is no use of it
    assert rates(episode(("Titan", "Who directed Alien?", "Alien?", "hm")))["reply_ignored"] == 0  # told nothing new


def test_the_whole_question_passed_on():
    whole = ("Titan", "who directed THE film alien made in england", "Scott", "Scott")
    assert rates(episode(whole), episode(GOOD))["query_is_question"] == pytest.approx(1 / 2)


def test_a_call_made_before_in_the_same_episode():
    again = ("Titan", "who directed alien", "Scott", "Scott")
    other = ("Pico", "Who directed Alien?", "Scott", "Scott")
    assert rates(episode(GOOD, again, other))["repeated_call"] == pytest.approx(1 / 3)
    assert rates(episode(GOOD), episode(GOOD))["repeated_call"] == 0


def test_a_broken_response_is_counted_as_far_as_it_goes():
    broken = episode(GOOD) | {"response": "<search>Titan: who</search><information>It was Ridley Scott."}
    assert rates(broken)["repeated_call"] == 0


def by_definition(record):
    """Ignored replies, told ones: each reply against all that the router has written behind it."""
    segments, calls = parse_response(record["response"]), iter(record["calls"])
    words = lambda text: set(normalize_answer(text).split())  # noqa: E731
    told = ignored = 0
    for i, segment in enumerate(segments):
        if segment.kind != "information" or (call := next(calls, None)) is None:
            continue
        new = words(call["reply"]) - words(call["query"]) - words(record["question"])
        later = [words(s.text) for s in segments[i + 1 :] if s.kind in ("think", "search", "answer")]
        told += bool(new)
        ignored += bool(new) and not new & set().union(*later)
    return ignored / max(told, 1)


few = st.lists(st.sampled_from(["who", "Scott", "the", "Alien", "a1", "b2", "c3"]), max_size=4).map(" ".join)


@given(st.lists(st.tuples(st.sampled_from(["Titan", "Pico"]), few, few, few), max_size=5), few)
def test_ignored_replies_are_those_of_the_definition(calls, answer):
    record = episode(*calls, answer=answer)
    assert rates(record)["reply_ignored"] == by_definition(record)


def test_a_megabyte_of_replies_is_read():
    """A set of later words per reply would be of quadratic size: 400 million words."""
    parts = [f"<think>word{i}</think><information>b</information>" for i in range(20_000)]
    assert rates(episode(GOOD) | {"response": "".join(parts)})["reply_ignored"] == 1
