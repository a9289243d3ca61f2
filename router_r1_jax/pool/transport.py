"""One HTTP request to one provider, and what it came to; a provider's trouble is never an exception.

Connections are kept alive and shared by all threads. A key is read from the environment once, at the start, and leaves
this file in a request header only: where a provider echoes it, it is blotted out.
"""

import email.utils
import errno
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter

from router_r1_jax.pool.outcomes import Outcome, PoolError
from router_r1_jax.pool.providers import Provider

_RETRIED = {408: Outcome.TIMEOUT, 409: Outcome.UNAVAILABLE, 429: Outcome.RATE_LIMITED}  # and every 5xx
_MAX_BODY = 16 * 1024 * 1024  # bytes; a longer answer is no chat completion
_MAX_TOKENS = 10**9  # a call that claims more has not been counted
_SHORTEST_SECRET = 8  # characters; shorter "keys" such as EMPTY are placeholders of local servers and ordinary words
_NETWORK_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, OSError)


@dataclass(frozen=True)
class Attempt:
    """What one HTTP request came to. `again` says whether another may help, not before `pause` seconds.

    A fault has tokens where the provider counted some. `sent` counts the requests that left us, and `wasted_*` are the
    tokens of those whose answer is not this one.
    """

    outcome: Outcome
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""
    again: bool = False
    pause: float = 0.0
    sent: int = 1
    cached_tokens: int = 0
    wasted_prompt_tokens: int = 0
    wasted_completion_tokens: int = 0
    served: str = ""


class Transport:
    """The connections to one provider. Safe to use from many threads at once."""

    def __init__(self, provider: Provider) -> None:
        """Reads the provider's key; raises ConfigError where it is missing."""
        self._provider = provider
        self._key = provider.key()
        self._session = _session(provider, self._key)
        url = f"{provider.base_url}/chat/completions"
        self._empty = self._session.prepare_request(requests.Request("POST", url))
        self._adapter = self._session.get_adapter(url)

    def post(self, body: bytes, until: float) -> Attempt:
        """One chat completion request, to be over at `until` (monotonic seconds)."""
        try:
            with self._send(body, max(until - time.monotonic(), 0.001)) as answer:
                content = _read(answer, until)
        except (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError):
            return Attempt(Outcome.TIMEOUT, error="no answer in time", again=True)
        except _NETWORK_ERRORS as error:
            return Attempt(Outcome.UNAVAILABLE, error=self._blot(_reason(error)), again=True)
        status = answer.status_code
        if status == 200:
            return self._parse(content, len(body))
        message = _error_field(content, "message")
        if "Location" in answer.headers:
            message = f"it redirects to {answer.headers['Location']}"
        error = self._blot(f"HTTP {status}: {message}".rstrip(": "))[:300]  # a key that is cut is not blotted out
        if status in _RETRIED or status >= 500:
            outcome = _RETRIED.get(status, Outcome.UNAVAILABLE)
            return Attempt(outcome, error=error, again=True, pause=_retry_after(answer.headers.get("Retry-After", "")))
        refused = _error_field(content, "code") == "content_filter"  # a filter before the model
        return Attempt(Outcome.REFUSED if refused else Outcome.BAD_REQUEST, error=error)

    def _send(self, body: bytes, timeout: float) -> requests.Response:
        """The answer, its body unread. Not by the session, which would put the same request together anew for each call
        (a quarter of a call's time), and follow redirects: the POST would arrive as a GET, and elsewhere."""
        prepared = self._empty.copy()
        prepared.body = body
        prepared.headers["Content-Length"] = str(len(body))
        session = self._session
        settings = {"verify": session.verify, "cert": session.cert, "proxies": session.proxies}
        return self._adapter.send(prepared, stream=True, timeout=timeout, **settings)

    def check(self) -> None:
        """Raise PoolError where the provider does not answer or refuses the key.

        Any answer to GET /models will do: not every provider has that page.
        """
        provider = self._provider
        try:
            url = f"{provider.base_url}/models"
            answer = self._session.get(url, timeout=provider.request_timeout, allow_redirects=False)
        except _NETWORK_ERRORS as error:
            raise PoolError(
                f"pool provider {provider.name!r} at {provider.base_url} does not answer ({_reason(error)}); "
                f"start it or correct {provider.field}.base_url"
            ) from None
        if answer.status_code in (401, 403):
            fix = f"correct the key in {provider.key_env}" if provider.key_env else f"set {provider.field}.key_env"
            raise PoolError(
                f"pool provider {provider.name!r} at {provider.base_url} refuses us (HTTP {answer.status_code}); {fix}"
            )

    def close(self) -> None:
        """Drop the connections."""
        self._session.close()

    def _parse(self, content: bytes, asked: int) -> Attempt:
        """Read a chat completion. `asked` is the size of the request in bytes."""
        data: Any = None
        try:
            # A model that writes half a character has answered all the same: it becomes U+FFFD.
            data = json.loads(content.decode("utf-8-sig", "replace"))
            choice = data["choices"][0]
            message = choice["message"]
            text = message.get("content") or ""
            usage = data.get("usage") or {}
            tokens = _count(usage, "prompt_tokens", asked), _count(usage, "completion_tokens", len(text))
            if not isinstance(text, str) or not all(0 <= count <= _MAX_TOKENS for count in tokens):
                raise ValueError
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError):
            error = "HTTP 200, but not a chat completion"
            return Attempt(Outcome.UNAVAILABLE, "", *_used(data), error=error, again=True)
        outcome = Outcome.TRUNCATED if choice.get("finish_reason") == "length" else Outcome.OK
        if not text.strip():
            outcome = Outcome.EMPTY
        if choice.get("finish_reason") == "content_filter" or (outcome == Outcome.EMPTY and message.get("refusal")):
            outcome = Outcome.REFUSED
        served = data.get("model")
        return Attempt(
            outcome, self._blot(text), *tokens, cached_tokens=min(_cached(usage), tokens[0]),
            served=self._blot(served)[:200] if isinstance(served, str) else "",
        )  # fmt: skip

    def _blot(self, text: str) -> str:
        return text.replace(self._key, "[key]") if len(self._key) >= _SHORTEST_SECRET else text


