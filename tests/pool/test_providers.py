import dataclasses

import pytest

from router_r1_jax.config import ConfigError, provider
from router_r1_jax.pool.cards import Card
from router_r1_jax.pool.providers import providers_from_config, tokens_at_most

KEY = "sk-marked-5ecre7"
CARD = Card("M", "M", "a", "some-model", 0.0, 1.0, None, {}, "", ())


def _providers(pool_config, *entries, **fields):
    config = pool_config(**fields)
    config.providers = entries
    return providers_from_config(config)


def test_a_request_has_the_form_that_openai_documents(pool_config):
    entry = provider(name="a", base_url="https://x.example/v1/", parameters={"top_p": 0.9})
    body = _providers(pool_config, entry, max_tokens=99)["a"].body(CARD, "Who?")
    assert body == {
        "model": "some-model",
        "messages": [{"role": "user", "content": "Who?"}],
        "max_tokens": 99,
        "temperature": 0.0,
        "top_p": 0.9,
    }


def test_a_providers_parameters_win_and_none_drops_one(pool_config):
    entry = provider(
        name="a",
        base_url="http://x/v1",
        parameters={"max_tokens": None, "max_completion_tokens": 7, "temperature": 0.5},
    )
    body = _providers(pool_config, entry)["a"].body(CARD, "Who?")
    assert {name: body[name] for name in body.keys() - {"model", "messages"}} == {
        "max_completion_tokens": 7,
        "temperature": 0.5,
    }


def test_a_models_own_instruction_and_parameters_win_over_the_providers(pool_config):
    entry = provider(name="a", base_url="http://x/v1", parameters={"top_p": 0.9, "temperature": 0.5})
    card = dataclasses.replace(CARD, system="Be brief.", parameters={"temperature": None, "top_p": 0.1, "seed": 3})
    assert _providers(pool_config, entry, max_tokens=99)["a"].body(card, "Who?") == {
        "model": "some-model",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}],
        "max_tokens": 99,
        "top_p": 0.1,
        "seed": 3,
    }


def test_every_query_travels_in_the_pools_prompt(pool_config):
    entry = provider(name="a", base_url="http://x/v1")
    made = _providers(pool_config, entry, prompt="Answer briefly.\n{query}\nThe end {}.")["a"]
    assert made.body(CARD, "Who {query}?")["messages"][0]["content"] == "Answer briefly.\nWho {query}?\nThe end {}."


