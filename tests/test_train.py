"""The main job in small, as processes: what a finished run leaves, and what a further run makes of it."""

import json
import shutil
from types import SimpleNamespace

import mains
import numpy as np
import pytest
import tiny_config
from mains import assert_same_checkpoint, checkpoint_arrays, train_lines

from router_r1_jax.data.questions import QuestionRecord
from router_r1_jax.pool.ledger import read_ledger
from router_r1_jax.pool.outcomes import Outcome, Reply
from router_r1_jax.reward import CostNormalizer
from router_r1_jax.rollout import Episode
from router_r1_jax.router import RolloutBatch
from router_r1_jax.storage.checkpoint import CheckpointStore
from router_r1_jax.storage.json_lines import read_episodes
from router_r1_jax.train import estimate
from router_r1_jax.training.step_log import _hit_rate as hit_rate
from router_r1_jax.training.validation import validate

MODELS = ("Titan", "Reel", "Aria", "Atlas", "Pico")
STEP_METRICS = {
    "reward/total",
    "reward/format",
    "reward/outcome",
    "reward/cost",
    "em",
    "f1",
    "malformed_share",
    "calls_per_question",
    "dollars_per_question",
    "rollout_seconds",
    "update_seconds",
    "tokens_per_second",
    "kl",
    "entropy",
    "clip_share",
    "zero_variance_groups",
    "failed_episodes",
    "spent_dollars",
    "learning_rate",
    "weight_sync_seconds",
    "weight_sync_bytes",
    *(f"calls/share/{model}" for model in MODELS),
}


@pytest.mark.parametrize(
    ("replies", "rate"),
    [([("a", True), ("a", False), ("", False), ("b", True), ("b", True)], 0.75), ([("", False)], 0.0), ([], 0.0)],
)
def test_the_call_caches_hit_rate_is_of_calls_that_reached_a_model(replies, rate):
    made = [Reply("", Outcome.OK, model, hit=hit) for model, hit in replies]
    assert (
        hit_rate(SimpleNamespace(episodes=[SimpleNamespace(replies=made[:2]), SimpleNamespace(replies=made[2:])]))
        == rate
    )


@pytest.mark.parametrize(("shown", "batches"), [(0, [20]), (3, [8, 8, 4])])
def test_validation_meets_several_candidates_where_they_are_drawn(shown, batches):
    config, seeds, sizes = tiny_config.demo_config(), [], []
    config.pool.candidates, config.rollout.prompts_per_step, config.rollout.num_generations = shown, 8, 4
    questions = [QuestionRecord(str(i), "synthetic", "?", ("a",), 1, (), ()) for i in range(20)]

    def answer(asked, *, seed, **_):
        seeds.append(seed)
        sizes.append(len(asked))
        episodes = [Episode(i, prompt=(), stop="answer", text="<answer> no </answer>") for i in range(len(asked))]
        return RolloutBatch(asked, episodes, 1, (), 0, np.ones(len(asked), bool), None)

    router = SimpleNamespace(config=config, answer=answer)
    session = SimpleNamespace(config=config, router=router, cards=())
    window = CostNormalizer(config.reward.window).state()
    figures, records = validate(session, questions, window, step=5)
    assert sizes == batches and len(set(seeds)) == len(batches)
    assert [record["id"] for record in records] == [str(i) for i in range(20)] and figures["val/em"] == 0


@pytest.mark.parametrize(("dynamic_sampling", "every", "episodes"), [(0, 2, 104), (3, 2, 344), (0, 9, 88), (0, 5, 88)])
def test_the_estimate_counts_groups_drawn_anew_and_the_last_validation(dynamic_sampling, every, episodes):
    config = tiny_config.get_config()
    config.steps, config.learner.dynamic_sampling, config.validation.every = 5, dynamic_sampling, every
    assert f"5 steps, at most {episodes} episodes and {2 * episodes} calls" in estimate(config)


# What a finished run leaves.


def test_workdir_holds_all_that_is_promised(finished_run):
    for name in (
        "config.json",
        "metrics.jsonl",
        "ledger.jsonl",
        "results.json",
        "report.html",
        "episodes/train.jsonl",
        "episodes/test_trained.jsonl",
        "episodes/test_warm_start.jsonl",
        "plots/learning_curves.png",
        "plots/calls_per_model.png",
        "plots/em_against_cost.png",
        "plots/slots_over_time.png",
        "rollout.json",
    ):
        assert (finished_run / name).stat().st_size > 100, name
    with CheckpointStore(finished_run / "checkpoints") as store:
        assert store.steps() == [0, 2, 4]
        assert store.best() in (2, 4)
    config = json.loads((finished_run / "config.json").read_text())
    assert (config["steps"], config["rollout"]["num_generations"]) == (4, 4)
    assert "4 steps, at most 80 episodes and 160 calls" in (finished_run / "train.stdout").read_text()


