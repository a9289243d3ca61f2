"""Demo: a router of one million parameters learns which model to ask in the synthetic world, on two CPU cores.

    make demo

or, command by command,

    python -m router_r1_jax.train    --config=configs/demo.py --workdir=runs/demo
    python -m router_r1_jax.evaluate --config=configs/demo.py --workdir=runs/demo

Hardware: a CPU. Time: four to five minutes on one core. Number to expect: the README's table of the demo.
`--config=configs/demo.py:dapo` takes another loss by its name in `router_r1_jax.config.LOSSES`. The README's numbers
are those of the fields below.
"""

from pathlib import Path

from ml_collections import ConfigDict

from router_r1_jax.config import base_config, use_loss, use_pool


def get_config(arg: str | None = None) -> ConfigDict:
    c = base_config()
    use_pool(c, Path(__file__).parent / "pools" / "simulated.py")
    c.synthetic.simulate_models = True
    c.steps = 50
    c.model.remat = "none"
    c.prompt.template = "terse"
    c.prompt.question_tokens = 32
    c.rollout.prompts_per_step = 16
    c.rollout.num_generations = 8
    c.rollout.slots = 64
    c.rollout.max_calls = 2
    c.rollout.max_turn_tokens = 48
    c.rollout.reply_tokens = 32
    c.rollout.max_row_tokens = 192
    c.rollout.prefill_chunk = 16
    # Gradients have norms near 0.1. A rare update with a norm of 0.5 to 1.3 can make the router drop a good model.
    c.learner.learning_rate, c.learner.decay = 3e-4, True
    c.learner.max_grad_norm = 0.1
    c.learner.kl_coef = 0.01
    c.learner.micro_tokens, c.learner.length_buckets = 6144, 2
    c.warmstart.steps = 700
    c.synthetic.copy_steps = 250
    c.warmstart.file = str(Path(__file__).parent / "demo_warmstart.safetensors")
    c.checkpoint.every = c.validation.every = 10
    if arg:
        use_loss(c, arg)
    return c
