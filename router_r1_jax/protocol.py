"""The text protocol between router, external models and reward: the four tags and one route call.

The router writes `<think>`, `<search> Name: question </search>` and `<answer>`; the reply of the model it asked enters
the context as `<information>`. This file reads that text (`parse_response`, `parse_route`) and makes external text safe
to stand in it (`neutralize`). Everything runs in time linear in the text: responses come from a sampler and replies
from the network, so a pattern that backtracks would be an invitation.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

THINK = "think"
SEARCH = "search"
INFORMATION = "information"
ANSWER = "answer"
KINDS = (THINK, SEARCH, INFORMATION, ANSWER)

# What the prompt's example call looks like. A router that copies it has asked nobody anything.
PLACEHOLDERS = ("llm-name", "your-query")

_TAG = re.compile(rf"<(/?)({'|'.join(KINDS)})>")

# Zero-width and bidirectional marks, variation selectors, fillers and the invisible "tag" block: characters that show
# nothing and can hide a tag from a reader or from a pattern. Control characters other than tab and line breaks,
# and the two non-characters, go the same way.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_LINE_BREAK = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_SURROGATE = re.compile("[\ud800-\udfff]")
# The characters that Unicode's compatibility normalisation (NFKC), which some tokenizers apply, turns into < and >.
_ANGLE_BRACKETS = str.maketrans({"\uff1c": "<", "\ufe64": "<", "\uff1e": ">", "\ufe65": ">"})
# One of our tags, also with spaces in it; or anything without a space between angle brackets, which covers the special
# tokens of chat templates (<|im_end|>, </s>, <start_of_turn>) of whatever tokenizer. Left alone: "a < b and c > d",
# "<=>", "<3", "<->". Parentheses are outside the pattern so that its own output never matches again. The quantifiers
# are possessive (no way back) and a match cannot contain "<", hence linear time.
_TAG_LIKE = re.compile(
    rf"<(\s*+/?+\s*+(?:{'|'.join(KINDS)})\s*+|[^\s<>()=\d-][^\s<>()]*+)>",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Tag:
    """One tag in a text: its kind, whether it closes, and the character range [start, end) that it covers."""

    kind: str
    closing: bool
    start: int
    end: int


@dataclass(frozen=True)
class Segment:
    """A stretch of a response: kind (one of KINDS, or "text") and the text inside, not stripped."""

    kind: str
    text: str


@dataclass(frozen=True)
class RouteCall:
    """A call that can be made: the model's name as its card declares it, and the question for it."""

    name: str
    query: str


@dataclass(frozen=True)
class RouteFault:
    """A call that cannot be made: not of the form `Name: question`, or to a model that nobody declared."""

    reason: Literal["malformed_route", "unknown_model"]


def open_tag(kind: str) -> str:
    """`<kind>`."""
    return f"<{kind}>"


def close_tag(kind: str) -> str:
    """`</kind>`."""
    return f"</{kind}>"


def information_block(reply: str) -> str:
    """How a reply enters the context. `reply` is neutralised, cut to its budget and stripped already."""
    return f"\n\n{open_tag(INFORMATION)} {reply} {close_tag(INFORMATION)}\n\n"


def find_tags(text: str) -> list[Tag]:
    """All tags of `text` in order; tags are lower case and hold no space."""
    return [Tag(m[2], m[1] == "/", m.start(), m.end()) for m in _TAG.finditer(text)]


