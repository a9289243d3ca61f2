"""Own questions, own models, own prompt: one configuration to copy and to edit.

    python -m router_r1_jax.data.prepare --sets=mine --source=configs/own_data --dir=data
    python -m router_r1_jax.pool.check --config=configs/own_data.py:http://127.0.0.1:8000/v1
    python -m router_r1_jax.train      --config=configs/own_data.py:http://127.0.0.1:8000/v1 --workdir=runs/mine
    python -m router_r1_jax.evaluate   --config=configs/own_data.py:http://127.0.0.1:8000/v1 --workdir=runs/mine

The text behind the colon is the address of an OpenAI-compatible endpoint. It must serve models with the ids "small" and
"large"; write your endpoint's ids, prices and scores into `get_config`. The questions are configs/own_data/mine/*.jsonl
and the prompt is configs/own_data/template.txt. docs/how-to/own-questions.md and own-models.md explain each step.

The router is Qwen2.5-0.5B-Instruct with LoRA, from the Hugging Face hub; `--config.model.source=FOLDER` takes weights
in Hugging Face format from a folder.
Hardware: one device, or a CPU, with 8 GB, according to

    python -m router_r1_jax.plan --config=configs/own_data.py --hbm_gb=8

Time: not measured with this router. `tests/test_own_data.py` runs the commands with a tiny one in about a minute on a
CPU.
Number to expect: none. 24 questions are enough to see every file of a run, but far too few to train or to compare.
"""

from pathlib import Path

from ml_collections import ConfigDict

from router_r1_jax.config import base_config, model_card, provider

HERE = Path(__file__).parent / "own_data"


def get_config(arg: str | None = None) -> ConfigDict:
    c = base_config()

    # ---- questions: the set "mine", which data.prepare has put below data.dir ----
    c.data.dir = "data"
    c.data.train = c.data.validation = c.data.test = ("mine",)

    # ---- models: one endpoint that serves two ----
    # key_env names the environment variable with the endpoint's key; a local endpoint usually needs none.
    c.pool.providers = (provider(name="mine", base_url=arg or "http://127.0.0.1:8000/v1", key_env=""),)
    c.pool.models = (
        model_card(
            name="Sparrow",  # the prompt shows this name, and the router writes it
            provider="mine",
            model="small",  # the endpoint's id of the model
            price_in=0.05,
            price_out=0.10,
            latency=0.5,
            performance=dict(geography=0.6, science=0.5, history=0.4),
            description="small and fast",
        ),
        model_card(
            name="Heron",
            provider="mine",
            model="large",
            price_in=0.60,
            price_out=1.20,
            latency=2.0,
            performance=dict(geography=0.9, science=0.9, history=0.8),
            description="large and slow",
        ),
    )
    c.pool.price_date = "2026-11-30"  # the day on which you read the prices; these ones are invented
    c.pool.max_tokens = 128

    # ---- prompt ----
    c.prompt.template = str(HERE / "template.txt")
    c.prompt.question_tokens = 128

    # ---- router and training ----
    c.model.source = "Qwen/Qwen2.5-0.5B-Instruct"
    c.model.lora.rank = 16
    c.steps = 20
    c.rollout.prompts_per_step, c.rollout.num_generations, c.rollout.slots = 4, 4, 8
    c.rollout.max_calls, c.rollout.max_turn_tokens, c.rollout.reply_tokens = 2, 128, 128
    c.rollout.max_row_tokens = 768
    c.learner.learning_rate = 1e-4  # LoRA needs a higher one than full training
    c.learner.micro_tokens, c.learner.length_buckets = 4096, 1
    c.reward.alpha = 0.3
    c.checkpoint.every = c.validation.every = 10
    c.logging.episodes_every = 1
    return c
