"""One GRPO update of 32 rows behind a prompt of 1024 tokens, against the same in PyTorch and in plain JAX.

What it shows: seconds of one update (clipped loss of 128 response tokens per row, gradient, global-norm clip, AdamW) of
the same weights and data, float32:

- *ours*: `Learner.update`, which reads the shared prompt once;
- *plain*: the same learner given whole sequences, so that every row reads the prompt again;
- *torch*: `transformers` with sdpa attention, micro-batches of 8 rows, logits of the response only, `AdamW`.

The gradients of the three are compared tensor by tensor before anything is timed; then the three take turns, and
medians are divided: above 1 means that ours takes less time.

    python experiments/bench_update.py           L4 D256, some minutes
    python experiments/bench_update.py --full    also L8 D512

The last line is one JSON object; its top-level keys hold the worst value over the sizes that ran.

Result, 26 November 2026, 2 cores of an AMD EPYC (Zen 4), jax 0.10.2, torch 2.13.0, medians of 5, L4 D256: ours 1.69
s, torch 9.47 s, plain 11.2 s: `ratio_vs_torch` 5.62 (aim 5), `ratio_vs_plain_jax` 6.63; `temp_memory_ratio` 3.01;
`grad_max_rel_diff` 4.4e-6 (aim 1e-4). The day before on Zen 3, with an earlier learner: 2.98 s against 15.98 s, 5.36.
Later on 26 November beside low-priority work, medians of 5 again: L4 D256 1.93 s, 10.86 s, 17.5 s: 5.61 and 9.03.
L8 D512, medians of 3 (`--full --no_plain --repeats=3`, of which only the larger size was run): ours 16.9 s, torch 92.4
s: `ratio_vs_torch` 5.48 (aim 4.5), `grad_max_rel_diff` 6.3e-6. Plain at L8, and a GPU, have not been run.
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import describe_machine, in_turns, load_torch
from safetensors.numpy import load_file

from router_r1_jax.distributed.mesh import make_mesh
from router_r1_jax.learner import Layout, Learner, PolicyLoss, Row, init_state, make_batch, make_optimizer
from router_r1_jax.learner.micro_batches import Batch
from router_r1_jax.learner.update import TrainState, batch_gradients
from router_r1_jax.model import ModelConfig, Params, abstract_params, init_params, save_hf

ROWS, PROMPT, RESPONSE = 32, 1024, 128
CLIP, LEARNING_RATE, MAX_NORM, LOGIT_CHUNK = 0.2, 1e-6, 1.0, 16
HEADS = dict(head_dim=64, num_kv_heads=2, family="qwen3", remat="dots")
SIZES = {
    "L4 D256": dict(num_layers=4, width=256, mlp=1024, num_heads=4, vocab_size=4096, **HEADS),
    "L8 D512": dict(num_layers=8, width=512, mlp=2048, num_heads=8, vocab_size=32_768, **HEADS),
}
MICRO_BATCH = {"ours": 16, "plain": 8, "torch": 8}
"""Rows of a pass: ours of 129 tokens each, the others' of 1152."""


class Data:
    """Random prompt, responses and advantages, and log-probs of a sampler that has moved a little from the parameters.

    No ratio lies within 1 % of a clip: two systems that differ by rounding take the same side.
    """

    def __init__(self, config: ModelConfig, params: Params, *, rows: int, prompt: int, response: int) -> None:
        rng = np.random.default_rng(0)
        self.prompt = rng.integers(config.vocab_size, size=prompt)
        self.responses = rng.integers(config.vocab_size, size=(rows, response))
        self.advantages = rng.standard_normal(rows).astype(np.float32)
        self.logps = np.zeros((rows, response), np.float32)
        learner, _ = make_learner(config, Layout((response,), (rows,)))
        now = np.stack([scores.logps for scores in learner.score(params, *self.rows(shared=True))])
        ratio = np.exp(0.2 * rng.standard_normal(now.shape))
        for edge in (1 - CLIP, 1 + CLIP):
            ratio = np.where(np.abs(ratio - edge) < 0.01, edge + 0.02, ratio)
        self.logps = (now - np.log(ratio)).astype(np.float32)

    def rows(self, *, shared: bool) -> tuple[np.ndarray, list[Row]]:
        """The learner's prefix and rows. A row begins with the prompt's last token, which predicts the response."""
        cut = len(self.prompt) - 1 if shared else 0
        made = zip(self.responses, self.logps, self.advantages, strict=True)
        return self.prompt[:cut], [Row(self.prompt[cut:], r, logps=p, advantages=a) for r, p, a in made]


def make_learner(config: ModelConfig, layout: Layout) -> tuple[Learner, Callable[[Params], TrainState]]:
    """A learner of this loss on one device, and what makes its state of parameters."""
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    abstract = abstract_params(config, mesh)
    optimizer, _ = make_optimizer(
        learning_rate=LEARNING_RATE, warmup=1, total=10, decay=False, weight_decay=0.0, max_grad_norm=MAX_NORM
    )
    learner = Learner(config, optimizer, LOSS, mesh, abstract, layout=layout, chunk=LOGIT_CHUNK)
    return learner, lambda params: init_state(optimizer, params, abstract, mesh)


LOSS = PolicyLoss(clip_low=CLIP, clip_high=CLIP, kl_coef=0.0, kl="none")


