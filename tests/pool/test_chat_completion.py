"""How answers are read that differ from the OpenAI reference; each case is the form of a public bug report or of a
provider's own documentation, with the value that a reader of it expects."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_r1_jax.pool.chat_completion import read_completion, read_error
from router_r1_jax.pool.outcomes import Outcome

USAGE = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}


def answer(content="Paris", *, finish="stop", usage=USAGE, choice=(), message=(), **fields):
    said = {"role": "assistant", "content": content} | dict(message)
    choice = {"index": 0, "message": said, "finish_reason": finish} | dict(choice)
    return json.dumps({"id": "x", "choices": [choice], "usage": usage} | fields).encode()


def stream(*chunks, end="data: [DONE]\n\n"):
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks).encode() + end.encode()


def delta(text=None, *, finish=None, **fields):
    return {"choices": [{"index": 0, "delta": {"content": text} | fields, "finish_reason": finish}]}


def read(content, request_size=40):
    return read_completion(content, request_size)[0]


@pytest.mark.parametrize(
    ("content", "text", "thought"),
    [
        ([{"type": "text", "text": "Os"}, {"type": "text", "text": "lo"}], "Oslo", ""),
        (["Os", {"text": "lo"}], "Oslo", ""),
        ({"type": "text", "text": "Oslo"}, "Oslo", ""),
        ([{"type": "text", "text": {"value": "Oslo", "annotations": []}}], "Oslo", ""),
        ([{"type": "thinking", "thinking": "north"}, {"type": "text", "text": "Oslo"}], "Oslo", "north"),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "north"}]}, "Oslo"], "Oslo", "north"),
        ([{"type": "reasoning", "text": "north"}, {"type": "output_text", "text": "Oslo"}], "Oslo", "north"),
        ([{"type": "redacted_thinking", "data": "Zm9v"}, {"type": "text", "text": "Oslo"}], "Oslo", ""),
        ([], "", ""),
    ],
)
def test_parts_are_joined_and_thinking_parts_kept_apart(content, text, thought):
    got = read(answer(content))
    assert (got.text, got.thought) == (text, thought)
    assert got.outcome == (Outcome.OK if text else Outcome.EMPTY)


@pytest.mark.parametrize(
    ("content", "text", "thought"),
    [
        ("<think>\nRome?\n</think>\n\nParis", "Paris", "Rome?"),
        ("<THINK>Rome?</THINK>Paris", "Paris", "Rome?"),
        ("<Reasoning>Rome?</reasoning> Paris", "Paris", "Rome?"),
        ("<thinking>Rome?</thinking>Paris", "Paris", "Rome?"),
        ("\n<think>\n\n</think>\n\nParis", "Paris", ""),
        ("Rome? No.</think>Paris", "Paris", "Rome? No."),
        ("Rome? No. </reasoning> Paris", "Paris", "Rome? No."),
        ('<think>Rome?</think>"Paris"', '"Paris"', "Rome?"),
        ("<think>a</think>Par<think>b</think>is", "Paris", "a\n\nb"),
        ("Let me see. <think>Rome?</think> Paris", "Let me see.  Paris", "Rome?"),
        ("<think>I use `</think>` here</think>Paris", "Paris", "I use `</think>` here"),
        ("<think>```\ncode</think>Paris", "Paris", "```\ncode"),
        ("<think>the <reasoning> tag</think>Paris", "Paris", "the <reasoning> tag"),
        ("<think>Rome? Let me", "", "Rome? Let me"),
        ("Write `</think>` to end it.", "Write `</think>` to end it.", ""),
        ("Use `<think>` and `</think>`.", "Use `<think>` and `</think>`.", ""),
        ("```xml\n<think>x</think>\n```", "```xml\n<think>x</think>\n```", ""),
        ("The tag <think> opens it.", "The tag <think> opens it.", ""),
        ("I think </b> so", "I think </b> so", ""),
    ],
)
def test_an_inline_thought_is_taken_off(content, text, thought):
    got = read(answer(content))
    assert (got.text, got.thought, got.completion_tokens) == (text, thought, 20)


def test_a_second_thought_that_was_cut_is_taken_off_too():
    got = read(answer("Paris. <think>Or is it", finish="length"))
    assert (got.text, got.outcome, got.thought) == ("Paris.", Outcome.TRUNCATED, "Or is it")


@given(st.lists(st.sampled_from(["<think>", "</think>", "<reasoning>", "</Reasoning>", "q", "`", "```", "\n", '"'])))
def test_taking_thoughts_off_loses_no_letter(pieces):
    text = "".join(pieces)
    got = read(answer(text))
    assert got.text.count("q") + got.thought.count("q") == text.count("q")


def test_taking_thoughts_off_takes_linear_time():
    started = time.process_time()
    for text in ("<think></think>" * 100_000, "</think>" * 200_000, "<think>" * 200_000, "```<think>" * 100_000):
        read(answer("x" + text))
    assert time.process_time() - started < 20  # quadratic time would be hours


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_a_thought_beside_the_text_is_kept(field):
    got = read(answer("Paris", message={field: "Rome?"}))
    assert (got.text, got.thought) == ("Paris", "Rome?")


@pytest.mark.parametrize(
    ("finish", "outcome"),
    [
        ("stop", Outcome.OK),
        ("STOP", Outcome.OK),
        ("eos", Outcome.OK),
        ("end_turn", Outcome.OK),
        (None, Outcome.OK),
        ("length", Outcome.TRUNCATED),
        ("MAX_TOKENS", Outcome.TRUNCATED),
        ("FinishReason.MAX_TOKENS", Outcome.TRUNCATED),
        ("FINISH_REASON_MAX_TOKENS", Outcome.TRUNCATED),
        ("model_length", Outcome.TRUNCATED),
        ("content_filter", Outcome.REFUSED),
        ("SAFETY", Outcome.REFUSED),
        ("PROHIBITED_CONTENT", Outcome.REFUSED),
        ("sensitive", Outcome.REFUSED),
        ("error", Outcome.UNAVAILABLE),
        ("insufficient_system_resource", Outcome.UNAVAILABLE),
        ("abort", Outcome.UNAVAILABLE),
    ],
)
def test_finish_reasons_in_all_spellings(finish, outcome):
    completion, retry = read_completion(answer(finish=finish), 40)
    assert (completion.outcome, retry) == (outcome, outcome == Outcome.UNAVAILABLE)


def test_a_filter_that_leaves_the_message_out_refuses():
    body = {"choices": [{"index": 0, "finish_reason": "content_filter", "content_filter_results": {}}], "usage": USAGE}
    assert read(json.dumps(body).encode()).outcome == Outcome.REFUSED


@pytest.mark.parametrize(
    ("usage", "counts", "estimated"),
    [
        (USAGE, (10, 20, 0), False),
        ({"input_tokens": 7, "output_tokens": 3}, (7, 3, 0), False),
        ({"prompt_tokens": "7", "completion_tokens": 3.0}, (7, 3, 0), False),
        (None, (10, 2, 0), True),
        ({}, (10, 2, 0), True),
        ({"prompt_tokens": 0, "completion_tokens": 0}, (10, 2, 0), True),
        ({"prompt_tokens": 5, "completion_tokens": -1}, (5, 2, 0), True),
        ({"prompt_tokens": -5, "completion_tokens": 1}, (10, 1, 0), True),
        ({"prompt_tokens": 5, "completion_tokens": 10**400}, (5, 2, 0), True),
        ({"prompt_tokens": 5, "completion_tokens": "many"}, (5, 2, 0), True),
        # Reasoning beside the completion (the total shows it), and within it.
        (
            {**USAGE, "total_tokens": 37, "completion_tokens_details": {"reasoning_tokens": 7}},
            (10, 27, 0),
            False,
        ),
        ({**USAGE, "completion_tokens_details": {"reasoning_tokens": 7}}, (10, 20, 0), False),
        ({**USAGE, "total_tokens": 37, "reasoning_tokens": 7}, (10, 27, 0), False),
        (
            {"input_tokens": 10, "output_tokens": 20, "output_tokens_details": {"reasoning_tokens": 7}},
            (10, 20, 0),
            False,
        ),
        ({**USAGE, "prompt_tokens_details": {"cached_tokens": 4}}, (10, 20, 4), False),
        ({**USAGE, "prompt_tokens_details": None, "prompt_cache_hit_tokens": 4}, (10, 20, 4), False),
        ({**USAGE, "cached_tokens": 4}, (10, 20, 4), False),
        ({**USAGE, "cached_tokens": 400}, (10, 20, 10), False),
        ({**USAGE, "cached_tokens": -4}, (10, 20, 0), False),
    ],
)
def test_tokens_under_all_names_and_no_call_is_free(usage, counts, estimated):
    got = read(answer(usage=usage))  # "Paris": two tokens as estimated; the request of 40 bytes: ten
    assert (got.prompt_tokens, got.completion_tokens, got.cached_tokens) == counts
    assert (got.outcome, got.estimated) == (Outcome.OK, estimated)


def test_an_empty_answer_costs_what_the_provider_counts():
    got = read(answer("", usage={"prompt_tokens": 10, "completion_tokens": 0}))
    assert (got.outcome, got.completion_tokens, got.estimated) == (Outcome.EMPTY, 0, False)


@pytest.mark.parametrize(
    ("body", "outcome", "retry", "words"),
    [
        ({"error": {"message": "no credits", "code": 402}}, Outcome.BAD_REQUEST, False, "no credits"),
        ({"error": {"message": "bad key", "code": "401"}}, Outcome.BAD_REQUEST, False, "bad key"),
        ({"error": {"message": "bad key", "code": "invalid_api_key"}}, Outcome.BAD_REQUEST, False, "bad key"),
        ({"error": {"message": "no", "type": "invalid_request_error", "code": None}}, Outcome.BAD_REQUEST, False, "no"),
        ({"error": {"message": "slow", "code": 429}}, Outcome.RATE_LIMITED, True, "slow"),
        ({"error": {"message": "slow", "status": "RESOURCE_EXHAUSTED"}}, Outcome.RATE_LIMITED, True, "slow"),
        ({"error": {"message": "late", "code": 408}}, Outcome.TIMEOUT, True, "late"),
        ({"error": {"message": "down", "code": 524}}, Outcome.UNAVAILABLE, True, "down"),
        ({"error": {"message": "down"}}, Outcome.UNAVAILABLE, True, "down"),
        ({"error": "loading"}, Outcome.UNAVAILABLE, True, "loading"),
        ({"error": ["a", {"message": "b"}]}, Outcome.UNAVAILABLE, True, "a; b"),
        ([{"error": {"code": 403, "message": "no access"}}], Outcome.BAD_REQUEST, False, "no access"),
        ({"object": "error", "message": "too long", "code": 400}, Outcome.BAD_REQUEST, False, "too long"),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "o"}}, Outcome.UNAVAILABLE, True, "o"),
        (
            {"error": {"code": 403, "message": "flagged", "metadata": {"reasons": ["violence"]}}},
            Outcome.REFUSED,
            False,
            "flagged",
        ),
        (
            {"error": {"code": 502, "message": "Provider error", "metadata": {"raw": "upstream said no"}}},
            Outcome.UNAVAILABLE,
            True,
            "Provider error: upstream said no",
        ),
        ({"detail": "Not ready"}, Outcome.UNAVAILABLE, True, "Not ready"),
        ({"choices": [{"error": {"code": 502, "message": "cut"}}]}, Outcome.UNAVAILABLE, True, "cut"),
        ({"choices": []}, Outcome.UNAVAILABLE, True, "not a chat completion"),
    ],
)
def test_an_error_with_status_200_is_what_its_code_says(body, outcome, retry, words):
    completion, again = read_completion(json.dumps(body).encode(), 40)
    assert (completion.outcome, again, completion.error) == (outcome, retry, f"HTTP 200, but {words}")
    assert completion.completion_tokens == 0


@pytest.mark.parametrize("thought", [None, {"summary": "x"}, 3, ["x"]])
def test_a_thought_that_is_no_text_is_no_reason_to_ask_again(thought):
    completion, retry = read_completion(answer(message={"reasoning": thought}), 40)
    assert (completion.text, completion.thought, retry) == ("Paris", "", False)


def test_an_error_that_is_null_is_none():
    assert read(answer(error=None)).outcome == Outcome.OK


def test_tokens_of_an_answer_that_ended_in_an_error_are_wasted_and_not_charged():
    got = read(answer("The capital of", choice={"finish_reason": "error", "error": {"code": 502, "message": "gone"}}))
    assert (got.text, got.prompt_tokens, got.completion_tokens) == ("", 0, 0)
    assert (got.wasted_prompt_tokens, got.wasted_completion_tokens) == (10, 20)


@pytest.mark.parametrize(
    ("status", "content", "outcome", "error"),
    [
        (400, b'{"detail": "no such\\nmodel"}', Outcome.BAD_REQUEST, "HTTP 400: no such model"),
        (422, b'{"detail": [{"loc": ["body"], "msg": "field required"}]}', Outcome.BAD_REQUEST, "field required"),
        (404, b"model not found", Outcome.BAD_REQUEST, "HTTP 404: model not found"),
        (502, b"<html><head><TITLE>502 Bad\nGateway</TITLE>", Outcome.UNAVAILABLE, "HTTP 502: 502 Bad Gateway"),
        (500, b"<html>oops</html>", Outcome.UNAVAILABLE, "HTTP 500"),
        (500, b"", Outcome.UNAVAILABLE, "HTTP 500"),
        (429, b'{"error": {"code": "insufficient_quota", "message": "pay"}}', Outcome.RATE_LIMITED, "HTTP 429: pay"),
        (403, b'{"error": {"message": "flagged", "metadata": {"flagged_input": "x"}}}', Outcome.REFUSED, "flagged"),
        (403, b'{"error": {"message": "no access"}}', Outcome.BAD_REQUEST, "no access"),
        (400, b'{"error": {"code": "content_filter", "message": "m"}}', Outcome.REFUSED, "HTTP 400: m"),
        (503, b'{"message": "busy"}', Outcome.UNAVAILABLE, "busy"),
    ],
)
def test_the_servers_own_words_are_quoted(status, content, outcome, error):
    completion, retry = read_error(status, content)
    assert completion.outcome == outcome and completion.error.endswith(error)
    assert retry == (status >= 500 or status == 429)


def test_an_event_stream_is_put_together():
    usage = {"prompt_tokens": 4, "completion_tokens": 2}
    content = stream(
        delta("", role="assistant"),
        delta(None, reasoning_content="north"),
        delta("Os"),
        delta("lo", finish="stop") | {"model": "m-1"},
        {"choices": [], "usage": usage},
    )
    got = read(b": keep-alive\r\n\r\n" + content)
    assert (got.text, got.thought, got.outcome, got.served) == ("Oslo", "north", Outcome.OK, "m-1")
    assert (got.prompt_tokens, got.completion_tokens, got.estimated) == (4, 2, False)


def test_an_event_over_several_lines_and_without_a_space_is_read():
    content = b'event: message\ndata:{"choices": [{"delta": {"content": "Oslo"},\ndata:"finish_reason": "length"}]}\n\n'
    assert (read(content).text, read(content).outcome) == ("Oslo", Outcome.TRUNCATED)


def test_what_a_stream_holds_beside_chunks_is_passed_over():
    content = stream(None, delta("Os", refusal=None, reasoning={"effort": "low"}), "ping", delta("lo", finish="stop"))
    assert (read(content).text, read(content).outcome) == ("Oslo", Outcome.OK)


def test_a_stream_that_ends_with_done_alone_is_whole():
    assert read(stream(delta("Oslo"))).outcome == Outcome.OK


@pytest.mark.parametrize("content", [stream(delta("Os"), end=""), stream(delta("Os"), end='data: {"choi')])
def test_a_stream_that_breaks_off_is_no_answer(content):
    completion, retry = read_completion(content, 40)
    assert (completion.outcome, retry) == (Outcome.UNAVAILABLE, True)
    assert completion.error == "HTTP 200, but an event stream that breaks off"


def test_an_error_in_a_stream_is_what_its_code_says():
    completion, retry = read_completion(stream(delta("Os"), {"error": {"code": 402, "message": "no credits"}}), 40)
    assert (completion.outcome, retry, completion.text) == (Outcome.BAD_REQUEST, False, "")
