"""Text protocol: tags (think, search, information, answer), parsing of responses and route calls, neutralised replies.

The router writes `<think>`, `<search> Name: question </search>` and `<answer>`. The reply of the model that it asked
enters the context as `<information>`. This file parses that text (`parse_response`, `parse_route`) and makes external
text safe to enter it (`neutralize`). All functions take time linear in the text. Responses come from a sampler and
replies from the network, so hostile text could stall a pattern that backtracks.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

THINK = "think"
SEARCH = "search"
INFORMATION = "information"
ANSWER = "answer"
KINDS = (THINK, SEARCH, INFORMATION, ANSWER)

# Placeholders of the published prompt's example call. A router that copies them has asked no model.
PLACEHOLDERS = ("llm-name", "your-query")

_TAG = re.compile(rf"<(/?)({'|'.join(KINDS)})>")

# Zero-width and bidirectional marks, variation selectors, fillers and the invisible "tag" block. These characters show
# nothing and can hide a tag from a reader or from a pattern. Control characters other than tab and line breaks, and the
# two non-characters, are removed with them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_LINE_BREAK = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Some tokenizers apply Unicode's compatibility normalisation (NFKC), which turns these characters into < and >.
_ANGLE_BRACKETS = str.maketrans({"\uff1c": "<", "\ufe64": "<", "\uff1e": ">", "\ufe65": ">"})
# Other hyphens and spaces that a model may write in a name; quotes and mark-up that it may write around one.
_PLAIN = str.maketrans({"\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2212": "-", "\u00a0": " ", "\u202f": " "})
_COLON, _ANY_COLON = re.compile(":"), re.compile("[:\uff1a\ufe55]")
_MARKS = " \t\n*_@`\"'[]\u2018\u2019\u201c\u201d"
# Anything without a space between angle brackets, and the protocol's tags also with spaces in them. Not matched are
# "a < b and c > d", "<=>", "<3" and "<->". A match holds no parentheses, so that the output never matches again. The
# quantifiers are possessive (no backtracking) and a match holds no second "<"; so matching takes linear time.
_BRACKETED = re.compile(
    rf"<(\s*+/?+\s*+(?:{'|'.join(KINDS)})\s*+|[^\s<>()=\d-][^\s<>()]*+)>",
    re.IGNORECASE,
)
# What stands between the brackets of a tag of the protocol, of a thought, and of special tokens of known tokenizers.
_SPECIAL = re.compile(
    rf"\s*/?\s*(?:{'|'.join(KINDS)}|thinking|reasoning|thought)\s*|.*\|.*"
    "|/?(?:s|unk|pad|bos|eos|sos|eot|cls|sep|mask|sys|inst|image|img|video|audio|reponame|filename)"
    r"|/?(?:start|end|begin|bos|eos|tool|function|fim|im|vision|image|extra_id|gh|jupyter|issue|repo|file|commit|empty)"
    r"_\w+|unused_?\d+|reserved\w*",
    re.IGNORECASE | re.DOTALL,
)
_SNAKE_CASE = re.compile(r"/?[a-z]+(?:_[a-z0-9]+)+", re.IGNORECASE)  # the form of most other special tokens


@dataclass(frozen=True)
class Tag:
    """One tag in a text: its kind, whether it is a closing tag, and its characters [start, end)."""

    kind: str
    closing: bool
    start: int
    end: int


@dataclass(frozen=True)
class Segment:
    """A part of a response: its kind (one of KINDS, or "text") and the text inside, not stripped."""

    kind: str
    text: str


@dataclass(frozen=True)
class RouteCall:
    """A call that can be made: the model's name as its card declares it, and the question for the model."""

    name: str
    query: str


@dataclass(frozen=True)
class RouteFault:
    """A call that cannot be made: it has not the form `Name: question`, or no card declares the model."""

    reason: Literal["malformed_route", "unknown_model"]


def open_tag(kind: str) -> str:
    """`<kind>`."""
    return f"<{kind}>"


def close_tag(kind: str) -> str:
    """`</kind>`."""
    return f"</{kind}>"


def information_block(reply: str) -> str:
    """The text by which a reply enters the context. `reply` is already neutralised, truncated and stripped."""
    return f"\n\n{open_tag(INFORMATION)} {reply} {close_tag(INFORMATION)}\n\n"


def find_tags(text: str) -> list[Tag]:
    """All tags of `text` in order. A tag is in lower case and holds no space."""
    return [Tag(m[2], m[1] == "/", m.start(), m.end()) for m in _TAG.finditer(text)]


def match_pairs(tags: Sequence[Tag]) -> list[tuple[int, int]]:
    """Pairs (index of the opening tag, index of its closing tag) in `tags`, in order and without overlap.

    An opening tag takes the first closing tag of its own kind behind it. Tags between the two belong to the pair and
    open no pair themselves. An opening tag that is never closed is skipped. These are the pairs that the published
    code's non-greedy pattern `<(kind)>(.*?)</\\1>` finds.
    """
    nearest: dict[str, int] = {}  # kind -> its first closing tag behind the tag that the loop is at
    closing_of: dict[int, int] = {}  # opening tag -> its closing tag, from the last opening tag to the first
    for i in reversed(range(len(tags))):
        if tags[i].closing:
            nearest[tags[i].kind] = i
        elif tags[i].kind in nearest:
            closing_of[i] = nearest[tags[i].kind]
    pairs, end = [], -1
    for opening, closing in reversed(closing_of.items()):
        if opening > end:
            pairs.append((opening, closing))
            end = closing
    return pairs


