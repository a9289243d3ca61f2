"""The main on the tiny run: baselines measured, left as episodes, and not measured twice."""

import contextlib
import dataclasses
import json
import shutil
from concurrent.futures import Future
from types import SimpleNamespace

import jax
import mains
import numpy as np
import pytest
from tiny_config import get_config
from tiny_world import CARDS, WORLD, WorldPool, questions

from router_r1_jax.baselines import __main__ as baselines
from router_r1_jax.baselines.__main__ import chosen_names
from router_r1_jax.config import ConfigError
from router_r1_jax.evaluation.journal import digest
from router_r1_jax.mesh import make_mesh
from router_r1_jax.model import ModelConfig, abstract_params, init_params, lora_from
from router_r1_jax.model.lora import split_trainable
from router_r1_jax.pool.outcomes import Outcome, PoolError, Reply
from router_r1_jax.report.writer import EpisodeWriter

NAMES = ("direct", "prompt only", "fine-tuned", "random", "knn*", "classifier*", "oracle of one call")


@pytest.mark.slow
def test_baselines_are_measured_on_the_run_s_questions_and_only_once(finished_run, warm_file, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    arguments = (f"warmstart.file={warm_file}", "steps=2", f"--only={','.join(NAMES)}", "--tries=60")
    mains.succeed("baselines", workdir, *arguments)
    results = json.loads((workdir / "baselines.json").read_text())
    lines = {line["name"]: line for line in results["policies"]}
    assert list(lines) == ["trained router", *NAMES] and results["questions"] == 20
    trained = json.loads((workdir / "results.json").read_text())["policies"][0]
    assert lines["trained router"]["em"] == trained["em"]
    for name in NAMES:
        ahead = lines[name]["router_ahead"]["em"]
        assert ahead["mean"] == pytest.approx(trained["em"] - lines[name]["em"]) and ahead["ci"][0] <= ahead["ci"][1]
    assert lines["direct"]["calls_per_question"] == 0 and lines["random"]["calls_per_question"] == 1
    assert lines["knn*"]["calls_per_question"] > 1
    assert lines["oracle of one call"]["em"] >= lines["random"]["em"]
    warm = [p for p in json.loads((workdir / "results.json").read_text())["policies"] if p["name"] == "warm start"]
    assert lines["prompt only"]["em"] == warm[0]["em"]  # the same parameters, questions and rosters
    episodes = {path.name: path.stat().st_mtime_ns for path in (workdir / "episodes").glob("*baseline*")}
    ledger = (workdir / "ledger.jsonl").read_bytes()
    assert len(episodes) == len(NAMES)
    mains.succeed("baselines", workdir, *arguments)
    assert {path.name: path.stat().st_mtime_ns for path in (workdir / "episodes").glob("*baseline*")} == episodes
    assert (workdir / "ledger.jsonl").read_bytes() == ledger
    assert json.loads((workdir / "baselines.json").read_text()) == results


@pytest.mark.parametrize(("own", "mode"), [("off", "record"), ("replay", "replay")])
def test_calls_are_kept_on_evaluation_s_tape_where_the_pool_has_none(tmp_path, monkeypatch, own, mode):
    opened = []

    def open_session(config, workdir, load_source):
        opened.append(config.pool.tape)
        raise KeyboardInterrupt

    monkeypatch.setattr(baselines, "open_session", open_session)
    config = get_config()
    config.pool.tape.mode = own
    with pytest.raises(KeyboardInterrupt):
        baselines.main(config, tmp_path)
    (tape,) = opened
    assert tape.mode == mode and tape.path == (str(tmp_path / "evaluation" / "tape.sqlite") if own == "off" else "")


def test_a_run_without_checkpoints_starts_from_the_warm_start_with_its_adapters(tmp_path, monkeypatch):
    config = get_config()
    config.model.lora.rank = 2
    model = ModelConfig(
        vocab_size=64, num_layers=2, width=16, mlp=24, num_heads=2, num_kv_heads=1, head_dim=8, remat="none",
        lora=lora_from(config.model.lora),
    )  # fmt: skip
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    base = init_params(model.base, mesh, seed=0)
    monkeypatch.setattr(baselines, "warm_start", lambda session, writer: base)
    session = SimpleNamespace(workdir=tmp_path, model=model, mesh=mesh, abstract_params=abstract_params(model, mesh))
    params = baselines.Bench(config, session, 1).params()
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, session.abstract_params)
    assert_same_leaves(split_trainable(params)[1], base)


