"""Prompts and episodes: token ids with log-probs and loss mask, replies, stop reason; the prompts' common prefix."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from router_r1_jax.errors import UserError


class Respond(Protocol):
    """How the sampling loop calls external models: it passes on the inside of a route tag and gets a future reply."""

    def __call__(self, route: str, *, episode: int, call: int) -> Future[Any]:
        """Call a model; `call` counts the episode's calls from 0. The future resolves within the pool's deadline.

        Its result has an attribute `text`, which enters the context and can neither open nor close a tag.
        """


class PromptError(UserError, ValueError):
    """A prompt that does not fit. The message names the fields that make room for it."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One episode to sample. `episode` (uint32) seeds its random draws; `tokens` is the whole rendered prompt."""

    episode: int
    tokens: tuple[int, ...]


@dataclasses.dataclass
class Episode:
    """One finished episode. The lists `tokens`, `logps`, `sampler_logps` and `sampled` have one entry per token.

    Attributes:
      prompt: ids of the whole prompt.
      tokens: sampled and injected ids behind the prompt, in order.
      logps: log-prob of each sampled token at the rollout's temperature, without truncation; 0 for injected ones.
      sampler_logps: log-prob in the distribution that the token was sampled from: after top-k, top-p and min-p.
      sampled: the loss mask: True if the router sampled the token, False if it was injected.
      replies: the pool's replies, in order of the calls.
      stop: answer | call_limit | turn_limit | token_limit | row_full | end_of_text | time_limit | no_reply.
      text: the tokens as text, for people and rewards.
    """

    id: int
    prompt: tuple[int, ...]
    tokens: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    sampler_logps: list[float] = dataclasses.field(default_factory=list)
    sampled: list[bool] = dataclasses.field(default_factory=list)
    replies: list[Any] = dataclasses.field(default_factory=list)
    stop: str = ""
    text: str = ""

    def sample(self, tokens: list[int], logps: list[float], sampler_logps: list[float]) -> None:
        """Append tokens that the router sampled."""
        self.tokens += tokens
        self.logps += logps
        self.sampler_logps += sampler_logps
        self.sampled += [True] * len(tokens)

    def inject(self, tokens: list[int]) -> None:
        """Append tokens that entered the context from outside."""
        self.tokens += tokens
        self.logps += [0.0] * len(tokens)
        self.sampler_logps += [0.0] * len(tokens)
        self.sampled += [False] * len(tokens)


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the longest token prefix that all prompts share; at least one token of each prompt stays outside it."""
    first, last = min(prompts), max(prompts)  # in lexical order, these two differ earliest
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return min(shared, min(map(len, prompts)) - 1)
