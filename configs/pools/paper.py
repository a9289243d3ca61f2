"""The paper's pool: the six models that its router was trained with and, with `unseen=True`, two unseen models.

Prices are the published dollars per million output tokens (arXiv 2506.09033); the paper's cost reward counts nothing
else. The paper states no prices of input tokens and no latencies. So `price_in` is 0, input tokens are charged with
nothing, and the cards show no latency. Enter your provider's prices and their date to see what you pay. Model ids are
Hugging Face names if there are any; replace them with your provider's names.
"""

from ml_collections import ConfigDict

from router_r1_jax.config import model_card, provider

PRICE_DATE = "2025-06-01"  # the month in which the paper appeared
# The published system wraps every sub-question in such an instruction. These words are ours, to the same effect.
PROMPT = """Several agents reason together about a larger question, and you are one of them. Here is your part of it:

{query}

Answer it and explain the answer in a few sentences. If you cannot answer it, give facts that help to find the answer. \
If you can do neither, say so, and advise to ask another model. Be clear, keep to the question, and write fewer than \
512 tokens."""


def _card(name: str, model: str, price_out: float, description: str) -> ConfigDict:
    return model_card(
        name=name, provider="openai-compatible", model=model, price_out=price_out, description=description
    )


def models(*, unseen: bool = False) -> tuple[ConfigDict, ...]:
    """`unseen` adds the two models that the published router was not trained with."""
    seen = (
        _card("Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct", 0.30, "7B parameters, many languages"),
        _card("LLaMA-3.1-70B-Instruct", "meta-llama/Llama-3.1-70B-Instruct", 0.88, "70B parameters, general"),
        _card("LLaMA-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", 0.18, "8B parameters, general"),
        _card("Mistral-7B-Instruct", "mistralai/Mistral-7B-Instruct-v0.3", 0.20, "7B parameters, general"),
        _card("Mixtral-8x22B-Instruct", "mistralai/Mixtral-8x22B-Instruct-v0.1", 1.20, "mixture of 8 22B experts"),
        _card("Gemma-2-27B-Instruct", "google/gemma-2-27b-it", 0.80, "27B parameters, general"),
    )
    new = (
        _card("Palmyra-Creative-122B", "writer/palmyra-creative-122b", 1.80, "122B parameters, for creative writing"),
        _card("LLaMA3-ChatQA-1.5-8B", "nvidia/Llama3-ChatQA-1.5-8B", 0.18, "8B parameters, tuned to answer questions"),
    )
    return seen + new if unseen else seen


def providers() -> tuple[ConfigDict, ...]:
    """One endpoint for all models, here on this machine. Enter yours, and in key_env the variable with its key."""
    return (provider(name="openai-compatible", base_url="http://127.0.0.1:8000/v1", key_env=""),)
