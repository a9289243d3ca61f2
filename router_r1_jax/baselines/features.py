"""Question features for baselines: TF-IDF of the words, or the router's embedding of the text."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from router_r1_jax.model import ModelConfig, Params, RouterLM

Features = Callable[[Sequence[str]], np.ndarray]  # n texts -> float32 [n, F]

LENGTH_BUCKET = 32  # questions are padded to a multiple of this length, so that few shapes are compiled


class WordFeatures:
    """TF-IDF of a text's words; vocabulary and frequencies come from `texts`."""

    def __init__(self, texts: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._vectorizer = TfidfVectorizer(sublinear_tf=True, dtype=np.float32).fit(texts)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors [n, F]; a text without a known word is all zero."""
        return self._vectorizer.transform(texts).toarray()


class RouterFeatures:
    """Mean over a text's tokens of the router's last hidden states. It replaces the BERT encoders of other routers."""

    def __init__(self, config: ModelConfig, params: Params, tokenizer: PreTrainedTokenizerBase) -> None:
        """`params` are stacked, as in checkpoints."""
        self._params, self._tokenizer = params, tokenizer

        def embed(params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
            # Attention is causal, so the padding behind a text does not change its hidden states.
            hidden, _ = RouterLM(config).apply({"params": params}, tokens, method="hidden")
            total = jnp.sum(hidden.astype(jnp.float32) * mask[..., None], axis=1)
            return total / jnp.maximum(mask.sum(axis=1, keepdims=True), 1.0)

        self._embed: Any = jax.jit(embed)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings [n, D] float32."""
        ids = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        T = -(-max(map(len, ids)) // LENGTH_BUCKET) * LENGTH_BUCKET
        B = -(-len(ids) // LENGTH_BUCKET) * LENGTH_BUCKET if len(ids) > 1 else 1
        tokens, mask = np.zeros((B, T), np.int32), np.zeros((B, T), np.float32)
        for row, line in enumerate(ids):
            tokens[row, : len(line)], mask[row, : len(line)] = line, 1.0
        return np.asarray(self._embed(self._params, tokens, mask))[: len(ids)]
