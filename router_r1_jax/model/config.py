"""Model configuration (ModelConfig), LoRA settings and RoPE scaling, for the families Qwen2, Qwen3 and Llama."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

Family = Literal["qwen2", "qwen3", "llama"]
AttentionName = Literal["einsum", "xla", "cudnn"]
Remat = Literal["none", "dots", "full"]

MATCH_FREQUENCY = 0.012  # radians per token; rotary pairs below it can match tokens far apart, for induction heads


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of the low RoPE frequencies (`rope_type` "llama3" in a Hugging Face config)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al. 2021, section 4.1): the kernel W of a target becomes W + alpha / rank * A B.

    The base is frozen, and A B starts at 0, so that the base stays the policy from which training started. `targets`
    are projections of every layer.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")

    @property
    def scale(self) -> float:
        """The factor of A B."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

    The families differ in two switches, `qkv_bias` and `qk_norm`.

    dtype: of parameters and activations ("float32", "bfloat16"). Norms, softmax and log-probs are computed in float32
      at least.
    attention: "einsum" uses the einsums of `attention.py`, "xla" and "cudnn" use `jax.nn.dot_product_attention`. The
      fused kernel of cuDNN needs a GPU and half precision.
    remat: what a block keeps for its backward pass. "none" keeps everything, "dots" the results of projections and
      attention, "full" only the block's input.
    lora: the parameters also hold these adapters, in float32 at least.
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
    max_positions: int = 32_768  # longest context of the model; written into exports, otherwise unused
    dtype: str = "float32"
    attention: AttentionName = "einsum"
    remat: Remat = "full"
    initializer_range: float = 0.02  # standard deviation of random kernels
    embedding_range: float = 0.02  # that of random embeddings and of an untied head
    induction_heads: int = 0  # random start: KV heads that begin as the `init_params` module describes
    lora: LoRA | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}; it must divide num_heads ({self.num_heads}) for grouped queries"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even number")
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
        if self.induction_heads and self.rope_theta ** (2 / self.head_dim - 1) >= MATCH_FREQUENCY:
            raise ValueError(
                f"induction_heads is {self.induction_heads} with rope_theta={self.rope_theta:g} and "
                f"head_dim={self.head_dim}; no rotary pair turns less than {MATCH_FREQUENCY} radians per token, so "
                "none finds a token far back: raise rope_theta"
            )

    @property
    def base(self) -> "ModelConfig":
        """This model without its adapters. It takes the same parameters and ignores the adapters."""
        return dataclasses.replace(self, lora=None)

    @property
    def adapter_dtype(self) -> jnp.dtype:
        """The dtype of LoRA's parameters: half precision would round their small updates away."""
        return jnp.promote_types(self.dtype, jnp.float32)

    @property
    def qkv_bias(self) -> bool:
        """Qwen2 and Qwen2.5 add a bias to the query, key and value projections."""
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises each query and key head before the rotary embedding."""
        return self.family == "qwen3"


def lora_from(block: Any) -> LoRA | None:
    """The LoRA of a `config.model.lora` block; None at rank 0."""
    return LoRA(block.rank, block.alpha, tuple(block.targets)) if block.rank else None


def from_arch(arch: Any, vocab_size: int, *, dtype: str) -> ModelConfig:
    """The ModelConfig of a `config.model.arch` block for a tokenizer of `vocab_size` ids.

    A block that names its vocabulary size (`preset_arch`) keeps it. Raises ValueError if the tokenizer has more ids.
    """
    fields = {"vocab_size": vocab_size} | dict(arch)
    if vocab_size > fields["vocab_size"]:
        raise ValueError(
            f"vocab_size is {fields['vocab_size']}, but the tokenizer needs {vocab_size}; take the model's "
            "own tokenizer, or raise it"
        )
    if fields.get("rope_scaling") is not None:
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    return ModelConfig(dtype=dtype, **fields)
