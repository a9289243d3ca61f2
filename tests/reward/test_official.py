"""The whole official reward against section 6 of the design, written down a second time, character by character.

Nothing is shared with the package: no pattern, no table, no running window. It is checked against the published values
itself, and then both are tried on text that is made to tell them apart.
"""

import string

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from published_values import FORMATS, NAMES, REWARDS

from router_r1_jax.reward import CostNormalizer, check_format, extract_answer, score

KINDS = ("think", "search", "information", "answer")


def pairs_of(text):
    """(kind, inside) of each opening tag that finds its own closing one, left to right, without overlap."""
    pairs, at = [], 0
    while at < len(text):
        for kind in KINDS:
            opening, closing = f"<{kind}>", f"</{kind}>"
            if text.startswith(opening, at):
                end = text.find(closing, at + len(opening))
                if end >= 0:
                    pairs.append((kind, text[at + len(opening) : end]))
                    at = end + len(closing) - 1
        at += 1
    return pairs


def well_formed(response):
    pairs, inside = pairs_of(response), {kind: [] for kind in KINDS}
    for kind, text in pairs:
        if any(tag in text for k in KINDS for tag in (f"<{k}>", f"</{k}>")):
            return False
        inside[kind].append(text)
    balanced = all(response.count(f"<{kind}>") == response.count(f"</{kind}>") for kind in KINDS)
    thoughts = [text.strip() for text in inside["think"]]
    stripped = response.strip()
    return bool(
        pairs
        and balanced
        and thoughts
        and "" not in thoughts
        and "..." not in thoughts
        and len(inside["answer"]) == 1
        and len(inside["information"]) == len(inside["search"])
        and stripped[:7] == "<think>"
        and stripped[-9:] == "</answer>"
        and all(map(right_search, inside["search"]))
    )


def right_search(text):
    if text.count(":") != 1 or "llm-name" in text.lower() or "your-query" in text.lower():
        return False
    name, query = (part.strip().lower() for part in text.split(":"))
    return query != "" and name in [known.lower() for known in NAMES] and name not in query


def words_of(text):
    """Lower case, no ASCII punctuation; articles are whole runs of letters, digits and underscores."""
    kept, run = "", ""
    for char in "".join(c for c in text.lower() if c not in string.punctuation) + "\n":
        if char.isalnum() or char == "_":
            run += char
        else:
            kept, run = kept + (" " if run in ("a", "an", "the") else run) + char, ""
    return kept.split()


def f1_of(ours, theirs):
    closed = (["yes"], ["no"], ["noanswer"])
    if ours != theirs and (ours in closed or theirs in closed):
        return 0.0
    left, common = list(theirs), 0
    for word in ours:
        if word in left:
            left.remove(word)
            common += 1
    return 0.0 if common == 0 else 2 * common / (len(ours) + len(theirs))


def answer_of(response):
    """Inside of the last answer pair, whatever else there is."""
    parts, found, at = response, None, 0
    while (start := parts.find("<answer>", at)) >= 0 and (end := parts.find("</answer>", start)) >= 0:
        found, at = parts[start + 8 : end].strip(), end + 9
    return found


def rewards_of(responses, golds, raw_costs, alpha, metric):
    """Total of each, in order, with one window of the last 1000 costs."""
    seen, totals = [], []
    for response, accepted, raw in zip(responses, golds, raw_costs, strict=True):
        seen = [*seen, raw**0.5][-1000:]
        low, high = np.percentile(seen, [5, 95])
        cheap = 0.5 if high - low < 1e-8 else 1 - min(max((seen[-1] - low) / (high - low), 0), 1)
        answer = answer_of(response)
        outcome = 0.0
        if answer is not None:
            ours, each = words_of(answer), [words_of(gold) for gold in accepted]
            outcome = float(ours in each) if metric == "em" else max((f1_of(ours, gold) for gold in each), default=0.0)
        right = (1 - alpha) * outcome + alpha * cheap if outcome > 0 else 0.0
        totals.append(right if well_formed(response) else -1.0)
    return totals


def test_the_second_reading_has_the_published_values():
    for row in FORMATS:
        assert well_formed(row["response"]) == (row["format_reward"] == 0), row
    for alpha, metric in {(row["alpha"], row["metric"]) for row in REWARDS}:
        columns = ([row[name] for row in REWARDS] for name in ("response", "golds", "raw_cost"))
        totals = rewards_of(*columns, alpha, metric)
        rows = [i for i, row in enumerate(REWARDS) if (row["alpha"], row["metric"]) == (alpha, metric)]
        assert [totals[i] for i in rows] == pytest.approx([REWARDS[i]["reward"] for i in rows], abs=1e-12)


