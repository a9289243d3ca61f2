"""configs/own_data.py as a user runs it: own questions, own models behind HTTP, own prompt, with a random router.

The commands are those of the configuration's docstring. The router of the test is a folder in Hugging Face format whose
blocks add nothing, so that each token follows from the one before it alone. It asks the model "Sparrow" one question
and answers "Oslo"; in some episodes its thought is empty, which is malformed.
"""

import ast
import json
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import mains
import numpy as np
import pytest
from pool.scripted_provider import completion, serving
from transformers import AutoTokenizer

from router_r1_jax.distributed.mesh import make_mesh
from router_r1_jax.model import ModelConfig, init_params, save_hf
from router_r1_jax.pool.ledger import read_ledger
from router_r1_jax.protocol import information_block
from router_r1_jax.storage.json_lines import read_lines
from router_r1_jax.synthetic.tokenizer import train_tokenizer

pytestmark = pytest.mark.slow  # about a minute: four commands in processes of their own
CONFIGS = Path(__file__).parents[1] / "configs"
CONFIG = CONFIGS / "own_data.py"
DOCSTRING = ast.get_docstring(ast.parse(CONFIG.read_text()))
ADDRESS = "http://127.0.0.1:8000/v1"  # in the docstring's commands
QUERY = "Which city?"
CALL = f"<think> help needed </think> <search> Sparrow: {QUERY} </search>"
ANSWER = " <answer> Oslo </answer>"
SMALLER = """
    steps=2 checkpoint.every=2 validation.every=2 evaluation.bootstrap=100 rollout.max_row_tokens=96
    prompt.question_tokens=32 model.remat=none model.lora.targets=('o',) learner.kl=none
""".split()
LOGIT = 40.0  # of a token that follows; all others are below 20


def save_router(folder):
    """A model that writes CALL behind a prompt and ANSWER behind a reply, whatever question and reply say."""
    questions = [line for path in CONFIGS.glob("own_data/mine/*.jsonl") for line in path.read_text().splitlines()]
    template = (CONFIGS / "own_data" / "template.txt").read_text()
    train_tokenizer([*questions, template, CALL, ANSWER, information_block("x")], folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    config = ModelConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        num_layers=1,
        width=64,
        mlp=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        family="llama",
        tie_embeddings=False,
    )
    params = init_params(config, make_mesh(1, 1, 1, jax.devices()[:1]), 0)
    embed = np.random.default_rng(0).normal(size=(config.vocab_size, config.width))
    embed /= np.linalg.norm(embed, axis=1, keepdims=True)
    head = np.zeros_like(embed)

    def follow(text, logit=LOGIT):
        ids = tokenizer.encode(text, add_special_tokens=False)
        for before, after in zip(ids, ids[1:], strict=False):
            head[after] += logit / np.sqrt(config.width) * embed[before]  # the last norm makes embeddings sqrt(width)

    follow(f"\n{CALL}")
    follow(f"\n\n{ANSWER}")
    follow("<think> </think>", LOGIT - 1.0)
    params["embed"], params["head"] = jnp.asarray(embed, jnp.float32), jnp.asarray(head, jnp.float32)
    for part, kernel in (("attention", "o"), ("mlp", "down")):  # what a block adds
        params["layers"][part][kernel]["kernel"] *= 0
    save_hf(folder / "router", config, params, tokenizer)
    return folder / "router"


@pytest.fixture(scope="module")
def models():
    """An OpenAI-compatible endpoint that knows no answer."""
    with serving(lambda number, body: completion("I do not know.") if body else (200, {}, b"{}")) as scripted:
        yield scripted


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """The folder in which the docstring's commands have run, and what each of them has printed, by its module."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "configs").symlink_to(CONFIGS)
    source = save_router(folder)
    commands = [shlex.split(line) for line in DOCSTRING.splitlines() if line.startswith("    python -m ")]
    commands = [command for command in commands if command[2] != "router_r1_jax.plan"]
    printed = {}
    for python, dash_m, module, *arguments in commands:
        assert (python, dash_m) == ("python", "-m")
        if module.endswith(("train", "evaluate")):
            arguments += [f"--config.{field}" for field in [f"model.source={source}", *SMALLER]]
        done = subprocess.run(
            [sys.executable, "-m", module, *[argument.replace(ADDRESS, models.base_url) for argument in arguments]],
            cwd=folder,
            env=mains.environment(),
            capture_output=True,
            text=True,
            timeout=mains.TIMEOUT,
        )
        assert done.returncode == 0, f"{module}: {done.stderr[-4000:]}"
        printed[module.removeprefix("router_r1_jax.")] = done.stdout
    assert list(printed) == ["data.prepare", "pool.check", "train", "evaluate"]
    return folder, printed


def test_the_questions_are_prepared_and_sampled_by_split(run):
    folder, printed = run
    assert "mine/train.jsonl: 10 questions, 0 bad lines" in printed["data.prepare"]
    sampled = json.loads((folder / "runs/mine/data.json").read_text())
    assert {split: sampled[split]["sets"]["mine"]["questions"] for split in sampled} == {
        "train": 10,
        "validation": 6,
        "test": 8,
    }


def test_the_check_says_that_both_models_answer(run):
    lines = run[1]["pool.check"].splitlines()
    assert [line.split()[:2] for line in lines if line.startswith(("Sparrow", "Heron"))] == [
        ["Sparrow", "ok"],
        ["Heron", "ok"],
    ]


def test_the_router_asks_the_endpoint_and_the_ledger_counts_it(run, models):
    folder, _ = run
    ledger = read_ledger(folder / "runs/mine/ledger.jsonl")
    assert {(line["model"], line["outcome"]) for line in ledger} == {("Sparrow", "ok")}
    assert {line["split"] for line in ledger} == {"train", "validation", "test"}
    assert all(line["charged"] == pytest.approx((3 * 0.05 + 5 * 0.10) / 1e6) for line in ledger)
    asked = [body for _, body in models.requests if body["messages"][-1]["content"] == QUERY]
    assert {(body["model"], body["max_tokens"]) for body in asked} == {("small", 128)}


def test_malformed_episodes_teach_the_router_something(run):
    steps = mains.train_lines(run[0] / "runs/mine")
    assert [line["step"] for line in steps] == [1, 2]
    assert all(0 < line["malformed_share"] < 1 and line["grad_norm"] > 0 for line in steps)
    assert all(line["skipped_updates"] == 0 for line in steps)


def test_the_results_answer_every_test_question_once(run):
    folder, printed = run
    results = json.loads((folder / "runs/mine/results.json").read_text())
    assert results["questions"] == 8 and list(results["policies"][0]["datasets"]) == ["mine"]
    answers = read_lines(folder / "runs/mine" / results["policies"][0]["episodes"])
    assert sorted(answer["id"] for answer in answers) == [f"mine/test/test_{i}" for i in range(8)]
    assert results["policies"][0]["em"] == 1 / 8  # Oslo
    assert (folder / "runs/mine/report.html").exists() and "results.json" in printed["evaluate"]
