"""Gradients and updates against plain full-sequence ones, on one device and on meshes of eight."""

import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType
from tiny_learner import (
    LOSS,
    QUICK_COMPILE,
    full_logprobs,
    make_config,
    make_params,
    make_rows_batch,
    with_old_policies,
)

from router_r1_jax.learner import Learner, PolicyLoss, SupervisedLoss, init_state, make_optimizer
from router_r1_jax.learner.update import batch_gradients
from router_r1_jax.mesh import AXES, make_mesh
from router_r1_jax.model import LoRA, abstract_params, add_adapters, split_trainable


@pytest.fixture
def all_float64(monkeypatch):
    """Everything in float64: rounding then hides nothing. The model says float32 where it raises precision."""
    monkeypatch.setattr(jnp, "float32", jnp.float64)
    with jax.enable_x64(True):
        yield


def plain_gradients(config, loss, params, batch, temperature):
    """Gradient of the mean loss with full logits, all rows at once, the prefix written out in each."""

    P = int(batch.prefix_length)

    def mean_loss(params, batch):
        logps, entropy = full_logprobs(config, params, batch, P, temperature)
        total, sums = loss(logps, entropy, batch)
        mean = total / loss.divisor(batch.mask)
        return mean, {"loss": mean} | {name: x / batch.mask.sum() for name, x in sums.items()}

    return jax.jit(jax.grad(mean_loss, has_aux=True), compiler_options=QUICK_COMPILE)(params, batch)


def shared_gradients(config, loss, params, batch, temperature, micro_batch, chunk):
    def run(params, batch):
        kwargs = {"micro_batch": micro_batch, "chunk": chunk, "temperature": temperature}
        return batch_gradients(config, loss, params, batch, **kwargs)

    return jax.jit(run, compiler_options=QUICK_COMPILE)(params, batch)


