"""The world's tokenizer through AutoTokenizer: whole names, round trips, and the same bytes each time."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from router_r1_jax import prompts
from router_r1_jax.config import base_config
from router_r1_jax.synthetic.scripted_episodes import scripted_episode
from router_r1_jax.synthetic.tokenizer import END, PAD, VOCABULARY, corpus, train_tokenizer
from router_r1_jax.synthetic.world import DOMAINS, RELATIONS, World

ROOT = Path(__file__).parents[2]
WORLD = World(base_config().synthetic.world)
CARDS = runpy.run_path(str(ROOT / "configs/pools/simulated.py"))["models"]()
TERSE = prompts.load_template("terse")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(corpus(WORLD, CARDS, TERSE, 2), path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_names_relations_domains_models_and_scores_are_one_token_each(tokenizer):
    words = [name for names in WORLD.names.values() for name in names]
    words += [relation.name for relation in RELATIONS] + list(DOMAINS) + [card.name for card in CARDS]
    words += [str(score) for score in range(101)] + ["</think>", "</search>", "</information>", "</answer>"]
    ids = [tokenizer.encode(f" {word}", add_special_tokens=False) for word in words]
    assert [word for word, pieces in zip(words, ids, strict=True) if len(pieces) != 1] == []
    assert len({pieces[0] for pieces in ids}) == len(words)


def test_vocabulary_and_special_tokens(tokenizer):
    assert 256 < len(tokenizer) < VOCABULARY  # merging ended because every unit was whole
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, END)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.encode("Who?") == tokenizer.encode("Who?", add_special_tokens=False)


def test_an_episode_encodes_piece_by_piece_as_it_encodes_whole(tokenizer):
    """Training concatenates the ids of the prompt and of the pieces; sampling continues after the prompt's ids."""
    rng = np.random.default_rng(0)
    for question in WORLD.questions("validation")[:40]:
        prompt = prompts.render(TERSE, CARDS, question.text, 2)
        texts = [prompt, *(text for text, _ in scripted_episode(question, WORLD, CARDS, rng, template=TERSE))]
        pieces = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        assert sum(pieces, []) == tokenizer.encode("".join(texts), add_special_tokens=False)
        assert tokenizer.decode(sum(pieces, [])) == "".join(texts)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_shared_part_of_a_prompt_is_short(tokenizer):
    render = prompts.render(TERSE, CARDS, "@", 2)
    assert len(tokenizer.encode(render[: render.index("@")])) <= 120
    for card in CARDS:
        assert len(tokenizer.encode(prompts.card_line(card))) <= 20


def test_the_same_texts_give_the_same_bytes_in_another_process(folder, tmp_path):
    code = (
        "import runpy, sys; from router_r1_jax import prompts; from router_r1_jax.config import base_config;"
        "from router_r1_jax.synthetic.tokenizer import corpus, train_tokenizer;"
        "from router_r1_jax.synthetic.world import World;"
        "cards = runpy.run_path('configs/pools/simulated.py')['models']();"
        "world = World(base_config().synthetic.world);"
        "train_tokenizer(corpus(world, cards, prompts.load_template('terse'), 2), sys.argv[1]);"
        "assert not {'jax', 'tensorflow'} & set(sys.modules), 'a tokenizer needs no framework'"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
