"""The HTTP client: one query to one provider, retried within a deadline; a provider's trouble is never an exception.

Connections are kept alive and shared by all threads. A key is read from the environment once, at the start, and leaves
this file in a request header only: where a provider echoes it, it is blotted out.
"""

import email.utils
import errno
import json
import logging
import random
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from typing import Any

import requests
import urllib3
from ml_collections import ConfigDict
from requests.adapters import HTTPAdapter

from router_r1_jax.pool.cards import Card
from router_r1_jax.pool.outcomes import Completion, Outcome, PoolError, provider_fault
from router_r1_jax.pool.providers import Provider

_RETRIED = {408: Outcome.TIMEOUT, 409: Outcome.UNAVAILABLE, 429: Outcome.RATE_LIMITED}  # and every 5xx
_MAX_BODY = 16 * 1024 * 1024  # bytes; a longer answer is no chat completion
_SHORTEST_SECRET = 8  # characters; shorter "keys" such as EMPTY are placeholders of local servers and ordinary words
_NETWORK_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, OSError)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Attempt:
    """What one HTTP request came to. `again` says whether another may help, not before `pause` seconds."""

    outcome: Outcome
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""
    again: bool = False
    pause: float = 0.0


class Client:
    """Asks models over HTTP. Safe to use from many threads at once."""

    def __init__(self, pool_config: ConfigDict, providers: Mapping[str, Provider]) -> None:
        """Reads the keys of `providers`; raises ConfigError where one is missing."""
        self._deadline = pool_config.deadline
        self._request_timeout = pool_config.request_timeout
        self._backoff = pool_config.backoff
        self._backoff_max = pool_config.backoff_max
        self._providers = dict(providers)
        self._keys = {name: provider.key() for name, provider in providers.items()}
        self._sessions = {
            name: _session(provider, self._keys[name], pool_config.concurrency) for name, provider in providers.items()
        }
        self._closed = threading.Event()
        self._warned: set[tuple[str, Outcome]] = set()

    def complete(self, card: Card, query: str) -> Completion:
        """Ask the card's model, again after faults that may pass, for `pool.deadline` seconds in all.

        Only a connection that is taken and then stays silent can overrun that, by at most one request timeout.
        """
        provider = self._providers[card.provider]
        body = json.dumps(provider.body(card.model, query)).encode()
        started = time.monotonic()
        give_up = started + self._deadline
        attempts = 0
        while True:
            attempts += 1
            attempt = self._post(provider, body, min(time.monotonic() + self._request_timeout, give_up))
            if not attempt.again:
                break
            # Half of the pause is random, so that calls which failed together do not come back together.
            pause = min(self._backoff * 2.0 ** min(attempts - 1, 30), self._backoff_max) * random.uniform(0.5, 1.0)
            pause = max(pause, attempt.pause)
            if time.monotonic() + pause >= give_up or self._closed.wait(pause):
                break
        self._warn_once(card, attempt, attempts)
        return Completion(
            text=attempt.text,
            outcome=attempt.outcome,
            prompt_tokens=attempt.prompt_tokens,
            completion_tokens=attempt.completion_tokens,
            latency=time.monotonic() - started,
            attempts=attempts,
            error=attempt.error,
        )

    def check(self, names: Iterable[str]) -> None:
        """Raise PoolError for the first of these providers that does not answer or refuses the key.

        Any answer to GET /models will do: not every provider has that page.
        """
        for name in names:
            provider = self._providers[name]
            try:
                url = f"{provider.base_url}/models"
                answer = self._sessions[name].get(url, timeout=self._request_timeout, allow_redirects=False)
            except _NETWORK_ERRORS as error:
                raise PoolError(
                    f"pool provider {name!r} at {provider.base_url} does not answer ({_reason(error)}); "
                    f"start it or correct {provider.field}.base_url"
                ) from None
            if answer.status_code in (401, 403):
                fix = f"correct the key in {provider.key_env}" if provider.key_env else f"set {provider.field}.key_env"
                raise PoolError(
                    f"pool provider {name!r} at {provider.base_url} refuses us (HTTP {answer.status_code}); {fix}"
                )

    @property
    def closed(self) -> bool:
        """Whether `close` was called: faults are then ours."""
        return self._closed.is_set()

    def close(self) -> None:
        """End pauses between retries, so that running calls finish with what they have, and drop the connections."""
        self._closed.set()
        for session in self._sessions.values():
            session.close()

    def _post(self, provider: Provider, body: bytes, until: float) -> _Attempt:
        """One request, to be over at `until` (monotonic seconds)."""
        try:
            with self._sessions[provider.name].post(
                f"{provider.base_url}/chat/completions",
                data=body,
                timeout=max(until - time.monotonic(), 0.001),
                stream=True,
                allow_redirects=False,  # the POST would arrive as a GET, and elsewhere
            ) as answer:
                content = _read(answer, until)
        except (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError):
            return _Attempt(Outcome.TIMEOUT, error="no answer in time", again=True)
        except _NETWORK_ERRORS as error:
            return _Attempt(Outcome.UNAVAILABLE, error=self._blot(provider, _reason(error)), again=True)
        status = answer.status_code
        if status == 200:
            return self._parse(provider, content, len(body))
        message = _error_message(content)
        if "Location" in answer.headers:
            message = f"it redirects to {answer.headers['Location']}"
        error = self._blot(provider, f"HTTP {status}: {message}".rstrip(": "))[:300]
        if status in _RETRIED or status >= 500:
            outcome = _RETRIED.get(status, Outcome.UNAVAILABLE)
            return _Attempt(outcome, error=error, again=True, pause=_retry_after(answer.headers.get("Retry-After", "")))
        return _Attempt(Outcome.BAD_REQUEST, error=error)

    def _parse(self, provider: Provider, content: bytes, asked: int) -> _Attempt:
        """Read a chat completion. `asked` is the size of the request in bytes."""
        try:
            data = json.loads(content)
            choice = data["choices"][0]
            text = choice["message"].get("content") or ""
            usage = data.get("usage") or {}
            tokens = _count(usage, "prompt_tokens", asked), _count(usage, "completion_tokens", len(text))
            if not isinstance(text, str) or min(tokens) < 0:
                raise ValueError
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError):
            error = "HTTP 200, but not a chat completion"
            return _Attempt(Outcome.UNAVAILABLE, error=error, again=True)
        outcome = Outcome.TRUNCATED if choice.get("finish_reason") == "length" else Outcome.OK
        if not text.strip():
            outcome = Outcome.EMPTY
        return _Attempt(outcome, self._blot(provider, text), *tokens)

    def _blot(self, provider: Provider, text: str) -> str:
        key = self._keys[provider.name]
        return text.replace(key, "[key]") if len(key) >= _SHORTEST_SECRET else text

    def _warn_once(self, card: Card, attempt: _Attempt, attempts: int) -> None:
        """Log the first fault of each kind per model: a wrong key should not wait until someone reads the ledger."""
        if provider_fault(attempt.outcome) and (card.key, attempt.outcome) not in self._warned:
            self._warned.add((card.key, attempt.outcome))
            _log.warning(
                "model %r (%s): %s after %d attempts: %s; further ones only in the ledger",
                card.key, card.provider, attempt.outcome, attempts, attempt.error,
            )  # fmt: skip


def _session(provider: Provider, key: str, concurrency: int) -> requests.Session:
    session = requests.Session()
    # Proxies and certificates from the environment, read once: requests would look them up for every single call, and
    # would let a ~/.netrc replace our Authorization header.
    settings = session.merge_environment_settings(provider.base_url, {}, None, None, None)
    session.proxies, session.verify, session.cert = settings["proxies"], settings["verify"], settings["cert"]
    session.trust_env = False
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    session.headers.update({"Content-Type": "application/json", **provider.headers})
    if key:
        session.headers["Authorization"] = f"Bearer {key}"
    adapter = HTTPAdapter(pool_connections=1, pool_maxsize=concurrency, max_retries=0)
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


def _error_message(content: bytes) -> str:
    """The message of an OpenAI-style error body, in one short line; "" where there is none."""
    try:
        data: Any = json.loads(content)
        message = data["error"]["message"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return ""
    return " ".join(str(message).split())[:200]


def _reason(error: BaseException) -> str:
    """The cause at the bottom of the libraries' chain of exceptions, in the system's words: "connection refused"."""
    reason = ""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        reason = getattr(error, "strerror", None) or type(error).__name__
        error = error.__cause__ or error.__context__
    return reason.lower()
