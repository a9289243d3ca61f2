"""Training rows of the warm start: the curriculum, then scripted episodes behind prompts, at first with exercises.

The exercises beside the episodes are random sequences that repeat; they teach copying. If names are sampled for each
prompt, other exercises recite the cards of a prompt.
"""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from router_r1_jax.learner import Row
from router_r1_jax.pool.cards import Card, all_in_prompts, draw_candidates
from router_r1_jax.rollout import common_prefix
from router_r1_jax.router import Router
from router_r1_jax.synthetic.curriculum import curriculum_phase, token_ids
from router_r1_jax.synthetic.scripted_episodes import recited_cards, repeating_sequences, scripted_episode
from router_r1_jax.synthetic.world import World
from router_r1_jax.training.supervised import Phase

COPY_TOKENS = 96  # tokens of an exercise, at most
RECITED_NAMES = 24  # names that an exercise recites


def warmstart_phases(world: World, router: Router) -> list[list[Phase]]:
    """Stages of the warm start: the curriculum if there is one, then the episodes up to `warmstart.steps`."""
    config, w = router.config, router.config.warmstart
    curriculum, left = [], w.steps
    for kind, updates, *numbers in config.synthetic.curriculum:
        curriculum.append(curriculum_phase(router, kind, min(updates, left), *numbers))
        left -= curriculum[-1].updates
    first = w.steps - left

    def batch(step: int) -> tuple[list[int], list[Row]]:
        return episode_rows(world, router, np.random.default_rng([w.seed, step]), step - first)

    episodes = [Phase(left, batch, longest_row(router), config.learner.length_buckets, w.batch)]
    return [curriculum, episodes] if curriculum else [episodes]


def rows_differ_in_cards(pool_config: ConfigDict) -> bool:
    """Whether candidates are sampled for each row: if names are sampled, or if a prompt shows some of the models only.

    If all rows of an update showed the same few names, the update would mostly learn these names, and the next one
    would unlearn them. If the names are fixed, all rows show the same candidates, which are then computed once.
    """
    return pool_config.rename or pool_config.candidates > 0


def episode_rows(world: World, router: Router, rng: np.random.Generator, update: int) -> tuple[list[int], list[Row]]:
    """The shared prefix and the rows of episode update `update`, counted from 0."""
    config, s = router.config, router.config.synthetic
    exercises = config.warmstart.batch // 2 if update < s.copy_steps else 0
    recited = exercises // 2 if config.pool.rename else 0
    copies = exercises - recited
    prefix, rows = _prompted_rows(world, router, rng, config.warmstart.batch - copies, recited)
    if copies:
        vocabulary = len(router.tokenizer)
        tokens, repeats = repeating_sequences(rng, copies, COPY_TOKENS, vocabulary, periods=s.copy_periods)
        rows += [Row([], t, m) for t, m in zip(tokens, repeats, strict=True)]
    return prefix, rows


def _prompted_rows(
    world: World, router: Router, rng: np.random.Generator, count: int, recited: int
) -> tuple[list[int], list[Row]]:
    """The common prefix of `count` prompts, and their rows: `recited` recited cards, then scripted episodes."""
    pool, template = router.config.pool, router.template

    def draw() -> tuple[Card, ...]:
        return draw_candidates(router.cards, rng, pool)

    candidates = [draw() for _ in range(count)] if rows_differ_in_cards(pool) else [draw()] * count
    questions = world.questions("train")
    asked = [questions[i] for i in rng.integers(len(questions), size=count)]
    ids = [router.prompt_ids(question.text, cards) for cards, question in zip(candidates, asked, strict=True)]
    shared, rows = common_prefix(ids), []
    for i, (cards, question, prompt) in enumerate(zip(candidates, asked, ids, strict=True)):
        if i < recited:
            pieces = recited_cards(cards, rng, RECITED_NAMES, template=template)
            tokens, mask = (x[:COPY_TOKENS] for x in token_ids(router, pieces))
        else:
            tokens, mask = token_ids(router, scripted_episode(question, world, cards, rng, template=template))
        rows.append(Row(prompt[shared:], tokens, mask))
    return ids[0][:shared], rows


def longest_row(router: Router) -> int:
    """An upper bound of a row's tokens behind the shared prefix.

    If candidates are sampled for each row, their cards are part of the row. The longest cards under the longest name
    are then the bound.
    """
    pool, longest = router.config.pool, max(router.config.rollout.max_row_tokens, COPY_TOKENS)
    if not rows_differ_in_cards(pool):
        return longest

    def prompt(*cards: Card) -> tuple[int, ...]:
        return router.prompt_ids("?", cards)

    names = [card.name for card in all_in_prompts(router.cards, pool)]
    name = max(names, key=lambda name: len(router.tokenizer.encode(f" {name}")))
    named = [dataclasses.replace(card, name=name) for card in router.cards]
    cards = sorted(named, key=lambda card: len(prompt(card)))[-(pool.candidates or len(named)) :]
    return longest + len(prompt(*cards)) - common_prefix([prompt(card) for card in router.cards])
