"""Is a response well-formed? The published rule, with a name for each way to break it.

The rule reads the whole response, replies included, and can only do so because replies are neutralised before they
enter it (`protocol.neutralize`): otherwise a tag in somebody else's text would be charged to the policy.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router_r1_jax.protocol import (
    ANSWER,
    INFORMATION,
    KINDS,
    SEARCH,
    THINK,
    RouteFault,
    close_tag,
    find_tags,
    match_pairs,
    open_tag,
    parse_route,
)

# Every name that FormatReport.faults can hold, in the order in which it holds them.
FAULTS = (
    "no_tags",  # no pair at all
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
    "unknown_model",  # a search that asks a model nobody declared
    "several_colons",  # a search with more than one colon; strict only
    "name_in_query",  # a search whose query repeats the model's name; strict only
)


@dataclass(frozen=True)
class FormatReport:
    """Whether a response is well-formed, and the names (of FAULTS, each at most once) of what is wrong with it."""

    ok: bool
    faults: tuple[str, ...]


def check_format(response: str, names: Sequence[str] | Mapping[str, str], *, strict: bool = True) -> FormatReport:
    """Judge the form of a response.

    Args:
        response: all text behind the prompt, replies included.
        names: the models that may be asked, as for `protocol.parse_route`.
        strict: the published rule. False allows later colons in a query and the model's name in it; then a search is
            well-formed exactly where `parse_route` would make the call.
    """
    tags = find_tags(response)
    pairs = match_pairs(tags)
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
        "wrong_start": not stripped.startswith(open_tag(THINK)),
        "wrong_end": not stripped.endswith(close_tag(ANSWER)),
    }
    found = {_search_fault(search, names, strict) for search in inside[SEARCH]}
    faults = tuple(name for name in FAULTS if broken.get(name) or name in found)
    return FormatReport(ok=not faults, faults=faults)


def _search_fault(search: str, names: Sequence[str] | Mapping[str, str], strict: bool) -> str | None:
    """The first fault of what stands in one search segment, or None."""
    route = parse_route(search, names)
    if isinstance(route, RouteFault):
        return route.reason
    if not strict:
        return None
    if ":" in route.query:
        return "several_colons"
    # The name as it is written, not as it is declared: a query may mention a model whose alias was used.
    written = search.partition(":")[0].strip()
    return "name_in_query" if written.lower() in route.query.lower() else None
