"""Format check: whether a response is well-formed by the published rule, and the name of each fault.

The rule reads the whole response, replies included. This is fair only because replies are neutralised before they enter
the response (`protocol.neutralize`). Otherwise a tag in a model's reply would count as the policy's fault.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router_r1_jax import protocol
from router_r1_jax.protocol import ANSWER, INFORMATION, KINDS, SEARCH, THINK

# All names that FormatReport.faults can hold, in this order.
FAULTS = (
    "no_tags",  # no pair of tags at all
    "unbalanced_tags",  # a kind is opened more or less often than closed
    "nested_tags",  # a tag inside of a pair
    "no_think",
    "empty_think",  # nothing inside, or "..."
    "no_answer",
    "several_answers",
    "unanswered_search",  # not as many information as search segments
    "wrong_start",  # something before the first <think>
    "wrong_end",  # something behind the last </answer>
    "malformed_route",  # a search without colon or query, or with a placeholder
    "unknown_model",  # a search for a model that is not declared
    "several_colons",  # a search with more than one colon; strict only
    "name_in_query",  # a search whose query repeats the model's name; strict only
)


@dataclass(frozen=True)
class FormatReport:
    """Whether a response is well-formed, and its faults: names of FAULTS, each at most once."""

    ok: bool
    faults: tuple[str, ...]


def check_format(response: str, names: Sequence[str] | Mapping[str, str], *, strict: bool = True) -> FormatReport:
    """Check the format of a response.

    Args:
        response: all text behind the prompt, replies included.
        names: the models that may be asked, as for `protocol.parse_route`.
        strict: the published rule. False allows later colons in a query and the model's name in it. Then a search is
            well-formed exactly if `parse_route` would make the call.
    """
    tags = protocol.find_tags(response)
    pairs = protocol.match_pairs(tags)
    inside: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for i, j in pairs:
        inside[tags[i].kind].append(response[tags[i].end : tags[j].start].strip())
    balance = Counter()
    for tag in tags:
        balance[tag.kind] += -1 if tag.closing else 1
    stripped = response.strip()
    broken = {
        "no_tags": not pairs,
        "unbalanced_tags": any(balance.values()),
        "nested_tags": any(j > i + 1 for i, j in pairs),
        "no_think": not inside[THINK],
        "empty_think": any(thought in ("", "...") for thought in inside[THINK]),
        "no_answer": not inside[ANSWER],
        "several_answers": len(inside[ANSWER]) > 1,
        "unanswered_search": len(inside[SEARCH]) != len(inside[INFORMATION]),
        "wrong_start": not stripped.startswith(protocol.open_tag(THINK)),
        "wrong_end": not stripped.endswith(protocol.close_tag(ANSWER)),
    }
    found = {_search_fault(search, names, strict) for search in inside[SEARCH]}
    faults = tuple(name for name in FAULTS if broken.get(name) or name in found)
    return FormatReport(ok=not faults, faults=faults)


def _search_fault(search: str, names: Sequence[str] | Mapping[str, str], strict: bool) -> str | None:
    """The first fault inside one search segment, or None."""
    route = protocol.parse_route(search, names, exact=strict)
    if isinstance(route, protocol.RouteFault):
        return route.reason
    if not strict:
        return None
    if ":" in route.query:
        return "several_colons"
    # The name as the search writes it, which can be an alias. A query may mention the declared name of that alias.
    written = search.partition(":")[0].strip()
    return "name_in_query" if written.lower() in route.query.lower() else None
