"""load_hf and save_hf against transformers: the same logits from its files, the same bytes and logits from ours."""

import json
import pickle
import resource
import shutil
import signal

import jax
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.numpy import save_file as save_numpy
from tiny_models import CONFIGS, VOCAB, forward, random_model, random_tokens, relative_error, torch_logits
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from router_r1_jax.model import WeightsError, load_hf, save_hf

INDEX = "model.safetensors.index.json"


def all_tensors(folder):
    """Every tensor of a checkpoint by name."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.fixture
def copy(checkpoint, tmp_path):
    """copy(case) -> a folder with that checkpoint, to be spoiled."""

    def make(case="qwen3_tied"):
        return shutil.copytree(checkpoint(case).folder, tmp_path / "copy")

    return make


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(folder, change):
    """`change` edits the dict of tensors in place, or returns another."""
    tensors = load_file(folder / "model.safetensors")
    save_numpy(change(tensors) or tensors, folder / "model.safetensors", metadata={"format": "pt"})


# Truth: transformers


@pytest.mark.parametrize("case", CONFIGS)
def test_logits_are_those_of_transformers(checkpoint, case):
    c = checkpoint(case)
    tokens = random_tokens(3, 24)
    gaps = np.random.default_rng(1).integers(1, 1500, size=24).cumsum()
    positions = np.stack([np.arange(24), 8_500 + np.arange(24), gaps]).astype(np.int32)
    assert gaps.max() > 15_000
    ours, theirs = forward(c.config, c.params, tokens, positions), torch_logits(c.model, tokens, positions)
    assert relative_error(ours, theirs) < 2e-4


@pytest.mark.parametrize("case", CONFIGS)
def test_rows_padded_on_the_left_are_those_of_transformers(checkpoint, case):
    """Padding is left out by the attention mask there, and by a position later than all others here."""
    c = checkpoint(case)
    tokens, padding = random_tokens(3, 24), np.array([[0], [7], [20]])
    real = np.arange(24) >= padding
    with torch.no_grad():
        positions = np.where(real, np.arange(24) - padding, 0)
        kwargs = {"attention_mask": torch.tensor(real).long(), "position_ids": torch.tensor(positions)}
        theirs = c.model(torch.tensor(tokens), **kwargs).logits.numpy()
    ours = forward(c.config, c.params, tokens, np.where(real, positions, 30_000).astype(np.int32))
    assert relative_error(ours[real], theirs[real]) < 2e-4


@pytest.mark.parametrize("case", CONFIGS)
def test_a_saved_model_is_the_same_to_transformers(checkpoint, case, tmp_path):
    c = checkpoint(case)
    save_hf(tmp_path / "out", c.config, c.params)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    tokens = random_tokens(2, 70)  # behind the 64 positions from which Llama's scaling counts
    np.testing.assert_array_equal(torch_logits(model, tokens), torch_logits(c.model, tokens))
    assert_same_bits(all_tensors(tmp_path / "out"), all_tensors(c.folder))
    config, params = load_hf(tmp_path / "out")
    assert config == c.config
    jax.tree.map(np.testing.assert_array_equal, params, c.params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_through_unchanged(tmp_path, dtype):
    random_model(CONFIGS["llama_untied"](), dtype).save_pretrained(tmp_path / "in")
    config, params = load_hf(tmp_path / "in")
    assert config.dtype == str(dtype).removeprefix("torch.")
    save_hf(tmp_path / "out", config, params)
    assert_same_bits(all_tensors(tmp_path / "out"), all_tensors(tmp_path / "in"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


def test_dtype_asked_for_is_rounded_as_torch_rounds(checkpoint, tmp_path):
    folder = checkpoint("qwen2_tied").folder
    config, params = load_hf(folder, dtype="bfloat16")
    assert config.dtype == "bfloat16"
    save_hf(tmp_path / "out", config, params)
    random_model(CONFIGS["qwen2_tied"](), torch.bfloat16).save_pretrained(tmp_path / "torch")
    assert_same_bits(all_tensors(tmp_path / "out"), all_tensors(tmp_path / "torch"))
    config, params = load_hf(tmp_path / "out", dtype="float32")
    assert config.dtype == "float32"
    np.testing.assert_array_equal(params["embed"], load_hf(tmp_path / "out")[1]["embed"].astype("float32"))


# Several files


@pytest.mark.parametrize("case", ["qwen2_wide_heads", "qwen3_untied_one_kv_head"])
def test_shards_of_transformers_are_read(checkpoint, case, tmp_path):
    c = checkpoint(case)
    c.model.save_pretrained(tmp_path / "in", max_shard_size="8KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 3
    config, params = load_hf(tmp_path / "in")
    assert config == c.config
    jax.tree.map(np.testing.assert_array_equal, params, c.params)


@pytest.mark.parametrize("limit", [1, 10_000, 30_000])
def test_shards_are_cut_at_the_limit_and_read_by_transformers(checkpoint, limit, tmp_path):
    c = checkpoint("qwen2_untied_one_kv_head")
    save_hf(tmp_path / "out", c.config, c.params, max_shard_bytes=limit)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = {file.name: load_file(file) for file in (tmp_path / "out").glob("*.safetensors")}
    assert index["weight_map"] == {tensor: file for file, tensors in files.items() for tensor in tensors}
    assert len(files) > 1 and sorted(files)[0] == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [[tensor.nbytes for tensor in tensors.values()] for tensors in files.values()]
    assert all(sum(shard) <= limit or len(shard) == 1 for shard in sizes)
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    assert_same_bits(all_tensors(tmp_path / "out"), all_tensors(c.folder))
    tokens = random_tokens(1, 5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    np.testing.assert_array_equal(torch_logits(model, tokens), torch_logits(c.model, tokens))


def test_a_file_says_that_its_layout_is_pytorchs(checkpoint, tmp_path):
    c = checkpoint("qwen3_tied")
    save_hf(tmp_path / "out", c.config, c.params)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


# Beside the weights


def test_tokenizer_goes_with_the_model(checkpoint, tmp_path):
    c = checkpoint("llama_tied_scaled")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w7", pad_token="w9")
    save_hf(tmp_path / "out", c.config, c.params, tokenizer)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("w5 w17 w7")["input_ids"] == [5, 17, 7]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (None, 7, 9)
    assert load_hf(tmp_path / "out")[0] == c.config


def test_without_a_tokenizer_no_special_token_is_made_up(checkpoint, tmp_path):
    c = checkpoint("llama_untied")
    save_hf(tmp_path / "out", c.config, c.params)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.bos_token_id, config.eos_token_id) == (None, None)  # LlamaConfig's own defaults are 1 and 2


# What is refused


def refused(folder, *words, **kwargs):
    """The message of load_hf's refusal: one line that holds all `words`."""
    with pytest.raises(WeightsError) as caught:
        load_hf(folder, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def test_all_wrong_tensors_stand_in_one_message(copy):
    def spoil(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((3, 5), np.float32)
        tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((32, 16), np.float32)  # transposed

    folder = copy()
    edit_tensors(folder, spoil)
    refused(
        folder,
        "missing model.layers.1.mlp.up_proj.weight",
        "missing model.norm.weight",
        "left over model.layers.2.mlp.up_proj.weight [3, 5]",
        "model.layers.0.self_attn.k_proj.weight has shape [32, 16], not [16, 32]",
    )


def test_many_wrong_tensors_are_counted(copy):
    folder = copy()
    edit_config(folder, num_hidden_layers=12)
    refused(folder, "missing model.layers.2.input_layernorm.weight", "and 90 more")  # 10 layers x 11 tensors - 20


def test_biases_are_not_dropped_in_silence(copy):
    """The weights of a Qwen2 under a Llama's config.json: everything fits but the biases."""
    folder = copy("qwen2_tied")
    edit_config(folder, model_type="llama")
    refused(folder, "left over model.layers.0.self_attn.q_proj.bias [32]")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "weights.pt"])
