"""Qwen2.5-3B-Instruct on the synthetic world, with the published hyper-parameters that GRPO has too.

    python -m router_r1_jax.train    --config=configs/qwen25_3b_grpo.py --workdir=runs/qwen3b --config.mesh.fsdp=8
    python -m router_r1_jax.evaluate --config=configs/qwen25_3b_grpo.py --workdir=runs/qwen3b --config.mesh.fsdp=8

Hardware: 8 devices of 24 GB, each with a replica of the rollout. One device needs about 22 GB according to

    python -m router_r1_jax.plan --config=configs/qwen25_3b_grpo.py --config.mesh.fsdp=8 --devices=8 --hbm_gb=24

(38 GB with model.dtype float32). One device of 24 GB is enough with `--config.model.lora.rank=16` (23 GB). LoRA usually
needs a higher learning rate, 1e-5 to 1e-4.

Time: not run yet. On 8 H100, arithmetic gives ten seconds a step and three quarters of an hour in all. A step has 128
episodes of a thousand tokens: 1.5 s for the update at 40 % of the peak, 2.5 s for 600 decode steps at half of the
memory's bandwidth, and three calls of 2 s.
Number to expect: none yet. The paper's models on the paper's questions reach mean EM .416 (configs/paper_ppo.py).

With `--config.model.source=` the run starts from random weights.
`--config=configs/qwen25_3b_grpo.py:paper` takes the paper's questions (`use_paper_data`; prepare them first) and models
(configs/pools/paper.py; enter your endpoint there) instead of the synthetic world's.
`--config=configs/qwen25_3b_grpo.py:runlocal` runs the same settings with a random 2-layer model on a CPU.
`:dapo`, or `:paper,dapo`, takes another loss by its name in `router_r1_jax.config.LOSSES`.
"""

from pathlib import Path

from ml_collections import ConfigDict

from router_r1_jax.config import base_config, use_loss, use_paper_data, use_pool
from router_r1_jax.model import preset_arch


def get_config(arg: str | None = None) -> ConfigDict:
    c = base_config()
    use_pool(c, Path(__file__).parent / "pools" / "simulated.py")
    c.synthetic.simulate_models = True

    c.model.source = "Qwen/Qwen2.5-3B-Instruct"
    c.model.dtype = "bfloat16"
    c.model.arch = ConfigDict(preset_arch("Qwen2.5-3B"))  # read only if model.source is empty: a random start
    c.prompt.template = "router"
    c.steps = 225
    c.rollout.prompts_per_step, c.rollout.num_generations = 16, 8
    c.rollout.slots = 64
    c.rollout.max_calls = 4
    c.learner.learning_rate = 1e-6
    c.learner.micro_tokens = 4096

    options = arg.split(",") if arg else []
    if "paper" in options:
        use_paper_data(c)
        use_pool(c, Path(__file__).parent / "pools" / "paper.py")
        c.synthetic.simulate_models = False
    if "runlocal" in options:
        c.model.source = ""
        c.model.arch = base_config().model.arch
        c.model.arch.num_layers, c.model.arch.width, c.model.arch.mlp = 2, 64, 128
        c.steps = 2
        c.rollout.prompts_per_step, c.rollout.num_generations, c.rollout.slots = 2, 4, 8
        c.rollout.max_turn_tokens, c.rollout.reply_tokens, c.rollout.max_row_tokens = 16, 32, 512
        c.learner.length_buckets = 1
        c.validation.questions = 8
        c.evaluation.questions = 16
    for name in options:
        if name not in ("runlocal", "paper"):
            use_loss(c, name)
    return c