def check_close(found, expected, tolerance):
    """Relative to each leaf's own size, so that no leaf hides behind a larger one."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        error, size = np.max(np.abs(x - y)), np.max(np.abs(y))
        assert size > 0 and error <= tolerance * size, f"{jax.tree_util.keystr(path)}: {error} of {size}"


def test_shared_prefix_and_micro_batches_are_exact(all_float64):
    config = make_config(dtype="float64")
    params = make_params(config)
    batch = with_old_policies(config, params, make_rows_batch(), 0.7)
    batch = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, batch)
    expected = plain_gradients(config, LOSS, params, batch, 0.7)
    found = shared_gradients(config, LOSS, params, batch, 0.7, micro_batch=2, chunk=5)
    assert found[0]["embed"].dtype == np.float64
    check_close(found[0], expected[0], 1e-9)
    check_close(found[1], expected[1], 1e-9)
    assert 0 < found[1]["clip_share"] < 0.5  # both sides of the clip took part


def test_remat_changes_memory_and_no_gradient(all_float64):
    batch = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, make_rows_batch())
    found, memory = {}, {}
    for remat in ("none", "dots", "full"):
        config = make_config(dtype="float64", remat=remat, num_layers=4)
        gradients = functools.partial(batch_gradients, config, LOSS, micro_batch=3, chunk=16, temperature=1.0)
        params = make_params(config)
        compiled = jax.jit(gradients).lower(params, batch).compile(QUICK_COMPILE)
        found[remat], memory[remat] = compiled(params, batch), compiled.memory_analysis().temp_size_in_bytes
    for remat in ("dots", "full"):
        check_close(found[remat][0], found["none"][0], 1e-9)
    assert memory["none"] > 1.2 * memory["dots"] > 1.4 * memory["full"], memory
    with pytest.raises(ValueError, match="remat is True; choose one of none, dots, full"):
        make_config(remat=True)


@pytest.mark.parametrize(
    ("changes", "prefix", "micro_batch", "loss"),
    [
        ({"family": "qwen2", "tie_embeddings": False}, 70, 3, LOSS),
        ({"family": "llama", "remat": "none"}, 0, 6, SupervisedLoss()),
        ({}, 20, 2, PolicyLoss(0.01, 0.02, 0.1, ratio="sequence", mean_over="sequence", kl="k2")),
        ({}, 20, 3, PolicyLoss(0.1, 0.2, 0.1, mean_over="constant", length=40, dual_clip=1.5, kl="k1")),
    ],
    ids=["qwen2 behind a long prefix", "llama without a prefix", "rows alike", "constant length"],
)
def test_families_in_float32(changes, prefix, micro_batch, loss):
    config = make_config(**changes)
    params = make_params(config)
    batch = with_old_policies(config, params, make_rows_batch(prefix=prefix))
    expected = plain_gradients(config, loss, params, batch, 1.0)
    found = shared_gradients(config, loss, params, batch, 1.0, micro_batch, chunk=64)
    if prefix:  # a bias on keys shifts all scores of a query alike: its gradient is rounding
        for grads in (found[0], expected[0]):
            grads["layers"]["attention"]["k"].pop("bias", None)
    check_close(found[0], expected[0], 1e-4)
    check_close(found[1], expected[1], 1e-4)


LORA = make_config(lora=LoRA(rank=3, alpha=5.0, targets=("q", "o", "up")))


def test_lora_has_the_gradients_of_its_adapters(all_float64):
    config = dataclasses.replace(LORA, dtype="float64")
    params = make_params(config)
    batch = with_old_policies(config, params, make_rows_batch())
    batch = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, batch)
    expected = plain_gradients(config, LOSS, params, batch, 1.0)
    found = shared_gradients(config, LOSS, params, batch, 1.0, micro_batch=2, chunk=5)
    assert set(found[0]["layers"]) == {"attention", "mlp"} and set(found[0]["layers"]["mlp"]) == {"up"}
    check_close(found[0], split_trainable(expected[0])[0], 1e-9)
    check_close(found[1], expected[1], 1e-9)


CONFIG = make_config()
ONE = make_mesh(1, 1, 1, jax.devices()[:1])
ABSTRACT = abstract_params(CONFIG, ONE)
SGD = optax.sgd(0.1)


@pytest.fixture(scope="module")
def params():
    return make_params(CONFIG)


@pytest.fixture(scope="module")
def learner():
    return Learner(CONFIG, SGD, LOSS, ONE, ABSTRACT, micro_batch=3, chunk=16)


def fresh_state(params):
    return init_state(SGD, jax.tree.map(jnp.array, params), ABSTRACT, ONE)


def test_an_update_is_one_optimizer_step_along_the_plain_gradient(learner, params):
    batch = with_old_policies(CONFIG, params, make_rows_batch())
    state, metrics = learner.update(fresh_state(params), batch)
    gradient, expected = plain_gradients(CONFIG, LOSS, params, batch, 1.0)
    check_close(jax.tree.map(lambda new, old: (old - new) / 0.1, state.params, params), gradient, 1e-3)
    assert int(state.step) == 1
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6)
    norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in jax.tree.leaves(gradient)))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_lora_leaves_the_base_alone(params):
    """Bit for bit, so that the reference policy needs no copy; nor has the base optimizer state."""
    abstract = abstract_params(LORA, ONE)
    optimizer, _ = make_optimizer(
        learning_rate=0.1, warmup=0, total=9, decay=False, weight_decay=0.1, max_grad_norm=1.0
    )
    learner = Learner(LORA, optimizer, LOSS, ONE, abstract, micro_batch=3, chunk=16)
    base = jax.tree.map(jnp.array, params)
    state = init_state(optimizer, add_adapters(LORA, base, ONE, seed=0), abstract, ONE)
    before, _ = split_trainable(jax.device_get(state.params))
    batch = make_rows_batch()
    reference = learner.reference_logprobs(state.params, batch)
    batch = batch.replace(logps=reference * batch.mask, reference_logps=reference)
    kls = []
    for _ in range(2):
        state, metrics = learner.update(state, batch)
        kls.append(metrics["kl"])
    assert kls[0] == pytest.approx(0, abs=1e-9) and kls[1] > 1e-4  # fresh adapters change nothing
    after, frozen = split_trainable(jax.device_get(state.params))
    jax.tree.map(np.testing.assert_array_equal, frozen, params)
    assert all(np.abs(x - y).max() > 0.01 for x, y in zip(*map(jax.tree.leaves, (after, before)), strict=True))
    np.testing.assert_array_equal(learner.reference_logprobs(state.params, batch), reference)
    for moment in ("mu", "nu"):
        held = optax.tree_utils.tree_get(state.opt_state, moment)
        assert jax.tree.map(jnp.shape, held) == jax.tree.map(jnp.shape, after)


def test_padding_and_the_order_of_rows_do_not_matter(learner, params):
    batch = with_old_policies(CONFIG, params, make_rows_batch())
    state, metrics = learner.update(fresh_state(params), batch)
    rng = np.random.default_rng(0)
    used = np.cumsum(batch.mask[:, ::-1], axis=1)[:, ::-1] > 0  # up to the last token that carries loss
    prefix = batch.prefix.copy()
    prefix[int(batch.prefix_length) :] = 9
    order = rng.permutation(len(batch.tokens))
    dirty = batch.replace(
        prefix=prefix,
        tokens=np.where(used, batch.tokens, rng.integers(40, size=batch.tokens.shape))[order],
        logps=np.where(batch.mask > 0, batch.logps, -3)[order],
        reference_logps=np.where(batch.mask > 0, batch.reference_logps, 5)[order],
        mask=batch.mask[order],
        advantages=batch.advantages[order],
    )
    other, other_metrics = learner.update(fresh_state(params), dirty)
    check_close(other.params, state.params, 1e-6)
    assert other_metrics == pytest.approx(metrics, rel=1e-5)


def test_a_batch_without_loss_moves_nothing(learner, params):
    batch = make_rows_batch()
    state, metrics = learner.update(fresh_state(params), batch.replace(mask=np.zeros_like(batch.mask)))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), params)
    assert set(metrics.values()) == {0.0}


def test_logprobs_are_those_of_full_logits_row_by_row(learner, params):
    batch = make_rows_batch()
    found = learner.reference_logprobs(params, batch)
    assert isinstance(found, np.ndarray)
    expected, _ = full_logprobs(CONFIG, params, batch, int(batch.prefix_length))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_micro_batch_that_does_not_divide_over_the_devices_is_refused():
    mesh = AbstractMesh((2, 2, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    with pytest.raises(ValueError, match=r"learner.micro_batch is 6; .* multiple of mesh.data x mesh.fsdp \(4\)"):
        Learner(CONFIG, SGD, LOSS, mesh, ABSTRACT, micro_batch=6, chunk=16)


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_schedule(warmup, decay):
    _, schedule = make_optimizer(
        learning_rate=2e-3, warmup=warmup, total=50, decay=decay, weight_decay=0.0, max_grad_norm=1.0
    )
    rates = np.array([float(schedule(step)) for step in range(51)])
    assert rates.max() == pytest.approx(2e-3) and np.argmax(rates >= 2e-3 * (1 - 1e-6)) <= warmup
    assert np.all(np.diff(rates[: max(warmup, 1)]) > 0)
    if decay:
        part = (np.arange(51) - warmup) / (50 - warmup)
        cosine = 2e-4 + (2e-3 - 2e-4) * 0.5 * (1 + np.cos(np.pi * part))
        np.testing.assert_allclose(rates[warmup:], cosine[warmup:], rtol=1e-5)
    else:
        np.testing.assert_allclose(rates, 2e-3 * np.minimum((np.arange(51) + 1) / max(warmup, 1), 1), rtol=1e-5)


def start_sharded(devices, *args):
    """sharded_learner.py in a process with so many devices."""
    script = Path(__file__).parent / "sharded_learner.py"
    flags = [
        f"--xla_force_host_platform_device_count={devices}",
        *(f"--{k}={int(v)}" for k, v in QUICK_COMPILE.items()),
    ]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, script, *args], env=env, **pipes)


def report_of(process):
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def sharded():
    """What sharded_learner.py reports of one device and of meshes of eight."""
    return report_of(start_sharded(8))


@pytest.fixture(scope="module")
def over_two_processes():
    """The same of two processes with four devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [start_sharded(4, f"--process={i}", f"--port={port}") for i in range(2)]
    return [report_of(process) for process in both]


