"""Hostile replies against the path that real ones take: the pool's neutralising, the rollout's feed, the parser.

Whatever an external model writes, it stays inside of its information block: it ends no turn, becomes no special token
of the router's tokenizer, and changes nothing in how the response around it is read.
"""

import functools
import itertools
import re
from concurrent.futures import Future

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from router_r1_jax.distributed.mesh import make_mesh
from router_r1_jax.model import ModelConfig, init_params
from router_r1_jax.pool.cards import Card
from router_r1_jax.pool.outcomes import Completion, Outcome
from router_r1_jax.pool.pool import make_reply
from router_r1_jax.protocol import KINDS, find_tags, information_block, parse_response
from router_r1_jax.reward.format import check_format
from router_r1_jax.rollout import Engine, EpisodeLimits, Prompt, StaticShapes, common_prefix
from router_r1_jax.rollout.host_callback import reply_ids, route_text
from router_r1_jax.rollout.stop_tags import STOP_TAGS, build_automaton, token_bytes

CARD = Card("Titan", "Titan", "p", "titan", 1.0, 1.0, None, {}, "", ())
BUDGET = 24
# Of Qwen, Llama, DeepSeek, Gemma and Mistral; the last ones hold no angle bracket.
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|fim_prefix|>",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_0|>",
    "<|eom_id|>",
    "<\uff5cUser\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<start_of_turn>",
    "<bos>",
    "</s>",
    "<|pad|>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
]
BEFORE = "<think> a </think> <search> Titan: who? </search>"
AFTER = "<think> b </think> <answer> c </answer>"


@functools.cache
def tokenizer(tags_whole, *more):
    """A byte-level vocabulary, as Qwen's and Llama's are, with their special tokens; perhaps our tags are tokens, and
    `more`."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    base = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    base.decoder = decoders.ByteLevel()
    base.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    base.add_tokens([AddedToken(token, normalized=False) for token in more])
    if tags_whole:
        base.add_tokens([AddedToken(f"<{slash}{kind}>", normalized=False) for kind in KINDS for slash in ("", "/")])
    return PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<|im_end|>", pad_token="<|pad|>")


@functools.cache
def automaton(tags_whole):
    tok = tokenizer(tags_whole)
    return build_automaton(STOP_TAGS, token_bytes(tok, len(tok)))


def special_ids(tok):
    """Of all special tokens: `all_special_ids` holds those with a role, such as end of text, and no others."""
    ids = frozenset(i for i, token in tok.added_tokens_decoder.items() if token.special)
    assert len(ids) == len(SPECIAL)
    return ids


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
    reply = make_reply(CARD, "who?", Completion(text, Outcome.OK, 1, 1, 0.0, 1), None)
    ids, _ = reply_ids(tok, reply.text, budget)
    assert not special_ids(tok) & set(ids)
    table, state = automaton(tags_whole), 0
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
@settings(max_examples=2000, deadline=None)
@given(text=hostile, tags_whole=st.booleans(), budget=st.integers(1, 40))
def test_no_reply_of_thousands_leaves_its_block(text, tags_whole, budget):
    assert_harmless(text, tags_whole, budget)


# Words with a tag in them: a router that draws its words at random calls in nearly every turn.
CALLS = tuple(f"{before}</search>{behind}" for before in map(str, range(40)) for behind in ("", ".", "!"))
PLAIN = information_block("x")


@functools.cache
def engine():
    """The jitted loop with a model of random weights."""
    tok = tokenizer(True, *CALLS, "so</answer>")
    model = ModelConfig(
        vocab_size=len(tok), num_layers=1, width=8, mlp=8, num_heads=2, num_kv_heads=1, head_dim=4, remat="none"
    )
    shapes = StaticShapes(
        slots=8,
        decode_batch=8,
        row_tokens=192,
        turn_tokens=12,
        episode_tokens=99,
        prefill_tokens=64,
        prefill_chunk=32,
        prefill_rows=4,
        prefill_wait=2,
        callback_rows=8,
        poll_every=4,
    )
    where = {"driver": "jit", "devices": jax.devices()[:1], "tensor": 1}
    made = Engine(model, shapes, tok, EpisodeLimits(max_calls=3, reply_tokens=BUDGET), **where)
    made.sync_weights(init_params(model, make_mesh(1, 1, 1, jax.devices()[:1]), seed=0))
    return made, tok


def assert_engine_unharmed(texts, seed):
    """Feed the texts to eight episodes; returns how many of them were fed.

    Each is one information block of plain tokens; a turn ends where the router itself has written a stop tag, and
    nowhere else; the response reads as with a harmless reply in each block's place.
    """
    (made, tok), left, fed = engine(), iter(texts), 0

    def respond(route, *, episode, call):
        future = Future()
        completion = Completion(next(left, "x"), Outcome.OK, 1, 1, 0.0, 1)
        future.set_result(make_reply(CARD, "who?", completion, None))
        return future

    prompts = [Prompt(8 * seed + i, tuple(tok.encode(f"Question {i}:"))) for i in range(8)]
    shared = common_prefix([prompt.tokens for prompt in prompts])
    for episode in made.run(prompts, respond, temperature=1.0, seed=seed, prefix_tokens=shared)[0]:
        turns, blocks = [], []
        for own, part in itertools.groupby(zip(episode.sampled, episode.tokens, strict=True), key=lambda x: x[0]):
            (turns if own else blocks).append([token for _, token in part])
        fed += len(blocks)
        for turn in turns:
            before, whole = (re.findall("</search>|</answer>", tok.decode(ids)) for ids in (turn[:-1], turn))
            assert before == [] and len(whole) <= 1
            # Without a tag it was cut, or the router drew the end of text: that is the last turn.
            assert whole or turn is turns[-1]
        written = [tok.decode(block) for block in blocks]
        for block, text in zip(blocks, written, strict=True):
            assert not special_ids(tok) & set(block)
            assert [(tag.kind, tag.closing) for tag in find_tags(text)] == [("information", 0), ("information", 1)]
        own = [tok.decode(turn) for turn in turns]
        assert "".join(map("".join, itertools.zip_longest(own, written, fillvalue=""))) == episode.text
        harmless = PLAIN.join(own) + PLAIN * (len(blocks) == len(turns))
        segments = [(segment.kind, segment.text) for segment in parse_response(episode.text)]
        for text in written:  # a segment of its own, or inside of a tag that the router itself has left open
            head = text.partition("</information>")[0]
            own_text, x = head.removeprefix("\n\n<information>"), PLAIN.partition("</information>")[0]
            segments = [(k, " x " if (k, t) == ("information", own_text) else t.replace(head, x)) for k, t in segments]
        assert segments == [(segment.kind, segment.text) for segment in parse_response(harmless)]
        assert check_format(episode.text, ["Titan"], strict=False) == check_format(harmless, ["Titan"], strict=False)
    return fed


@pytest.mark.slow
def test_thousands_of_replies_pass_through_the_engine():
    fed = 0

    @settings(max_examples=450, deadline=None)
    @given(texts=st.lists(hostile, min_size=16, max_size=16), seed=st.integers(0, 10**6))
    def feed(texts, seed):
        nonlocal fed
        fed += min(assert_engine_unharmed(texts, seed), len(texts))

    feed()
    assert fed >= 5000


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
    reply = make_reply(CARD, "", Completion("a" * 1_000_000, Outcome.OK, 1, 1, 0.0, 1), None)
    (frame, whole), (ids, cut) = (reply_ids(tokenizer(True), text, BUDGET) for text in ("", reply.text))
    assert (len(ids), whole, cut) == (BUDGET + len(frame), False, True)
