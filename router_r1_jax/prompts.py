"""Prompt text: template, model cards, budget and question, in an order that lets a batch share all but the question."""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jinja2.exceptions import TemplateError

from router_r1_jax.config import ConfigError
from router_r1_jax.protocol import THINK, neutralize, open_tag

_PLACEHOLDER = re.compile(r"\{(cards|table|descriptions|max_calls|question)\}")
_OPENED_THOUGHT = re.compile(rf"{re.escape(open_tag(THINK))}\s*$")


class PromptCard(Protocol):
    """What a prompt says of a model: prices in dollars per million tokens, latency in seconds, scores in [0, 1]."""

    name: str
    price_out: float
    latency: float | None
    performance: Mapping[str, float]
    description: str


def load_template(name_or_path: str) -> str:
    """The text of a template: a file of `router_r1_jax/templates` by its name without suffix, or any path.

    It says the models by {cards} (`card_line`), {table} (`card_table`) or {descriptions} (`description_line`), may say
    the budget by {max_calls}, each once, and {question} comes last: what stands before it is computed once for a whole
    batch. Raises ConfigError for any other template, and where there is no such file.
    """
    shipped = resources.files("router_r1_jax") / "templates"
    source = shipped / f"{name_or_path}.txt" if re.fullmatch(r"\w+", name_or_path) else Path(name_or_path)
    try:
        text = source.read_text(encoding="utf-8").removeprefix("\ufeff")  # some editors begin a file with it
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(file.name.removesuffix(".txt") for file in shipped.iterdir()))
        raise ConfigError(
            f"prompt.template is {name_or_path!r}, which cannot be read; choose one of {known}, or a text file's path"
        ) from error
    found = _PLACEHOLDER.findall(text)
    says_models = {"cards", "table", "descriptions"} & set(found)
    if len(says_models) != 1 or len(set(found)) < len(found) or found[-1] != "question":
        raise ConfigError(
            f"prompt.template is {name_or_path!r}, with the placeholders {found}; it must hold one of {{cards}}, "
            "{table} and {descriptions}, and {question} last; {max_calls} if you like; each once"
        )
    return text


def score_text(score: float) -> str:
    """A score in [0, 1] as prompts write it: in percent, without the sign."""
    return f"{100 * score:.0f}"


def card_line(card: PromptCard) -> str:
    """One model in one line, scores in percent: "film 97 music 16 : Titan ; price 12 latency 0.06".

    What is not known is left out: a latency that nobody measured, scores without a test.
    The scores come directly before the name, which is then what follows a topic's score.
    """
    scores = "".join(f"{topic} {score_text(score)} " for topic, score in card.performance.items())
    latency = "" if card.latency is None else f" latency {card.latency:g}"
    line = f"{scores}: {card.name} ; price {card.price_out:g}{latency}"
    return f"{line} ; {card.description}" if card.description else line


class TableLine(NamedTuple):
    """A topic, "price" or "latency", and for each model of which it is known the value and the model's name."""

    label: str
    entries: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        """In one line, the label before each value: "- film 97 Titan film 90 Reel"."""
        return "- " + " ".join(f"{self.label} {value} {name}" for value, name in self.entries)


def card_table(cards: Sequence[PromptCard]) -> list[TableLine]:
    """What the cards say, by topic; then prices and latencies. Descriptions have no place in it.

    A topic stands directly before each value and that directly before the name, so that looking up a value of a topic
    and then its name is twice reading on from what was seen before. A small router learnt that in updates in which it
    learnt nothing from lines of whole cards (experiments/studies/README.md).
    """
    lines = [
        TableLine(topic, tuple((score_text(c.performance[topic]), c.name) for c in cards if topic in c.performance))
        for topic in dict.fromkeys(topic for card in cards for topic in card.performance)
    ]
    lines.append(TableLine("price", tuple((f"{c.price_out:g}", c.name) for c in cards)))
    known = tuple((f"{c.latency:g}", c.name) for c in cards if c.latency is not None)
    return [*lines, TableLine("latency", known)] if known else lines


def looked_up(template: str, topic: str, card: PromptCard) -> tuple[str, str]:
    """A topic's score as the template's cards state it, and the name that follows: (" film 97 :", " Titan").

    Where the template has a table there is no colon in between.
    """
    colon = "" if "{table}" in template else " :"
    return f" {topic} {score_text(card.performance[topic])}{colon}", f" {card.name}"


def description_line(card: PromptCard) -> str:
    """One model in one line, in words alone: "Titan: knows films and music". The name alone where nothing is said."""
    return f"{card.name}: {card.description}" if card.description else card.name


def render(template: str, cards: Sequence[PromptCard], question: str, max_calls: int) -> str:
    """The prompt. Values are put in in one pass, so braces in a question or a card mean nothing.

    A question is external text: its tags and special tokens are neutralised, else one that holds `<|im_end|>` would
    end the user's turn. Raises ValueError for one that is empty; that of a data set is refused when the set is read.
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

    With a chat template the prompt is the user's turn and the assistant's turn has been opened; without one it is
    encoded as it stands, behind the token that begins a text where the tokenizer puts one there (base models of the
    Llama family were never trained without it). No other special tokens are added. `system` is a system message before
    it, none if empty: then some templates put in their own. `thinking` is `enable_thinking` of templates that know it
    (Qwen3): False has them close an empty thought at once. A thought that the template leaves open is taken away: the
    router opens its own. Raises ConfigError where the template refuses the messages.
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
