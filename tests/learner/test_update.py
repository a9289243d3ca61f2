"""Gradients and updates against plain full-sequence ones, on one device and on meshes of eight."""

import dataclasses
import functools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_learner import (
    LOSS,
    QUICK_COMPILE,
    full_scores,
    make_config,
    make_params,
    make_rows,
    together,
    with_old_policies,
)

from router_r1_jax.distributed.mesh import make_mesh
from router_r1_jax.learner import (
    Layout,
    Learner,
    PolicyLoss,
    SupervisedLoss,
    abstract_state,
    init_critic,
    init_state,
    make_batch,
    make_layout,
    make_optimizer,
)
from router_r1_jax.learner.update import batch_gradients
from router_r1_jax.model import LoRA, abstract_params, add_adapters, split_trainable


@pytest.fixture
def all_float64(monkeypatch):
    """Everything in float64: rounding then hides nothing. The model says float32 where it raises precision."""
    monkeypatch.setattr(jnp, "float32", jnp.float64)
    with jax.enable_x64(True):
        yield


def in_precision(config, tree):
    """With the floats of a float64 model in float64."""
    raised = np.float64 if config.dtype == "float64" else np.float32
    return jax.tree.map(lambda x: x.astype(raised) if x.dtype == np.float32 else x, tree)


def plain_gradients(config, loss, params, prefix, rows, temperature=1.0, critic=None):
    """Gradients of the mean loss with full logits, all rows at once, the prefix written out in each."""
    rows = in_precision(config, together(rows))
    tokens, with_loss = rows.mask.sum(), (rows.mask.max(axis=1) > 0).sum()

    def mean_loss(trained, rows):
        params, critic = trained
        sums = loss(full_scores(config, params, prefix, rows.tokens, temperature, critic), rows)
        mean = sums.loss / loss.divisor(tokens, with_loss)
        return mean, {"loss": mean} | {name: x / tokens for name, x in sums.totals.items()} | sums.maxima

    return jax.jit(jax.grad(mean_loss, has_aux=True), compiler_options=QUICK_COMPILE)((params, critic), rows)


def shared_gradients(config, loss, params, prefix, rows, layout, *, chunk, temperature=1.0, critic=None):
    batch = in_precision(config, make_batch(prefix, rows, layout))

    def run(params, critic, batch):
        return batch_gradients(config, loss, params, batch, chunk=chunk, temperature=temperature, critic=critic)

    return jax.jit(run, compiler_options=QUICK_COMPILE)(params, critic, batch)


