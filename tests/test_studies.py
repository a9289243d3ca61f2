"""Shared parts of the studies: redirected calls, means over runs, kept records, and the kept warm starts."""

import runpy
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open
from scipy import stats

from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.pool.cards import cards_from_config
from router_r1_jax.reward import exact_match
from router_r1_jax.rollout import Episode
from router_r1_jax.router import RolloutBatch
from router_r1_jax.setup.environment import open_environment
from router_r1_jax.setup.session import open_session
from router_r1_jax.synthetic.oracle import oracle, trees
from router_r1_jax.synthetic.world import World, query_text
from router_r1_jax.training.warmstart import load_warm_start, recipe

STUDIES = Path(__file__).parents[1] / "experiments" / "studies"
NAMES = ("main_table", "cost_curve", "unseen_models", "format_reward", "routing_worth")


@pytest.fixture(scope="module")
def studies():
    """Module name -> its names. The modules import each other as scripts do."""
    sys.path.insert(0, str(STUDIES))
    try:
        return {name: runpy.run_path(str(STUDIES / f"{name}.py")) for name in (*NAMES, "runner")}
    finally:
        sys.path.remove(str(STUDIES))


@pytest.fixture(scope="module")
def world_and_cards():
    config = runpy.run_path(str(Path(__file__).parent / "tiny_config.py"))["get_config"]()
    return World(config.synthetic.world), cards_from_config(config.pool)


class Pool:
    """Keeps the calls that it is asked."""

    def __init__(self):
        self.asked = []

    def respond(self, route_text, *, cards, **where):
        self.asked.append(route_text)
        return Future()


def test_every_study_has_a_main_and_its_command(studies):
    for name in NAMES:
        assert callable(studies[name]["main"]) and f"python experiments/studies/{name}.py" in studies[name]["__doc__"]


def test_a_redirected_call_reaches_the_chosen_model_and_a_malformed_one_is_passed_on(studies, world_and_cards):
    _, cards = world_and_cards
    pool = Pool()
    redirected = studies["runner"]["Redirected"](pool, lambda query, candidates, called: "Atlas")
    for route in ("Titan: director of Velmora?", "nobody: what?", "no colon"):
        redirected.respond(route, cards=cards, episode="e", call=0, step=0, split="test")
    assert pool.asked == ["Atlas: director of Velmora?", "nobody: what?", "no colon"]


def test_the_oracle_s_choice_is_the_cheapest_model_that_knows(studies, world_and_cards):
    """Against the tree of all ways to answer: on one-hop questions both reach the same EM at the same price."""
    world, cards = world_and_cards
    choose = studies["routing_worth"]["knowing_model"](world)
    asked = [q for q in world.questions("train") if len(q.hops) == 1]
    best = oracle(trees(world, asked, cards), 0.0, (0.0, 1.0))
    right = 0.0
    for question in asked:
        query = query_text(question.hops[0].relation, question.hops[0].subject)
        card = next(card for card in cards if card.name == choose(query, cards, "Titan"))
        right += exact_match(world.reply(query, card.performance).split(" is ")[1].rstrip("."), question.golds)
    assert right / len(asked) == pytest.approx(best.em) and 0.5 < best.em < 1
    assert choose("the weather?", cards, "Titan") == "Titan"


def test_means_over_seeds_carry_student_s_interval(studies):
    lines = {seed: {"em": em, "dollars_per_question": 1e-5} for seed, em in enumerate((0.9, 0.95, 0.91))}
    means = studies["runner"]["mean_over_seeds"](lines)
    interval = stats.ttest_1samp([0.9, 0.95, 0.91], 0).confidence_interval()
    assert means["em"]["ci"] == pytest.approx([interval.low, interval.high]) and means["seeds"] == [0, 1, 2]
    assert studies["runner"]["format_mean"](means["em"]) == f"0.920 [{interval.low:.3f} .. {interval.high:.3f}]"
    assert "f1" not in means


def test_a_run_is_trained_to_its_end_when_its_last_step_is_written(studies, tmp_path):
    """Steps of the warm start are no training steps. A line that was cut short by a kill does not count."""
    is_trained, metrics = studies["runner"]["is_trained"], tmp_path / "metrics.jsonl"
    assert not is_trained(tmp_path)
    (tmp_path / "config.json").write_text('{"steps": 3}')
    lines = ['{"step": 120, "phase": "warmstart"}\n', '{"step": 2}\n', '{"step": 3}\n', '{"st']
    for count, done in ((0, False), (1, False), (2, False), (3, True), (4, True)):
        metrics.write_text("".join(lines[:count]))
        assert is_trained(tmp_path) == done


