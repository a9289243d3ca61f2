"""Rotary position embedding (RoPE), with Llama 3's scaling of low frequencies."""

import jax
import jax.numpy as jnp
import numpy as np

from router_r1_jax.model.config import ModelConfig


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Angular frequencies [H/2] in radians per token, float32; dimension i is rotated with dimension i + H/2.

    The steps round as PyTorch's do: the last bit of a frequency changes an angle at position 10,000 by 1e-3.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    freqs = 1 / (config.rope_theta ** exponents.astype(np.float64)).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return freqs
    wavelength = np.float32(2 * np.pi) / freqs
    # 1 keeps a frequency (short waves), 0 divides it by the factor (long waves); in between the weight is linear.
    keep = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    keep = np.clip(keep, 0.0, 1.0)
    return (1 - keep) * freqs / scaling.factor + keep * freqs


def apply_rope(x: jax.Array, positions: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotate x [B, T, heads, H] to absolute positions [B, T]; halves are paired as Hugging Face pairs them."""
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(config)  # [B, T, 1, H/2]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
