"""The main on the tiny run: baselines measured, left as episodes, and not measured twice."""

import contextlib
import dataclasses
import json
import shutil
import sys
from concurrent.futures import Future
from types import SimpleNamespace

import jax
import mains
import numpy as np
import pytest
from tiny_config import get_config
from tiny_world import CARDS, WorldPool, questions

from router_r1_jax.baselines import __main__ as baselines
from router_r1_jax.baselines import suite as suite_module
from router_r1_jax.baselines.__main__ import chosen_names
from router_r1_jax.baselines.suite import BaselineSuite
from router_r1_jax.config import ConfigError
from router_r1_jax.distributed.mesh import make_mesh
from router_r1_jax.evaluation.episode_cache import digest
from router_r1_jax.model import ModelConfig, abstract_params, init_params, lora_from
from router_r1_jax.model.lora import split_trainable
from router_r1_jax.pool.outcomes import Outcome, PoolError, Reply
from router_r1_jax.storage.json_lines import write_episodes
from router_r1_jax.storage.metrics_writer import MissingExtraError

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
    assert lines["prompt only"]["em"] == warm[0]["em"]  # the same parameters, questions and candidates
    episodes = {path.name: path.stat().st_mtime_ns for path in (workdir / "episodes").glob("*baseline*")}
    ledger = (workdir / "ledger.jsonl").read_bytes()
    assert len(episodes) == len(NAMES)
    mains.succeed("baselines", workdir, *arguments)
    assert {path.name: path.stat().st_mtime_ns for path in (workdir / "episodes").glob("*baseline*")} == episodes
    assert (workdir / "ledger.jsonl").read_bytes() == ledger
    assert json.loads((workdir / "baselines.json").read_text()) == results


@pytest.mark.parametrize(("pool_mode", "mode"), [("off", "record"), ("replay", "replay")])
def test_calls_are_kept_in_evaluation_s_call_cache_if_the_pool_has_none(tmp_path, monkeypatch, pool_mode, mode):
    opened = []

    def open_session(config, workdir, load_source):
        opened.append(config.pool.call_cache)
        raise KeyboardInterrupt

    monkeypatch.setattr(baselines, "open_session", open_session)
    config = get_config()
    config.pool.call_cache.mode = pool_mode
    with pytest.raises(KeyboardInterrupt):
        baselines.main(config, tmp_path, only="", tries=500)
    (call_cache,) = opened
    assert call_cache.mode == mode and call_cache.path == (
        str(tmp_path / "evaluation" / "call_cache.sqlite") if pool_mode == "off" else ""
    )


def test_a_run_without_checkpoints_starts_from_the_warm_start_with_its_adapters(tmp_path, monkeypatch):
    config = get_config()
    config.model.lora.rank = 2
    model = ModelConfig(
        vocab_size=64,
        num_layers=2,
        width=16,
        mlp=24,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        remat="none",
        lora=lora_from(config.model.lora),
    )
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    base = init_params(model.base, mesh, seed=0)
    monkeypatch.setattr(suite_module, "warm_start", lambda session, writer: base)
    session = SimpleNamespace(workdir=tmp_path, model=model, mesh=mesh, abstract_params=abstract_params(model, mesh))
    params = BaselineSuite(config, session, 1).params
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, session.abstract_params)
    assert_same_leaves(split_trainable(params)[1], base)