@pytest.mark.parametrize("sweep", ["demo_cards", "demo_unseen"])
def test_a_kept_warm_start_of_a_study_carries_the_recipe_of_its_sweep(studies, tmp_path, sweep):
    """The study makes the tokenizer that the warm start was trained with."""
    config = runpy.run_path(str(STUDIES.parents[1] / "configs" / "sweeps" / f"{sweep}.py"))["get_config"]()
    studies["unseen_models"]["make_tokenizer"](tmp_path / "words", config)
    config.model.tokenizer = str(tmp_path / "words")
    session = SimpleNamespace(config=config, environment=open_environment(config, cards_from_config(config.pool)))
    with safe_open(config.warmstart.file, framework="numpy") as file:
        assert file.metadata()["recipe"] == recipe(session)


@pytest.mark.slow
def test_the_kept_warm_start_of_the_cards_study_reads(studies, tmp_path):
    """It reads names behind scores from candidates that it has not met, and knows all other words but the scores."""
    config = runpy.run_path(str(STUDIES.parents[1] / "configs" / "sweeps" / "demo_cards.py"))["get_config"]()
    studies["unseen_models"]["make_tokenizer"](tmp_path / "words", config)
    config.model.tokenizer = str(tmp_path / "words")
    with open_session(config, tmp_path, load_source=False) as session:
        params = load_warm_start(Path(config.warmstart.file), session)
        found = runpy.run_path(str(STUDIES.parent / "reading.py"))["foreseen"](session, params, 2)
    assert found["name behind a score"]["tokens"] > 100 and found["name behind a score"]["foreseen"] > 0.95
    assert found["name said again"]["foreseen"] > 0.99 and found["other"]["foreseen"] > 0.99
    assert found["score"]["nats"] > 1.5  # one of five at random: it prefers none yet


@pytest.mark.parametrize("colon", ["", " :"])
def test_a_named_score_is_compared_with_the_cards_in_the_prompt(studies, world_and_cards, colon):
    """Titan states film 97 and sport 27, Pico film 22."""
    _, cards = world_and_cards
    keys = {card.name: card.key for card in cards}
    said = [("film", 97), ("sport", 97), ("film", 22), ("film", 23)]
    calls = [f"<think> x of y : {d} {s}{colon} Titan </think>\n<search> Titan: x of y? </search>\n" for d, s in said]
    response = "".join(calls) + "<think> film 97 </think>\n<answer> y </answer>"
    share = studies["unseen_models"]["stated_share"]
    assert share([{"response": response, "candidates": [keys["Titan"], keys["Pico"]]}], cards) == 0.5
    assert share([{"response": response, "candidates": [keys["Titan"]]}], cards) == 0.25
    assert share([], cards) == 0.0


class Silent:
    """A router that answers nothing, and counts the questions."""

    def __init__(self, config):
        self.config, self.asked = config, 0

    def answer(self, questions, *, num_generations, **_):
        self.asked += len(questions)
        episodes = [Episode(i, prompt=(), stop="answer", text="<answer> no </answer>") for i in range(len(questions))]
        return RolloutBatch(list(questions), episodes, num_generations, (), 0, np.ones(len(questions), bool), None)


def test_episodes_are_measured_once_for_each_checkpoint_and_variant(studies, world_and_cards, tmp_path):
    runner, (world, cards) = studies["runner"], world_and_cards
    config = runpy.run_path(str(Path(__file__).parent / "tiny_config.py"))["get_config"]()
    asked = [QuestionRecord(q.id, "synthetic", q.text, q.golds, 1, (), ()) for q in world.questions("test")[:3]]
    session = SimpleNamespace(config=config, workdir=tmp_path, cards=cards, pool=None)
    router = Silent(config)

    def records(weight, **overrides):
        checkpoint = runner["Checkpoint"](session, {"w": np.full(3, weight, np.float32)})
        checkpoint.router = lambda variant: router
        return runner["greedy_records"](checkpoint, runner["Variant"]("v", overrides), asked, study="s")

    assert records(1.0) == records(1.0) and router.asked == 3
    records(2.0)
    assert router.asked == 6
    records(2.0, **{"rollout.max_calls": 0})
    records(2.0, **{"rollout.max_calls": 0})
    assert router.asked == 9
