"""Prompts: template, model cards (lines, table or descriptions), call budget, question, and the chat template.

The question comes last, so that the prompts of a batch share everything before it.
"""

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from router_r1_jax.config import ConfigError
from router_r1_jax.pool.cards import Card
from router_r1_jax.protocol import THINK, neutralize, open_tag

_PLACEHOLDER = re.compile(r"\{(cards|table|descriptions|max_calls|question)\}")
_OPENED_THOUGHT = re.compile(rf"{re.escape(open_tag(THINK))}\s*$")


def load_template(name_or_path: str) -> str:
    """The text of a template: a file of `router_r1_jax/templates` by its name without suffix, or any path.

    A template states the models by one of {cards} (`card_line`), {table} (`card_table`) and {descriptions}
    (`description_line`), and may state the budget by {max_calls}. Each stands once. {question} comes last, because the
    text before it is computed once for a whole batch. Raises ConfigError for any other template or a missing file.
    """
    shipped = resources.files("router_r1_jax") / "templates"
    source = shipped / f"{name_or_path}.txt" if re.fullmatch(r"\w+", name_or_path) else Path(name_or_path)
    try:
        text = source.read_text(encoding="utf-8").removeprefix("\ufeff")  # some editors write it first
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(file.name.removesuffix(".txt") for file in shipped.iterdir()))
        raise ConfigError(
            f"prompt.template is {name_or_path!r}, which cannot be read; choose one of {known}, or a text file's path"
        ) from error
    found = _PLACEHOLDER.findall(text)
    stated = {"cards", "table", "descriptions"} & set(found)
    if len(stated) != 1 or len(set(found)) < len(found) or found[-1] != "question":
        raise ConfigError(
            f"prompt.template is {name_or_path!r}, with the placeholders {found}; it must hold one of {{cards}}, "
            "{table} and {descriptions}, and {question} last; {max_calls} if you like; each once"
        )
    return text


def score_text(score: float) -> str:
    """A score in [0, 1] as prompts write it: in percent, without the percent sign."""
    return f"{100 * score:.0f}"


def card_line(card: Card) -> str:
    """One model in one line, scores in percent: "film 97 music 16 : Titan ; price 12 latency 0.06".

    A latency or score that is unknown is left out. The scores come directly before the name, so that the name follows
    a topic's score.
    """
    scores = "".join(f"{topic} {score_text(score)} " for topic, score in card.performance.items())
    latency = "" if card.latency is None else f" latency {card.latency:g}"
    line = f"{scores}: {card.name} ; price {card.price_out:g}{latency}"
    return f"{line} ; {card.description}" if card.description else line


class TableLine(NamedTuple):
    """A topic, "price" or "latency", with (value, name) of each model whose value is known."""

    label: str
    entries: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        """One line with the label before each value: "- film 97 Titan film 90 Reel"."""
        return "- " + " ".join(f"{self.label} {value} {name}" for value, name in self.entries)


def card_table(cards: Sequence[Card]) -> list[TableLine]:
    """The cards' scores by topic, then the prices and latencies. Descriptions are left out.

    A topic stands directly before each value, and the value directly before the name. To look up a topic's value and
    then its name, a router only continues twice what it has seen before. A small router learns this from far fewer
    updates than it needs for lines of whole cards (experiments/studies/README.md).
    """
    lines = [
        TableLine(topic, tuple((score_text(c.performance[topic]), c.name) for c in cards if topic in c.performance))
        for topic in dict.fromkeys(topic for card in cards for topic in card.performance)
    ]
    lines.append(TableLine("price", tuple((f"{c.price_out:g}", c.name) for c in cards)))
    known = tuple((f"{c.latency:g}", c.name) for c in cards if c.latency is not None)
    return [*lines, TableLine("latency", known)] if known else lines


def looked_up(template: str, topic: str, card: Card) -> tuple[str, str]:
    """A topic's score as the template's cards state it, and the name that follows: (" film 97 :", " Titan").

    If the template has a table, no colon stands in between.
    """
    colon = "" if "{table}" in template else " :"
    return f" {topic} {score_text(card.performance[topic])}{colon}", f" {card.name}"


def description_line(card: Card) -> str:
    """One model in one line, in words: "Titan: knows films and music". Only the name if there is no description."""
    return f"{card.name}: {card.description}" if card.description else card.name


def render(template: str, cards: Sequence[Card], question: str, max_calls: int) -> str:
    """The text of the prompt. All values are inserted in one pass, so braces in a question or a card mean nothing.

    A question is external text. Its tags and special tokens are neutralised, because `<|im_end|>` in a question would
    end the user's turn. Raises ValueError for an empty question.
    """
    asked = neutralize(question)
    if not asked.strip():
        raise ValueError(f"question is {question!r}; a prompt needs a question that is not empty")
    values = {
        "cards": "\n".join(map(card_line, cards)),
        "table": "\n".join(map(str, card_table(cards))),
        "descriptions": "\n".join(map(description_line, cards)),
        "max_calls": str(max_calls),
        "question": asked,
    }
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def encode(tokenizer: Any, text: str, *, system: str = "", thinking: bool = True) -> list[int]:
    """Token ids of a rendered prompt for a Hugging Face tokenizer.

    If the tokenizer has a chat template, the prompt is the user's turn, and the assistant's turn is opened. If the
    template leaves a thought open, that tag is removed, because the router opens its own. Without a chat template the
    prompt is encoded as it stands, behind the token that begins a text if the tokenizer puts one there (base models of
    the Llama family were never trained without it). No other special tokens are added.

    Args:
        tokenizer: of the language model.
        text: the rendered prompt.
        system: a system message before the prompt. If it is empty, some templates insert their own.
        thinking: `enable_thinking` of templates that know it (Qwen3). With False they write an empty, closed thought.

    Raises:
        ConfigError: the template refuses the messages.
    """
    if tokenizer.chat_template:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
            )
        except TemplateError as error:
            fix = "set it to ''" if system else "some templates need a system message, set it"
            raise ConfigError(
                f"the tokenizer's chat template refuses the prompt ({error}); prompt.system is {system!r}, {fix}"
            ) from error
        text = _OPENED_THOUGHT.sub("", text)
        return tokenizer.encode(text, add_special_tokens=False)
    begin = [token for token in tokenizer.encode("")[:1] if token == tokenizer.bos_token_id]
    return begin + tokenizer.encode(text, add_special_tokens=False)
