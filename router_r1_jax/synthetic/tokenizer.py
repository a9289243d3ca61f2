"""A small byte-level BPE tokenizer for the synthetic world, saved as transformers' AutoTokenizer loads it."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from router_r1_jax import prompts
from router_r1_jax.pool.cards import Card
from router_r1_jax.synthetic.scripted_episodes import scripted_episode
from router_r1_jax.synthetic.world import SPLITS, World

PAD, END = "<|pad|>", "<|end|>"
VOCABULARY = 2048  # at most

# BPE merges inside these units: a tag, a decimal number, a word or a punctuation mark, each with the space before it.
# Because tags and numbers are whole units, an episode has half as many tokens.
_UNITS = Regex(r" ?</?[a-z]+>| ?\d+(?:\.\d+)?| ?\w+| ?[^\s\w]|\s+")


def train_tokenizer(texts: Iterable[str], folder: str | Path) -> None:
    """Train on `texts` and write the tokenizer into `folder`. The same texts give the same bytes.

    Merging ends when each unit of the texts is one token, or when the vocabulary is full.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_UNITS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        special_tokens=[PAD, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)


def corpus(world: World, cards: Sequence[Card], template: str, max_calls: int) -> Iterator[str]:
    """Texts for the world's tokenizer: those of the world, a prompt, scripted episodes, names and scores."""
    yield from world.texts()
    rng = np.random.default_rng(0)
    question = world.questions("train")[0]
    yield prompts.render(template, cards, question.text, max_calls)
    for split in SPLITS:
        for question in world.questions(split):
            yield "".join(text for text, _ in scripted_episode(question, world, cards, rng, template=template))
    yield from (f" {card.name}" for card in cards)
    yield from (f" {score}" for score in range(101))  # other cards may state other scores
