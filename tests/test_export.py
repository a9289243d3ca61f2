"""From a run to a folder that other tools read, with and without LoRA, and from there to a further run."""

import jax
import mains
import numpy as np
import pytest
import torch
from mains import checkpoint_arrays, train_lines
from tiny_config import get_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from router_r1_jax import export
from router_r1_jax.model import RouterLM, WeightsError, abstract_params
from router_r1_jax.pool.cards import cards_from_config
from router_r1_jax.setup.environment import open_environment
from router_r1_jax.setup.model import open_model
from router_r1_jax.storage.checkpoint import CheckpointStore

LORA = ("model.lora.rank=4", "learner.learning_rate=1e-2")


@pytest.fixture(scope="module")
def lora_run(shared, warm_file):
    """Workdir of a run that trained adapters on the kept warm start, and was evaluated."""

    def make(folder):
        mains.succeed("train", folder, f"warmstart.file={warm_file}", *LORA)
        mains.succeed("evaluate", folder, f"warmstart.file={warm_file}", *LORA)

    return shared("lora", make)


def assert_export_has_the_routers_logits(workdir, folder, step, **lora):
    """Of transformers with the exported files, and of RouterLM with the checkpoint's parameters, unmerged."""
    config = get_config()
    config.model.lora.update(lora)
    environment = open_environment(config, cards_from_config(config.pool))
    mesh, _, model, _ = open_model(config, workdir, environment, load_source=False)
    with CheckpointStore(workdir / "checkpoints") as store:
        params = store.restore(step, params=abstract_params(model, mesh))["params"]
    tokens = AutoTokenizer.from_pretrained(folder).encode("Titan knows films. Which river flows through Velmora?")
    assert len(tokens) > 5
    ours = RouterLM(model).apply({"params": params}, np.array([tokens], np.int32))
    exported = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs = exported(torch.tensor([tokens])).logits.numpy()
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_export_is_the_trained_router(finished_run, tmp_path):
    done = mains.succeed("export", finished_run, f"--folder={tmp_path / 'out'}", "--checkpoint=last")
    assert f"step 4 is exported to {tmp_path / 'out'}" in done.stdout
    assert_export_has_the_routers_logits(finished_run, tmp_path / "out", 4)


@pytest.mark.slow
def test_lora_trains_adapters_and_nothing_else(lora_run):
    before, _ = checkpoint_arrays(lora_run, 0)
    after, _ = checkpoint_arrays(lora_run, 4)
    adapters = {name for name in after if "lora" in name}
    moments = {name for name in adapters if "mu" in name or "nu" in name}
    assert len(moments) == 2 * len(adapters - moments) == 4 * 7
    for name in after.keys() - adapters:
        if name.startswith("[0]"):  # parameters
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)
        else:  # counters: there is no moment of the base
            assert after[name].ndim == 0, name
    assert all(np.abs(after[name] - before[name]).max() > 0 for name in adapters)


@pytest.mark.slow
def test_lora_samples_with_its_adapters_and_is_held_to_its_base(lora_run):
    lines = train_lines(lora_run)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and max(line["kl"] for line in lines) > 1e-3
    # The rollout's weights are merged, the learner's are not: the same policy up to rounding.
    assert max(line["logp_diff_mean"] for line in lines) < 1e-4


@pytest.mark.slow
def test_lora_is_merged_and_trained_further(lora_run, tmp_path):
    export, again = tmp_path / "export", tmp_path / "again"
    mains.succeed("export", lora_run, *LORA, f"--folder={export}", "--checkpoint=4")
    assert_export_has_the_routers_logits(lora_run, export, 4, rank=4)
    mains.succeed("train", again, f"model.source={export}", "warmstart.steps=0", "steps=1")
    kept, _ = checkpoint_arrays(again, 0)
    model = AutoModelForCausalLM.from_pretrained(export)
    name = next(name for name in kept if name.startswith("[0]") and "embed" in name)
    np.testing.assert_array_equal(kept[name], model.get_input_embeddings().weight.detach().numpy())
    assert jax.tree.leaves(kept) and not any("lora" in name for name in kept)


def test_export_says_what_is_missing(finished_run, tmp_path):
    done = mains.run("export", finished_run)
    assert done.returncode == 1 and done.stderr == "error: missing flags: --folder (new folder for the export)\n"


def test_a_folder_with_something_in_it_is_refused_before_a_checkpoint_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "CheckpointStore", lambda *_, **__: pytest.fail("read"))
    (tmp_path / "old").write_text("x")
    with pytest.raises(WeightsError, match="is not an empty folder"):
        export.main(get_config(), tmp_path, folder=str(tmp_path), checkpoint="")