def test_pickled_weights_are_never_opened(copy, name):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    folder = copy()
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Trap()))
    refused(folder, name, "pickle", "save_pretrained")


def test_tied_head_stored_once_more(copy):
    folder = copy("qwen2_tied")

    def store(head):
        edit_tensors(folder, lambda t: t | {"lm_head.weight": head(t["model.embed_tokens.weight"])})

    store(np.array)
    assert "head" not in load_hf(folder)[1]
    store(lambda embed: embed + (np.arange(VOCAB) == VOCAB - 1)[:, None].astype("float32"))
    refused(folder, "left over lm_head.weight")
    store(lambda embed: embed[:-1])
    refused(folder, "left over lm_head.weight")


def test_rotary_tables_of_old_llama_files_are_passed_over(copy, checkpoint):
    folder = copy("llama_untied")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda tensors: tensors | {name: np.zeros(4, np.float16)})
    jax.tree.map(np.testing.assert_array_equal, load_hf(folder)[1], checkpoint("llama_untied").params)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_cut_file_is_named(copy, keep):
    folder = copy()
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    refused(folder, "model.safetensors", "damaged")


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"model.norm.weight": "gone.safetensors"}, ["gone.safetensors", "missing"]),
        ({"model.norm.weight": "../model.safetensors"}, [INDEX, "weight_map"]),
        ({"model.norm.weight": ".."}, [INDEX, "weight_map"]),
        ({"model.norm.weight": 3}, [INDEX, "weight_map"]),
        ({"model.norm.weight": ["a.safetensors"]}, [INDEX, "weight_map"]),
        (None, [INDEX, "weight_map"]),
    ],
)
def test_bad_index(copy, weight_map, words):
    folder = copy()
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, *words)


