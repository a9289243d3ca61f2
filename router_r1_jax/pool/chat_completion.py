"""Reads the answer to a chat completion request: text, thought, outcome, token counts, and the error message.

Providers differ from the OpenAI reference in small ways: other names of token counts and finish reasons, an error
object with status 200, an event stream that nobody asked for, a thought inside of the text. All of them are read here.
The public functions never raise, whatever the bytes are. Sources: the API references of OpenAI, Azure, OpenRouter,
DeepSeek, Gemini, Mistral and vLLM.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from router_r1_jax.pool.outcomes import Completion, Outcome

_MAX_TOKENS = 10**9  # a provider that reports more has not counted
_BAD_ANSWER = (ValueError, TypeError, LookupError, OverflowError, AttributeError, RecursionError)

_RETRIED = {408: Outcome.TIMEOUT, 409: Outcome.UNAVAILABLE, 429: Outcome.RATE_LIMITED}  # and every 5xx
# HTTP status for an error that only has a type or a code in words.
_STATUS_OF_WORD = {
    "authentication_error": 401,
    "context_length_exceeded": 400,
    "insufficient_quota": 402,
    "invalid_api_key": 401,
    "invalid_request_error": 400,
    "model_not_found": 404,
    "not_found_error": 404,
    "permission_error": 403,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "resource_exhausted": 429,
}
_MODERATION = re.compile(r"content[_ ]?(filter|policy|management)|moderation|flagged|ResponsibleAI", re.IGNORECASE)

# Finish reasons in lower case.
_TRUNCATED = {"length", "max_tokens", "max_output_tokens", "max_length", "model_length", "token_limit"}
_TRUNCATED |= {"model_context_window_exceeded"}
_REFUSED = {"content_filter", "content_filtered", "safety", "recitation", "blocklist", "prohibited_content", "spii"}
_REFUSED |= {"refusal", "guardrail_intervened", "moderation", "sensitive", "image_safety"}
_FAILED = {"error", "abort", "aborted", "cancelled", "network_error", "insufficient_system_resource"}

_THOUGHT_FIELDS = ("reasoning_content", "reasoning")
_TAG = re.compile(r"<(/?)(think|thinking|reasoning|thought)\s*>", re.IGNORECASE)
_QUOTES = frozenset("`\"'\u2018\u2019\u201c\u201d")
_TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
_STREAM = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:data|event|id|retry|):")
_LINE_BREAK = re.compile("\r\n|\r|\n")


def read_completion(content: bytes, request_size: int) -> tuple[Completion, bool]:
    """Read the body of an answer with HTTP status 200.

    Args:
      content: the body, JSON or an event stream, whatever its Content-Type says.
      request_size: size of the request in bytes. If the provider does not count the prompt, its tokens are estimated as
        a quarter of it.

    Returns:
      The completion, and whether another request may succeed. Latency and attempts are left to the caller. Of an answer
      that cannot be used, the tokens are in `wasted_prompt_tokens` and `wasted_completion_tokens`.
    """
    data = None
    try:
        data = _decode(content)
        if (error := _error_object(data)) is not None:
            return _failure(error, data)
        choice = data["choices"][0]
        reason = _finish_reason(choice)
        if reason in _FAILED:
            return _failure({"message": f"the answer ended with finish_reason {reason!r}"}, data)
        message = choice.get("message") or ({} if reason in _REFUSED else choice["delta"])
        text, thought = _text_and_thought(message.get("content"))
    except _BAD_ANSWER:
        words = "an event stream that breaks off" if _STREAM.match(content) else error_message(content)
        return _failure({"message": words or "not a chat completion"}, data)
    thought = thought or _first_text(message, _THOUGHT_FIELDS)
    if inline := _inline_thoughts(text, cut=reason in _TRUNCATED):
        text, thought = inline[0], "\n\n".join(filter(None, (thought, inline[1])))
    outcome = Outcome.TRUNCATED if reason in _TRUNCATED else Outcome.OK
    if not text.strip():
        outcome = Outcome.EMPTY
    if reason in _REFUSED or (outcome == Outcome.EMPTY and message.get("refusal")):
        outcome = Outcome.REFUSED
    usage = _usage(data.get("usage"), request_size, len(text) + len(thought))
    served = _first_text(data, ("model",))[:200]
    return Completion(text, outcome, **usage, served=served, thought=thought), False


def read_error(status: int, content: bytes) -> tuple[Completion, bool]:
    """Read the body of an answer with another HTTP status than 200; returns what `read_completion` returns."""
    error: Any = None
    with suppress(*_BAD_ANSWER):
        error = _error_object(_decode(content))
    outcome, retry = _outcome_of_status(status, error)
    message = f"HTTP {status}: {error_message(content)}".rstrip(": ")
    return Completion("", outcome, error=message), retry


def error_message(content: bytes) -> str:
    """The server's own words in the body of a failed answer, in one line of any length; "" if it says nothing.

    The body may be an error object, a `detail`, plain text, or an HTML page, of which the title counts.
    """
    text = content.decode("utf-8-sig", "replace")
    with suppress(*_BAD_ANSWER):
        return _one_line(_message(_decode(content)))
    if title := _TITLE.search(text):
        return _one_line(title[1])
    return "" if text.lstrip().startswith(("<", "{", "[")) else _one_line(text)


def _decode(content: bytes) -> Any:
    """The JSON value of a body; an event stream is put together to one answer. Raises ValueError if it is neither."""
    # If a model wrote half a character, its answer is still used: the half becomes U+FFFD.
    text = content.decode("utf-8-sig", "replace").lstrip()
    if _STREAM.match(content):
        return _join_chunks(text)
    data = json.loads(text)
    return data[0] if isinstance(data, list) and len(data) == 1 else data


def _join_chunks(stream: str) -> dict[str, Any]:
    """The answer whose chunks an event stream holds. Raises ValueError if the stream breaks off before its end."""
    message: dict[str, str] = {"content": "", "reasoning_content": "", "refusal": ""}
    joined: dict[str, Any] = {}
    reason, ended = None, False
    for data in _events(stream):
        if data.strip() == "[DONE]":
            ended = True
            break
        chunk = json.loads(data)
        if not isinstance(chunk, dict):
            continue
        joined |= {name: chunk[name] for name in ("error", "usage", "model") if chunk.get(name)}
        for choice in chunk.get("choices") or ():
            if choice.get("index"):
                continue
            delta = choice.get("delta") or choice.get("message") or {}
            text, thought = _text_and_thought(delta.get("content"))
            message["content"] += text
            message["reasoning_content"] += thought or _first_text(delta, _THOUGHT_FIELDS)
            message["refusal"] += _first_text(delta, ("refusal",))
            joined |= {"error": choice["error"]} if choice.get("error") else {}
            reason = choice.get("finish_reason") or reason
    if reason is None and not ended and "error" not in joined:
        raise ValueError("the event stream breaks off")
    return joined | {"choices": [{"message": message, "finish_reason": reason}]}


def _events(stream: str) -> Iterator[str]:
    """The data of each server-sent event. An event ends at an empty line, and at the end of the stream."""
    lines: list[str] = []
    for line in (*_LINE_BREAK.split(stream), ""):
        if line.startswith("data:"):
            lines.append(line.removeprefix("data:").removeprefix(" "))
        elif not line and lines:
            yield "\n".join(lines)
            lines = []


def _error_object(data: Any) -> Any:
    """The error in an answer, at its top or in its choice; None if there is none."""
    if data.get("error"):
        return data["error"]
    if data.get("object") == "error" or (data.get("type") == "error" and "choices" not in data):
        return data
    choices = data.get("choices")
    return (choices[0].get("error") or None) if choices else None


def _failure(error: Any, data: Any) -> tuple[Completion, bool]:
    """The completion for an error in an answer with HTTP status 200, and whether another request may succeed."""
    outcome, retry = _outcome_of_status(_error_status(error), error)
    usage: Any = {}
    with suppress(*_BAD_ANSWER):
        usage = data.get("usage") or {}
    failed = Completion(
        "",
        outcome,
        error=f"HTTP 200, but {_one_line(_message(error)) or 'an error without a message'}",
        wasted_prompt_tokens=_count(usage, ("prompt_tokens", "input_tokens")) or 0,
        wasted_completion_tokens=_count(usage, ("completion_tokens", "output_tokens")) or 0,
    )
    return failed, retry


def _error_status(error: Any) -> int:
    """The HTTP status that an error object stands for, 503 if it does not say."""
    if isinstance(error, Mapping):
        for field in ("code", "status", "status_code", "type"):
            value = error.get(field)
            with suppress(*_BAD_ANSWER):
                if 400 <= (status := int(value)) < 600:
                    return status
            if isinstance(value, str) and value.lower() in _STATUS_OF_WORD:
                return _STATUS_OF_WORD[value.lower()]
    return 503


def _outcome_of_status(status: int, error: Any) -> tuple[Outcome, bool]:
    """Outcome of an HTTP status, and whether another request may succeed. A filter before the model refuses."""
    if status in _RETRIED or status >= 500:
        return _RETRIED.get(status, Outcome.UNAVAILABLE), True
    refused = status in (400, 403) and isinstance(error, Mapping) and _MODERATION.search(json.dumps(error))
    return Outcome.REFUSED if refused else Outcome.BAD_REQUEST, False


def _message(error: Any) -> str:
    """The words of an error, whatever it is: text, an object with a message, or a list of such objects."""
    if isinstance(error, str):
        return error
    if isinstance(error, list):
        return "; ".join(filter(None, map(_message, error)))
    if not isinstance(error, Mapping):
        return ""
    words = next(filter(None, (_message(error.get(f)) for f in ("error", "message", "detail", "msg", "title"))), "")
    metadata = error.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, Mapping) else None  # OpenRouter: what the provider behind it said
    return f"{words}: {raw}" if isinstance(raw, str) and raw not in words else words


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _finish_reason(choice: Mapping[str, Any]) -> str:
    """The finish reason in lower case, without the prefix of an enumeration."""
    reason = choice.get("finish_reason")
    return reason.lower().rpartition(".")[2].removeprefix("finish_reason_") if isinstance(reason, str) else ""


def _text_and_thought(content: Any) -> tuple[str, str]:
    """The text of a message's content and the thought in it. The content is text, a part, a list of parts, or None.

    Raises TypeError if it is something else.
    """
    if content is None:
        return "", ""
    if isinstance(content, str):
        return content, ""
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        raise TypeError
    texts, thoughts = [], []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        thinks = "thinking" in part or str(part.get("type", "")) in ("reasoning", "thinking", "redacted_thinking")
        inner = part.get("thinking") if "thinking" in part else part.get("text")
        words = inner.get("value", "") if isinstance(inner, Mapping) else "".join(_text_and_thought(inner))
        (thoughts if thinks else texts).append(words)
    return "".join(texts), "".join(thoughts)


def _first_text(message: Mapping[str, Any], fields: tuple[str, ...]) -> str:
    """The first of these fields that holds text, or ""."""
    return next((message[field] for field in fields if isinstance(message.get(field), str)), "")


def _inline_thoughts(text: str, *, cut: bool) -> tuple[str, str] | None:
    """Split a text into the answer and the thoughts that stand in it between tags; None if there are none.

    The opening tag may be missing, because some chat templates end with it. The closing tag may be missing if the text
    begins with a thought or was `cut` in one. A tag in quotes or in a code block is part of the answer. Takes time
    linear in the text.
    """
    answer: list[str] = []
    thoughts: list[str] = []
    opened: re.Match | None = None  # the tag that opened the thought that is being read
    end = counted = fences = 0  # the text before `end` is split; `fences` counts the code fences before `counted`
    for tag in _TAG.finditer(text):
        if _is_quoted(text, tag):
            continue
        if opened is None:
            fences += text.count("```", counted, tag.start())
            counted = tag.start()
            if fences % 2:
                continue
            if not tag[1]:
                answer.append(text[end : tag.start()])
                opened = tag
            elif not answer and not thoughts:
                thoughts.append(text[: tag.start()])
                end = counted = tag.end()
        elif tag[1] and tag[2].lower() == opened[2].lower():
            thoughts.append(text[opened.end() : tag.start()])
            end = counted = tag.end()
            opened = None
    if opened is not None:
        is_thought = cut or not "".join(answer).strip()
        (thoughts if is_thought else answer).append(text[opened.end() if is_thought else opened.start() :])
        end = len(text)
    if not thoughts:
        return None
    return "".join([*answer, text[end:]]).strip(), "\n\n".join(filter(None, map(str.strip, thoughts)))


def _is_quoted(text: str, tag: re.Match) -> bool:
    before, after = text[max(tag.start() - 1, 0) : tag.start()], text[tag.end() : tag.end() + 1]
    return bool(before and after) and before in _QUOTES and after in _QUOTES


def _usage(usage: Any, request_size: int, characters: int) -> dict[str, Any]:
    """Token counts as fields of a Completion. A missing or impossible count is a token for four characters.

    So no call is free. `characters` counts those of text and thought.
    """
    usage = usage if isinstance(usage, Mapping) else {}
    prompt = _count(usage, ("prompt_tokens", "input_tokens"))
    completion = _count(usage, ("completion_tokens", "output_tokens"))
    estimated = not prompt or (not completion and characters > 0)
    prompt = prompt or math.ceil(request_size / 4)
    total = _count(usage, ("total_tokens",))
    details = (usage.get("completion_tokens_details"), usage.get("output_tokens_details"), usage)
    reasoning = next(filter(None, (_count(detail, ("reasoning_tokens",)) for detail in details)), 0)
    if completion and total and total >= prompt + completion + reasoning:
        completion += reasoning  # some providers count them beside the completion; the total shows it
    completion = completion or math.ceil(characters / 4)
    details = (usage.get("prompt_tokens_details"), usage.get("input_tokens_details"), usage)
    cached = next(filter(None, (_count(d, ("cached_tokens", "prompt_cache_hit_tokens")) for d in details)), 0)
    cached = min(cached, prompt)
    return dict(prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached, estimated=estimated)


def _count(usage: Any, fields: tuple[str, ...]) -> int | None:
    """The first of these fields that holds a count of tokens, or None."""
    if isinstance(usage, Mapping):
        for field in fields:
            with suppress(*_BAD_ANSWER):
                if 0 <= (count := int(usage[field])) <= _MAX_TOKENS:
                    return count
    return None