def check_close(found, expected, tolerance):
    """Relative to each leaf's own size, so that no leaf hides behind a larger one."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        error, size = np.max(np.abs(x - y)), np.max(np.abs(y))
        assert size > 0 and error <= tolerance * size, f"{jax.tree_util.keystr(path)}: {error} of {size}"


LAYOUTS = {
    "pairs": Layout((32,), (2,)),
    "buckets": Layout((8, 16, 32), (4, 3, 1)),
}
PPO = dataclasses.replace(LOSS, entropy_coef=0.02, value_coef=0.5, value_clip=0.3)


def with_targets(rows):
    """The rows with what PPO adds: advantages per token, importance weights, old values and returns."""
    rng = np.random.default_rng(8)
    names = ("advantages", "weights", "values", "returns")
    return [row._replace(**{name: rng.random(len(row.tokens)) for name in names}) for row in rows]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_shared_prefix_and_micro_batches_are_exact(all_float64, layout):
    config = make_config(dtype="float64")
    params, (prefix, rows) = make_params(config), make_rows()
    rows = with_targets(with_old_policies(config, params, prefix, rows, 0.7))
    critic = {"kernel": np.random.default_rng(2).normal(size=config.width), "bias": np.float64(0.2)}
    expected = plain_gradients(config, PPO, params, prefix, rows, 0.7, critic)
    found = shared_gradients(config, PPO, params, prefix, rows, layout, chunk=5, temperature=0.7, critic=critic)
    assert found[0][0]["embed"].dtype == np.float64
    check_close(found[0], expected[0], 1e-9)
    check_close(found[1], expected[1], 1e-9)
    assert 0 < found[1]["clip_share"] < 0.5  # both sides of the clip took part


def test_remat_changes_memory_and_no_gradient(all_float64):
    batch = in_precision(make_config(dtype="float64"), make_batch(*make_rows(), Layout((32,), (3,))))
    found, memory = {}, {}
    for remat in ("none", "dots", "full"):
        config = make_config(dtype="float64", remat=remat, num_layers=4)
        gradients = functools.partial(batch_gradients, config, LOSS, chunk=16, temperature=1.0)
        params = make_params(config)
        compiled = jax.jit(gradients).lower(params, batch).compile(QUICK_COMPILE)
        found[remat], memory[remat] = compiled(params, batch), compiled.memory_analysis().temp_size_in_bytes
    for remat in ("dots", "full"):
        check_close(found[remat][0], found["none"][0], 1e-9)
    assert memory["none"] > 1.2 * memory["dots"] > 1.4 * memory["full"], memory


@pytest.mark.parametrize(
    ("changes", "prefix", "layout", "loss"),
    [
        ({"family": "qwen2", "tie_embeddings": False}, 70, "buckets", LOSS),
        ({"family": "llama", "remat": "none"}, 0, "pairs", SupervisedLoss()),
        ({}, 20, "pairs", PolicyLoss(0.01, 0.02, 0.1, importance_level="sequence", loss_agg="sequence", kl="k2")),
        ({}, 20, "buckets", PolicyLoss(0.1, 0.2, 0.1, loss_agg="constant", length=40, dual_clip=1.5, kl="k1")),
    ],
    ids=["qwen2 behind a long prefix", "llama without a prefix", "rows alike", "constant length"],
)
def test_families_in_float32(changes, prefix, layout, loss):
    config = make_config(**changes)
    params, (prefix, rows) = make_params(config), make_rows(prefix=prefix)
    rows = with_old_policies(config, params, prefix, rows)
    expected = plain_gradients(config, loss, params, prefix, rows)
    found = shared_gradients(config, loss, params, prefix, rows, LAYOUTS[layout], chunk=64)
    if prefix:  # a bias on keys shifts all scores of a query alike: its gradient is rounding
        for grads in (found[0][0], expected[0][0]):
            grads["layers"]["attention"]["k"].pop("bias", None)
    check_close(found[0], expected[0], 1e-4)
    check_close(found[1], expected[1], 1e-4)


LORA = make_config(lora=LoRA(rank=3, alpha=5.0, targets=("q", "o", "up")))


def test_lora_has_the_gradients_of_its_adapters(all_float64):
    config = dataclasses.replace(LORA, dtype="float64")
    params, (prefix, rows) = make_params(config), make_rows()
    rows = with_old_policies(config, params, prefix, rows)
    expected = plain_gradients(config, LOSS, params, prefix, rows)
    (found, _), metrics = shared_gradients(config, LOSS, params, prefix, rows, LAYOUTS["buckets"], chunk=5)
    assert set(found["layers"]) == {"attention", "mlp"} and set(found["layers"]["mlp"]) == {"up"}
    check_close(found, split_trainable(expected[0][0])[0], 1e-9)
    check_close(metrics, expected[1], 1e-9)


CONFIG = make_config()
ONE = make_mesh(1, 1, 1, jax.devices()[:1])
ABSTRACT = abstract_params(CONFIG, ONE)
SGD = optax.sgd(0.1)


@pytest.fixture(scope="module")
def params():
    return make_params(CONFIG)


@pytest.fixture(scope="module")
def learner():
    return make_learner()


def make_learner(config=CONFIG, optimizer=SGD, abstract=ABSTRACT, **settings):
    layout = make_layout(33, buckets=2, tokens=96, rows=6)
    return Learner(config, optimizer, LOSS, ONE, abstract, layout=layout, chunk=16, **settings)


def fresh_state(params, critic=None):
    return init_state(SGD, jax.tree.map(jnp.array, params), ABSTRACT, ONE, critic)


def test_an_update_is_one_optimizer_step_along_the_plain_gradient(learner, params):
    prefix, rows = make_rows()
    rows = with_old_policies(CONFIG, params, prefix, rows)
    state, metrics = learner.update(fresh_state(params), prefix, rows)
    (gradient, _), expected = plain_gradients(CONFIG, LOSS, params, prefix, rows)
    check_close(jax.tree.map(lambda new, old: (old - new) / 0.1, state.params, params), gradient, 1e-3)
    assert int(state.step) == 1 and metrics["skipped_updates"] == 0
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6)
    norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in jax.tree.leaves(gradient)))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_the_critic_takes_a_step_of_its_own(params):
    loss = dataclasses.replace(LOSS, value_coef=0.5)
    prefix, rows = make_rows()
    rows = with_targets(with_old_policies(CONFIG, params, prefix, rows))
    layout = Layout((16, 32), (3, 2))
    learner = Learner(CONFIG, SGD, loss, ONE, ABSTRACT, layout=layout, chunk=16, critic_optimizer=optax.sgd(0.5))
    critic = init_critic(optax.sgd(0.5), CONFIG.width, ONE)
    start = jax.device_get(critic.params)
    state, _ = learner.update(fresh_state(params, critic), prefix, rows)
    (gradient, of_critic), _ = plain_gradients(CONFIG, loss, params, prefix, rows, critic=start)
    check_close(jax.tree.map(lambda new: -new / 0.5, state.critic.params), of_critic, 1e-3)
    check_close(jax.tree.map(lambda new, old: (old - new) / 0.1, state.params, params), gradient, 1e-3)
    values = [scores.values for scores in learner.score(state.params, prefix, rows, critic=state.critic.params)]
    expected = full_scores(CONFIG, state.params, prefix, together(rows).tokens, critic=state.critic.params).values
    for i, row in enumerate(rows):
        np.testing.assert_allclose(values[i], expected[i, len(row.prompt) : row.length], atol=1e-4)


@pytest.mark.parametrize("where", ["advantages", "reference_logps"])
def test_a_step_that_is_not_finite_is_not_made(learner, params, where):
    prefix, rows = make_rows()
    rows[2] = rows[2]._replace(**{where: np.where(rows[2].mask, np.inf, 0.0)})
    assert rows[2].mask.any()
    state, metrics = learner.update(fresh_state(params), prefix, rows)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), params)
    assert metrics["skipped_updates"] == 1 and not np.isfinite(metrics["loss"]) and int(state.step) == 0
    state, metrics = learner.update(state, *make_rows())
    assert metrics["skipped_updates"] == 0 and int(state.step) == 1


def test_lora_leaves_the_base_alone(params):
    """Bit for bit, so that the reference policy needs no copy; nor has the base optimizer state."""
    abstract = abstract_params(LORA, ONE)
    optimizer, _ = make_optimizer(
        learning_rate=0.1, warmup=0, total=9, decay=False, weight_decay=0.1, max_grad_norm=1.0
    )
    learner = make_learner(LORA, optimizer, abstract)
    base = jax.tree.map(jnp.array, params)
    state = init_state(optimizer, add_adapters(LORA, base, ONE, seed=0), abstract, ONE)
    before, _ = split_trainable(jax.device_get(state.params))
    prefix, rows = make_rows()

    def reference():
        return [scores.logps for scores in learner.score(state.params, prefix, rows, base=True)]

    first = reference()
    rows = [row._replace(logps=logps, reference_logps=logps) for row, logps in zip(rows, first, strict=True)]
    kls = []
    for _ in range(2):
        state, metrics = learner.update(state, prefix, rows)
        kls.append(metrics["kl"])
    assert kls[0] == pytest.approx(0, abs=1e-9) and kls[1] > 1e-4  # fresh adapters change nothing
    after, frozen = split_trainable(jax.device_get(state.params))
    jax.tree.map(np.testing.assert_array_equal, frozen, params)
    assert all(np.abs(x - y).max() > 0.01 for x, y in zip(*map(jax.tree.leaves, (after, before)), strict=True))
    for now, then in zip(reference(), first, strict=True):
        np.testing.assert_array_equal(now, then)
    for moment in ("mu", "nu"):
        held = optax.tree_utils.tree_get(state.opt_state, moment)
        assert jax.tree.map(jnp.shape, held) == jax.tree.map(jnp.shape, after)


def test_steps_that_half_precision_would_round_away_add_up(params):
    """Forty steps of 1e-6 on weights of about 0.02, whose neighbours in bfloat16 lie 1e-4 away."""
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    rounded = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16)), params)
    optimizer, _ = make_optimizer(
        learning_rate=1e-6, warmup=0, total=40, decay=False, weight_decay=0.0, max_grad_norm=1.0
    )
    prefix, rows = make_rows()
    moved, states = {}, {}
    for config in (CONFIG, half):
        abstract = abstract_params(config, ONE)
        learner = make_learner(config, optimizer, abstract)
        start = jax.tree.map(lambda x, a: jnp.asarray(x, a.dtype), rounded, abstract)
        state = init_state(optimizer, start, abstract, ONE)
        for _ in range(40):
            state, _ = learner.update(state, prefix, rows)
        trained = state.params if config is CONFIG else state.opt_state.params
        steps = jax.tree.map(lambda x, y: np.ravel(np.asarray(x) - y.astype(np.float32)), trained, rounded)
        moved[config.dtype], states[config.dtype] = np.concatenate(jax.tree.leaves(steps)), state
    one, other, state = moved["float32"], moved["bfloat16"], states["bfloat16"]
    assert np.linalg.norm(other) == pytest.approx(np.linalg.norm(one), rel=0.05)
    assert one @ other > 0.9 * np.linalg.norm(one) * np.linalg.norm(other)
    shapes = abstract_state(optimizer, abstract_params(half, ONE), ONE)
    jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype) or pytest.fail(str((x, y))), state, shapes)
    for leaf, copy in zip(*map(jax.tree.leaves, (state.params, state.opt_state.params)), strict=True):
        np.testing.assert_array_equal(leaf, copy.astype(leaf.dtype))


def test_the_order_of_rows_and_what_stands_outside_the_mask_do_not_matter(learner, params):
    prefix, rows = make_rows()
    rows = with_old_policies(CONFIG, params, prefix, rows)
    state, metrics = learner.update(fresh_state(params), prefix, rows)
    rng = np.random.default_rng(0)
    dirty = [rows[i] for i in rng.permutation(len(rows))]
    dirty = [
        row._replace(
            logps=np.where(row.mask, row.logps, -3), reference_logps=np.where(row.mask, row.reference_logps, 5)
        )
        for row in dirty
    ]
    other, other_metrics = learner.update(fresh_state(params), prefix, dirty)
    check_close(other.params, state.params, 1e-6)
    assert other_metrics == pytest.approx(metrics, rel=1e-5)


def test_a_batch_without_loss_moves_nothing(learner, params):
    prefix, rows = make_rows()
    state, metrics = learner.update(fresh_state(params), prefix, [row._replace(mask=0.0) for row in rows])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), params)
    assert {name for name, value in metrics.items() if value} == {"compiled_programs"}


def test_scores_are_those_of_full_logits_row_by_row(learner, params):
    prefix, rows = make_rows()
    found = learner.score(params, prefix, rows)
    expected = full_scores(CONFIG, params, prefix, together(rows).tokens)
    for i, row in enumerate(rows):
        own = slice(len(row.prompt), row.length)
        for name in ("logps", "entropy"):
            assert isinstance(getattr(found[i], name), np.ndarray)
            np.testing.assert_allclose(getattr(found[i], name), getattr(expected, name)[i, own], atol=1e-4)


def test_one_program_serves_batches_of_any_lengths(learner, params, caplog):
    state = fresh_state(params)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for seed in range(4):
            caplog.clear()
            prefix, rows = make_rows(seed=seed)
            learner.score(state.params, prefix, rows)
            state, metrics = learner.update(state, prefix, rows)
    assert "Compiling" not in caplog.text  # by the last batch, parameters came from an update before it too
    assert metrics["compiled_programs"] == 1
    _, metrics = learner.update(state, *make_rows(prefix=65))
    assert metrics["compiled_programs"] == 2


def test_work_on_a_bucket_stays_in_its_loop():
    """Of buckets with room for one micro-batch XLA took all work before the loop, and did it for empty ones too."""
    prefix, rows = make_rows()
    layout = Layout((8, 32), (len(rows), len(rows)))
    learner = Learner(CONFIG, SGD, LOSS, ONE, ABSTRACT, layout=layout, chunk=16)
    params, batch = make_params(CONFIG), learner.place(prefix, rows)
    programs = {
        "update": lambda params, batch: batch_gradients(CONFIG, LOSS, params, batch, chunk=16, temperature=1.0),
        "score": lambda params, batch: learner._score_fn(params, None, batch, base=False),
    }
    for name, program in programs.items():
        text = jax.jit(program).lower(params, batch).compile(QUICK_COMPILE).as_text()
        inside = re.compile(r'op_name="[^"]*while/body/[^"]*dot_general')
        before, _, entry = text.partition("\nENTRY")
        assert inside.search(before) and not inside.search(entry), name


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
