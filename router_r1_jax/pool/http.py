"""One HTTP request to an OpenAI-compatible provider: connection, deadline, Retry-After, key redaction.

A provider's fault is an outcome and never an exception. Connections are kept alive and shared by all threads. The key
is read from the environment once, at the start, and leaves this file only in a request header. If a provider echoes the
key, it is redacted.
"""

import dataclasses
import email.utils
import errno
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from http.cookiejar import DefaultCookiePolicy

import requests
import urllib3
from requests.adapters import HTTPAdapter

from router_r1_jax.pool.chat_completion import read_completion, read_error
from router_r1_jax.pool.outcomes import Completion, Outcome, PoolError
from router_r1_jax.pool.providers import Provider

_MAX_BODY = 16 * 1024 * 1024  # bytes; a longer answer is no chat completion
_MAX_ERROR = 300  # characters of an error message
_SHORTEST_SECRET = 8  # characters; shorter "keys" such as EMPTY are placeholders of local servers and ordinary words
_DURATION = re.compile(r"(\d+\.?\d*) ?(ms|milli|s|m|h|)[a-z]*")
_SECONDS = {"ms": 1e-3, "milli": 1e-3, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_EPOCH = 1e9  # seconds; a larger Retry-After is a time since 1970
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
            completion, retry = read_completion(content, len(body))
        elif "Location" in response.headers:
            message = f"HTTP {status}: it redirects to {response.headers['Location']}"
            completion, retry = Completion("", Outcome.BAD_REQUEST, error=message), False
        else:
            completion, retry = read_error(status, content)
        return self._redacted(completion), _retry_after(response.headers) if retry else None

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

    def _redacted(self, completion: Completion) -> Completion:
        """The completion without the key, if the provider has echoed it, and with an error of a readable length."""
        # Redact first: a key of which only a part is left would not be found.
        texts = {field: self._redact(getattr(completion, field)) for field in ("text", "thought", "served", "error")}
        return dataclasses.replace(completion, **texts | {"error": texts["error"][:_MAX_ERROR]})

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


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the headers retry-after-ms or Retry-After ask for; 0 if they ask for nothing that can be read.

    Retry-After is a date or a number. The number may have a unit, and may be a time since 1970 in (milli)seconds.
    """
    milliseconds, value = headers.get("retry-after-ms"), headers.get("Retry-After", "").strip().lower()
    if duration := _DURATION.fullmatch(f"{milliseconds.strip()}ms" if milliseconds else value):
        seconds = float(duration[1]) * _SECONDS[duration[2]]
        if seconds >= _EPOCH:
            seconds = seconds / (1 if seconds < 1000 * _EPOCH else 1000) - time.time()
        return max(seconds, 0.0)
    with suppress(ValueError, TypeError, OverflowError):
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return 0.0


def _reason(error: BaseException) -> str:
    """The cause at the end of the libraries' chain of exceptions, in the system's words: "connection refused"."""
    reason = ""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        reason = getattr(error, "strerror", None) or type(error).__name__
        error = error.__cause__ or error.__context__
    return reason.lower()
