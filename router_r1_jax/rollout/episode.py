"""What a rollout yields: episodes as sampled token ids with their log-probs, and the calls they made."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol


class ReplyText(Protocol):
    """What the loop needs of a reply: the text that enters the context. The rest is the pool's."""

    @property
    def text(self) -> str:
        """Already neutralised: it can neither open nor close a tag."""


class Respond(Protocol):
    """How the loop reaches external models: it passes the inside of a route tag on and gets a future reply."""

    def __call__(self, route: str, *, episode: int, call: int) -> Future[ReplyText]:
        """`call` counts the episode's calls from 0. The future resolves within the pool's own deadline."""


class PromptError(ValueError):
    """A prompt that does not fit. The message names the fields that make room for it."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One episode to sample. `episode` (uint32) seeds its draws; `tokens` is the whole rendered prompt."""

    episode: int
    tokens: tuple[int, ...]


@dataclasses.dataclass
class Episode:
    """One finished episode. `tokens`, `logps`, `drawn_logps` and `sampled` run in step and begin behind the prompt.

    Attributes:
      prompt: ids of the whole prompt.
      tokens: sampled and injected ids, in order.
      logps: log-prob of each sampled token at the rollout's temperature, nothing cut; 0 for injected ones.
      drawn_logps: the same in the distribution it was drawn from: with top-k, top-p, min-p.
      sampled: whether the router sampled the token (the loss mask) or it was injected.
      replies: the pool's replies, in order of the calls.
      stop: answer | call_limit | turn_limit | token_limit | row_full | end_of_text | time_limit | no_reply.
      text: the tokens as text, for people and rewards.
    """

    id: int
    prompt: tuple[int, ...]
    tokens: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    drawn_logps: list[float] = dataclasses.field(default_factory=list)
    sampled: list[bool] = dataclasses.field(default_factory=list)
    replies: list[Any] = dataclasses.field(default_factory=list)
    stop: str = ""
    text: str = ""

    def sample(self, tokens: list[int], logps: list[float], drawn_logps: list[float]) -> None:
        """Append what the router sampled."""
        self.tokens += tokens
        self.logps += logps
        self.drawn_logps += drawn_logps
        self.sampled += [True] * len(tokens)

    def inject(self, tokens: list[int]) -> None:
        """Append what was put into its context."""
        self.tokens += tokens
        self.logps += [0.0] * len(tokens)
        self.drawn_logps += [0.0] * len(tokens)
        self.sampled += [False] * len(tokens)


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the longest token prefix that all prompts share, leaving each at least one token of its own."""
    first, last = min(prompts), max(prompts)  # the two that differ earliest
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return min(shared, min(map(len, prompts)) - 1)
