"""The planner against XLA's own account of the real update and the real step, and against what a run would hold."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from compiled_memory import MESHES, SHARDED, compiled_step, compiled_update

from router_r1_jax.learner import batch
from router_r1_jax.learning import learner_layout
from router_r1_jax.mesh import abstract_mesh, make_mesh
from router_r1_jax.model import LoRA, ModelConfig, WeightsError, plan, preset
from router_r1_jax.model.hf_config import config_to_hf
from router_r1_jax.model.plan import RolloutShape, UpdateShape
from router_r1_jax.rollout import engine, replica
from router_r1_jax.rollout.automaton import build_automaton
from router_r1_jax.rollout.exchange import STOP_TAGS

ROOT = Path(__file__).parents[2]
ONE = abstract_mesh(1, 1, 1, 1)
SMALL = ModelConfig(vocab_size=500, num_layers=3, width=96, mlp=256, num_heads=4, num_kv_heads=2, head_dim=24)
LLAMA = ModelConfig(
    vocab_size=4000, num_layers=2, width=128, mlp=384, num_heads=8, num_kv_heads=8, head_dim=16, family="llama",
    tie_embeddings=False,
)  # fmt: skip
ADAPTERS = LoRA(rank=8, alpha=16.0)
UPDATE = UpdateShape(rows=16, micro_batch=8, row_tokens=96, prefix_tokens=64, logit_chunk=16)
LONG = UpdateShape(rows=8, micro_batch=4, row_tokens=256, prefix_tokens=128, logit_chunk=64)
STEP = RolloutShape(
    slots=16, lanes=16, row_tokens=256, turn_tokens=48, feed_tokens=64, chunk=16, feed_rows=4, prefix_tokens=64
)  # fmt: skip


def configuration(path, arg=None):
    """What a file of configs/ says."""
    spec = importlib.util.spec_from_file_location("configuration", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def update_plan(config, mesh, shape):
    """(arguments, all) of an update, as the planner has it."""
    parts = plan.plan(config, mesh, shape, STEP)["update"]
    arguments = parts["parameters"] + parts["optimizer"] + parts["batch"]
    return arguments, arguments + sum(
        parts[name] for name in ("gradients", "activations kept (remat)", "activations at work")
    )


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (SMALL, UPDATE),
        (dataclasses.replace(SMALL, remat="dots"), UPDATE),
        (dataclasses.replace(SMALL, remat="none", family="qwen2"), UPDATE),
        (dataclasses.replace(LLAMA, remat="dots"), LONG),
        (dataclasses.replace(SMALL, lora=ADAPTERS), UPDATE),
        (dataclasses.replace(LLAMA, remat="dots", lora=ADAPTERS), LONG),
        (dataclasses.replace(SMALL, remat="none", lora=ADAPTERS), UPDATE),
    ],
    ids=["full", "dots", "none", "long rows, large vocabulary", "LoRA", "LoRA dots, long rows", "LoRA none"],
)
def test_update_is_what_xla_needs(config, shape):
    arguments, everything = compiled_update(config, make_mesh(1, 1, 1, jax.devices()[:1]), shape)
    planned_arguments, planned = update_plan(config, ONE, shape)
    assert planned_arguments == arguments
    assert planned == pytest.approx(everything, rel=0.15)
    assert everything > 2 * arguments  # what is estimated is the larger part


@pytest.mark.slow
def test_update_on_meshes_is_what_xla_needs():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    script = Path(__file__).parent / "compiled_memory.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for sizes, (arguments, everything) in zip(MESHES, json.loads(done.stdout.splitlines()[-1]), strict=True):
        planned_arguments, planned = update_plan(SHARDED[0], abstract_mesh(*sizes, 8), SHARDED[1])
        assert planned_arguments == arguments, sizes
        assert planned == pytest.approx(everything, rel=0.15), sizes


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (SMALL, {}),
        (LLAMA, {"row_tokens": 1024}),
        (
            dataclasses.replace(SMALL, vocab_size=16_000, width=64, num_layers=1),
            {"slots": 64, "lanes": 64, "row_tokens": 64},
        ),
        (SMALL, {"chunk": 64, "feed_rows": 16, "row_tokens": 64}),
        (SMALL, {"slots": 64}),
    ],
    ids=["short rows", "long rows", "large vocabulary", "wide feed", "few lanes"],
)
def test_step_is_what_xla_needs(config, changes):
    shape = dataclasses.replace(STEP, **changes)
    parts = plan.plan(config, ONE, UPDATE, shape)["rollout"]
    planned = sum(parts[name] for name in ("rollout's copy of the weights", "KV caches", "sampling at work"))
    arguments, everything = compiled_step(config, shape)
    assert planned == pytest.approx(everything, rel=0.15)
    assert parts["KV caches"] + parts["rollout's copy of the weights"] < arguments


def test_shapes_are_those_of_learner_and_rollout():
    """model/ may not import them: what it repeats is held here."""
    assert (plan.ROW_BUCKET, plan.PREFIX_BUCKET) == (batch.ROW_MULTIPLE, batch.PREFIX_MULTIPLE)
    assert (plan.TAG_TOKENS, plan.PREFIX_BUCKET) == (engine.TAG_TOKENS, replica.PREFIX_BUCKET)
    assert (plan.CACHE_BUCKET, plan.SHORT_CACHE) == (replica.LENGTH_BUCKET, replica.SHORTEST_CACHE)
    assert len(build_automaton(STOP_TAGS, [b"a"]).next_state) <= plan.TAG_STATES
    config = configuration("configs/qwen25_3b_grpo.py")
    update, rollout = plan.shapes_of(config, prefix_tokens=700, mesh=ONE)
    layout = learner_layout(config, ONE, rows=128)
    assert update == UpdateShape(128, layout.rows[-1], layout.lengths[-1], 704, 64, len(layout.lengths))
    limits = engine.make_limits(config.rollout, config.prompt.question_tokens)._asdict()
    fields = dataclasses.asdict(rollout)
    assert {name: limits[name] for name in fields if name in limits} == {k: v for k, v in fields.items() if k in limits}
    assert fields.keys() - limits.keys() == {"prefix_tokens", "tensor"}


def test_a_model_larger_than_this_machine_is_planned():
    """Llama-3.1-8B in float32 on 64 devices: its shares, and three moments whose parts add up."""
    config, mesh = preset("Llama-3.1-8B"), abstract_mesh(4, 8, 2, 64)
    assert plan.param_bytes(config, mesh) == pytest.approx(8_030_261_248 * 4 / 16, rel=1e-3)
    moments = plan.plan(config, mesh, dataclasses.replace(UPDATE, rows=64, micro_batch=32), STEP)
    assert all(part["rollout's copy of the weights"] == 8_030_261_248 * 4 for part in moments.values())
    half = plan.plan(
        dataclasses.replace(config, dtype="bfloat16"), mesh, dataclasses.replace(UPDATE, micro_batch=32), STEP
    )
    assert half["update"]["parameters"] * 2 == moments["update"]["parameters"]


def test_lora_needs_neither_a_reference_nor_moments_of_the_base():
    config, mesh = preset("Qwen2.5-3B"), abstract_mesh(1, 8, 1, 8)
    full = plan.plan(config, mesh, UPDATE, STEP)["update"]
    lora = plan.plan(dataclasses.replace(config, lora=LoRA(rank=16, alpha=32.0)), mesh, UPDATE, STEP)["update"]
    assert lora["rollout's copy of the weights"] == full["rollout's copy of the weights"]
    assert lora["reference parameters (KL)"] == 0 < full["reference parameters (KL)"]
    for part in ("optimizer", "gradients"):
        assert lora[part] < 0.05 * full[part]
    assert 1 < lora["parameters"] / full["parameters"] < 1.05


def test_no_reference_is_kept_without_a_kl_and_sampling_ahead_shares_the_device_with_the_update():
    base = plan.plan(SMALL, ONE, UPDATE, STEP)
    alone = plan.plan(SMALL, ONE, UPDATE, STEP, reference=False)
    part = "reference parameters (KL)"
    assert all(moment[part] == base[name][part] - plan.param_bytes(SMALL, ONE) == 0 for name, moment in alone.items())
    ahead = plan.plan(SMALL, ONE, UPDATE, STEP, ahead=True)
    assert sum(ahead["update"].values()) == sum(base["update"].values()) + sum(
        base["rollout"][name] for name in ("KV caches", "sampling at work")
    )
    assert ahead["rollout"] == base["rollout"]


def test_a_tensor_parallel_rollout_shares_weights_and_caches():
    config = preset("Llama-3.1-8B")
    one, two = (
        plan.plan(config, ONE, UPDATE, dataclasses.replace(STEP, tensor=tensor))["rollout"] for tensor in (1, 2)
    )
    assert two["KV caches"] * 2 == one["KV caches"]
    assert two["rollout's copy of the weights"] == pytest.approx(one["rollout's copy of the weights"] / 2, rel=1e-3)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"a micro-batch has 8 rows; .* \(16\)"):
        plan.plan(SMALL, abstract_mesh(2, 8, 1, 16), UPDATE, STEP)


def test_model_of_a_configuration(tmp_path):
    model = configuration("configs/qwen25_3b_grpo.py").model
    published = dataclasses.replace(preset("Qwen2.5-3B"), dtype=model.dtype)
    assert plan.model_of(model, 2048) == published  # of the hub name, without a network
    model.source = ""
    assert plan.model_of(model, 2048) == published  # of model.arch
    model.source = "someone/some-model"
    with pytest.raises(ValueError, match="model.source: 'someone/some-model' is not a preset.*name its folder"):
        plan.model_of(model, 2048)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(SMALL)))
    model.source, model.dtype, model.remat = str(tmp_path), "bfloat16", "dots"
    assert plan.model_of(model, 2048) == dataclasses.replace(SMALL, dtype="bfloat16", remat="dots")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match="config.json holds a list"):
        plan.model_of(model, 2048)
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError, match="config.json is missing"):
        plan.model_of(model, 2048)
    assert plan.model_of(configuration("configs/demo.py").model, 1000).vocab_size == 1000


def run_main(*args):
    command = [sys.executable, "-m", "router_r1_jax.model.plan", "--config=configs/qwen25_3b_grpo.py", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["--hbm_gb=80"], 0, ["fits in 80 GB", "3,085.9 M parameters", "data=1, fsdp=8, tensor=1", "KV caches"]),
        (["--hbm_gb=16"], 2, ["does not fit in 16 GB"]),
        (["--hbm_gb=48", "--config.model.lora.rank=16"], 0, ["parameters (29.9 M of them trained)"]),
        (["--hbm_gb=16", "--config.learner.kl=none"], 2, ["reference parameters (KL)           0.000"]),
        (["--devices=7"], 1, ["error: mesh is data=1, fsdp=8, tensor=1, which needs 8 devices; there are 7"]),
    ],
)
def test_exit_status(args, status, words):
    done = run_main("--config.mesh.fsdp=8", "--devices=8", *args)
    assert done.returncode == status, done.stderr[-3000:]
    for word in words:
        assert word in done.stdout + done.stderr
