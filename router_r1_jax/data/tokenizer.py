"""A small byte-level BPE for the synthetic world, saved so that transformers' AutoTokenizer loads it like any other."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from router_r1_jax import prompts
from router_r1_jax.data.scripted import scripted_episode
from router_r1_jax.data.world import SPLITS, World

PAD, END = "<|pad|>", "<|end|>"
VOCABULARY = 2048  # at most

# A tag, a decimal number, a word or a run of marks, each with the space before it, is one unit inside which BPE merges.
# Tags and numbers kept whole halve the length of an episode.
_UNITS = Regex(r" ?</?[a-z]+>| ?\d+(?:\.\d+)?| ?\w+| ?[^\s\w]|\s+")


def train_tokenizer(texts: Iterable[str], path: str | Path) -> None:
    """Train on `texts` and write tokenizer.json and tokenizer_config.json into the folder `path`.

    Merging goes on until each unit of the texts is one token or the vocabulary is full. Same texts give the same bytes.
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
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def corpus(world: World, cards: Sequence[prompts.PromptCard], template: str, max_calls: int) -> Iterator[str]:
    """What the world's tokenizer is trained on: the world's texts, a prompt, scripted episodes, names and scores."""
    yield from world.texts()
    rng = np.random.default_rng(0)
    question = world.questions("train")[0]
    yield prompts.render(template, cards, question.text, max_calls)
    for split in SPLITS:
        for question in world.questions(split):
            yield "".join(text for text, _ in scripted_episode(question, world, cards, rng, template=template))
    yield from (f" {card.name}" for card in cards)
    yield from (f" {score}" for score in range(101))  # cards with other scores are read too
