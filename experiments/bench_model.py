"""Forward and backward of RouterLM against `transformers` on the same weights and tokens.

What it shows: mean token cross-entropy over all predicted positions of [8, 512] tokens, float32 on CPU, without and
with its gradient. Ours is what training runs: the stacked layout, causal einsums, of each block only the results of its
products kept (`remat="dots"`, which takes less time here than to keep all: the pages of what is kept must be made), and
the head of `learner/logprobs.py`, which never holds logits [B, T, V]. Theirs is Qwen3 with `sdpa` attention
and full logits, in eager mode. Logits and losses are compared first; then the two systems take turns, so that what else
the machine does falls on both, and medians are divided: above 1 means that ours takes less time.

    python experiments/bench_model.py           L4 D256, a few minutes
    python experiments/bench_model.py --full    also L8 D512

Where JAX finds a GPU, the shapes of Qwen2.5-3B run instead, in bfloat16, rematerialised, with each attention
implementation; the results are model FLOP utilisation (the recomputation is not counted as useful).

The last line is one JSON object; its top-level keys hold the worst value over the sizes that ran.

Result, 25 November 2026, 2 otherwise idle cores of an AMD EPYC (Zen 3), jax 0.10.2, torch 2.13.0, transformers 5.23.0,
L4 D256: 1.36 forward, 0.83 with the gradient (2.43 s against 2.01 s), which misses the aim of 1.3. On 26 November the
same code on 2 cores with AVX-512 (Zen 4): 1.47 forward, 0.66 with the gradient (1.80 s against 1.18 s).

Since then the gradient costs less: with everything kept 2.72 core-seconds; with the results of products kept 2.42;
attention's blocks in one loop over rows 2.30; the head's gradient by hand, and no transposition folded into the
gradient of a kernel 2.22 (Zen 4, beside other work, least of 5: rough). About 1.6 of these are products, at 93 GFLOP/s
a core. Idle, 26 November, Zen 4, L4 D256: 1.29 forward (0.287 s), 1.04 with the gradient (1.042 s against 1.087 s),
which still misses the aim of 1.3. XLA's other CPU paths were tried on these shapes, 1.18 to 1.21 s with the gradient as
they are: `xla_cpu_use_onednn` 1.18, `xla_cpu_enable_fast_math` 1.21, without the fusion emitters 1.20; YNNPACK, XNNPACK
for products and vectors of 512 bits took 2.3 s, beside other work.

`--full`, idle, 26 November, AMD EPYC with 2 cores, the same versions: L4 D256 1.43 forward and 1.12 with the gradient
(1.198 s against 1.339 s), L8 D512 1.54 forward (2.35 s) and 1.08 with the gradient (8.69 s against 9.42 s; 139
GFLOP/s). The aim of 1.0 forward holds for both, that of 1.3 with the gradient for neither. The GPU part has not been
run.

29 November, another machine of that kind (Zen 4), L4 D256: 1.21 forward (0.311 s), 1.01 with the gradient (1.122 s
against 1.132 s). What stands in the way of 1.3, by `jax.profiler` on one core beside another job: of 1.98 core-seconds
1.58 are products, at 100 of the 115 GFLOP/s that a loop of multiply-adds alone reaches; torch takes 2.26 on two cores,
so that 1.3 would leave 0.16 for all else, where page faults of fresh buffers alone took about 0.1 (by huge pages, on
another day). Tried on one core, by scripts that were not kept, so notes, least of 7, 2.0 to 2.1 as it is: layers
unrolled instead of scanned 2.40 (more buffers), micro-batches of 4, 2 and 1 rows 1.97, 1.96 and 2.13, rotary angles
once for all layers 2.01, products by Eigen instead of YNNPACK (`--xla_cpu_experimental_ynn_fusion_type=`) 2.00.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import describe_machine, in_turns, load_torch

from router_r1_jax.distributed.mesh import make_mesh
from router_r1_jax.learner.logprobs import score_rows
from router_r1_jax.model import ModelConfig, Params, RouterLM, count_params, init_params

ROWS, LENGTH = 8, 512
LOGIT_CHUNK = 64  # as in config.py
HEADS = dict(head_dim=64, num_kv_heads=2, family="qwen3", remat="dots")
SIZES = {
    "L4 D256": dict(num_layers=4, width=256, mlp=1024, num_heads=4, vocab_size=4096, **HEADS),
    "L8 D512": dict(num_layers=8, width=512, mlp=2048, num_heads=8, vocab_size=32_768, **HEADS),
}
QWEN25_3B = dict(
    num_layers=36,
    width=2048,
    mlp=11_008,
    num_heads=16,
    num_kv_heads=2,
    head_dim=128,
    vocab_size=151_936,
    family="qwen2",
    rope_theta=1e6,
    dtype="bfloat16",
    remat="full",
)
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L4": 121e12}  # dense bfloat16 FLOP/s, as their maker states


def mean_loss(config: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """Cross-entropy in nats of tokens [B, T + 1], averaged over all but the first, T of which are read."""
    logps = score_rows(config, params, None, tokens, chunk=LOGIT_CHUNK, temperature=1.0).logps
    return -jnp.mean(logps[:, 1:])


def flops(config: ModelConfig, params: Params) -> float:
    """Of one forward pass: matrix products, and the half of the attention that is seen."""
    weights = count_params(params) - (0 if config.tie_embeddings else config.vocab_size * config.width)
    seen = config.num_layers * config.num_heads * config.head_dim * (LENGTH + 1) / 2
    return ROWS * LENGTH * (2 * weights + 4 * seen)


def our_calls(config: ModelConfig, params: Params, tokens: np.ndarray) -> dict[str, Callable[[], Any]]:
    forward = jax.jit(lambda params: mean_loss(config, params, tokens))
    backward = jax.jit(jax.value_and_grad(lambda params: mean_loss(config, params, tokens)))
    return {
        "forward": lambda: jax.block_until_ready(forward(params)),
        "backward": lambda: jax.block_until_ready(backward(params)),
    }


def torch_calls(model: Any, tokens: np.ndarray) -> dict[str, Callable[[], Any]]:
    import torch

    ids = torch.tensor(tokens, dtype=torch.long)

    def loss() -> torch.Tensor:
        logits = model(ids[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return loss()

    def backward() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        return value

    return {"forward": forward, "backward": backward}


def check_equal(config: ModelConfig, params: Params, model: Any, tokens: np.ndarray) -> float:
    """Largest difference of the logits of two rows, relative to the largest logit; stops if it is more than 1e-4."""
    import torch

    with torch.no_grad():
        theirs = model(torch.tensor(tokens[:2], dtype=torch.long)).logits.numpy()
    ours = np.asarray(jax.jit(RouterLM(config).apply)({"params": params}, tokens[:2]))
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if error > 1e-4:
        raise SystemExit(f"logits differ by {error:.1e} of the largest; the two do not compute the same")
    return error


def compare_on_cpu(name: str, repeats: int) -> dict[str, Any]:
    """Results of one size."""
    config = ModelConfig(**SIZES[name])
    params = init_params(config, make_mesh(1, 1, 1, jax.devices()[:1]), seed=0)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(ROWS, LENGTH + 1), dtype=np.int32)
    model = load_torch(config, params).train()
    result = {"logit_error": check_equal(config, params, model, tokens)}
    ours, theirs = our_calls(config, params, tokens), torch_calls(model, tokens)
    result["loss"], result["torch_loss"] = float(ours["forward"]()), float(theirs["forward"]())
    calls = {
        f"{system}_{name}": call for system, of in (("torch", theirs), ("ours", ours)) for name, call in of.items()
    }
    order = ["torch_forward", "ours_forward", "torch_backward", "ours_backward"]
    seconds = in_turns({name: calls[name] for name in order}, repeats)
    result |= {f"{name}_seconds": round(value, 4) for name, value in seconds.items()}
    for part in ("forward", "backward"):
        result[f"{part}_ratio"] = round(seconds[f"torch_{part}"] / seconds[f"ours_{part}"], 3)
    useful = flops(config, params)
    result["ours_gflops"] = {
        "forward": round(useful / seconds["ours_forward"] / 1e9, 1),
        "backward": round(3 * useful / seconds["ours_backward"] / 1e9, 1),
    }
    return result


def utilisation_on_gpu(repeats: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Share of the GPU's peak that the products of forward and backward reach, per attention implementation."""
    kind = jax.devices()[0].device_kind
    peak = next((value for name, value in PEAKS.items() if name in kind.replace("-", " ").split()), None)
    for attention in ("einsum", "xla", "cudnn"):
        config = ModelConfig(**QWEN25_3B, attention=attention)
        params = init_params(config, make_mesh(1, 1, 1, jax.devices()[:1]), seed=0)
        tokens = np.random.default_rng(0).integers(config.vocab_size, size=(ROWS, LENGTH + 1), dtype=np.int32)
        seconds = in_turns(our_calls(config, params, tokens), repeats)
        result = {f"{part}_seconds": round(value, 4) for part, value in seconds.items()}
        for part, passes in (("forward", 1), ("backward", 3)):
            rate = passes * flops(config, params) / seconds[part]
            result[f"{part}_tflops"] = round(rate / 1e12, 1)
            if peak:
                result[f"{part}_mfu"] = round(rate / peak, 3)
        yield f"Qwen2.5-3B {attention}", result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="run the larger size too")
    parser.add_argument("--repeats", type=int, default=7, help="measured runs of each call")
    args = parser.parse_args()
    machine = describe_machine()
    print(f"[{ROWS}, {LENGTH}] tokens on", machine, flush=True)
    if jax.default_backend() == "gpu":
        runs = utilisation_on_gpu(args.repeats)
        keys = ["forward_mfu", "backward_mfu"]
    else:
        runs = ((name, compare_on_cpu(name, args.repeats)) for name in list(SIZES)[: 1 + args.full])
        keys = ["forward_ratio", "backward_ratio"]
    sizes = {}
    for name, result in runs:
        sizes[name] = result
        print(name, result, flush=True)
    worst = {key: min(size[key] for size in sizes.values() if key in size) for key in keys if key in result}
    print(json.dumps(worst | {"sizes": sizes, "machine": machine}))


if __name__ == "__main__":
    main()