def check_three_updates(report, mesh):
    """Gradient, loss, log-probs and parameters are those of one device."""
    found = report[mesh]
    assert found["worst_gradient"] < 1e-5 < 1e-2 < found["largest_gradient"]
    assert found["worst_parameter"] < 1e-5
    assert found["moved"] > 1e-3  # three updates moved parameters a hundred times further than meshes may differ
    assert found["worst_logprob"] < 1e-4
    assert found["losses"] == pytest.approx(report["1,1,1"]["losses"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("mesh", ["8,1,1", "1,8,1", "2,2,2"])
def test_three_updates_on_eight_devices_are_those_on_one(sharded, mesh):
    check_three_updates(sharded, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["8,1,1", "1,8,1", "2,2,2"])
def test_three_updates_over_two_processes_are_those_on_one_device(over_two_processes, mesh):
    for report in over_two_processes:
        assert report[mesh]["processes"] == 2 and report["1,1,1"]["processes"] == 1
        check_three_updates(report, mesh)


@pytest.mark.parametrize("mesh", ["8,1,1", "1,8,1", "2,2,2"])
def test_adapters_start_and_move_on_eight_devices_as_on_one(sharded, mesh):
    found = sharded[mesh]
    assert found["worst_adapter"] < 1e-5 < 1e-3 < found["adapters_moved"]
    assert found["fresh_adapters"] == 0


@pytest.mark.parametrize("mesh", ["1,1,1", "8,1,1", "1,8,1", "2,2,2"])
def test_optimizer_moments_lie_beside_their_parameters(sharded, mesh):
    assert sharded[mesh]["moments_apart"] == []
    assert sharded[mesh]["abstract_apart"] == []


def test_fsdp_and_tensor_really_cut_the_parameters(sharded):
    """Share of all parameters that one device stores."""
    assert sharded["8,1,1"]["stored"] == 1.0
    assert sharded["1,8,1"]["stored"] < 0.2
    assert sharded["2,2,2"]["stored"] < 0.3