def _session(provider: Provider, key: str) -> requests.Session:
    session = requests.Session()
    # Proxies and certificates from the environment, read once: requests would look them up for every single call, and
    # would let a ~/.netrc replace our Authorization header.
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


def _read(answer: requests.Response, until: float) -> bytes:
    """The body. A socket's timeout counts from the last byte, so a server that drips needs the clock looked at too."""
    chunks, size = [], 0
    while chunk := answer.raw.read1(65536, decode_content=True):
        chunks.append(chunk)
        size += len(chunk)
        if size > _MAX_BODY:
            raise OSError(errno.EMSGSIZE, f"an answer of more than {_MAX_BODY} bytes")
        if time.monotonic() > until:
            raise TimeoutError
    return b"".join(chunks)


def _retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for, given as seconds or as a date; 0 where it says neither."""
    try:
        return max(float(value), 0.0) if value.strip() else 0.0
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _count(usage: Mapping[str, Any], field: str, characters: int) -> int:
    """Tokens as the server counts them; where it does not, one for four characters, since no call is free."""
    value = usage.get(field)
    return -(-characters // 4) if value is None else int(value)


def _used(data: Any) -> tuple[int, int]:
    """Prompt and completion tokens of an answer that is of no use otherwise; 0 where it counts none."""
    try:
        tokens = int(data["usage"]["prompt_tokens"]), int(data["usage"]["completion_tokens"])
    except (ValueError, TypeError, LookupError, OverflowError):
        return 0, 0
    return tokens if all(0 <= count <= _MAX_TOKENS for count in tokens) else (0, 0)


def _cached(usage: Mapping[str, Any]) -> int:
    """Tokens of the prompt that came from the provider's cache, where it says so."""
    try:
        return max(int(usage["prompt_tokens_details"]["cached_tokens"]), 0)
    except (ValueError, TypeError, LookupError, OverflowError):
        return 0


def _error_field(content: bytes, field: str) -> str:
    """A field of an OpenAI-style error body, in one line of any length; "" where there is none."""
    try:
        data: Any = json.loads(content)
        said = data["error"][field]
    except (ValueError, TypeError, LookupError, RecursionError):
        return ""
    return " ".join(str(said).split())


def _reason(error: BaseException) -> str:
    """The cause at the bottom of the libraries' chain of exceptions, in the system's words: "connection refused"."""
    reason = ""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        reason = getattr(error, "strerror", None) or type(error).__name__
        error = error.__cause__ or error.__context__
    return reason.lower()