def assert_same_leaves(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for leaf, own in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(leaf, own)


def test_the_trained_router_is_compared_on_some_of_the_questions_that_it_answered(tmp_path):
    writer = EpisodeWriter(tmp_path, "test_trained")
    writer.write([{"id": name, "em": 1.0} for name in "abc"])
    writer.close()
    asked = [SimpleNamespace(id=name) for name in "ca"]
    assert [r["id"] for r in baselines.trained_records(tmp_path, "test", asked)] == ["c", "a"]
    assert baselines.trained_records(tmp_path, "test", [*asked, SimpleNamespace(id="d")]) is None
    assert baselines.trained_records(tmp_path, "validation", asked) is None


def test_baselines_have_the_prices_of_a_step(tmp_path, monkeypatch):
    """Without a trained router that of step 0."""
    cards = tuple(dataclasses.replace(card, price_changes=((0, 7.0, 11.0), (3, 1.0, 1.0))) for card in CARDS)
    shown, config = [], get_config()
    session = SimpleNamespace(
        workdir=tmp_path, cards=cards, pool=WorldPool(), router=SimpleNamespace(show=shown.append), world=WORLD,
        questions=questions,
    )  # fmt: skip
    monkeypatch.setattr(baselines, "open_session", lambda *_, **__: contextlib.nullcontext(session))
    baselines.main(config, tmp_path, only="Titan alone")
    (line,) = json.loads((tmp_path / "baselines.json").read_text())["policies"]
    assert line["raw_cost_per_question"] > 0  # 11 for each token written, and WorldPool counts 5 read ones
    dollars = (7.0 * 5 + line["raw_cost_per_question"]) / 1e6
    assert line["dollars_per_question"] == pytest.approx(dollars)
    assert {(card.price_in, card.price_out) for card in shown[0]} == {(7.0, 11.0)}


def test_the_table_says_where_the_router_chooses_among_fewer_models():
    results = {"questions": 3, "split": "test", "policies": [], "models": 9}
    said = "choose among all 9 models, the router among the 5 it is shown"
    assert said in baselines.table(results | {"shown": 5}) and said not in baselines.table(results | {"shown": 9})


def test_records_depend_on_what_they_were_fitted_and_judged_with(tmp_path):
    asked = questions("test")[:3]

    def depends(name="knn", tries=5, **fields):
        config = get_config()
        config.update_from_flattened_dict(fields)
        session = SimpleNamespace(workdir=tmp_path, cards=CARDS)
        bench = baselines.Bench(config, session, tries)
        bench._params = {"w": np.ones(3, np.float32)}
        return digest(baselines.depends(bench, name, asked))

    changed = [
        {"tries": 6}, {"reward.alpha": 0.5}, {"seed": 1}, {"data.world.seed": 9}, {"name": "classifier"},
        {"learner.learning_rate": 0.5}, {"rollout.temperature": 0.5}, {"pool.max_tokens": 9},
    ]  # fmt: skip
    assert depends() == depends(**{"evaluation.bootstrap": 7, "evaluation.tape": False})
    assert len({depends(), *(depends(**fields) for fields in changed)}) == len(changed) + 1


def test_without_a_train_question_that_all_models_answered_the_failing_model_is_named(tmp_path):
    class Failing(WorldPool):
        def respond(self, route_text, **where):
            future = super().respond(route_text, **where)
            if route_text.startswith("Aria"):
                future = Future()
                future.set_result(Reply("r", Outcome.BAD_REQUEST, "Aria", "q", error="HTTP 404"))
            return future

    session = SimpleNamespace(workdir=tmp_path, cards=CARDS, pool=Failing(), questions=questions)
    bench = baselines.Bench(get_config(), session, 3)
    with pytest.raises(PoolError, match=r"each of the 3 train questions .* 3 at Aria bad_request \(HTTP 404\)"):
        bench.fitted("knn")


def test_baselines_are_not_judged_on_the_questions_that_they_are_fitted_on(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "open_session", lambda *_, **__: pytest.fail("opened"))
    config = get_config()
    config.evaluation.split = "train"
    with pytest.raises(ConfigError, match="evaluation.split is 'train'"):
        baselines.main(config, tmp_path)


def test_a_baseline_s_episodes_lie_where_the_report_looks_whatever_its_model_is_called():
    assert baselines.file_name("test", "org/model 2.5 alone*") == "test_baseline_org_model_2.5_alone_star"


def test_an_unknown_baseline_is_refused():
    assert chosen_names(" knn*, random", ["random", "knn", "knn*"]) == ["knn*", "random"]
    assert chosen_names("", ["random", "knn"]) == ["random", "knn"]
    with pytest.raises(ConfigError, match="--only names 'bert'; choose from random, knn"):
        chosen_names("bert", ["random", "knn"])
