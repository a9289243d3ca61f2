"""Episodes of a page: a varied selection of a large file, in JSON that means nothing to HTML."""

import json
import re
from itertools import takewhile

from hypothesis import given, settings
from hypothesis import strategies as st

from router_r1_jax.report.episode_data import pack_episodes


def episode(number, policy, step, right, split="test", **fields):
    record = {"id": str(number), "dataset": "synthetic", "split": split, "policy": policy, "step": step, "hops": 1}
    record |= {"question": "Who?", "golds": ["Ondo"], "response": "", "calls": [], "faults": [], "stop": "answer"}
    record |= {"exact_match": right, "f1": 1.0, "dollars": 0.0}
    return record | {"reward": dict.fromkeys(("total", "format", "outcome", "cost"), 0.0)} | fields


def questions_of(episodes, **options):
    return json.loads(pack_episodes(episodes, {}, **options).json)["questions"]


def test_kinds_of_outcome_take_turns_and_what_parts_the_policies_comes_first():
    episodes = [episode(n, "trained", 50, n != 17) for n in range(300)]
    episodes += [episode(n, "warm start", 0, n % 2) for n in range(298)]  # two questions have one policy only
    found = questions_of(episodes)
    outcomes = [tuple(e["right"] for e in sorted(q["episodes"], key=lambda e: e["policy"])) for q in found]
    assert outcomes[:3] == [(1, 0), (0, 1), (1, 1)]  # the only question that training spoilt is the second
    assert [len(o) for o in outcomes] == [2] * 298 + [1] * 2


def test_datasets_take_turns():
    episodes = [episode(n, "trained", 1, 1, dataset=dataset) for dataset in ("nq", "popqa") for n in range(50)]
    assert [q["dataset"] for q in questions_of(episodes)][:4] == ["nq", "popqa", "nq", "popqa"]


def test_evaluated_questions_come_before_those_of_training():
    episodes = [episode(n, "training", 10, 1, split="train") for n in range(5)]
    episodes += [episode(n, "trained", 50, 1) for n in range(3)]
    assert [q["split"] for q in questions_of(episodes)] == ["test"] * 3 + ["train"] * 5
    assert json.loads(pack_episodes(episodes, {}).json)["policies"] == ["trained", "training"]


def test_a_question_has_its_episodes_by_step():
    episodes = [episode(1, "training", step, 0, split="validation") for step in (60, 20, 80, 40)]
    (question,) = questions_of(episodes)
    assert [e["step"] for e in question["episodes"]] == [20, 40, 60, 80]


def test_a_page_that_would_be_too_large_says_how_much_it_holds():
    episodes = [episode(n, "trained", 1, 1, response="x" * 1000) for n in range(100)]
    packed = pack_episodes(episodes, {}, most_bytes=20_000)
    assert (packed.shown, packed.total) == (len(json.loads(packed.json)["questions"]), 100)
    assert 10 < packed.shown < 20 and len(packed.json) < 21_000


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=4, max_size=4), st.text(max_size=10))
def test_whatever_the_text_the_block_is_ascii_without_a_bracket(texts, model):
    question, gold, response, policy = texts
    call = {"model": model, "outcome": "ok", "completion_tokens": 3, "charged": 1e-6, "latency": 0.1, "thought": ""}
    record = episode(1, policy, 0, 1, question=question, golds=[gold], response=response, calls=[call])
    data = pack_episodes([record], {model: "#000"}).json
    assert data.isascii() and not re.search("[<>&]", data)
    found = json.loads(data)
    assert (found["policies"], found["colours"]) == ([policy], [[model, "#000"]])
    (question_found,) = found["questions"]
    assert (question_found["question"], question_found["golds"]) == (question, [gold])
    assert question_found["episodes"][0]["calls"][0][0] == model


def test_a_long_run_of_one_kind_does_not_hide_another_dataset():
    episodes = [episode(n, "trained", 1, 1, dataset="nq") for n in range(500)]
    episodes += [episode(f"b{n}", "trained", 1, 0, dataset="bamboogle") for n in range(3)]
    before = list(takewhile(lambda q: q["dataset"] == "nq", questions_of(episodes)))
    assert len(before) < 3
