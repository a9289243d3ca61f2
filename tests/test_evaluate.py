"""Evaluation as a user runs it: killed and continued, of other weights, on a changed pool, beside another run."""

import json
import os
import re
import shutil
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import mains
import numpy as np
import pytest
from bad_config import tiny_config
from gated_pool import GatedPool

from router_r1_jax.evaluate import reference_policies
from router_r1_jax.evaluation.episode_cache import FOLDER
from router_r1_jax.pool.call_cache import count_calls
from router_r1_jax.pool.cards import cards_from_config
from router_r1_jax.pool.ledger import read_ledger
from router_r1_jax.pool.outcomes import PoolError
from router_r1_jax.setup.environment import open_environment
from router_r1_jax.storage.json_lines import read_lines
from router_r1_jax.synthetic.simulated_models import SimulatedModels
from router_r1_jax.synthetic.world import World

pytestmark = pytest.mark.slow
CONFIG = f"{mains.CONFIG.with_name('bad_config.py')}:pool="
SAMPLES = ("evaluation.samples=2", "evaluation.baseline=")


@pytest.fixture
def pool():
    config = tiny_config()
    models = SimulatedModels(World(config.synthetic.world.to_dict()), cards_from_config(config.pool))
    with GatedPool(models) as gated:
        yield gated


def copy_of(run, folder):
    """A run as `train` leaves it."""
    left_out = shutil.ignore_patterns("results.*", "report.html", "plots", FOLDER, "test_*.jsonl", "ledger.jsonl")
    return shutil.copytree(run, folder, ignore=left_out)


def timeless(value):
    """A result without what calls took."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not k.startswith(("call_seconds", "latency"))}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def recorded(workdir):
    try:
        return count_calls(workdir / FOLDER / "call_cache.sqlite")["replies"]
    except PoolError:  # there is no call cache yet
        return 0


def test_killed_twice_it_ends_with_the_same_results_and_asks_nothing_twice(finished_run, tmp_path, pool):
    config = CONFIG + pool.base_url
    whole, cut = copy_of(finished_run, tmp_path / "whole"), copy_of(finished_run, tmp_path / "cut")
    pool.answer_up_to(float("inf"))
    mains.succeed("evaluate", whole, *SAMPLES, config=config)
    asked = Counter(pool.answered)
    assert max(asked.values()) == 1 and len(asked) > 20  # what two episodes ask is paid once
    pool.begin_anew()
    for share in (0.4, 0.8):
        most = int(share * len(asked))
        pool.answer_up_to(most)
        process = mains.start("evaluate", cut, *SAMPLES, config=config)
        mains.wait_until(lambda most=most: recorded(cut) == most, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    cached = {path.name: len(read_lines(path)) for path in (cut / FOLDER).glob("*.jsonl")}
    assert cached and any(cached.values())
    pool.answer_up_to(float("inf"))
    done = mains.succeed("evaluate", cut, *SAMPLES, config=config)
    assert "episodes are on disk already" in done.stdout
    assert Counter(pool.answered) == asked
    results = [timeless(json.loads((run / "results.json").read_text())) for run in (whole, cut)]
    assert results[0] == results[1] and results[0]["policies"][0]["samples"]["per_question"] == 2
    for name in ("test_trained.jsonl", "test_trained_samples.jsonl"):
        episodes = [timeless(read_lines(run / "episodes" / name)) for run in (whole, cut)]
        assert episodes[0] == episodes[1] and len(episodes[0]) in (20, 40)

    # Once more: nothing is left to ask, and the table is the same.
    pool.answer_up_to(0)
    table = (cut / "results.md").read_text()
    mains.succeed("evaluate", cut, *SAMPLES, config=config)
    assert (cut / "results.md").read_text() == table


def test_policies_are_scored_by_the_costs_of_the_run_s_first_rollout(finished_run):
    """Both by one frozen window: equal costs give equal components, whichever policy made them."""
    _, run = mains.checkpoint_arrays(finished_run, 4)
    window = run["first_cost_window"]["sqrt_costs"]
    assert len(window) == 16
    low, high = np.percentile(window, [5, 95])
    components = set()
    for name in ("trained", "warm_start"):
        for record in read_lines(finished_run / "episodes" / f"test_{name}.jsonl"):
            if not record["failed"]:
                expected = 1 - np.clip((record["raw_cost"] ** 0.5 - low) / (high - low), 0, 1)
                assert record["reward"]["cost"] == pytest.approx(expected, abs=1e-6)
                components.add(record["reward"]["cost"])
    assert len(components) > 1


def test_an_exported_folder_and_another_runs_checkpoint_are_the_run_itself(finished_run, tmp_path):
    mains.succeed("export", finished_run, f"--folder={tmp_path / 'exported'}")
    original = read_lines(finished_run / "episodes" / "test_trained.jsonl")
    entry = json.loads((finished_run / "results.json").read_text())["policies"][0]
    exported, other = (
        mains.command("evaluate", tmp_path / name, f"--checkpoint={source}", f"--compare={finished_run}")
        for name, source in (
            ("a", tmp_path / "exported"),
            ("b", finished_run / "checkpoints" / str(entry["checkpoint"])),
        )
    )
    for done in mains.run_each(tmp_path / "outputs", [exported, other]):
        assert done.returncode == 0, done.stderr[-4000:]
    for name, policy in (("a", "exported"), ("b", "trained")):
        found = json.loads((tmp_path / name / "results.json").read_text())
        assert found["policies"][0]["name"] == policy
        assert found["policies"][0]["weights"] == entry["weights"]  # the same bits, by another way
        records = read_lines(tmp_path / name / found["policies"][0]["episodes"])
        assert [r["response"] for r in records] == [r["response"] for r in original]
        assert found["comparison"]["em"] == {
            "mean": 0.0,
            "ci": [0.0, 0.0],
            "sign_test": {"better": 0, "worse": 0, "equal": 20, "p": 1.0},
        }


def test_a_changed_pool_is_shown_charged_and_recorded_as_said(finished_run, tmp_path):
    run = copy_of(finished_run, tmp_path / "run")
    change = "drop=Titan,prices=3,rename,shuffle"
    mains.succeed("evaluate", run, f"--change={change}", f"--compare={finished_run}", "evaluation.baseline=")
    folder = run / "changes" / change.replace(",", "_")
    results = json.loads((folder / "results.json").read_text())
    assert results["changes"] == change.split(",") and not (run / "results.json").exists()
    assert results["comparison"]["folder"] == str(finished_run)
    assert "Titan" not in results["policies"][0]["calls_share"]
    prices = {card.key: (card.price_in, card.price_out) for card in cards_from_config(tiny_config().pool)}
    calls = [line for line in read_ledger(run / "ledger.jsonl") if line["model"]]
    assert calls
    for call in calls:
        assert call["model"] != "Titan"
        price_in, price_out = prices[call["model"]]
        dollars = (call["prompt_tokens"] * price_in + call["completion_tokens"] * price_out) / 1e6
        assert call["charged"] == pytest.approx(3 * dollars)
    shown = {}  # name in the call -> the model that answered
    for record in read_lines(folder / "episodes" / "test_trained.jsonl"):
        first = re.search(r"<search>\s*(\w+):", record["response"])
        if first and record["calls"] and record["calls"][0]["model"]:
            model = record["calls"][0]["model"]
            assert shown.setdefault(first[1], model) == model != first[1]
    assert shown and "Titan" not in shown


POOL = """
import runpy
SIMULATED = runpy.run_path({simulated!r})
PRICE_DATE, providers = SIMULATED["PRICE_DATE"], SIMULATED["providers"]
def models():
    models = SIMULATED["models"]()
    for model in models:
        model.price_changes = ((1, 7.0, 11.0),)
    return models
