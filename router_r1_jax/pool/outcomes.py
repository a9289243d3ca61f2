"""How a call to an external model can end: its outcome, what a provider gave, what the router gets, and the error that
ends a run. A fault of the router (the policy) and a fault of a provider are kept apart everywhere.
"""

import enum
from dataclasses import dataclass


class Outcome(enum.StrEnum):
    """How one call ended."""

    OK = "ok"
    TRUNCATED = "truncated"  # the model was cut at max_tokens; its text is used
    EMPTY = "empty"  # the model answered and gave no text; its tokens are charged
    REFUSED = "refused"  # the model, or the filter before it, would not answer; its tokens are charged
    TIMEOUT = "timeout"
    UNAVAILABLE = "unavailable"  # no connection, HTTP 5xx, or an answer that is not a chat completion
    RATE_LIMITED = "rate_limited"
    BAD_REQUEST = "bad_request"  # the provider refuses the request as it stands: key, model id, parameters
    OVER_BUDGET = "over_budget"  # not asked: the run has spent pool.budget, and ends
    UNKNOWN_MODEL = "unknown_model"
    MALFORMED_ROUTE = "malformed_route"


# What the router reads in place of a reply.
FAULT_TEXT = {
    Outcome.EMPTY: "The model gave no text.",
    Outcome.REFUSED: "The model refused to answer.",
    Outcome.TIMEOUT: "The model could not be reached.",
    Outcome.UNAVAILABLE: "The model could not be reached.",
    Outcome.RATE_LIMITED: "The model could not be reached.",
    Outcome.BAD_REQUEST: "The model could not be reached.",
    Outcome.OVER_BUDGET: "The model could not be reached.",
    Outcome.UNKNOWN_MODEL: "No model of this name.",
    Outcome.MALFORMED_ROUTE: "A call is a name, a colon and a question.",
}

_PROVIDER_FAULTS = frozenset(
    {Outcome.TIMEOUT, Outcome.UNAVAILABLE, Outcome.RATE_LIMITED, Outcome.BAD_REQUEST, Outcome.OVER_BUDGET}
)


def provider_fault(outcome: Outcome) -> bool:
    """Whether no answer came and the router is not to blame: nothing is charged to it, and the episode is left out of
    the loss or weighs less in it."""
    return outcome in _PROVIDER_FAULTS


class PoolError(RuntimeError):
    """The pool cannot work. One line that names what, where and the fix."""


@dataclass(frozen=True)
class Completion:
    """What a provider gave for one query. Tokens are 0 and the text is empty where `outcome` is a provider's fault.

    `latency` is seconds from the call to its end, retries and pauses included; `attempts` counts HTTP requests;
    `error` says in a few words what went wrong last. `cached_tokens` of the prompt came from the provider's cache;
    `wasted_*` were used by further requests of the same call, whose answers are not this one: unreadable ones, and a
    hedge's slower one. `served` is the model's name as the server reports it.
    """

    text: str
    outcome: Outcome
    prompt_tokens: int
    completion_tokens: int
    latency: float
    attempts: int
    error: str = ""
    cached_tokens: int = 0
    wasted_prompt_tokens: int = 0
    wasted_completion_tokens: int = 0
    served: str = ""


@dataclass(frozen=True)
class Reply:
    """The answer to one route call.

    Attributes:
      text: what enters the context; external text is neutralised and stripped, a fault is a short sentence.
      outcome: how the call ended.
      model: `Card.key` of the model that was asked, "" for a fault of the policy.
      query: the question; for a fault of the policy the call as it was written.
      prompt_tokens: tokens of the query, as the provider counts them.
      completion_tokens: tokens of the reply, as the provider counts them.
      raw_cost: completion tokens x dollars per million output tokens, the unit of the paper's cost reward.
      charged: dollars at the card's prices, both directions, whether paid or taken from the tape.
      spent: dollars really paid, by the tokens that the provider counted: 0 for a reply from the tape, more than
        `charged` where further requests of the call used tokens too, and less where the card prices cached tokens.
      latency: seconds that the call took when it was made, retries included.
      attempts: HTTP requests made.
      hit: whether the reply came from the tape.
      error: what went wrong, in a few words, "" where nothing did.
      cached_tokens: tokens of the query that came from the provider's cache; they are charged at full price.
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
