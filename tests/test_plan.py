"""The memory plan against XLA's own account of the real update and the real step, and against what a run holds."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import mains
import pytest
from compiled_memory import MESHES, SHARDED, compiled_step, compiled_update, make_config, sharded_config

from router_r1_jax import plan
from router_r1_jax.distributed.mesh import abstract_mesh, make_mesh
from router_r1_jax.model import LoRA, ModelConfig, WeightsError, preset
from router_r1_jax.model.hf_config import config_to_hf

ROOT = Path(__file__).parents[1]
ONE = abstract_mesh(1, 1, 1, 1)
SMALL = ModelConfig(vocab_size=500, num_layers=3, width=96, mlp=256, num_heads=4, num_kv_heads=2, head_dim=24)
LLAMA = ModelConfig(
    vocab_size=4000,
    num_layers=2,
    width=128,
    mlp=384,
    num_heads=8,
    num_kv_heads=8,
    head_dim=16,
    family="llama",
    tie_embeddings=False,
)
ADAPTERS = LoRA(rank=8, alpha=16.0)
UPDATE = make_config(rows=16, micro_batch=8, row_tokens=96, logit_chunk=16)
LONG = make_config(rows=8, micro_batch=4, row_tokens=256, logit_chunk=64)
STEP = dict(
    slots=16,
    max_row_tokens=256,
    max_turn_tokens=48,
    reply_tokens=32,
    prefill_chunk=16,
    prefill_rows=4,
)
PREFIX = 64


def with_rollout(**fields):
    """A configuration with these fields of `rollout`, where STEP has no other."""
    config = make_config(rows=16, micro_batch=8, row_tokens=96, logit_chunk=16)
    config.rollout.update(STEP | fields)
    return config


def configuration(path, arg=None):
    """What a file of configs/ says."""
    spec = importlib.util.spec_from_file_location("configuration", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def update_plan(config, model, mesh, prefix):
    """(arguments, all) of an update, as the plan has it."""
    parts = plan.plan(config, model, mesh, prefix)["update"]
    arguments = parts["parameters"] + parts["optimizer"] + parts["batch"]
    return arguments, arguments + sum(
        parts[name] for name in ("gradients", "activations kept (remat)", "activations at work")
    )


@pytest.mark.parametrize(
    ("model", "config", "prefix"),
    [
        (SMALL, UPDATE, 64),
        (dataclasses.replace(SMALL, remat="dots"), UPDATE, 64),
        (dataclasses.replace(SMALL, remat="none", family="qwen2"), UPDATE, 64),
        (dataclasses.replace(LLAMA, remat="dots"), LONG, 128),
        (dataclasses.replace(SMALL, lora=ADAPTERS), UPDATE, 64),
        (dataclasses.replace(LLAMA, remat="dots", lora=ADAPTERS), LONG, 128),
        (dataclasses.replace(SMALL, remat="none", lora=ADAPTERS), UPDATE, 64),
    ],
    ids=["full", "dots", "none", "long rows, large vocabulary", "LoRA", "LoRA dots, long rows", "LoRA none"],
)
def test_update_is_what_xla_needs(model, config, prefix):
    arguments, everything = compiled_update(config, model, make_mesh(1, 1, 1, jax.devices()[:1]), prefix)
    planned_arguments, planned = update_plan(config, model, ONE, prefix)
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
        planned_arguments, planned = update_plan(sharded_config(sizes), SHARDED, abstract_mesh(*sizes, 8), PREFIX)
        assert planned_arguments == arguments, sizes
        assert planned == pytest.approx(everything, rel=0.15), sizes


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (SMALL, {}),
        (LLAMA, {"max_row_tokens": 1024}),
        (
            dataclasses.replace(SMALL, vocab_size=16_000, width=64, num_layers=1),
            {"slots": 64, "max_row_tokens": 64},
        ),
        (SMALL, {"prefill_chunk": 64, "prefill_rows": 16, "max_row_tokens": 64}),
        (SMALL, {"slots": 64, "decode_batch": 16}),
    ],
    ids=["short rows", "long rows", "large vocabulary", "wide prefill", "small decode batch"],
)
def test_step_is_what_xla_needs(model, changes):
    config = with_rollout(**changes)
    parts = plan.plan(config, model, ONE, PREFIX)["rollout"]
    planned = sum(parts[name] for name in ("rollout's copy of the weights", "KV caches", "sampling at work"))
    arguments, everything = compiled_step(config, model, PREFIX)
    assert planned == pytest.approx(everything, rel=0.15)
    assert parts["KV caches"] + parts["rollout's copy of the weights"] < arguments


def test_a_model_larger_than_this_machine_is_planned():
    """Llama-3.1-8B in float32 on 64 devices: its shares, and three moments whose parts add up."""
    model, mesh = preset("Llama-3.1-8B"), abstract_mesh(4, 8, 2, 64)
    moments = plan.plan(UPDATE, model, mesh, PREFIX)
    assert moments["update"]["parameters"] == pytest.approx(8_030_261_248 * 4 / 16, rel=1e-3)
    assert all(part["rollout's copy of the weights"] == 8_030_261_248 * 4 for part in moments.values())
    half = plan.plan(UPDATE, dataclasses.replace(model, dtype="bfloat16"), mesh, PREFIX)
    assert half["update"]["parameters"] * 2 == moments["update"]["parameters"]


def test_lora_needs_neither_a_reference_nor_moments_of_the_base():
    model, mesh = preset("Qwen2.5-3B"), abstract_mesh(1, 8, 1, 8)
    full = plan.plan(UPDATE, model, mesh, PREFIX)["update"]
    lora = plan.plan(UPDATE, dataclasses.replace(model, lora=LoRA(rank=16, alpha=32.0)), mesh, PREFIX)["update"]
    assert lora["rollout's copy of the weights"] == full["rollout's copy of the weights"]
    assert lora["reference parameters (KL)"] == 0 < full["reference parameters (KL)"]
    for part in ("optimizer", "gradients"):
        assert lora[part] < 0.05 * full[part]
    assert 1 < lora["parameters"] / full["parameters"] < 1.05


def test_no_reference_is_kept_without_a_kl_and_one_step_off_policy_shares_the_device_with_the_update():
    config = with_rollout()
    base = plan.plan(config, SMALL, ONE, PREFIX)
    config.learner.kl = "none"
    alone = plan.plan(config, SMALL, ONE, PREFIX)
    part = "reference parameters (KL)"
    assert all(moment[part] == base[name][part] - moment["parameters"] == 0 for name, moment in alone.items())
    config = with_rollout(one_step_off_policy=True)
    ahead = plan.plan(config, SMALL, ONE, PREFIX)
    assert sum(ahead["update"].values()) == sum(base["update"].values()) + sum(
        base["rollout"][name] for name in ("KV caches", "sampling at work")
    )
    assert ahead["rollout"] == base["rollout"]


def test_a_tensor_parallel_rollout_shares_weights_and_caches():
    model = preset("Llama-3.1-8B")
    one, two = (plan.plan(with_rollout(tensor=n), model, ONE, PREFIX)["rollout"] for n in (1, 2))
    assert two["KV caches"] * 2 == one["KV caches"]
    assert two["rollout's copy of the weights"] == pytest.approx(one["rollout's copy of the weights"] / 2, rel=1e-3)


def test_the_model_of_a_configuration(tmp_path):
    config = configuration("configs/qwen25_3b_grpo.py")
    model = config.model
    published = dataclasses.replace(preset("Qwen2.5-3B"), dtype=model.dtype)
    assert plan.planned_model(config, 2048) == published  # of the hub name, without a network
    model.source = ""
    assert plan.planned_model(config, 2048) == published  # of model.arch
    model.source = "someone/some-model"
    with pytest.raises(ValueError, match="model.source: 'someone/some-model' is not a preset.*name its folder"):
        plan.planned_model(config, 2048)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(SMALL)))
    model.source, model.dtype, model.remat = str(tmp_path), "bfloat16", "dots"
    assert plan.planned_model(config, 2048) == dataclasses.replace(SMALL, dtype="bfloat16", remat="dots")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match="config.json holds a list"):
        plan.planned_model(config, 2048)
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError, match="config.json is missing"):
        plan.planned_model(config, 2048)
    assert plan.planned_model(configuration("configs/demo.py"), 1000).vocab_size == 1024  # rounded up, as in training


EXITS = [
    (["--hbm_gb=80"], 0, ["fits in 80 GB", "3,085.9 M parameters", "data=1, fsdp=8, tensor=1", "KV caches"]),
    (["--hbm_gb=16"], 2, ["does not fit in 16 GB"]),
    (["--hbm_gb=48", "--config.model.lora.rank=16"], 0, ["parameters (29.9 M of them trained)"]),
    (["--hbm_gb=16", "--config.learner.kl=none"], 2, ["reference parameters (KL)              0.000"]),
    (["--devices=7"], 1, ["error: mesh is data=1, fsdp=8, tensor=1, which needs 8 devices; there are 7"]),
]


def test_exit_statuses(tmp_path):
    command = [sys.executable, "-m", "router_r1_jax.plan", f"--config={ROOT / 'configs/qwen25_3b_grpo.py'}"]
    commands = [[*command, "--config.mesh.fsdp=8", "--devices=8", *args] for args, _, _ in EXITS]
    for done, (_, status, words) in zip(mains.run_each(tmp_path / "outputs", commands), EXITS, strict=True):
        assert done.returncode == status, done.stderr[-3000:]
        for word in words:
            assert word in done.stdout + done.stderr
