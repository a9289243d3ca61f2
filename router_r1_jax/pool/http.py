"""One HTTP request to an OpenAI-compatible provider: send, read, parse the chat completion, Retry-After, key redaction.

A provider's fault is an outcome and never an exception. Connections are kept alive and shared by all threads. The key
is read from the environment once, at the start, and leaves this file only in a request header. If a provider echoes the
key, it is redacted.
"""

import email.utils
import errno
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from http.cookiejar import DefaultCookiePolicy
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter

from router_r1_jax.pool.outcomes import Completion, Outcome, PoolError
from router_r1_jax.pool.providers import Provider

_RETRIED = {408: Outcome.TIMEOUT, 409: Outcome.UNAVAILABLE, 429: Outcome.RATE_LIMITED}  # and every 5xx
_MAX_BODY = 16 * 1024 * 1024  # bytes; a longer answer is no chat completion
_MAX_TOKENS = 10**9  # a provider that reports more has not counted
_SHORTEST_SECRET = 8  # characters; shorter "keys" such as EMPTY are placeholders of local servers and ordinary words
_BAD_ANSWER = (ValueError, TypeError, LookupError, OverflowError)  # a JSON value is missing or of another type
_NETWORK_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, OSError)


class Transport:
    """The HTTP connections to one provider. Thread-safe."""

    def __init__(self, provider: Provider) -> None:
        """Reads the provider's key; raises ConfigError if it is missing."""
        self._provider = provider
        self._key = provider.key()
        self._session = _session(provider, self._key)
        url = f"{provider.base_url}/chat/completions"
        self._empty = self._session.prepare_request(requests.Request("POST", url))
        self._adapter = self._session.get_adapter(url)

    def post(self, body: bytes, deadline: float) -> tuple[Completion, float | None]:
        """Send one chat completion request, which has to end by `deadline` (monotonic seconds).

        Returns also the seconds to wait before another request, as the provider's header Retry-After says, or None if
        no further request can succeed. The completion's latency is left to the caller.
        """
        try:
            with self._send(body, max(deadline - time.monotonic(), 0.001)) as response:
                content = _read(response, deadline)
        except (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError):
            return Completion("", Outcome.TIMEOUT, error="no answer in time"), 0.0
        except _NETWORK_ERRORS as error:
            return Completion("", Outcome.UNAVAILABLE, error=self._redact(_reason(error))), 0.0
        status = response.status_code
        if status == 200:
            return self._parse(content, len(body))
        message = _error_field(content, "message")
        if "Location" in response.headers:
            message = f"it redirects to {response.headers['Location']}"
        # Redact first: a key of which only a part is left would not be found.
        error = self._redact(f"HTTP {status}: {message}".rstrip(": "))[:300]
        if status in _RETRIED or status >= 500:
            wait = _retry_after(response.headers.get("Retry-After", ""))
            return Completion("", _RETRIED.get(status, Outcome.UNAVAILABLE), error=error), wait
        refused = _error_field(content, "code") == "content_filter"  # a filter before the model
        return Completion("", Outcome.REFUSED if refused else Outcome.BAD_REQUEST, error=error), None

    def check(self) -> None:
        """Raise PoolError if the provider does not answer or refuses the key.

        Any answer to GET /models is enough, because not every provider serves this page.
        """
        provider = self._provider
        try:
            url = f"{provider.base_url}/models"
            response = self._session.get(url, timeout=provider.request_timeout, allow_redirects=False)
        except _NETWORK_ERRORS as error:
            raise PoolError(
                f"pool provider {provider.name!r} at {provider.base_url} does not answer ({_reason(error)}); "
                f"start it or correct {provider.field}.base_url"
            ) from None
        if response.status_code in (401, 403):
            fix = f"correct the key in {provider.key_env}" if provider.key_env else f"set {provider.field}.key_env"
            raise PoolError(
                f"pool provider {provider.name!r} at {provider.base_url} refuses the key "
                f"(HTTP {response.status_code}); {fix}"
            )

    def close(self) -> None:
        """Drop the connections."""
        self._session.close()

    def _send(self, body: bytes, timeout: float) -> requests.Response:
        """Send the request; the response's body is not read yet.

        The session's own method is not used. It would prepare the same request anew for each call, which takes a
        quarter of a call's time, and it would follow redirects, which turn the POST into a GET to another address.
        """
        prepared = self._empty.copy()
        prepared.body = body
        prepared.headers["Content-Length"] = str(len(body))
        session = self._session
        settings = {"verify": session.verify, "cert": session.cert, "proxies": session.proxies}
        return self._adapter.send(prepared, stream=True, timeout=timeout, **settings)

    def _parse(self, content: bytes, request_size: int) -> tuple[Completion, float | None]:
        """Read a chat completion; returns what `post` returns. `request_size` is the size of the request in bytes."""
        data: Any = None
        try:
            # If a model wrote half a character, its answer is still used: the half becomes U+FFFD.
            data = json.loads(content.decode("utf-8-sig", "replace"))
            choice = data["choices"][0]
            message = choice["message"]
            text = message.get("content") or ""
            usage = data.get("usage") or {}
            tokens = _count(usage, "prompt_tokens", request_size), _count(usage, "completion_tokens", len(text))
            if not isinstance(text, str) or not all(0 <= count <= _MAX_TOKENS for count in tokens):
                raise ValueError
        except (*_BAD_ANSWER, AttributeError, RecursionError):
            prompt_tokens, completion_tokens = _used_tokens(data)
            failed = Completion(
                "",
                Outcome.UNAVAILABLE,
                error="HTTP 200, but not a chat completion",
                wasted_prompt_tokens=prompt_tokens,
                wasted_completion_tokens=completion_tokens,
            )
            return failed, 0.0
        outcome = Outcome.TRUNCATED if choice.get("finish_reason") == "length" else Outcome.OK
        if not text.strip():
            outcome = Outcome.EMPTY
        if choice.get("finish_reason") == "content_filter" or (outcome == Outcome.EMPTY and message.get("refusal")):
            outcome = Outcome.REFUSED
        served = data.get("model")
        completion = Completion(
            self._redact(text),
            outcome,
            *tokens,
            cached_tokens=min(_cached_tokens(usage), tokens[0]),
            served=self._redact(served)[:200] if isinstance(served, str) else "",
        )
        return completion, None

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "[key]") if len(self._key) >= _SHORTEST_SECRET else text