def match_pairs(tags: Sequence[Tag]) -> list[tuple[int, int]]:
    """Pairs (index of the opening tag, index of its closing tag) in `tags`, in order and without overlap.

    An opening tag takes the first closing tag of its own kind behind it; what lies between belongs to the pair and
    opens no pair itself. An opening tag that is never closed is passed over. This is what the published code's
    non-greedy pattern `<(kind)>(.*?)</\\1>` finds.
    """
    closing = {kind: [i for i, tag in enumerate(tags) if tag.closing and tag.kind == kind] for kind in KINDS}
    passed = dict.fromkeys(KINDS, 0)  # closing tags of each kind that lie behind us; only grows, hence linear time
    pairs = []
    i = 0
    while i < len(tags):
        kind = tags[i].kind
        if not tags[i].closing:
            candidates = closing[kind]
            while passed[kind] < len(candidates) and candidates[passed[kind]] < i:
                passed[kind] += 1
            if passed[kind] < len(candidates):
                pairs.append((i, candidates[passed[kind]]))
                i = candidates[passed[kind]]
        i += 1
    return pairs


def parse_response(text: str) -> list[Segment]:
    """Cut a response into segments, in order, for display and statistics.

    A pair of tags is one segment, with whatever lies between them. An opening tag that is never closed (a truncated
    response) holds everything up to the next opening tag or the end. All else is kind "text", a stray closing tag
    included; text of white space alone is dropped.
    """
    tags = find_tags(text)
    closing_of = dict(match_pairs(tags))
    segments: list[Segment] = []

    def add_text(start: int, end: int) -> None:
        if text[start:end].strip():
            segments.append(Segment("text", text[start:end]))

    position = 0  # everything before it is in `segments`
    for i, tag in enumerate(tags):
        if tag.closing or tag.start < position:  # stray, or inside of a pair
            continue
        add_text(position, tag.start)
        if i in closing_of:
            end, position = tags[closing_of[i]].start, tags[closing_of[i]].end
        else:
            # An index, not a slice of `tags`: a copy per unclosed tag would take quadratic time.
            following = (tags[j].start for j in range(i + 1, len(tags)) if not tags[j].closing)
            end = position = next(following, len(text))
        segments.append(Segment(tag.kind, text[tag.end : end]))
    add_text(position, len(text))
    return segments


def parse_route(text: str, names: Sequence[str] | Mapping[str, str]) -> RouteCall | RouteFault:
    """Read the inside of a `<search>` block, `Name: question`.

    Args:
        text: what lies between the tags.
        names: the declared names, or a mapping from each alias to the declared name (which is itself accepted too).

    Returns:
        RouteCall with the declared spelling of the name, which must match as a whole except for case and white space
        around it, and everything behind the *first* colon as the query. RouteFault "malformed_route" without a colon,
        with an empty query or with a placeholder of the prompt's example; else "unknown_model".
    """
    written, colon, query = text.partition(":")
    query = query.strip()
    lowered = text.lower()
    if not colon or not query or any(placeholder in lowered for placeholder in PLACEHOLDERS):
        return RouteFault("malformed_route")
    declared = _declared(names).get(written.strip().lower())
    return RouteFault("unknown_model") if declared is None else RouteCall(declared, query)


def _declared(names: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Name or alias in lower case -> declared name. Not case-folded: the published rule knows no "Inſtruct"."""
    if isinstance(names, str):
        raise TypeError(f"names is the string {names!r}; pass a list of names")
    if isinstance(names, Mapping):
        return {name.lower(): declared for alias, declared in names.items() for name in (declared, alias)}
    return {name.lower(): name for name in names}


def neutralize(text: str) -> str:
    """External text that can stand in the context: it opens and closes no tag and spells no special token.

    `<think>` and `<|im_end|>` become `(think)` and `(|im_end|)`, also in capitals, in full-width characters and with
    invisible characters inside. Invisible and control characters are dropped, every line break becomes a newline,
    a lone surrogate becomes U+FFFD. All else stays. Idempotent.

    A tokenizer should still be told to read such text without special tokens: two locks are better than one.
    """
    text = _INVISIBLE.sub("", text)
    text = _SURROGATE.sub("\ufffd", text)
    text = _LINE_BREAK.sub("\n", text)
    text = text.translate(_ANGLE_BRACKETS)
    return _TAG_LIKE.sub(r"(\1)", text)