def test_every_step_has_its_metrics(finished_run):
    lines = train_lines(finished_run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert STEP_METRICS <= line.keys()
        assert all(isinstance(line[key], (int, float)) for key in STEP_METRICS)
        assert line["tokens_per_second"] > 0
        assert ("val/em" in line) == (line["step"] % 2 == 0)
    assert sum(line["calls_per_question"] for line in lines) > 0
    assert any(line["grad_norm"] > 0 and line["kl"] >= 0 for line in lines)
    # The sampler's log-probs are the learner's: the ratio of an unmoved policy is 1.
    assert max(line["logp_diff_mean"] for line in lines) < 1e-5


def test_metrics_are_those_of_the_episodes(finished_run):
    """episodes/train.jsonl holds every step here, so each figure can be counted again from what was said."""
    episodes = [json.loads(line) for line in (finished_run / "episodes" / "train.jsonl").read_text().splitlines()]
    for line in train_lines(finished_run):
        own = [e for e in episodes if e["step"] == line["step"] and e["split"] == "train"]
        assert len(own) == 16 and len({e["id"] for e in own}) == 4
        assert line["reward/total"] == pytest.approx(sum(e["reward"]["total"] for e in own) / 16)
        assert line["em"] == pytest.approx(sum(e["exact_match"] for e in own) / 16)
        calls = [call for e in own for call in e["calls"]]
        assert line["calls_per_question"] == len(calls) / 16
        reached = [call["model"] for call in calls if call["model"]]
        for model in MODELS:
            assert line[f"calls/share/{model}"] == pytest.approx(reached.count(model) / max(len(reached), 1))
        rewards = [[e["reward"]["total"] for e in own if e["id"] == question] for question in {e["id"] for e in own}]
        assert line["zero_variance_groups"] == sum(len(set(group)) == 1 for group in rewards)


def test_ledger_holds_every_call_of_every_episode(finished_run):
    ledger = [line for line in read_ledger(finished_run / "ledger.jsonl") if line["split"] == "train"]
    episodes = [e for e in read_episodes(finished_run) if e["split"] == "train"]
    calls = [(e["step"], call["model"], call["charged"]) for e in episodes for call in e["calls"]]
    assert sorted((line["step"], line["model"], line["charged"]) for line in ledger) == sorted(calls)
    _, run = checkpoint_arrays(finished_run, 4)
    validated = [line for line in read_ledger(finished_run / "ledger.jsonl") if line["split"] != "test"]
    assert sum(sums[0] for sums in run["pools"][0]["ledger"].values()) <= len(validated)


def test_results_say_what_they_were_made_with(finished_run):
    results = json.loads((finished_run / "results.json").read_text())
    assert results["versions"].keys() >= {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"}
    assert len(results["config_hash"]) == 16 and isinstance(results["commit"], str)
    assert results["seeds"] == {"run": 0, "world": 7}
    assert results["price_date"] and results["alpha"] == 0.0
    assert (results["split"], results["questions"]) == ("test", 20)
    trained, warm = results["policies"]
    assert (trained["name"], warm["name"], warm["checkpoint"]) == ("trained", "warm start", 0)
    assert trained["checkpoint"] in (2, 4)
    names = [entry["name"] for entry in results["reference_policies"]]
    assert len(names) == len(set(names)) and {f"{model} alone" for model in MODELS} < set(names)


def test_policies_are_compared_on_the_same_questions(finished_run):
    after, before = (
        [json.loads(line) for line in (finished_run / "episodes" / f"test_{name}.jsonl").read_text().splitlines()]
        for name in ("trained", "warm_start")
    )
    assert [e["id"] for e in after] == [e["id"] for e in before] and len(after) == 20
    results = json.loads((finished_run / "results.json").read_text())
    for key, entry in (("exact_match", "em"), ("dollars", "dollars_per_question")):
        difference = np.mean([a[key] - b[key] for a, b in zip(after, before, strict=True)])
        gain = results["gain"][entry]
        assert gain["mean"] == pytest.approx(difference, abs=1e-12)
        assert gain["ci"][0] - 1e-12 <= gain["mean"] <= gain["ci"][1] + 1e-12


def test_the_same_command_after_the_end_changes_nothing(finished_run, warm_file, tmp_path):
    workdir = tmp_path / "again"
    shutil.copytree(finished_run, workdir)
    kept = ("metrics.jsonl", "ledger.jsonl", "episodes/train.jsonl", "config.json")
    before = {name: (workdir / name).read_bytes() for name in kept}
    done = mains.succeed("train", workdir, f"warmstart.file={warm_file}")
    assert "going on from step 4" in done.stdout and "another configuration" not in done.stdout
    assert {name: (workdir / name).read_bytes() for name in kept} == before
    assert_same_checkpoint(workdir, finished_run, 4)


def test_a_finished_run_goes_on_with_more_steps(finished_run, warm_file, tmp_path):
    """And says that the configuration is another one."""
    workdir = tmp_path / "longer"
    shutil.copytree(finished_run, workdir)
    done = mains.succeed("train", workdir, f"warmstart.file={warm_file}", "steps=5", "validation.questions=0")
    assert "another configuration" in done.stdout
    assert [line["step"] for line in train_lines(workdir)] == [1, 2, 3, 4, 5]
    assert train_lines(workdir)[:4] == train_lines(finished_run)


@pytest.mark.slow
def test_eight_devices_go_on_with_the_numbers_of_one(finished_run, warm_file, tmp_path):
    """On another mesh, from a checkpoint that one device has written; its first one is the reference policy."""
    for step in ("0", "2"):
        shutil.copytree(finished_run / "checkpoints" / step, tmp_path / "checkpoints" / step)
    eight = "--xla_force_host_platform_device_count=8"
    overrides = (f"warmstart.file={warm_file}", "validation.questions=0", "mesh.fsdp=2", "mesh.tensor=2")
    mains.succeed("train", tmp_path, *overrides, "rollout.replicas=2", XLA_FLAGS=eight)  # each takes seconds to compile
    lines, truth = train_lines(tmp_path), train_lines(finished_run)[2:]
    assert [line["step"] for line in lines] == [3, 4]
    for line, single in zip(lines, truth, strict=True):
        assert line["weight_sync_bytes"] > 0 == single["weight_sync_bytes"]
        for key in ("reward/total", "calls_per_question", "zero_variance_groups"):
            assert line[key] == single[key], key
        for key in ("grad_norm", "loss", "entropy", "kl"):
            assert line[key] == pytest.approx(single[key], rel=1e-3, abs=1e-6), key
    (arrays, _), (others, _) = checkpoint_arrays(tmp_path, 4), checkpoint_arrays(finished_run, 4)
    start, _ = checkpoint_arrays(finished_run, 2)
    params = [name for name in others if name.startswith("[0]")]
    worst = max(np.max(np.abs(arrays[name] - others[name])) for name in params)
    moved = max(np.max(np.abs(start[name] - others[name])) for name in params)
    assert worst < min(1e-5, moved / 20)


@pytest.mark.slow
def test_a_run_in_half_precision_goes_on_as_if_it_had_never_stopped(tmp_path):
    """Its checkpoints hold the float32 copies too, without which the steps so far would be rounded."""
    overrides = ("model.dtype=bfloat16", "warmstart.steps=20", "validation.questions=0", "learner.learning_rate=1e-5")
    whole, later = tmp_path / "whole", tmp_path / "later"
    mains.succeed("train", whole, *overrides)
    lines = train_lines(whole)
    assert all(line["skipped_updates"] == 0 and line["logp_diff_mean"] < 0.05 for line in lines)
    for step in ("0", "2"):
        shutil.copytree(whole / "checkpoints" / step, later / "checkpoints" / step)
    mains.succeed("train", later, *overrides)
    assert mains.repeatable(train_lines(later)) == mains.repeatable(lines)[2:]
    assert_same_checkpoint(later, whole, 4)
    mains.succeed("evaluate", whole, *overrides)


PPO = (
    "learner.advantage=gae",
    "learner.value_coef=0.1",
    "learner.kl=k1",
    "learner.kl_in=reward",
    "learner.epochs=2",
    "learner.minibatches=2",
    "learner.old_logps=learner",
    "learner.tis_cap=2.0",
    "rollout.top_p=0.9",
)
DAPO = ("learner.dynamic_sampling=1", "learner.clip_high=0.28", "learner.kl=none", "learner.length_buckets=2")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [PPO, DAPO], ids=["ppo", "dapo"])
def test_a_run_that_samples_ahead_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(warm_file, tmp_path, settings):
    """Also with a critic, and with groups that are drawn anew; two of four steps are one step off-policy."""
    overrides = (f"warmstart.file={warm_file}", "validation.questions=0", "rollout.one_step_off_policy=True", *settings)
    whole, later = tmp_path / "whole", tmp_path / "later"
    mains.succeed("train", whole, *overrides)
    lines = train_lines(whole)
    apart = [line["logp_diff_mean"] for line in lines]
    assert (
        max(apart[0], apart[2]) < 1e-4 < max(apart[1], apart[3])
    )  # of the policy that sampled and the one that learns
    assert all(line["skipped_updates"] == 0 and np.isfinite(line["loss"]) for line in lines)
    if settings is PPO:
        assert all(line["tis_mean"] < 1 and line["value_loss"] > 0 for line in lines)  # what top-p leaves is more
        assert lines[3]["value_explained"] != lines[0]["value_explained"]
    else:
        assert {line["sampling_rounds"] for line in lines} <= {1, 2} and "kl" not in lines[0]
    for step in ("0", "2"):
        shutil.copytree(whole / "checkpoints" / step, later / "checkpoints" / step)
    mains.succeed("train", later, *overrides)
    assert mains.repeatable(train_lines(later)) == mains.repeatable(lines)[2:]
    assert_same_checkpoint(later, whole, 4)