def _session(provider: Provider, key: str) -> requests.Session:
    session = requests.Session()
    # Proxies and certificates come from the environment and are read once. If requests read them itself, it would do so
    # for every call, and a ~/.netrc would replace the Authorization header.
    settings = session.merge_environment_settings(provider.base_url, {}, None, None, None)
    session.proxies, session.verify, session.cert = settings["proxies"], settings["verify"], settings["cert"]
    session.trust_env = False
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    session.headers.update({"Content-Type": "application/json", **provider.headers})
    if key:
        bearer = provider.key_header.lower() == "authorization"
        session.headers[provider.key_header] = f"Bearer {key}" if bearer else key
    adapter = HTTPAdapter(pool_connections=1, pool_maxsize=provider.concurrency, max_retries=0)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def _read(response: requests.Response, deadline: float) -> bytes:
    """Read the body. A socket's timeout counts from the last byte, so a slow server must also meet the deadline."""
    chunks, size = [], 0
    while chunk := response.raw.read1(65536, decode_content=True):
        chunks.append(chunk)
        size += len(chunk)
        if size > _MAX_BODY:
            raise OSError(errno.EMSGSIZE, f"an answer of more than {_MAX_BODY} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(chunks)


def _retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date; 0 if it is neither."""
    with suppress(ValueError):
        return max(float(value), 0.0)
    with suppress(ValueError, TypeError, OverflowError):
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return 0.0


def _count(usage: Mapping[str, Any], field: str, characters: int) -> int:
    """Tokens as the provider counts them. If it does not, one token for four characters: no call is free."""
    value = usage.get(field)
    return -(-characters // 4) if value is None else int(value)


def _used_tokens(data: Any) -> tuple[int, int]:
    """Prompt and completion tokens of an answer that cannot be used; 0 if the provider does not count them."""
    with suppress(*_BAD_ANSWER):
        tokens = int(data["usage"]["prompt_tokens"]), int(data["usage"]["completion_tokens"])
        if all(0 <= count <= _MAX_TOKENS for count in tokens):
            return tokens
    return 0, 0


def _cached_tokens(usage: Mapping[str, Any]) -> int:
    """Prompt tokens that came from the provider's prompt cache; 0 if it does not say so."""
    with suppress(*_BAD_ANSWER):
        return max(int(usage["prompt_tokens_details"]["cached_tokens"]), 0)
    return 0


def _error_field(content: bytes, field: str) -> str:
    """A field of an OpenAI-style error body, in one line of any length; "" if there is none."""
    with suppress(*_BAD_ANSWER, RecursionError):
        return " ".join(str(json.loads(content)["error"][field]).split())
    return ""


def _reason(error: BaseException) -> str:
    """The cause at the end of the libraries' chain of exceptions, in the system's words: "connection refused"."""
    reason = ""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        reason = getattr(error, "strerror", None) or type(error).__name__
        error = error.__cause__ or error.__context__
    return reason.lower()