# What Python calls white space, in and beside ASCII, and what only looks like it.
spaces = st.sampled_from([" ", "\n", "\t", "\x0b", "\x1c", "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u3000"])
blanks = st.sampled_from(["", "\u200b", "\ufeff", "\u180e"]) | spaces
odd = st.sampled_from(
    [
        "<",
        ">",
        "</",
        "<Think>",
        "<think >",
        "< answer>",
        "</ANSWER>",
        "...",
        "....",
        ". . .",
        "\u2026",
        ":",
        "::",
        "\uff1a",
        "\x00",
        "\ud800",
        "<information",
        "a",
        "The",
        "\u0130",
        "\u212a",
        "\xdf",
        "_the_",
        "a-b",
        "d'a",
    ]
)
tags = st.sampled_from([f"<{slash}{kind}>" for kind in KINDS for slash in ("", "/")])
name = st.sampled_from(NAMES).flatmap(
    lambda n: st.sampled_from(
        [
            n,
            n.lower(),
            n.upper(),
            n.swapcase(),
            n[:-1],
            f"{n}2",
            f"my {n}",
            n.replace("s", "\u017f"),
            n.replace("-", " "),
        ]
    )
)
others = st.sampled_from(["", "Claude", "LLM-Name", "llm-NAME", "your-query"])
query = st.lists(st.sampled_from(["who", "is he?", "YOUR-query", ":", "10:30"]) | name | spaces | odd, max_size=3)
texts = st.lists(st.sampled_from(["Paris", "yes", "no", "noanswer", "in", "7"]) | spaces | odd, max_size=4).map("".join)


@st.composite
def search(draw):
    """A call, right or wrong in one way or in many."""
    who, what, colon = draw(name), "who?", ":"
    how = draw(st.sampled_from(["right", "colons", "repeated name", "anything"]))
    if how == "colons":
        what = "at 10:30?"
    elif how == "repeated name":
        what = f"is {draw(blanks)}{who.upper()} he?"
    elif how == "anything":
        who, what, colon = draw(others | name), "".join(draw(query)), draw(st.sampled_from(["", ":", "::", "\uff1a"]))
    return f"<search>{draw(blanks)}{who}{draw(blanks)}{colon}{draw(blanks)}{what}{draw(blanks)}</search>"


plain_search = st.sampled_from(NAMES).map(lambda n: f"<search> {n.upper()} :\u2003who?</search>")
reply = texts.map(lambda text: f"<information>{text}</information>")
plain = plain_search.map(lambda call: f"{call}<information>c</information>") | st.just("<think>b</think>")
parts = (
    plain
    | plain
    | texts.map(lambda text: f"<think>so {text}</think>")
    | texts.map(lambda text: f"<think>{text}</think>")
    | st.tuples(search() | plain_search, blanks, reply).map("".join)
    | blanks
)


@st.composite
def responses(draw):
    """A response that is right or nearly: its parts in order, and perhaps one piece put in or cut out anywhere."""
    middle = "".join(draw(st.lists(parts, max_size=4)))
    whole = f"{draw(blanks)}<think>a</think>{middle}<answer>{draw(blanks)}{draw(texts)}</answer>{draw(blanks)}"
    at = draw(st.integers(0, len(whole)))
    change = draw(st.sampled_from(["none", "none", "insert", "cut", "double"]))
    if change == "insert":
        return whole[:at] + draw(tags | odd | spaces) + whole[at:]
    if change == "cut":
        return whole[:at] + whole[at + draw(st.integers(1, 12)) :]
    return whole[:at] + whole[draw(st.integers(0, at)) :] if change == "double" else whole


framed = search().map(lambda call: f"<think>a</think>{call}<information>c</information><answer>d</answer>")
soup = st.lists(tags | tags | odd | spaces | name, max_size=14).map("".join)
episodes = st.tuples(responses() | framed | soup, st.lists(texts | st.just("Paris"), max_size=3), st.integers(0, 10**6))


@settings(max_examples=600, deadline=None)
@given(st.lists(episodes, min_size=1, max_size=6), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from(["em", "f1"]))
@example(
    [
        (
            "<think>a</think><search>Qwen2.5-7B-In\u017ftruct: b</search>"
            "<information>c</information><answer>d</answer>",
            ["d"],
            1,
        )
    ],
    0.0,
    "em",
)
@example([("<think>a</think><think><think>b</think></think><answer>d</answer>", ["d"], 1)], 0.0, "em")
def test_both_readings_agree(rows, alpha, metric):
    said, golds, costs = ([row[i] for row in rows] for i in range(3))
    for response in said:
        assert check_format(response, NAMES).ok == well_formed(response)
        assert extract_answer(response) == answer_of(response)
    rewards = score(said, golds, np.array(costs), NAMES, alpha=alpha, metric=metric, normalizer=CostNormalizer())
    assert rewards.total == pytest.approx(rewards_of(said, golds, costs, alpha, metric), abs=1e-9)


def test_the_texts_reach_both_sides_of_every_rule():
    """Else two readings that call everything malformed would agree as well."""
    seen, formed = set(), 0

    @settings(max_examples=400, deadline=None, database=None, derandomize=True)
    @given(responses(), framed)
    def look(whole, call):
        nonlocal formed
        for response in (whole, call):
            report = check_format(response, NAMES)
            formed += report.ok and "<search>" in response
            seen.update(report.faults)

    look()
    assert formed >= 20
    assert seen >= {
        "unbalanced_tags",
        "nested_tags",
        "empty_think",
        "unanswered_search",
        "wrong_start",
        "wrong_end",
        "malformed_route",
        "unknown_model",
        "several_colons",
        "name_in_query",
    }
