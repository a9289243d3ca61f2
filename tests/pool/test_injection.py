"""Hostile replies against the path that real ones take: the pool's neutralising, the rollout's feed, the parser.

Whatever an external model writes, it stays inside of its information block: it ends no turn, becomes no special token
of the router's tokenizer, and changes nothing in how the response around it is read.
"""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from router_r1_jax.pool.cards import Card
from router_r1_jax.pool.outcomes import Completion, Outcome
from router_r1_jax.pool.pool import _reply
from router_r1_jax.protocol import KINDS, find_tags, parse_response
from router_r1_jax.reward.format import check_format
from router_r1_jax.rollout.automaton import build_automaton, token_bytes
from router_r1_jax.rollout.exchange import STOP_TAGS, reply_ids, route_text

CARD = Card("Titan", "Titan", "p", "titan", 1.0, 1.0, None, {}, "", ())
BUDGET = 24
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<|endoftext|>",
    "</s>",
    "<|pad|>",
    "<|end|>",
]
BEFORE = "<think> a </think> <search> Titan: who? </search>"
AFTER = "<think> b </think> <answer> c </answer>"


@functools.cache
def tokenizer(tags_whole):
    """A byte-level vocabulary, as Qwen's and Llama's are, with their special tokens; perhaps our tags are tokens."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    base = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    base.decoder = decoders.ByteLevel()
    base.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if tags_whole:
        base.add_tokens([AddedToken(f"<{slash}{kind}>", normalized=False) for kind in KINDS for slash in ("", "/")])
    return PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<|im_end|>", pad_token="<|pad|>")


@functools.cache
def automaton(tags_whole):
    tok = tokenizer(tags_whole)
    return build_automaton(STOP_TAGS, token_bytes(tok, len(tok)))


@functools.cache
def special_ids(tags_whole):
    return frozenset(tokenizer(tags_whole).all_special_ids)


tags = st.sampled_from([f"<{slash}{kind}>" for kind in KINDS for slash in ("", "/")])
invisible = st.sampled_from(list("\u200b\u200d\u2060\ufeff\u00ad\u202e\ufe0f\x00\x1b\x7f\u3164\U000e0041"))
WIDE = str.maketrans({c: chr(ord(c) + 0xFEE0) for c in map(chr, range(0x21, 0x7F))})


@st.composite
def disguised(draw):
    """A tag or a special token, perhaps cut, in capitals, spaced, full-width or with invisible characters inside."""
    text = draw(tags | st.sampled_from(SPECIAL))
    how = draw(st.sampled_from(["whole", "half", "upper", "spaced", "wide", "wide brackets", "split", "nested"]))
    at = draw(st.integers(0, len(text)))
    return {
        "whole": text,
        "half": text[at:] if draw(st.booleans()) else text[:at],
        "upper": text.upper(),
        "spaced": text[:at] + " " + text[at:],
        "wide": text.translate(WIDE),
        "wide brackets": text.replace("<", "\uff1c").replace(">", "\ufe65"),
        "split": text[:at] + draw(invisible) + text[at:],
        "nested": text[:at] + draw(tags) + text[at:],
    }[how]


odd = st.sampled_from(
    ["\ud800", "\udcff", "\x00", "\r\n", "\u2028", "<", ">", "</", "(", "é", "Titan: x", "\ufffd", " "]
)
hostile = st.lists(disguised() | odd | st.text(max_size=6), min_size=1, max_size=8).map("".join)


def assert_harmless(text, tags_whole, budget=BUDGET):
    """Neutralise, cut, tokenise and parse as a rollout does."""
    tok = tokenizer(tags_whole)
    reply = _reply(CARD, "who?", Completion(text, Outcome.OK, 1, 1, 0.0, 1), spent=0.0, hit=False)
    ids = reply_ids(tok, reply.text, budget)
    assert not special_ids(tags_whole) & set(ids)
    table, state = automaton(tags_whole).next_state, 0
    for token in ids:
        state = table[state, token]
        assert not 1 <= state <= len(STOP_TAGS), "the reply completes a stop tag"
    block = tok.decode(ids)
    assert [(tag.kind, tag.closing) for tag in find_tags(block)] == [("information", False), ("information", True)]
    response = BEFORE + block + AFTER
    assert [segment.kind for segment in parse_response(response)] == [
        "think",
        "search",
        "information",
        "think",
        "answer",
    ]
    assert [s.text for s in parse_response(response) if s.kind in ("search", "answer")] == [" Titan: who? ", " c "]
    assert (
        check_format(response, ["Titan"]).faults
        == check_format(BEFORE + "<information> x </information>" + AFTER, ["Titan"]).faults
    )
    assert route_text(BEFORE) == " Titan: who? "


@settings(max_examples=300, deadline=None)
@given(text=hostile, tags_whole=st.booleans(), budget=st.integers(1, 40))
def test_no_reply_leaves_its_block(text, tags_whole, budget):
    assert_harmless(text, tags_whole, budget)


@pytest.mark.slow
@settings(max_examples=6000, deadline=None)
@given(text=hostile, tags_whole=st.booleans(), budget=st.integers(1, 40))
def test_no_reply_of_thousands_leaves_its_block(text, tags_whole, budget):
    assert_harmless(text, tags_whole, budget)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=60), tag=tags)
def test_bytes_that_are_no_text_stay_inside(data, tag):
    """As a client decodes them: invalid UTF-8 turned into replacement characters or into lone surrogates."""
    for errors in ("replace", "surrogateescape"):
        assert_harmless(data.decode("utf-8", errors) + tag, True)


@pytest.mark.parametrize(
    "piece", ["a", "<think>", "</search>", "<|im_end|>", "<", "\u200b", "\uff1c/answer\uff1e", "<\u200b/answer>"]
)
def test_a_million_characters_are_cut_to_the_budget(piece):
    assert_harmless(piece * (1_000_000 // len(piece)), True)
    reply = _reply(CARD, "", Completion("a" * 1_000_000, Outcome.OK, 1, 1, 0.0, 1), spent=0.0, hit=False)
    frame = len(reply_ids(tokenizer(True), "", BUDGET))
    assert len(reply_ids(tokenizer(True), reply.text, BUDGET)) == BUDGET + frame
