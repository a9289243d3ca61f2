"""Prompt text: templates, cards, and the order that lets a batch share its beginning."""

import dataclasses
import os
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_r1_jax import prompts
from router_r1_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Card:
    name: str
    price_out: float
    latency: float | None
    performance: Mapping[str, float]
    description: str = ""


CARDS = (
    Card("Titan", 12.0, 0.06, {"film": 0.97, "places": 0.26}),
    Card("Reel", 0.9, 1.5, {}, "made for {question} and film"),
)


def test_card_line_states_the_skill_directly_before_the_name():
    assert prompts.card_line(CARDS[0]) == "film 97 places 26 : Titan ; price 12 latency 0.06"
    assert prompts.card_line(CARDS[1]) == ": Reel ; price 0.9 latency 1.5 ; made for {question} and film"


def test_a_latency_that_nobody_measured_is_not_stated():
    assert prompts.card_line(Card("Reel", 0.9, None, {})) == ": Reel ; price 0.9"
    assert prompts.card_line(Card("Reel", 0.9, 0.0, {})) == ": Reel ; price 0.9 latency 0"


@pytest.mark.parametrize("name", ["router", "terse"])
def test_shipped_templates_say_all_cards_the_budget_and_the_question_last(name):
    text = prompts.render(prompts.load_template(name), CARDS, "Who sang?", 7)
    order = [text.index(piece) for piece in (*map(prompts.card_line, CARDS), "Who sang?")]
    assert order == sorted(order)
    assert text.endswith("Who sang?\n")
    assert " 7" in text and "{cards}" not in text and "{max_calls}" not in text


@given(st.text(min_size=1).filter(str.strip))
def test_everything_before_the_question_is_shared_and_the_question_is_put_in_literally(question):
    template = prompts.load_template("router")
    text, other = (prompts.render(template, CARDS, words, 4) for words in (question, "Who sang?"))
    assert text == other.removesuffix("Who sang?\n") + question + "\n"


@pytest.mark.parametrize("question", ["{cards}", "{max_calls} {question} {0} {", "a\\1b \\g<0>"])
def test_braces_and_backslashes_in_a_question_mean_nothing(question):
    text = prompts.render("{cards}|{max_calls}|{question}", CARDS[:1], question, 3)
    assert text == f"film 97 places 26 : Titan ; price 12 latency 0.06|3|{question}"


def test_an_empty_question_is_refused():
    with pytest.raises(ValueError, match="question is ' '"):
        prompts.render("{cards}{max_calls}{question}", CARDS, " ", 1)


def test_a_template_of_ones_own_is_read_from_its_path(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("é {max_calls} {cards} {question}", encoding="utf-8")
    assert prompts.load_template(str(path)) == "é {max_calls} {cards} {question}"


@pytest.mark.parametrize("name", ["nowhere", f"no{os.sep}where.txt", ""])
def test_an_unknown_template_is_named_with_the_known_ones(name):
    with pytest.raises(ConfigError, match=r"prompt\.template is .*choose one of router, terse"):
        prompts.load_template(name)


@pytest.mark.parametrize(
    "text", ["{cards} {question}", "{question} {cards} {max_calls}", "{cards}{cards}{max_calls}{question}"]
)
def test_a_template_without_the_placeholders_in_order_is_refused(tmp_path, text):
    path = tmp_path / "bad.txt"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"prompt\.template is .*\{question\} last"):
        prompts.load_template(str(path))


class Tokenizer:
    """Encodes characters as code points; the template wraps each message as real chat templates do."""

    def __init__(self, chat_template):
        self.chat_template = chat_template

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        assert not tokenize
        turns = "".join(f"[{message['role']}]{message['content']}" for message in messages)
        return turns + ("[assistant]" if add_generation_prompt else "")

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [ord(character) for character in text]


def test_encode_opens_the_assistants_turn_where_there_is_a_chat_template():
    assert "".join(map(chr, prompts.encode(Tokenizer("x"), "hi"))) == "[user]hi[assistant]"
    assert "".join(map(chr, prompts.encode(Tokenizer(None), "hi"))) == "hi"
