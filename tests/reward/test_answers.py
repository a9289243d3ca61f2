"""Answer metrics against the published functions' values and slow definitions of the metrics."""

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_values import ANSWERS

from router_r1_jax.reward import exact_match, extract_answer, f1_score, normalize_answer, sub_exact_match

answers = st.lists(
    st.sampled_from(
        ["a", "The", "an", "yes", "No", "noanswer", "Paris", "O'Neill", "U.S.", " ", "\n", "-", "état", "1987"]
    )
    | st.text(max_size=4),
    max_size=7,
).map(" ".join)


@pytest.mark.parametrize("row", ANSWERS)
def test_published_values(row):
    prediction, golds = row["prediction"], row["golds"]
    assert normalize_answer(prediction) == row["normalized"]
    assert exact_match(prediction, golds) == row["em"]
    assert sub_exact_match(prediction, golds) == row["sub_em"]
    assert f1_score(prediction, golds) == pytest.approx(row["f1"], abs=1e-12)


@given(
    st.lists(st.sampled_from(["<answer>", "</answer>", "<think>", "</think>", "a", " b", "\n"]), max_size=20).map(
        "".join
    )
)
def test_the_last_answer_pair_is_the_answer(response):
    pairs = re.findall(r"<answer>(.*?)</answer>", response, re.DOTALL)
    assert extract_answer(response) == (pairs[-1].strip() if pairs else None)


@given(answers)
def test_normalization_word_by_word(text):
    letters = "".join(c for c in text.lower() if c not in string.punctuation)
    runs = re.findall(r"\w+|\W", letters)  # articles are whole runs of word characters
    kept = "".join(" " if run in ("a", "an", "the") else run for run in runs)
    assert normalize_answer(text) == " ".join(kept.split())


@given(answers, answers)
def test_f1_by_crossing_out_tokens(prediction, gold):
    ours, theirs = normalize_answer(prediction), normalize_answer(gold)
    left = theirs.split()
    hits = 0
    for token in ours.split():
        if token in left:
            left.remove(token)
            hits += 1
    closed = ("yes", "no", "noanswer")
    if hits == 0 or ((ours in closed or theirs in closed) and ours != theirs):
        expected = 0.0
    else:
        precision, recall = hits / len(ours.split()), hits / len(theirs.split())
        expected = 2 * precision * recall / (precision + recall)
    assert f1_score(prediction, [gold]) == pytest.approx(expected, abs=1e-12)


@given(answers, st.lists(answers, max_size=4))
def test_the_best_gold_counts(prediction, golds):
    for metric in (exact_match, sub_exact_match, f1_score):
        assert metric(prediction, golds) == max((metric(prediction, [gold]) for gold in golds), default=0.0)


@pytest.mark.parametrize("metric", [exact_match, sub_exact_match, f1_score])
def test_a_string_is_no_list_of_golds(metric):
    with pytest.raises(TypeError, match="'Paris'"):
        metric("P", "Paris")


@pytest.mark.parametrize("piece", ["<answer>", "</answer>", "<answer></answer>", "<answer", "<think>"])
def test_a_megabyte_of_anything_is_read(piece):
    """A pattern that looks for the closing tag anew from each opening one would never end."""
    found = extract_answer(piece * (1_000_000 // len(piece)))
    assert found == ("" if piece == "<answer></answer>" else None)
