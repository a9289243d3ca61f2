"""Router-R1 as published: PPO on Qwen2.5-3B-Instruct, 7K NQ + 7K HotpotQA, the paper's six models and prices.

    python -m router_r1_jax.data.prepare --sets=paper --source=DIR_OR_URL --dir=data
    python -m router_r1_jax.train    --config=configs/paper_ppo.py --workdir=runs/paper --config.mesh.fsdp=8
    python -m router_r1_jax.evaluate --config=configs/paper_ppo.py --workdir=runs/paper --config.mesh.fsdp=8

Differences from the published run, with their reasons:

- The critic is a head on the router's hidden states (`learner/critic.py`). A second model of 3B parameters, with its
  moments and activations, would double the memory. The critic's gradient reaches the body with factor `value_coef` 0.1.
- Ratios, advantages and values cover sampled tokens only. In the published run, external replies had value targets.
- Sampling uses top-p 0.95, and ratios compare log-probs without top-p. Importance weights, capped at 2, correct for
  the tokens that top-p removes.
- Validation questions are sampled from the train split. The best checkpoint is the one that answers them best.

Enter your provider, and the environment variable with its key, in configs/pools/paper.py.

Hardware: 8 devices of 24 GB. One device needs about 22 GB according to

    python -m router_r1_jax.plan --config=configs/paper_ppo.py --config.mesh.fsdp=8 --devices=8 --hbm_gb=24

Time: not run yet. On 8 H100, arithmetic gives ten seconds a step and three quarters of an hour in all, most of it for
decoding and calls (see configs/qwen25_3b_grpo.py; here with half the episodes and two updates).
Number to expect: the paper reports mean EM .416 over seven sets (500 questions each, one run).
`--config=configs/paper_ppo.py:runlocal` runs the same settings with a random 2-layer model and simulated models on a
CPU in a minute or two. `--config.reward.alpha` is the paper's alpha.
"""

from pathlib import Path

from ml_collections import ConfigDict

from router_r1_jax.config import base_config, use_loss, use_paper_data, use_pool
from router_r1_jax.model import preset_arch

POOLS = Path(__file__).parent / "pools"


def get_config(arg: str | None = None) -> ConfigDict:
    c = base_config()
    use_pool(c, POOLS / "paper.py")
    use_loss(c, "ppo")
    c.model.source = "Qwen/Qwen2.5-3B-Instruct"
    c.model.dtype = "bfloat16"
    c.model.arch = ConfigDict(preset_arch("Qwen2.5-3B"))  # read only if model.source is empty: a random start
    c.prompt.template = "published"
    c.steps = 225
    c.rollout.prompts_per_step, c.rollout.num_generations = 64, 1
    c.rollout.top_p = 0.95
    c.rollout.max_calls, c.rollout.max_turn_tokens, c.rollout.max_row_tokens = 4, 1024, 4096
    c.rollout.reply_tokens, c.pool.max_tokens, c.pool.temperature = 600, 512, 0.0
    c.learner.learning_rate, c.learner.value_learning_rate = 1e-6, 1e-5
    c.learner.minibatches = 2
    c.learner.tis_cap = 2.0
    c.learner.micro_tokens = 4096
    c.reward.preset, c.reward.alpha = "official", 0.0
    c.data.dir = "data"
    if arg == "runlocal":
        use_pool(c, POOLS / "simulated.py")
        c.synthetic.simulate_models = True
        c.prompt.template = "router"
        c.model.source = ""
        c.model.arch = base_config().model.arch
        c.model.arch.num_layers, c.model.arch.width, c.model.arch.mlp = 2, 64, 128
        c.data.dir = ""
        c.steps = 2
        c.rollout.prompts_per_step, c.rollout.slots = 8, 8
        c.rollout.max_turn_tokens, c.rollout.reply_tokens, c.rollout.max_row_tokens = 16, 32, 512
        c.learner.length_buckets = 1
        c.validation.questions = 8
        c.evaluation.questions = 16
    else:
        use_paper_data(c)
    return c