def test_index_and_files_that_differ(checkpoint, tmp_path):
    """A tensor that only a file knows is left over, one that only the index knows is missing."""
    checkpoint("qwen3_tied").model.save_pretrained(tmp_path, max_shard_size="8KB")
    index = json.loads((tmp_path / INDEX).read_text())
    first, last = min(index["weight_map"].values()), max(index["weight_map"].values())
    save_numpy(load_file(tmp_path / first) | {"model.extra.weight": np.ones(3, np.float32)}, tmp_path / first)
    moved = next(name for name, file in index["weight_map"].items() if file == last)
    index["weight_map"][moved] = first
    (tmp_path / INDEX).write_text(json.dumps(index))
    refused(tmp_path, f"missing {moved}", "left over model.extra.weight [3]")


def test_dtypes(copy):
    folder = copy()
    refused(folder, "int8", "float32, bfloat16, float16", dtype="int8")

    def change(dtype):
        def one(tensors):
            tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(dtype)

        edit_tensors(folder, one)

    change(np.float16)
    refused(folder, "F16, F32", "name one dtype")
    assert load_hf(folder, dtype="float32")[1]["final_norm"]["scale"].dtype == np.float32
    change(np.int8)
    refused(folder, "model.norm.weight is stored as I8", dtype="float32")


def test_missing_files(copy, tmp_path):
    folder = copy()
    refused(tmp_path / "nowhere" / "at" / "all", "neither a folder nor a hub name")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json is not JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json holds a list")
    (folder / "config.json").unlink()
    refused(folder, "config.json is missing")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_the_system_does_not_let_be_read_is_named(copy, name):
    folder = copy()
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, f"{name} cannot be read")


class SilentError(Exception):
    """As HTTP libraries have it: no OSError, and often without a word."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (LocalEntryNotFoundError("Got: ConnectError\nAn error happened"), "Got: ConnectError"),
        (SilentError(), "SilentError"),
    ],
)
def test_hub_name_without_network(monkeypatch, error, said):
    import huggingface_hub

    def no_network(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    refused("Qwen/Qwen2.5-3B-Instruct", "'Qwen/Qwen2.5-3B-Instruct'", f"hub did not give it ({said})")


def test_hub_name_with_network(monkeypatch, checkpoint):
    import huggingface_hub

    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(checkpoint("qwen3_tied").folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_hf("Qwen/Qwen3-0.6B")[0] == checkpoint("qwen3_tied").config
    assert asked[0][0] == "Qwen/Qwen3-0.6B" and not any("bin" in pattern or "pt" in pattern for pattern in asked[0][1])


def test_export_goes_to_an_empty_folder_only(checkpoint, tmp_path):
    c = checkpoint("qwen3_tied")
    (tmp_path / "out").mkdir()
    save_hf(tmp_path / "out", c.config, c.params)
    before = all_tensors(tmp_path / "out")
    with pytest.raises(WeightsError, match="not an empty folder"):
        save_hf(tmp_path / "out", c.config, jax.tree.map(np.zeros_like, c.params))
    assert_same_bits(all_tensors(tmp_path / "out"), before)


def test_export_refuses_parameters_of_another_model(checkpoint, tmp_path):
    c = checkpoint("qwen3_tied")
    with pytest.raises(WeightsError, match="missing layers/attention/q/bias.*left over layers/attention/q_norm/scale"):
        save_hf(tmp_path / "out", checkpoint("qwen2_tied").config, c.params)
    params = c.params | {"embed": c.params["embed"].astype("bfloat16")[:5]}
    with pytest.raises(WeightsError, match=r"embed has shape \[5, 32\], not \[96, 32\]; embed is stored as bfloat16"):
        save_hf(tmp_path / "out", c.config, params)
    assert not (tmp_path / "out").exists()


def test_full_disk_leaves_no_half_export(checkpoint, tmp_path):
    """A file size limit makes the operating system refuse the second shard, as a full disk would."""
    c = checkpoint("qwen3_tied")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, hard))
    try:
        with pytest.raises(WeightsError, match="could not be written.*free space"):
            save_hf(tmp_path / "out", c.config, c.params, max_shard_bytes=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "out").exists()