def assert_same_leaves(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for leaf, other_leaf in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(leaf, other_leaf)


def test_the_trained_router_is_compared_on_some_of_the_questions_that_it_answered(tmp_path):
    write_episodes(tmp_path, "test_trained", [{"id": name, "em": 1.0} for name in "abc"])
    asked = [SimpleNamespace(id=name) for name in "ca"]
    assert [r["id"] for r in baselines.trained_records(tmp_path, "test", asked)] == ["c", "a"]
    assert baselines.trained_records(tmp_path, "test", [*asked, SimpleNamespace(id="d")]) is None
    assert baselines.trained_records(tmp_path, "validation", asked) is None


def test_baselines_choose_and_pay_by_the_prices_of_a_step(tmp_path, monkeypatch):
    """Without a trained router that is step 0; by declared prices Titan is the most expensive, at step 0 it is Reel."""
    prices = {"Reel": (8.0, 12.0)}
    cards = tuple(
        dataclasses.replace(card, price_changes=((0, *prices.get(card.key, (7.0, 11.0))), (3, 1.0, 1.0)))
        for card in CARDS
    )
    config, router = get_config(), SimpleNamespace()
    session = SimpleNamespace(
        workdir=tmp_path,
        cards=cards,
        pool=WorldPool(),
        router=router,
        environment=None,
        questions=questions,
    )
    monkeypatch.setattr(baselines, "open_session", lambda *_, **__: contextlib.nullcontext(session))
    baselines.main(config, tmp_path, only="Titan alone,largest", tries=1)
    titan, largest = json.loads((tmp_path / "baselines.json").read_text())["policies"]
    assert titan["raw_cost_per_question"] > 0  # 11 for each token written, and WorldPool counts 5 read ones
    assert titan["dollars_per_question"] == pytest.approx((7.0 * 5 + titan["raw_cost_per_question"]) / 1e6)
    assert largest["calls_share"]["Reel"] == 1.0
    assert {card.key: (card.price_in, card.price_out) for card in router.cards}["Reel"] == (8.0, 12.0)


def test_records_depend_on_what_they_were_fitted_and_scored_with(tmp_path):
    asked = questions("test")[:3]

    def key(name="knn", tries=5, **fields):
        config = get_config()
        config.update_from_flattened_dict(fields)
        session = SimpleNamespace(workdir=tmp_path, cards=CARDS)
        suite = BaselineSuite(config, session, tries)
        suite.params = {"w": np.ones(3, np.float32)}
        return digest(suite.key(name, asked))

    changed = [
        {"tries": 6},
        {"reward.alpha": 0.5},
        {"seed": 1},
        {"synthetic.world.seed": 9},
        {"name": "classifier"},
        {"learner.learning_rate": 0.5},
        {"rollout.temperature": 0.5},
        {"pool.max_tokens": 9},
    ]
    assert key() == key(**{"evaluation.bootstrap": 7, "evaluation.call_cache": False})
    assert len({key(), *(key(**fields) for fields in changed)}) == len(changed) + 1


def test_without_a_train_question_that_all_models_answered_the_failing_model_is_named(tmp_path):
    class Failing(WorldPool):
        def respond(self, route_text, **where):
            future = super().respond(route_text, **where)
            if route_text.startswith("Aria"):
                future = Future()
                future.set_result(Reply("r", Outcome.BAD_REQUEST, "Aria", "q", error="HTTP 404"))
            return future

    session = SimpleNamespace(workdir=tmp_path, cards=CARDS, pool=Failing(), questions=questions)
    suite = BaselineSuite(get_config(), session, 3)
    with pytest.raises(PoolError, match=r"each of the 3 train questions .* 3 at Aria bad_request \(HTTP 404\)"):
        suite.fitted("knn")


def test_a_missing_scikit_learn_is_named_before_a_call_is_paid(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    suite = BaselineSuite(get_config(), SimpleNamespace(workdir=tmp_path, cards=CARDS), 3)
    with pytest.raises(MissingExtraError, match=r"baseline 'cascade' needs scikit-learn .*router_r1_jax\[baselines\]"):
        suite.fitted("cascade")


def test_baselines_are_not_measured_on_the_questions_that_they_are_fitted_on(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "open_session", lambda *_, **__: pytest.fail("opened"))
    config = get_config()
    config.evaluation.split = "train"
    with pytest.raises(ConfigError, match="evaluation.split is 'train'"):
        baselines.main(config, tmp_path, only="", tries=500)


def test_a_baseline_s_episodes_lie_where_the_report_looks_whatever_its_model_is_called():
    assert baselines.file_name("test", "org/model 2.5 alone*") == "test_baseline_org_model_2.5_alone_star"


def test_an_unknown_baseline_is_refused():
    assert chosen_names(" knn*, random", ["random", "knn", "knn*"]) == ["knn*", "random"]
    assert chosen_names("", ["random", "knn"]) == ["random", "knn"]
    with pytest.raises(ConfigError, match="--only names 'bert'; choose from random, knn"):
        chosen_names("bert", ["random", "knn"])
