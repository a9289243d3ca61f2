"""What the studies share: whom a redirected call really reaches, and how runs become tables."""

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
from router_r1_jax.data.reference import oracle, trees
from router_r1_jax.data.world import World, query_text
from router_r1_jax.pool.cards import cards_from_config
from router_r1_jax.reward import exact_match
from router_r1_jax.rollout import Episode
from router_r1_jax.router import Answers
from router_r1_jax.session import open_session
from router_r1_jax.warmstart import load_warm_start, recipe

STUDIES = Path(__file__).parents[1] / "experiments" / "studies"
NAMES = ("main_table", "cost_curve", "unseen_models", "format_reward", "routing_worth")


@pytest.fixture(scope="module")
def studies():
    """Module name -> its names; they import each other as scripts do."""
    sys.path.insert(0, str(STUDIES))
    try:
        return {name: runpy.run_path(str(STUDIES / f"{name}.py")) for name in (*NAMES, "runner")}
    finally:
        sys.path.remove(str(STUDIES))


@pytest.fixture(scope="module")
def world_and_cards():
    config = runpy.run_path(str(Path(__file__).parent / "tiny_config.py"))["get_config"]()
    return World(config.data.world), cards_from_config(config.pool)


class Pool:
    """Writes down what it is asked."""

    def __init__(self):
        self.asked = []

    def respond(self, route_text, *, cards, **where):
        self.asked.append(route_text)
        return Future()


def test_every_study_has_a_main_and_its_command(studies):
    for name in NAMES:
        assert callable(studies[name]["main"]) and f"python experiments/studies/{name}.py" in studies[name]["__doc__"]


def test_a_redirected_call_reaches_the_chosen_model_and_a_faulty_one_none_other(studies, world_and_cards):
    _, cards = world_and_cards
    pool = Pool()
    redirected = studies["runner"]["Redirected"](pool, lambda query, roster, called: "Atlas")
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
    means = studies["runner"]["over_seeds"](lines)
    interval = stats.ttest_1samp([0.9, 0.95, 0.91], 0).confidence_interval()
    assert means["em"]["ci"] == pytest.approx([interval.low, interval.high]) and means["seeds"] == [0, 1, 2]
    assert studies["runner"]["spelt"](means["em"]) == f"0.920 [{interval.low:.3f} .. {interval.high:.3f}]"
    assert "f1" not in means


def test_a_run_is_trained_to_its_end_when_its_last_step_is_written(studies, tmp_path):
    """Steps of the warm start are none of training; a line that a kill has torn is no line."""
    ended, metrics = studies["runner"]["checkpoints"], tmp_path / "metrics.jsonl"
    assert not ended(tmp_path)
    (tmp_path / "config.json").write_text('{"steps": 3}')
    lines = ['{"step": 120, "phase": "warmstart"}\n', '{"step": 2}\n', '{"step": 3}\n', '{"st']
    for count, done in ((0, False), (1, False), (2, False), (3, True), (4, True)):
        metrics.write_text("".join(lines[:count]))
        assert ended(tmp_path) == done


@pytest.mark.parametrize("sweep", ["demo_cards", "demo_unseen"])
def test_a_kept_warm_start_of_a_study_is_of_its_sweep_s_recipe(studies, tmp_path, sweep):
    """With the tokenizer that the study makes, whose words it was trained on."""
    config = runpy.run_path(str(STUDIES.parents[1] / "configs" / "sweeps" / f"{sweep}.py"))["get_config"]()
    studies["unseen_models"]["make_tokenizer"](tmp_path / "words", config)
    config.model.tokenizer = str(tmp_path / "words")
    with safe_open(config.warmstart.file, framework="numpy") as file:
        assert file.metadata()["recipe"] == recipe(config)


@pytest.mark.slow
def test_the_kept_warm_start_of_the_cards_study_reads(studies, tmp_path):
    """Which name stands behind a score, on rosters that it has not met; all else but the score it knows by heart."""
    config = runpy.run_path(str(STUDIES.parents[1] / "configs" / "sweeps" / "demo_cards.py"))["get_config"]()
    studies["unseen_models"]["make_tokenizer"](tmp_path / "words", config)
    config.model.tokenizer = str(tmp_path / "words")
    with open_session(config, tmp_path, load_source=False) as session:
        params = load_warm_start(Path(config.warmstart.file), session)
        found = runpy.run_path(str(STUDIES.parent / "reading.py"))["foreseen"](session, params, 2)
    assert found["name behind a score"]["tokens"] > 100 and found["name behind a score"]["foreseen"] > 0.95
    assert found["name said again"]["foreseen"] > 0.99 and found["other"]["foreseen"] > 0.99
    assert found["score"]["nats"] > 1.5  # one of five at random: none is preferred yet


@pytest.mark.parametrize("colon", ["", " :"])
def test_a_named_score_is_held_against_the_cards_that_were_shown(studies, world_and_cards, colon):
    """Titan states film 97 and sport 27, Pico film 22."""
    _, cards = world_and_cards
    keys = {card.name: card.key for card in cards}
    said = [("film", 97), ("sport", 97), ("film", 22), ("film", 23)]
    calls = [f"<think> x of y : {d} {s}{colon} Titan </think>\n<search> Titan: x of y? </search>\n" for d, s in said]
    response = "".join(calls) + "<think> film 97 </think>\n<answer> y </answer>"
    share = studies["unseen_models"]["stated_share"]
    assert share([{"response": response, "shown": [keys["Titan"], keys["Pico"]]}], cards) == 0.5
    assert share([{"response": response, "shown": [keys["Titan"]]}], cards) == 0.25
    assert share([], cards) == 0.0


class Silent:
    """A router that answers nothing, and counts the questions."""

    def __init__(self):
        self.asked = 0

    def answer(self, questions, *, group, **_):
        self.asked += len(questions)
        episodes = [Episode(i, prompt=(), stop="answer", text="<answer> no </answer>") for i in range(len(questions))]
        return Answers(list(questions), episodes, group, (), 0, np.ones(len(questions), bool), None)


def test_episodes_are_measured_once_for_each_checkpoint_and_variant(studies, world_and_cards, tmp_path):
    runner, (world, cards) = studies["runner"], world_and_cards
    config = runpy.run_path(str(Path(__file__).parent / "tiny_config.py"))["get_config"]()
    asked = [QuestionRecord(q.id, "synthetic", q.text, q.golds, 1, (), ()) for q in world.questions("test")[:3]]
    session = SimpleNamespace(config=config, workdir=tmp_path, cards=cards, pool=None)
    router = Silent()

    def measured(weight, **overrides):
        checkpoint = runner["Checkpoint"](session, {"w": np.full(3, weight, np.float32)})
        checkpoint.router = lambda variant: router
        return runner["measured"](checkpoint, runner["Variant"]("v", overrides), asked, study="s")

    assert measured(1.0) == measured(1.0) and router.asked == 3
    measured(2.0)
    assert router.asked == 6
    measured(2.0, **{"rollout.max_calls": 0})
    measured(2.0, **{"rollout.max_calls": 0})
    assert router.asked == 9
