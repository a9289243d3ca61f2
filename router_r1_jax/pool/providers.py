"""Providers: OpenAI-compatible endpoints as the config declares them, their API keys, and the body of a request.

A provider holds the name of the environment variable with its key and not the key. So it can be printed and hashed.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ml_collections import ConfigDict

from router_r1_jax.config import QUERY, ConfigError
from router_r1_jax.pool.cards import Card, check_parameters

# A header that may hold a secret. The headers of the config are written to config.json and to the report.
_SECRET_HEADER = re.compile("auth|key|token|secret|cookie", re.IGNORECASE)
_HEADER_NAME = re.compile("[A-Za-z0-9-]+")


@dataclass(frozen=True)
class Provider:
    """One OpenAI-compatible endpoint.

    Attributes:
      field: its place in the config ("pool.providers[0]"), for error messages.
      name: the name under which model cards refer to it.
      base_url: the address up to /v1, without a slash at the end.
      key_env: the environment variable with the key, "" if no key is needed.
      key_header: the request header that carries the key.
      headers: further headers of every request.
      parameters: further fields in the body of every request.
      requests_per_minute: rate limit of requests; 0 is none.
      tokens_per_minute: rate limit of tokens; 0 is none.
      concurrency: most calls in flight.
      request_timeout: seconds of one HTTP request.
      prompt: the text in which a query travels, with the placeholder {query}.
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
    prompt: str = QUERY

    def body(self, card: Card, query: str) -> dict[str, Any]:
        """The JSON body of a chat completion request. A parameter that is None is left out."""
        system = [{"role": "system", "content": card.system}] if card.system else []
        user = {"role": "user", "content": self.prompt.replace(QUERY, query)}
        parameters = {**self.parameters, **card.parameters}
        given = {name: value for name, value in parameters.items() if value is not None}
        return {"model": card.model, "messages": [*system, user], **given}

    def key(self) -> str:
        """The key from the environment, "" if none is needed. Raises ConfigError, which never shows the key."""
        if not self.key_env:
            return ""
        value = os.environ.get(self.key_env, "").strip()
        if not value:
            raise ConfigError(
                f"{self.field}.key_env names {self.key_env}, which is not set; export it, "
                "or set key_env to '' for a provider that needs no key"
            )
        if not (value.isascii() and value.isprintable()):  # an error of `requests` would quote it
            raise ConfigError(
                f"{self.field}.key_env names {self.key_env}, whose value is no key: it holds a line break "
                "or a character outside ASCII; export it again"
            )
        return value


def providers_from_config(pool_config: ConfigDict) -> dict[str, Provider]:
    """The providers of `config.pool` by name. Raises ConfigError for the first invalid field.

    A provider's concurrency and request_timeout replace those of the pool unless they are 0. Its `parameters` replace
    pool.max_tokens and pool.temperature. A parameter that is None is left out, for endpoints that refuse it.
    """
    if pool_config.prompt.count(QUERY) != 1:
        raise ConfigError(f"pool.prompt is {pool_config.prompt!r}; it must hold {QUERY} once, where the query stands")
    providers: dict[str, Provider] = {}
    for i, entry in enumerate(pool_config.providers):
        field = f"pool.providers[{i}]"
        if not entry.name or entry.name in providers:
            raise ConfigError(f"{field}.name is {entry.name!r}; every provider needs another name")
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
        check_parameters(field, parameters)
        providers[entry.name] = Provider(
            field=field,
            **entry.to_dict()
            | {
                "base_url": entry.base_url.rstrip("/"),
                "parameters": parameters,
                "prompt": pool_config.prompt,
                "concurrency": entry.concurrency or pool_config.concurrency,
                "request_timeout": entry.request_timeout or pool_config.request_timeout,
            },
        )
    return providers


def tokens_at_most(body: Mapping[str, Any]) -> int:
    """Estimate the tokens of a request before it is sent: one per four characters, and the longest answer."""
    answer = body.get("max_completion_tokens") or body.get("max_tokens") or 0
    return sum(len(message["content"]) for message in body["messages"]) // 4 + 1 + int(answer)


def _check_url(field: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"{field} is {url!r}; write the address up to /v1, like https://api.example.com/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        # The address is not shown, because it may hold a key.
        raise ConfigError(f"{field} holds a user, a password, '?' or '#'; name the variable with the key in key_env")


def _check_headers(field: str, headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        if _SECRET_HEADER.search(name):
            raise ConfigError(
                f"{field}.headers.{name} is set; a key comes from the environment: name its variable in key_env, and "
                "the header in key_header if it is not Authorization"
            )
        if not (isinstance(value, str) and value.isascii() and value.isprintable()):
            raise ConfigError(f"{field}.headers.{name} is not text in printable ASCII, as a header must be; correct it")
