"""Providers: OpenAI-compatible endpoints as the config declares them, and the request body for a query.

A provider holds no key, only the name of the variable with it, so it can be printed, hashed and kept.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ml_collections import ConfigDict

from router_r1_jax.config import ConfigError

_RESERVED = ("model", "messages", "stream", "n")  # ours to set, or they would change the shape of the answer
_SECRET_HEADER = re.compile("auth|key|token|secret|cookie", re.IGNORECASE)  # headers stand in config.json and report
_HEADER_NAME = re.compile("[A-Za-z0-9-]+")


@dataclass(frozen=True)
class Provider:
    """One endpoint. `field` is its place in the config ("pool.providers[0]"); `parameters` go into every request.

    Limits are per minute, 0 for none; `concurrency` counts calls in flight and `request_timeout` is seconds.
    """

    field: str
    name: str
    base_url: str
    key_env: str
    key_header: str
    headers: Mapping[str, str]
    parameters: Mapping[str, Any]
    requests_per_minute: float
    tokens_per_minute: float
    concurrency: int
    request_timeout: float

    def body(self, model: str, query: str) -> dict[str, Any]:
        """The JSON body of a chat completion request."""
        return {"model": model, "messages": [{"role": "user", "content": query}], **self.parameters}

    def tokens_at_most(self, query: str) -> int:
        """Tokens that a request may use, as far as is known before: one per four characters, and all it may write."""
        written = self.parameters.get("max_completion_tokens") or self.parameters.get("max_tokens") or 0
        return len(query) // 4 + 1 + int(written)

    def key(self) -> str:
        """The key from the environment, "" where none is needed. Raises ConfigError without ever showing the key."""
        if not self.key_env:
            return ""
        value = os.environ.get(self.key_env, "").strip()
        if not value:
            raise ConfigError(
                f"{self.field}.key_env names {self.key_env}, which is not set; export it, "
                "or set key_env to '' for a provider that needs no key"
            )
        if not (value.isascii() and value.isprintable()):  # requests would quote it in its own error
            raise ConfigError(
                f"{self.field}.key_env names {self.key_env}, whose value is no key: it holds a line break "
                "or a character outside ASCII; export it anew"
            )
        return value


def providers_from_config(pool_config: ConfigDict) -> dict[str, Provider]:
    """The providers of `config.pool` by name. Raises ConfigError for the first field that cannot be meant.

    A provider's own settings win over the pool's: concurrency and request_timeout where they are not 0, and
    `parameters` over pool.max_tokens and pool.temperature; None there drops a parameter, for endpoints that refuse it.
    """
    providers: dict[str, Provider] = {}
    for i, entry in enumerate(pool_config.providers):
        field = f"pool.providers[{i}]"
        if not entry.name or entry.name in providers:
            raise ConfigError(f"{field}.name is {entry.name!r}; every provider needs a name of its own")
        _check_url(f"{field}.base_url", entry.base_url)
        if not _HEADER_NAME.fullmatch(entry.key_header):
            raise ConfigError(
                f"{field}.key_header is {entry.key_header!r}; name a header, such as Authorization or x-goog-api-key"
            )
        _check_headers(field, entry.headers)
        for name in ("requests_per_minute", "tokens_per_minute", "concurrency", "request_timeout"):
            if not (math.isfinite(entry[name]) and entry[name] >= 0):
                raise ConfigError(f"{field}.{name} is {entry[name]}; it must be at least 0, and 0 takes the default")
        parameters = {"max_tokens": pool_config.max_tokens, "temperature": pool_config.temperature}
        parameters |= entry.parameters.to_dict()
        for name in _RESERVED:
            if name in parameters:
                raise ConfigError(f"{field}.parameters.{name} is set; leave it out, the pool sets it itself")
        providers[entry.name] = Provider(
            field=field,
            name=entry.name,
            base_url=entry.base_url.rstrip("/"),
            key_env=entry.key_env,
            key_header=entry.key_header,
            headers=entry.headers.to_dict(),
            parameters={name: value for name, value in parameters.items() if value is not None},
            requests_per_minute=entry.requests_per_minute,
            tokens_per_minute=entry.tokens_per_minute,
            concurrency=entry.concurrency or pool_config.concurrency,
            request_timeout=entry.request_timeout or pool_config.request_timeout,
        )
    return providers


def _check_url(field: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"{field} is {url!r}; write the address up to /v1, like https://api.example.com/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        # Not shown: what stands there may be a key.
        raise ConfigError(f"{field} holds a user, a password, '?' or '#'; name the variable with the key in key_env")


def _check_headers(field: str, headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        if _SECRET_HEADER.search(name):
            raise ConfigError(
                f"{field}.headers.{name} is set; a key comes from the environment: name its variable in key_env, and "
                "the header in key_header where it is not Authorization"
            )
        if not (isinstance(value, str) and value.isascii() and value.isprintable()):
            raise ConfigError(f"{field}.headers.{name} is not text in printable ASCII, as a header must be; correct it")