"""


def test_all_policies_are_charged_the_prices_of_the_step_that_is_evaluated(finished_run, tmp_path):
    """Also the warm start, whose step lies before the change, and the reference policies."""
    run = copy_of(finished_run, tmp_path / "run")
    pool = tmp_path / "pool.py"
    pool.write_text(POOL.format(simulated=str(Path(__file__).parents[1] / "configs/pools/simulated.py")))
    mains.succeed("evaluate", run, f"--change=pool={pool}", "evaluation.questions=4")
    (results,) = [json.loads(path.read_text()) for path in run.glob("changes/*/results.json")]
    assert [p["checkpoint"] > 0 for p in results["policies"]] == [True, False]
    calls = [line for line in read_ledger(run / "ledger.jsonl") if line["model"]]
    assert {line["step"] for line in calls} == {p["checkpoint"] for p in results["policies"]}
    for call in calls:
        dollars = (7.0 * call["prompt_tokens"] + 11.0 * call["completion_tokens"]) / 1e6
        assert call["charged"] == pytest.approx(dollars)
    alone = [r["dollars_per_question"] for r in results["reference_policies"] if r["name"].endswith("alone")]
    assert len(alone) > 1 and max(alone) < 2 * min(alone)  # one price for all; 20 times as much without the change


def test_other_questions_are_refused_before_anything_is_asked(finished_run, tmp_path):
    run = copy_of(finished_run, tmp_path / "run")
    commands = [
        mains.command("evaluate", run, f"--compare={finished_run}", "evaluation.questions=7"),
        mains.command("evaluate", run, f"--compare={tmp_path}"),
        mains.command("evaluate", run, "--change=drop=Nova"),
        mains.command("evaluate", run, "--change=drop=Titan", "pool.candidates=5"),
        mains.command("evaluate", run, f"--checkpoint={tmp_path}"),
        mains.command("evaluate", run, "--checkpoint=no/such/folder"),
    ]
    says = [
        "13 questions of the two evaluations, of 7 and 20 questions, differ in id, text or gold answers",
        "holds no results.json of an evaluation",
        "--change=drop=Nova: there is no model 'Nova'; choose one of Titan, Reel",
        "pool.candidates is 5, and --change=drop=Titan leaves 4 models; show them all with --config.pool.candidates=0",
        "is neither a run's folder",
        "--checkpoint=no/such/folder does not exist",
    ]
    for done, text in zip(mains.run_each(tmp_path / "outputs", commands), says, strict=True):
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert text in done.stderr.splitlines()[-1]
    assert not (run / "ledger.jsonl").exists() or not read_ledger(run / "ledger.jsonl")


def test_policies_that_choose_among_all_models_are_no_reference_if_prompts_show_only_some():
    """With 240 models their trees of calls would also take a quarter of an hour."""
    config = tiny_config()
    cards = cards_from_config(config.pool)
    session = SimpleNamespace(environment=open_environment(config, cards))
    world = session.environment.world
    asked = [SimpleNamespace(id=question.id) for question in world.questions(config.evaluation.split)[:5]]
    for candidates, named in ((0, 5 + len(cards)), (len(cards), 5 + len(cards)), (2, 0)):
        config.pool.candidates = candidates
        assert len(reference_policies(config, session, asked, cards)) == named
