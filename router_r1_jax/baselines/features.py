"""What baselines see of a question: its words, or the router's own embedding. Nothing of the world behind it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from router_r1_jax.model import ModelConfig, Params, RouterLM
from router_r1_jax.report.writer import MissingExtraError

Features = Callable[[Sequence[str]], np.ndarray]  # n texts -> float32 [n, F]

LENGTH_BUCKET = 32  # questions are padded to a multiple of it: few compilations


def scikit_learn() -> None:
    """Raise MissingExtraError where scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "baselines need scikit-learn, which is not installed; pip install 'router_r1_jax[baselines]'"
        ) from error


class WordFeatures:
    """TF-IDF of a question's words, over the words of the texts that it is fitted on."""

    def __init__(self) -> None:
        scikit_learn()
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._vectorizer = TfidfVectorizer(sublinear_tf=True, dtype=np.float32)

    def fit(self, texts: Sequence[str]) -> "WordFeatures":
        """Take vocabulary and frequencies from `texts`; returns itself."""
        self._vectorizer.fit(texts)
        return self

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors [n, F]; a text without a known word is all zero."""
        return self._vectorizer.transform(texts).toarray()


class RouterFeatures:
    """Mean over a text's tokens of the router's last hidden states: what a BERT-style encoder is elsewhere."""

    def __init__(self, config: ModelConfig, params: Params, tokenizer: PreTrainedTokenizerBase) -> None:
        """`params` are stacked, as checkpoints hold them."""
        self._params, self._tokenizer = params, tokenizer

        def embed(params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
            hidden, _ = RouterLM(config).apply({"params": params}, tokens, method="hidden")  # causal: padding is behind
            total = jnp.sum(hidden.astype(jnp.float32) * mask[..., None], axis=1)
            return total / jnp.maximum(mask.sum(axis=1, keepdims=True), 1.0)

        self._embed: Any = jax.jit(embed)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """[n, D] float32."""
        ids = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        T = -(-max(map(len, ids)) // LENGTH_BUCKET) * LENGTH_BUCKET
        B = -(-len(ids) // LENGTH_BUCKET) * LENGTH_BUCKET if len(ids) > 1 else 1
        tokens, mask = np.zeros((B, T), np.int32), np.zeros((B, T), np.float32)
        for row, line in enumerate(ids):
            tokens[row, : len(line)], mask[row, : len(line)] = line, 1.0
        return np.asarray(self._embed(self._params, tokens, mask))[: len(ids)]
