"""What a step learns from: groups without a spread are replaced, and the next step's episodes may come prefetch."""

import dataclasses
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from router_r1_jax.config import base_config
from router_r1_jax.reward import CostNormalizer
from router_r1_jax.rollout import Episode
from router_r1_jax.router import RolloutBatch
from router_r1_jax.train import sample_step
from router_r1_jax.training.rollouts import Prefetch, choose_groups

GROUP = 2


class Questions:
    """Hands out batches of numbered questions; those divisible by `dead` are answered alike by all episodes."""

    def __init__(self, batch, dead):
        self.batch, self.dead, self.given = batch, dead, 0

    def next(self):
        made = [SimpleNamespace(id=str(n), golds=("yes",), dead=n % self.dead == 0) for n in self.numbers()]
        self.given += self.batch
        return made

    def numbers(self):
        return range(self.given, self.given + self.batch)


class FakeRouter:
    """RolloutBatch at once; the second episode of a live group is wrong."""

    def __init__(self, failed=(), thought="<think> {} </think>"):
        """`failed`: numbers of the episodes whose provider failed."""
        self.seeds, self.candidate_seeds, self.failed, self.thought = [], [], failed, thought

    def answer(self, questions, *, num_generations, seed, candidates_seed, **_):
        self.seeds.append(seed)
        self.candidate_seeds.append(candidates_seed)
        repeated = [q for q in questions for _ in range(num_generations)]
        episodes = []
        for i, question in enumerate(repeated):
            word = "no" if i % num_generations and not question.dead else "yes"
            text = self.thought.format(question.id) + f"<answer> {word} </answer>"
            episodes.append(Episode(id=i, prompt=(1, 2), text=text))
        valid = np.array([i not in self.failed for i in range(len(episodes))])
        return RolloutBatch(repeated, episodes, num_generations, (), 1 + len(self.seeds), valid, stats=None)


@pytest.fixture
def config():
    config = base_config()
    config.rollout.prompts_per_step, config.rollout.num_generations = 4, GROUP
    return config


def sample(config, router, questions, normalizer, step):
    """All rounds of a step, and the groups that the update learns from."""
    rounds = sample_step(config, router, questions, normalizer, step)
    return rounds, choose_groups(config, rounds)


def chosen_ids(chosen):
    ids = [question.id for question in chosen.rollouts.questions]
    assert ids[::GROUP] == ids[1::GROUP]  # groups stay whole
    return list(map(int, ids[::GROUP]))


@pytest.mark.parametrize(
    ("dead", "dynamic_sampling", "ids", "rounds"),
    [
        (100, 3, [0, 1, 2, 3], 2),  # one dead group: a second round
        (100, 0, [0, 1, 2, 3], 1),
        (2, 3, [1, 3, 5, 7], 2),
        (1, 2, [0, 1, 2, 3], 3),  # nothing but dead groups: as many rounds as are allowed, and the first episodes
        (3, 1, [1, 2, 4, 5], 2),
    ],
)
def test_groups_without_a_spread_are_replaced(config, dead, dynamic_sampling, ids, rounds):
    config.learner.dynamic_sampling = dynamic_sampling
    questions, router = Questions(4, dead), FakeRouter()
    if dead == 100 and dynamic_sampling:
        ids = [1, 2, 3, 4]  # 0 is dead
    rounds_made, chosen = sample(config, router, questions, CostNormalizer(10), 5)
    assert len(rounds_made) == rounds and questions.given == 4 * rounds
    assert chosen_ids(chosen) == ids
    rollouts, rewards = chosen
    assert [e.text for e in rollouts.episodes] == [
        f"<think> {q.id} </think><answer> {'no' if i % GROUP and not q.dead else 'yes'} </answer>"
        for i, q in enumerate(rollouts.questions)
    ]
    for i, episode in enumerate(rollouts.episodes):
        assert rewards.exact_match[i] == float("yes" in episode.text)
    assert {len(getattr(rewards, f.name)) for f in dataclasses.fields(rewards)} == {4 * GROUP}
    assert len(set(router.seeds)) == rounds and set(router.candidate_seeds) == {(0, 4)}  # one prefix, other draws
    assert rollouts.prefix_length == 2


@pytest.mark.parametrize(("group", "failed", "rounds"), [(1, {1}, 1), (GROUP, {2, 3}, 2), (GROUP, set(range(8)), 4)])
def test_a_group_that_failed_as_a_whole_has_no_spread(config, group, failed, rounds):
    config.rollout.num_generations, config.learner.dynamic_sampling = group, rounds - 1
    rounds_made, chosen = sample(config, FakeRouter(failed), Questions(4, 100), CostNormalizer(10), 1)
    assert len(rounds_made) == rounds and len(chosen.rollouts.episodes) == 4 * group


@pytest.mark.parametrize(("component", "ids"), [("outcome", [1, 3, 5, 7]), ("format", [0, 1, 2, 3])])
def test_what_the_update_compares_decides_which_groups_have_a_spread(config, component, ids):
    """All episodes are malformed: their totals are equal, and so are their formats, but not their outcomes."""
    config.learner.dynamic_sampling = 1
    config.learner.component_weights[component] = 1.0
    rounds_made, chosen = sample(config, FakeRouter(thought=""), Questions(4, 2), CostNormalizer(10), 1)
    assert not np.ptp(chosen.rewards.total)
    assert chosen_ids(chosen) == ids


class SlowSampling:
    def __init__(self):
        self.threads, self.stopped = [], threading.Event()

    def __call__(self, step):
        self.threads.append(threading.current_thread())
        if step == "fails":
            raise OSError("no more")
        if step == "prompts first":
            time.sleep(0.3)
            self.stopped.clear()  # no rollout was under way that could hear it
        if step in ("endless", "prompts first"):
            self.stopped.wait(20)
            raise RuntimeError("stopped")
        return step

    def stop(self):
        self.stopped.set()


def test_a_step_prefetched_is_taken_from_the_thread_and_others_are_made_at_once():
    slow = SlowSampling()
    with Prefetch(slow, slow) as prefetch:
        assert prefetch.take(1) == 1 and not prefetch.begun
        prefetch.begin(2)
        assert prefetch.begun and prefetch.take(2) == 2 and not prefetch.begun
        prefetch.begin("fails")
        with pytest.raises(OSError, match="no more"):
            prefetch.take("fails")
        assert not prefetch.begun
    assert slow.threads[0] is threading.main_thread() is not slow.threads[1]


@pytest.mark.parametrize("step", ["endless", "prompts first"])
def test_leaving_ends_the_rollout_that_is_under_way_or_about_to_be(step):
    slow, began = SlowSampling(), time.monotonic()
    with pytest.raises(KeyboardInterrupt), Prefetch(slow, slow) as prefetch:
        prefetch.begin(step)
        raise KeyboardInterrupt
    assert slow.stopped.is_set() and time.monotonic() - began < 15
