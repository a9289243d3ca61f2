"""The tag automaton against a plain search in the concatenated text, and token bytes against the tokenizer's decode."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from router_r1_jax.rollout.stop_tags import build_automaton, token_bytes

TAGS = ("</search>", "</answer>")

half_tags = st.builds(lambda tag, i, j: tag[min(i, j) : max(i, j)], st.sampled_from(TAGS), *[st.integers(0, 9)] * 2)
texts = st.lists(st.one_of(st.sampled_from(TAGS), half_tags, st.text("</search>anw é日", max_size=4)), max_size=8)


def naive_states(tags, tokens):
    """For each token, the number of the first tag that is complete after it, else 0; found by `bytes.find`."""
    states, text = [], b""
    for token in tokens:
        text += token
        ends = {text.find(tag.encode()) + len(tag.encode()): i for i, tag in enumerate(tags, 1) if tag.encode() in text}
        states.append(ends[min(ends)] if ends else 0)
        if ends:
            text = b""  # a completed tag ends the turn; what its token holds behind it begins nothing
    return states


def automaton_states(tags, tokens):
    """The same by the table, a state beyond the tags read as 0."""
    vocabulary = sorted(set(tokens))
    automaton = build_automaton(tags, vocabulary)
    states, state = [], 0
    for token in tokens:
        state = automaton[state, vocabulary.index(token)]
        states.append(int(state) if state <= len(tags) else 0)
    return states


def split(data, text):
    """Split bytes anywhere, also inside a character, some pieces empty."""
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12).map(sorted))
    return [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(st.data(), texts.map("".join))
def test_table_sees_what_a_search_of_the_text_sees(data, text):
    tokens = split(data, text.encode())
    assert automaton_states(TAGS, tokens) == naive_states(TAGS, tokens)


@given(st.data(), st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=3, unique=True))
def test_any_tags_also_those_that_overlap_each_other(data, tags):
    assume(not any(a != b and a in b for a in tags for b in tags))
    tokens = split(data, data.draw(st.text("ab<", max_size=30)).encode())
    assert automaton_states(tags, tokens) == naive_states(tags, tokens)


def test_the_first_tag_completed_inside_one_token_counts():
    assert automaton_states(TAGS, [b"x</answer></search>", b"</search></answer>"]) == [2, 1]


def test_the_table_is_small():
    automaton = build_automaton(TAGS, [b"a", b""])
    assert automaton.dtype == np.uint8
    assert automaton.shape == (1 + sum(map(len, TAGS)) - 2, 2)  # "<" and "</" are shared
    np.testing.assert_array_equal(automaton[3:, 1], np.arange(3, len(automaton)))


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE with merges over several scripts, a special token and an added one that is ordinary text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]
    )
    bpe.train_from_iterator(
        ["who </search> is </answer> she", "日本語の日本", "ночь ночь", "🙂🙂 naïve é"] * 4, trainer
    )
    bpe.add_tokens([AddedToken("<tool☃>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | texts.map("".join))
def test_token_bytes_join_to_the_text_that_decode_gives(tokenizer, text):
    assume("<|end|>" not in text)
    ids = tokenizer.encode(text + "日 🙂<tool☃>", add_special_tokens=False)
    pieces = token_bytes(tokenizer, len(tokenizer))
    assert b"".join(pieces[i] for i in ids).decode() == tokenizer.decode(ids)


def test_every_token_alone_has_the_bytes_that_decode_shows(tokenizer):
    pieces = token_bytes(tokenizer, len(tokenizer))
    assert [
        i
        for i, piece in enumerate(pieces)
        if i != tokenizer.eos_token_id and piece.decode(errors="replace") != tokenizer.decode([i])
    ] == []


def test_special_and_unused_ids_add_no_bytes(tokenizer):
    pieces = token_bytes(tokenizer, len(tokenizer) + 5)
    assert pieces[tokenizer.eos_token_id] == b""
    assert pieces[len(tokenizer) :] == [b""] * 5
    assert all(piece for i, piece in enumerate(pieces[: len(tokenizer)]) if i != tokenizer.eos_token_id)