def parse_response(text: str) -> list[Segment]:
    """Split a response into segments, in order, for display and statistics.

    A pair of tags is one segment, which holds all text between them. If an opening tag is never closed, as in a
    truncated response, its segment ends before the next opening tag or at the end. All other text, stray closing tags
    included, has the kind "text"; if it is only white space, it is dropped.
    """
    tags = find_tags(text)
    closing_of = dict(match_pairs(tags))
    segments: list[Segment] = []

    def add_text(start: int, end: int) -> None:
        if text[start:end].strip():
            segments.append(Segment("text", text[start:end]))

    position = 0  # `segments` holds the text before it
    for i, tag in enumerate(tags):
        if tag.closing or tag.start < position:  # a stray tag, or one inside of a pair
            continue
        add_text(position, tag.start)
        if i in closing_of:
            end, position = tags[closing_of[i]].start, tags[closing_of[i]].end
        else:
            # The loop runs over indices, because a slice of `tags` per unclosed tag would take quadratic time.
            following = (tags[j].start for j in range(i + 1, len(tags)) if not tags[j].closing)
            end = position = next(following, len(text))
        segments.append(Segment(tag.kind, text[tag.end : end]))
    add_text(position, len(text))
    return segments


def parse_route(text: str, names: Sequence[str] | Mapping[str, str], *, exact: bool = False) -> RouteCall | RouteFault:
    """Parse the text inside of a `<search>` block, `Name: question`.

    Args:
        text: the text between the tags.
        names: the declared names, or a mapping from each alias to the declared name, which is accepted too.
        exact: the published rule: the name as declared, but for its case and white space around it, and a plain colon.
            Otherwise the name may also be quoted or marked up ("**Name**", "@Name"), and its hyphens, spaces and the
            colon may be other characters of the same meaning.

    Returns:
        RouteCall with the declared spelling of the name, and all text behind the *first* colon as the query. The name
        must match as a whole. RouteFault "malformed_route" if there is no colon, the query is empty, or the text holds
        a placeholder of the prompt's example. Otherwise RouteFault "unknown_model".
    """
    colon = (_COLON if exact else _ANY_COLON).search(text)
    written, query = (text[: colon.start()], text[colon.end() :].strip()) if colon else (text, "")
    if not exact and written.count("**") == 1:  # "**Name:** question"
        query = query.removeprefix("**").lstrip()
    lowered = text.lower()
    if not query or any(placeholder in lowered for placeholder in PLACEHOLDERS):
        return RouteFault("malformed_route")
    spellings = _declared(names)
    declared = spellings.get(written.strip().lower())
    if declared is None and not exact:
        declared = spellings.get(_plain_name(written))
    return RouteFault("unknown_model") if declared is None else RouteCall(declared, query)


def _plain_name(written: str) -> str:
    """A name in lower case without quotes and mark-up around it, and with plain hyphens and spaces."""
    return written.translate(_PLAIN).strip(_MARKS).lower()


def _declared(names: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Name or alias in lower case -> declared name. No case folding: the published rule does not accept "Inſtruct"."""
    if isinstance(names, str):
        raise TypeError(f"names is the string {names!r}; pass a list of names")
    if isinstance(names, Mapping):
        return {name.lower(): declared for alias, declared in names.items() for name in (declared, alias)}
    return {name.lower(): name for name in names}


def neutralize(text: str) -> str:
    """Make external text safe to enter the context: it then holds no tag and no special token.

    `<think>` and `<|im_end|>` become `(think)` and `(|im_end|)`, also in capitals, in full-width characters and with
    invisible characters inside. Invisible and control characters are dropped, every line break becomes a newline, and a
    lone surrogate becomes U+FFFD. All other text stays, code such as `vector<int>` too. Idempotent.

    As a second lock, a tokenizer should still be told to read such text without special tokens.
    """
    text = _INVISIBLE.sub("", text)
    text = _SURROGATE.sub("\ufffd", text)
    text = _LINE_BREAK.sub("\n", text)
    text = text.translate(_ANGLE_BRACKETS)
    return _BRACKETED.sub(_harmless, text)


def _harmless(match: re.Match[str]) -> str:
    """The bracketed text in parentheses if it may be read as a tag or special token; otherwise as it is."""
    inside = unicodedata.normalize("NFKC", match[1])  # some tokenizers read it so
    before = match.string[max(match.start() - 1, 0) : match.start()]
    is_type = before.isalnum() or before == "_"  # "vector<size_t>"
    if _SPECIAL.fullmatch(inside) or (_SNAKE_CASE.fullmatch(inside) and not is_type):
        return f"({match[1]})"
    return match[0]
