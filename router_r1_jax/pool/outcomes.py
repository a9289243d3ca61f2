"""Outcomes of a call to an external model: Outcome, the provider's Completion, the router's Reply, and PoolError.

A fault of the router (the policy) and a fault of a provider are different outcomes.
"""

import enum
from dataclasses import dataclass

from router_r1_jax.errors import UserError


class Outcome(enum.StrEnum):
    """How one call ended."""

    OK = "ok"
    TRUNCATED = "truncated"  # the model stopped at max_tokens; its text is used
    EMPTY = "empty"  # the model answered without text; its tokens are charged
    REFUSED = "refused"  # the model, or a content filter before it, refused to answer; its tokens are charged
    TIMEOUT = "timeout"
    UNAVAILABLE = "unavailable"  # no connection, HTTP 5xx, or an answer that is no chat completion
    RATE_LIMITED = "rate_limited"
    BAD_REQUEST = "bad_request"  # the provider refuses the request itself: its key, credits, model id or parameters
    OVER_BUDGET = "over_budget"  # no request is sent because the run has spent pool.budget; the run ends
    UNKNOWN_MODEL = "unknown_model"
    MALFORMED_ROUTE = "malformed_route"


_PROVIDER_FAULTS = frozenset(
    {Outcome.TIMEOUT, Outcome.UNAVAILABLE, Outcome.RATE_LIMITED, Outcome.BAD_REQUEST, Outcome.OVER_BUDGET}
)
HAS_TEXT = frozenset({Outcome.OK, Outcome.TRUNCATED})  # the router reads the model's text
# The router reads these sentences instead of a reply.
FAULT_TEXT = dict.fromkeys(_PROVIDER_FAULTS, "The model could not be reached.") | {
    Outcome.EMPTY: "The model gave no text.",
    Outcome.REFUSED: "The model refused to answer.",
    Outcome.UNKNOWN_MODEL: "No model of this name.",
    Outcome.MALFORMED_ROUTE: "A call is a name, a colon and a question.",
}


def provider_fault(outcome: Outcome) -> bool:
    """Whether the call failed without fault of the router.

    Nothing is charged then, and the episode is left out of the loss or gets a smaller weight in it.
    """
    return outcome in _PROVIDER_FAULTS


class PoolError(UserError, RuntimeError):
    """The pool cannot work. The message is one line that names the cause, the place and the fix."""


@dataclass(frozen=True)
class Completion:
    """What a provider returned for one query.

    Attributes:
      text: the model's text, "" after a provider's fault.
      outcome: how the call ended.
      prompt_tokens: tokens of the query, 0 after a provider's fault.
      completion_tokens: tokens of the text, 0 after a provider's fault.
      latency: seconds from the start of the call to its end, retries and pauses included.
      attempts: number of HTTP requests.
      error: the last error in a few words, "" if there was none.
      cached_tokens: how many of the prompt tokens came from the provider's prompt cache.
      wasted_prompt_tokens: prompt tokens of failed requests of this call, as far as the provider counted them.
      wasted_completion_tokens: completion tokens of failed requests of this call, as far as the provider counted them.
      served: the model's name as the provider reports it.
      thought: what a reasoning model thought before its text, if the provider shows it. It is no part of `text`.
      estimated: whether a token count is our estimate, because the provider gave none that can be true.
    """

    text: str
    outcome: Outcome
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latency: float = 0.0
    attempts: int = 1
    error: str = ""
    cached_tokens: int = 0
    wasted_prompt_tokens: int = 0
    wasted_completion_tokens: int = 0
    served: str = ""
    thought: str = ""
    estimated: bool = False


@dataclass(frozen=True)
class Reply:
    """The answer to one route call.

    Attributes:
      text: what enters the context. Tags in external text are neutralised; a fault becomes a short sentence.
      outcome: how the call ended.
      model: `Card.key` of the model that was asked, "" after a fault of the policy.
      query: the question; after a fault of the policy the call as it was written.
      prompt_tokens: tokens of the query, as the provider counts them.
      completion_tokens: tokens of the reply, as the provider counts them.
      raw_cost: completion tokens x dollars per million output tokens, the unit of the paper's cost reward.
      charged: dollars at the card's prices for both directions. It does not matter whether the call was paid or came
        from the call cache.
      spent: dollars really paid. It is 0 for a hit, more than `charged` if failed requests of
        the call used tokens too, and less if the provider had cached the prompt.
      latency: seconds that the call took when it was made, retries included.
      attempts: number of HTTP requests.
      hit: whether the reply came from the call cache or from another row's equal request.
      error: the last error in a few words, "" if there was none.
      cached_tokens: how many of the prompt tokens came from the provider's prompt cache; they are charged in full.
      thought: what the model thought before its text, for the report; the router never sees it.
      estimated: whether a token count is our estimate, because the provider gave none that can be true.
    """

    text: str
    outcome: Outcome
    model: str = ""
    query: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    raw_cost: float = 0.0
    charged: float = 0.0
    spent: float = 0.0
    latency: float = 0.0
    attempts: int = 0
    hit: bool = False
    error: str = ""
    cached_tokens: int = 0
    thought: str = ""
    estimated: bool = False
