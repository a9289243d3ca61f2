"""The format rule against the published values, a regular-expression reading of it, and known faults."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_values import FORMATS, NAMES

from router_r1_jax.protocol import RouteCall, information_block, neutralize, parse_route
from router_r1_jax.reward import FAULTS, check_format

KINDS = "think|search|information|answer"
NAME = NAMES[0]


def reference(response: str, strict: bool) -> bool:
    """The rule as one sentence after another, on regular expressions."""
    pairs = re.findall(rf"<({KINDS})>(.*?)</\1>", response, re.DOTALL)
    inside = {kind: [text for k, text in pairs if k == kind] for kind in KINDS.split("|")}
    if not pairs or any(response.count(f"<{k}>") != response.count(f"</{k}>") for k in inside):
        return False
    if any(re.search(rf"</?({KINDS})>", text) for _, text in pairs):
        return False
    if not inside["think"] or any(re.fullmatch(r"\s*(\.\.\.)?\s*", text) for text in inside["think"]):
        return False
    if len(inside["answer"]) != 1 or len(inside["information"]) != len(inside["search"]):
        return False
    if not re.fullmatch(r"\s*<think>.*</answer>\s*", response, re.DOTALL):
        return False
    for text in inside["search"]:
        name, query = re.fullmatch("([^:]*):?(.*)", text, re.DOTALL).groups()
        if not query.strip() or re.search("llm-name|your-query", text, re.IGNORECASE):
            return False
        if name.strip().lower() not in map(str.lower, NAMES):
            return False
        if strict and (":" in query or name.strip().lower() in query.lower()):
            return False
    return True


segments = st.sampled_from(
    [
        "<think>a</think>",
        "<think> ... </think>",
        "<think></think>",
        "<answer>b</answer>",
        "<information>c</information>",
    ]
    + [f"<search>{NAME}: who?</search> <information>c</information>", "\n", "x", "</think>", "<search>", "<answer>"]
)
searches = st.lists(
    st.sampled_from([NAME, NAME.lower(), "Claude", "LLM-Name", "your-query", ":", " ", "who?", "\n", "Oracle"]),
    max_size=5,
).map(lambda parts: f"<search>{''.join(parts)}</search><information>c</information>")
responses = st.lists(segments | searches, max_size=5).map("".join)
well_begun = responses.map(lambda middle: f" <think>a</think>{middle}<think>b</think><answer>c</answer>\n")


@pytest.mark.parametrize("row", FORMATS)
def test_published_values(row):
    report = check_format(row["response"], NAMES)
    assert report.ok == (row["format_reward"] == 0)
    assert report.ok == (not report.faults)


@given(responses | well_begun, st.booleans())
def test_agrees_with_the_rule_read_sentence_by_sentence(response, strict):
    report = check_format(response, NAMES, strict=strict)
    assert report.ok == reference(response, strict)
    assert set(report.faults) <= set(FAULTS)
    assert len(set(report.faults)) == len(report.faults)


@given(searches)
def test_without_strictness_a_search_is_well_formed_where_the_call_would_be_made(search):
    inside = search.partition("<search>")[2].partition("</search>")[0]
    report = check_format(f"<think>a</think>{search}<answer>c</answer>", NAMES, strict=False)
    assert report.ok == isinstance(parse_route(inside, NAMES), RouteCall)


def episode(search: str = f"{NAME}: who?", reply: str = "c") -> str:
    return f"<think>a</think><search>{search}</search><information>{reply}</information><answer>d</answer>"


@pytest.mark.parametrize(
    ("response", "faults"),
    [
        (episode(), ()),
        ("", ("no_tags", "no_think", "no_answer", "wrong_start", "wrong_end")),
        ("<think>a</think><think>b<answer>c</answer>", ("unbalanced_tags",)),
        ("<think>a<search>b</search></think><answer>c</answer>", ("nested_tags",)),
        ("<think>a<search>b</think></search><answer>c</answer>", ("nested_tags",)),
        ("<think>a</think><think>\n</think><answer>c</answer>", ("empty_think",)),
        ("<think>a</think><answer>b</answer><answer>b</answer>", ("several_answers",)),
        (f"<think>a</think><search>{NAME}: b</search><answer>c</answer>", ("unanswered_search",)),
        ("so <think>a</think><answer>b</answer>", ("wrong_start",)),
        ("<think>a</think><answer>b</answer>!", ("wrong_end",)),
        (episode("who?"), ("malformed_route",)),
        (episode("Claude: who?"), ("unknown_model",)),
        (episode(f"{NAME}: who: me"), ("several_colons",)),
        (episode(f"{NAME}: ask {NAME.upper()}"), ("name_in_query",)),
    ],
)
def test_each_fault_has_its_name(response, faults):
    assert check_format(response, NAMES).faults == faults


def test_loose_rule_allows_what_only_parity_forbids():
    assert check_format(episode(f"{NAME}: who: me, {NAME}?"), NAMES, strict=False).ok


def test_an_alias_is_a_known_name():
    assert check_format(episode("q: who?"), {"q": NAME}).faults == ()
    assert check_format(episode("q: is q known?"), {"q": NAME}).faults == ("name_in_query",)


@pytest.mark.parametrize("name", ["Qwen2.5-7B", "My Qwen2.5-7B-Instruct", "Instruct"])
def test_a_part_of_a_name_is_unknown(name):
    assert check_format(episode(f"{name}: who?"), NAMES).faults == ("unknown_model",)


@given(st.lists(st.sampled_from([f"<{k}>" for k in KINDS.split("|")] + [f"</{k}>" for k in KINDS.split("|")] + ["x"])))
def test_a_tag_inside_of_a_reply_is_not_the_policys(parts):
    """The published code charged the policy for what the external model wrote."""
    block = information_block(neutralize("".join(parts)))
    assert check_format(f"<think>a</think><search>{NAME}: b</search>{block}<answer>c</answer>", NAMES).ok


@pytest.mark.parametrize("piece", ["<think>", "</think>", "<search>", "<think></search>", "<search>:</search>", "<"])
def test_a_megabyte_of_anything_is_checked(piece):
    """A pattern that looks for the closing tag anew from each opening one would never end."""
    assert not check_format(piece * (1_000_000 // len(piece)), NAMES).ok