@pytest.mark.parametrize("prompt", ["", "Answer.", "{query} and {query}"])
def test_a_prompt_without_a_place_for_the_query_is_refused(pool_config, prompt):
    with pytest.raises(ConfigError, match=r"pool\.prompt is .*; it must hold \{query\} once"):
        _providers(pool_config, provider(name="a", base_url="http://x/v1"), prompt=prompt)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, r"pool\.providers\[1\]\.name is ''"),
        ({"name": "first"}, r"pool\.providers\[1\]\.name is 'first'; every provider needs another name"),
        ({"base_url": ""}, r"pool\.providers\[1\]\.base_url is ''; write the address"),
        ({"base_url": "api.example.com/v1"}, r"pool\.providers\[1\]\.base_url is 'api"),
        ({"base_url": "http://x:99999/v1"}, r"pool\.providers\[1\]\.base_url"),
        ({"base_url": f"http://u:{KEY}@x/v1"}, r"pool\.providers\[1\]\.base_url holds a user"),
        ({"base_url": f"http://x/v1?key={KEY}"}, r"pool\.providers\[1\]\.base_url holds"),
        ({"headers": {"Authorization": KEY}}, r"pool\.providers\[1\]\.headers\.Authorization is set; a key comes from"),
        (
            {"headers": {"x-goog-api-key": KEY}},
            r"headers\.x-goog-api-key is set; .* in key_env, and the header in key_h",
        ),
        ({"headers": {"X-Auth-Token": KEY}}, r"pool\.providers\[1\]\.headers\.X-Auth-Token is set"),
        ({"headers": {"Ocp-Apim-Subscription-Key": KEY}}, r"headers\.Ocp-Apim-Subscription-Key is set"),
        ({"headers": {"Helicone-Auth": f"Bearer {KEY}"}}, r"headers\.Helicone-Auth is set"),
        ({"headers": {"Client-SECRET": KEY}}, r"headers\.Client-SECRET is set"),
        ({"headers": {"Cookie": KEY}}, r"headers\.Cookie is set"),
        ({"key_header": "x key"}, r"pool\.providers\[1\]\.key_header is 'x key'; name a header"),
        ({"key_header": ""}, r"pool\.providers\[1\]\.key_header is ''"),
        ({"headers": {"X-Team": f"a\n{KEY}"}}, r"pool\.providers\[1\]\.headers\.X-Team is not text"),
        ({"requests_per_minute": -1}, r"pool\.providers\[1\]\.requests_per_minute is -1; it must be at least 0"),
        ({"tokens_per_minute": -1}, r"pool\.providers\[1\]\.tokens_per_minute is -1"),
        ({"concurrency": -1}, r"pool\.providers\[1\]\.concurrency is -1"),
        ({"request_timeout": float("nan")}, r"pool\.providers\[1\]\.request_timeout is nan"),
        ({"parameters": {"stream": True}}, r"pool\.providers\[1\]\.parameters\.stream is set; leave it out"),
    ],
)
def test_a_provider_that_cannot_be_meant_is_refused_by_its_field(pool_config, fields, message):
    first = provider(name="first", base_url="http://x/v1")
    second = provider(**{"name": "second", "base_url": "http://x/v1", **fields})
    with pytest.raises(ConfigError, match=message) as caught:
        _providers(pool_config, first, second)
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_comes_from_the_environment(pool_config, monkeypatch):
    entry = provider(name="a", base_url="http://x/v1", key_env="SOME_KEY")
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")  # as `export SOME_KEY="$(cat file)"` may leave it
    made = _providers(pool_config, entry)["a"]
    assert made.key() == KEY
    assert KEY not in repr(made)


@pytest.mark.parametrize(
    ("value", "said"), [(None, "not set"), ("", "not set"), (f"{KEY}\nx", "no key"), ("ключ", "no key")]
)
def test_a_key_that_is_missing_or_broken_is_named_and_never_shown(pool_config, monkeypatch, value, said):
    entry = provider(name="a", base_url="http://x/v1", key_env="SOME_KEY")
    monkeypatch.delenv("SOME_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(
        ConfigError, match=rf"pool\.providers\[0\]\.key_env names SOME_KEY, .*{said}.*export it"
    ) as caught:
        _providers(pool_config, entry)["a"].key()
    assert not value or value not in str(caught.value)
    assert KEY not in str(caught.value)


def test_what_a_provider_does_not_say_is_the_pools(pool_config):
    own = provider(name="a", base_url="http://x/v1", concurrency=3, request_timeout=1.5, requests_per_minute=60)
    made = _providers(pool_config, own, provider(name="b", base_url="http://y/v1"), concurrency=9, request_timeout=7.0)
    assert (made["a"].concurrency, made["a"].request_timeout, made["a"].requests_per_minute) == (3, 1.5, 60)
    assert (made["b"].concurrency, made["b"].request_timeout, made["b"].requests_per_minute) == (9, 7.0, 0)


def test_a_request_is_known_to_use_no_more_than_its_query_and_what_it_may_write(pool_config):
    entries = (
        provider(name="a", base_url="http://x/v1"),
        provider(name="b", base_url="http://x/v1", parameters={"max_tokens": None, "max_completion_tokens": 7}),
    )
    made = _providers(pool_config, *entries, max_tokens=100)
    assert [tokens_at_most(made[name].body(CARD, "x" * 40)) for name in "ab"] == [111, 18]
