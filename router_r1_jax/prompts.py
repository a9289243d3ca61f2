"""Prompt text: template, model cards, budget and question, in an order that lets a batch share all but the question."""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from router_r1_jax.config import ConfigError

_PLACEHOLDER = re.compile(r"\{(cards|max_calls|question)\}")


class PromptCard(Protocol):
    """What a prompt says of a model: prices in dollars per million tokens, latency in seconds, scores in [0, 1]."""

    name: str
    price_out: float
    latency: float | None
    performance: Mapping[str, float]
    description: str


def load_template(name_or_path: str) -> str:
    """The text of a template: a file of `router_r1_jax/templates` by its name without suffix, or any path.

    Raises ConfigError where there is no such file, or where it does not hold each of {cards}, {max_calls} and
    {question} exactly once with {question} last: what stands before the question is computed once for a whole batch.
    """
    shipped = resources.files("router_r1_jax") / "templates"
    source = shipped / f"{name_or_path}.txt" if re.fullmatch(r"\w+", name_or_path) else Path(name_or_path)
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(file.name.removesuffix(".txt") for file in shipped.iterdir()))
        raise ConfigError(
            f"prompt.template is {name_or_path!r}, which cannot be read; choose one of {known}, or a text file's path"
        ) from error
    found = _PLACEHOLDER.findall(text)
    if sorted(found) != ["cards", "max_calls", "question"] or found[-1] != "question":
        raise ConfigError(
            f"prompt.template is {name_or_path!r}, with the placeholders {found}; "
            "it must hold {cards}, {max_calls} and {question} once each, {question} last"
        )
    return text


def score_text(score: float) -> str:
    """A score in [0, 1] as prompts write it: in percent, without the sign."""
    return f"{100 * score:.0f}"


def card_line(card: PromptCard) -> str:
    """One model in one line, scores in percent: "film 97 music 16 : Titan ; price 12 latency 0.06".

    What is not known is left out: a latency that nobody measured, scores without a test.
    The scores come directly before the name: a small router that looks for a topic copies the name that follows. With
    other layouts it stayed at chance.
    """
    scores = "".join(f"{topic} {score_text(score)} " for topic, score in card.performance.items())
    latency = "" if card.latency is None else f" latency {card.latency:g}"
    line = f"{scores}: {card.name} ; price {card.price_out:g}{latency}"
    return f"{line} ; {card.description}" if card.description else line


def render(template: str, cards: Sequence[PromptCard], question: str, max_calls: int) -> str:
    """The prompt. Values are put in literally and in one pass, so braces in a question or a card mean nothing.

    Raises ValueError for an empty question; a question of a data set is refused with its id when the set is read.
    """
    if not question.strip():
        raise ValueError(f"question is {question!r}; a prompt needs a question that is not empty")
    values = {"cards": "\n".join(map(card_line, cards)), "max_calls": str(max_calls), "question": question}
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a rendered prompt for a Hugging Face tokenizer.

    With a chat template the prompt is the user's turn and the assistant's turn has been opened; without one it is
    encoded as it stands. No other special tokens are added.
    """
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)
