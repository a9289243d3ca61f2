"""The shape of a router model. One frozen dataclass covers the families; they differ by a few switches."""

import dataclasses
import math
from typing import Any, Literal, get_args

Family = Literal["qwen2", "qwen3", "llama"]
AttentionName = Literal["einsum", "xla", "cudnn"]
Remat = Literal["none", "dots", "full"]
Projected = Literal["q", "k", "v", "o", "gate", "up", "down"]


STILL_FREQUENCY = 0.012  # radians per token: rotary pairs below it match over distance, for induction heads


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the low RoPE frequencies (`rope_type` "llama3" in a Hugging Face config)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al. 2021, section 4.1): a target's kernel W acts as W + alpha / rank * A B.

    The base is frozen and A B is 0 at first, so that the base is the policy training started from. `targets` are
    projections, of every layer.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = get_args(Projected)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; it must be at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora.alpha is {self.alpha}; it must be greater than 0")
        if not self.targets or not set(self.targets) <= set(get_args(Projected)):
            raise ValueError(
                f"lora.targets is {self.targets!r}; choose one or more of {', '.join(get_args(Projected))}"
            )

    @property
    def scale(self) -> float:
        """What A B is multiplied with."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    `dtype` is that of parameters and activations ("float32", "bfloat16"); norms, softmax and log-probs are computed in
    float32 at least. `attention` says who computes it: "einsum" our own einsums, "xla" and "cudnn" the implementations
    of `jax.nn.dot_product_attention`; cudnn is fused, needs a GPU and a half-precision dtype. `remat` says what
    training keeps of a block for its backward pass: "none" recomputes nothing, "dots" keeps the results of the
    projections, "full" only the block's input. With `lora`, parameters also hold adapters, in float32 at least.
    """

    vocab_size: int
    num_layers: int
    width: int
    mlp: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    family: Family = "qwen3"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_eps: float = 1e-6
    tie_embeddings: bool = True
    max_positions: int = 32_768  # the longest context it was made for: goes into exports, nothing is cut at it here
    dtype: str = "float32"
    attention: AttentionName = "einsum"
    remat: Remat = "full"
    initializer_range: float = 0.02  # standard deviation of random kernels
    embedding_range: float = 0.02  # that of random embeddings and of an untied head
    induction_heads: int = 0  # random start: kv heads of the first layer that carry the token before to the second
    lora: LoRA | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}; it must divide num_heads ({self.num_heads}) for grouped queries"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even number")
        if self.attention not in get_args(AttentionName):
            raise ValueError(f"attention is {self.attention!r}; choose one of {', '.join(get_args(AttentionName))}")
        if self.attention == "cudnn" and self.dtype not in ("bfloat16", "float16"):
            raise ValueError(
                f"attention is 'cudnn' with dtype {self.dtype!r}; cuDNN has bfloat16 and float16 only: "
                "choose one of them, or attention 'einsum'"
            )
        if self.attention == "cudnn" and (self.head_dim % 8 or self.head_dim > 256):
            raise ValueError(
                f"attention is 'cudnn' with head_dim {self.head_dim}; cuDNN needs a multiple of 8 up to 128 "
                "(256 from Hopper GPUs on): choose attention 'einsum'"
            )
        if self.induction_heads and not self.qkv_bias:
            raise ValueError(
                f"induction_heads is {self.induction_heads} with family {self.family!r}; such heads start "
                "from biases, which only family 'qwen2' has: choose it, or 0"
            )
        if self.induction_heads > self.num_kv_heads:
            raise ValueError(f"induction_heads is {self.induction_heads}; there are {self.num_kv_heads} (num_kv_heads)")
        if self.induction_heads and self.num_layers < 2:
            raise ValueError(f"induction_heads is {self.induction_heads} with num_layers=1; they take two layers")
        if self.induction_heads and self.rope_theta ** (2 / self.head_dim - 1) >= STILL_FREQUENCY:
            raise ValueError(
                f"induction_heads is {self.induction_heads} with rope_theta={self.rope_theta:g} and "
                f"head_dim={self.head_dim}; no rotary pair turns less than {STILL_FREQUENCY} radians per token, so "
                "none finds a token far back: raise rope_theta"
            )
        if self.remat not in get_args(Remat):
            raise ValueError(f"remat is {self.remat!r}; choose one of {', '.join(get_args(Remat))}")

    @property
    def base(self) -> "ModelConfig":
        """This model without its adapters. It reads the same parameters and passes the adapters by."""
        return dataclasses.replace(self, lora=None)

    @property
    def qkv_bias(self) -> bool:
        """Qwen2 and Qwen2.5 add a bias to the query, key and value projections."""
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises each query and key head before the rotary positions."""
        return self.family == "qwen3"


def lora_from(block: Any) -> LoRA | None:
    """The LoRA of a `config.model.lora` block; None at rank 0. Raises ValueError as LoRA does."""
    return LoRA(block.rank, block.alpha, tuple(block.targets)) if block.rank else None


def from_arch(arch: Any, vocab_size: int, *, dtype: str, remat: Remat) -> ModelConfig:
    """The ModelConfig of a `config.model.arch` block for a tokenizer of `vocab_size` ids.

    A block that names a vocabulary itself (`preset_arch`) keeps it. Raises ValueError where the tokenizer has more ids.
    """
    fields = {"vocab_size": vocab_size} | dict(arch)
    if vocab_size > fields["vocab_size"]:
        raise ValueError(
            f"vocab_size is {fields['vocab_size']}, but the tokenizer needs {vocab_size}; take the model's "
            "own tokenizer, or raise it"
        )
    if fields.get("rope_scaling") is not None:
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    return ModelConfig(dtype=dtype, remat=remat, **fields)