def our_gradients(config: ModelConfig, params: Params, batch: Batch) -> tuple[dict, int]:
    """The gradient by Hugging Face's names, and the bytes of temporary memory of its program."""
    function = functools.partial(batch_gradients, config, LOSS, chunk=LOGIT_CHUNK, temperature=1.0)
    compiled = jax.jit(function).lower(params, batch).compile()
    (grads, _), _ = compiled(params, batch)
    with tempfile.TemporaryDirectory() as folder:
        save_hf(Path(folder) / "gradients", config, grads)
        files = sorted((Path(folder) / "gradients").glob("*.safetensors"))
        named = functools.reduce(lambda a, b: a | b, map(load_file, files))
    return named, compiled.memory_analysis().temp_size_in_bytes


class TorchUpdate:
    """The same update by `transformers` and torch."""

    def __init__(self, config: ModelConfig, params: Params, data: Data) -> None:
        import torch

        self.torch, self.model, self.data = torch, load_torch(config, params).train(), data
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
        prompt = np.broadcast_to(data.prompt, (len(data.responses), len(data.prompt)))
        self.ids = torch.tensor(np.concatenate([prompt, data.responses], axis=1))

    def gradients(self) -> None:
        """Leave the mean loss' gradient in the parameters."""
        torch, data, size = self.torch, self.data, MICRO_BATCH["torch"]
        self.optimizer.zero_grad(set_to_none=True)
        R = data.responses.shape[1]
        for start in range(0, len(self.ids), size):
            rows = slice(start, start + size)
            # The last R + 1 positions' logits, without the very last, predict the response.
            logits = self.model(self.ids[rows], use_cache=False, logits_to_keep=R + 1).logits[:, :-1]
            logps = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), self.ids[rows, -R:], reduction="none")
            ratio = torch.exp(logps - torch.tensor(data.logps[rows]))
            advantage = torch.tensor(data.advantages[rows])[:, None]
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
            (-surrogate.sum() / self.ids[:, -R:].numel()).backward()

    def update(self) -> None:
        """One step of the optimizer."""
        self.gradients()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()


def largest_difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Over all tensors: largest |a - b| relative to the tensor's largest |b|; stops where a name is missing."""
    if ours.keys() != theirs.keys():
        raise SystemExit(f"gradients of other tensors: {sorted(ours.keys() ^ theirs.keys())}")
    return max(float(np.abs(ours[n] - theirs[n]).max() / np.abs(theirs[n]).max()) for n in ours)


def updater(config: ModelConfig, params: Params, prefix: np.ndarray, rows: list[Row], layout: Layout) -> Callable:
    """A call that makes one more update of its own copy of the parameters."""
    learner, start = make_learner(config, layout)
    states = [start(jax.tree.map(jnp.copy, params))]

    def update() -> None:
        states[0], _ = learner.update(states[0], prefix, rows)
        jax.block_until_ready(states[0])

    return update


def compare_on_cpu(name: str, repeats: int, *, plain: bool) -> dict[str, Any]:
    """Results of one size; without `plain` our full-sequence path is neither run nor compared."""
    config = ModelConfig(**SIZES[name])
    params = init_params(config, make_mesh(1, 1, 1, jax.devices()[:1]), seed=0)
    data = Data(config, params, rows=ROWS, prompt=PROMPT, response=RESPONSE)
    torch_update = TorchUpdate(config, params, data)
    torch_update.gradients()
    theirs = {name: p.grad.numpy() for name, p in torch_update.model.named_parameters()}
    rows = {"ours": data.rows(shared=True)} | ({"plain": data.rows(shared=False)} if plain else {})
    lengths = {"ours": RESPONSE, "plain": PROMPT + RESPONSE}
    layouts = {system: Layout((lengths[system],), (MICRO_BATCH[system],)) for system in rows}
    result: dict[str, Any] = {}
    memory = {}
    for system, made in rows.items():
        grads, memory[system] = our_gradients(config, params, make_batch(*made, layouts[system]))
        result[f"{system}_grad_max_rel_diff"] = largest_difference(grads, theirs)
    print(f"{name}: {result}, temporary memory {memory}", flush=True)
    calls = {system: updater(config, params, *made, layouts[system]) for system, made in rows.items()}
    seconds = in_turns(calls | {"torch": torch_update.update}, repeats)
    result |= {
        **{f"{system}_seconds": round(value, 3) for system, value in seconds.items()},
        "grad_max_rel_diff": result["ours_grad_max_rel_diff"],
        "ratio_vs_torch": round(seconds["torch"] / seconds["ours"], 3),
    }
    if plain:
        result["ratio_vs_plain_jax"] = round(seconds["plain"] / seconds["ours"], 3)
        result["temp_memory_ratio"] = round(memory["plain"] / memory["ours"], 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="run the larger size too")
    parser.add_argument("--repeats", type=int, default=5, help="measured updates of each system")
    parser.add_argument("--no_plain", action="store_true", help="leave out our full-sequence path: two minutes at L8")
    args = parser.parse_args()
    machine = describe_machine()
    print(f"{ROWS} rows, prompt {PROMPT}, response {RESPONSE} on", machine, flush=True)
    sizes = {}
    for name in list(SIZES)[: 1 + args.full]:
        sizes[name] = compare_on_cpu(name, args.repeats, plain=not args.no_plain)
        print(name, sizes[name], flush=True)
    keys = {"ratio_vs_torch": min, "ratio_vs_plain_jax": min, "grad_max_rel_diff": max, "temp_memory_ratio": min}
    worst = {key: of(size[key] for size in sizes.values()) for key, of in keys.items() if key in sizes["L4 D256"]}
    print(json.dumps(worst | {"sizes": sizes, "machine": machine}))


if __name__ == "__main__":
    main()
