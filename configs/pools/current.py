"""Well-known open models as two providers serve them today, with the prices that their own pages stated.

The prices are those of https://cloud.sambanova.ai/plans/pricing on 2026-10-07 and of https://deepinfra.com/pricing on
2026-11-05, as public transcriptions of those pages quote them. Prices change: compare them before you spend money, and
correct PRICE_DATE. The cards state no latency and no score, because none was measured.

    export SAMBANOVA_API_KEY=... DEEPINFRA_API_KEY=...
    python -m router_r1_jax.pool.check --config=YOUR_CONFIG.py
"""

from ml_collections import ConfigDict

from router_r1_jax.config import model_card, provider

PRICE_DATE = "2026-10-07"  # the older of the two


def _card(served_by: str, name: str, model: str, price_in: float, price_out: float, description: str) -> ConfigDict:
    return model_card(
        name=name,
        provider=served_by,
        model=model,
        price_in=price_in,
        price_out=price_out,
        description=description,
    )


def models() -> tuple[ConfigDict, ...]:
    s, d = "sambanova", "deepinfra"
    return (
        _card(s, "DeepSeek-V3.1", "DeepSeek-V3.1", 3.00, 4.50, "large mixture of experts, general and reasoning"),
        _card(s, "MiniMax-M3", "MiniMax-M3", 0.60, 2.40, "mixture of experts with a long context"),
        _card(s, "LLaMA-3.3-70B", "Meta-Llama-3.3-70B-Instruct", 0.60, 1.20, "70B parameters, general"),
        _card(s, "Gemma-4-31B", "gemma-4-31B-it", 0.38, 1.15, "31B parameters, general"),
        _card(s, "GPT-OSS-120B", "gpt-oss-120b", 0.22, 0.59, "open mixture of experts with reasoning"),
        _card(d, "LLaMA-4-Scout", "meta-llama/Llama-4-Scout-17B-16E-Instruct", 0.10, 0.30, "mixture of 16 experts"),
        _card(d, "LLaMA-3.1-8B", "meta-llama/Meta-Llama-3.1-8B-Instruct-Turbo", 0.02, 0.04, "8B parameters, general"),
    )


def providers() -> tuple[ConfigDict, ...]:
    return (
        provider(name="sambanova", base_url="https://api.sambanova.ai/v1", key_env="SAMBANOVA_API_KEY"),
        provider(name="deepinfra", base_url="https://api.deepinfra.com/v1/openai", key_env="DEEPINFRA_API_KEY"),
    )
