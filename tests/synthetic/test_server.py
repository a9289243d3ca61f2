"""The simulated models' server over HTTP: replies, refusals, injected faults, and its life beside its parent."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from contextlib import ExitStack

import pytest
import requests

from router_r1_jax.config import base_config, model_card, provider
from router_r1_jax.pool.cards import cards_from_config
from router_r1_jax.pool.client import Client
from router_r1_jax.pool.outcomes import Outcome, PoolError
from router_r1_jax.pool.pool import Pool
from router_r1_jax.pool.providers import providers_from_config
from router_r1_jax.synthetic.server import start_server
from router_r1_jax.synthetic.world import World, query_text

WORLD = dict(seed=3, films=8, songs=8, clubs=8, persons=10, cities=8, countries=5, rivers=5)


def _config():
    config = base_config().pool
    config.providers = (provider(name="simulated"),)
    config.models = (
        model_card(name="Reel", provider="simulated", model="reel", price_out=1.0, performance={"film": 1.0}),
        model_card(name="Aria", provider="simulated", model="aria", price_out=1.0, performance={"film": 0.0}),
        model_card(name="Flaky", provider="simulated", model="flaky", price_out=1.0, performance={"film": 0.5}),
    )
    config.models[2].simulated.failure_rate = 0.5
    config.update(dict(backoff=0.01, backoff_max=0.05, concurrency=16))
    return config


@pytest.fixture(scope="module")
def base_url():
    with start_server(WORLD, cards_from_config(_config())) as base_url:
        yield base_url


def _port(base_url):
    return urllib.parse.urlsplit(base_url).port


def _post(base_url, body):
    return requests.post(f"{base_url}/chat/completions", json=body, timeout=10)


def test_replies_are_the_worlds_and_tokens_are_counted(base_url):
    world = World(WORLD)
    fact = next(fact for fact in world.facts if fact.relation == "director")
    query = query_text(fact.relation, fact.subject)
    for model, skill in (("reel", {"film": 1.0}), ("aria", {"film": 0.0})):
        body = {"model": model, "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": query}]}
        answer = _post(base_url, body).json()
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": world.reply(query, skill)}
        assert answer["choices"][0]["finish_reason"] == "stop"
        # "director of X?" and "The director of X is Y."
        assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 7, "total_tokens": 11}
    assert world.reply(query, {"film": 1.0}) != world.reply(query, {"film": 0.0})
    truncated = _post(base_url, {**body, "max_tokens": 3}).json()["choices"][0]
    assert (truncated["message"]["content"], truncated["finish_reason"]) == ("The director of", "length")


@pytest.mark.parametrize("model", ["nobody", ["reel"]])
def test_an_unknown_model_is_refused(base_url, model):
    answer = _post(base_url, {"model": model, "messages": [{"role": "user", "content": "?"}]})
    assert answer.status_code == 404 and "there is no model" in answer.json()["error"]["message"]


def test_a_connection_serves_many_requests_and_closes_when_asked(base_url):
    body = json.dumps({"model": "reel", "messages": [{"role": "user", "content": "?"}]}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n" % len(body)
    post, last = head + b"\r\n" + body, head + b"Connection: close\r\n\r\n" + body
    assert _raw(base_url, post * 3).count(b"HTTP/1.1 200 OK") == 3
    assert _raw(base_url, last + post).count(b"HTTP/1.1 200 OK") == 1


def _raw(base_url, data):
    """Everything that the server says to these bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", _port(base_url)), timeout=10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        said = b""
        while chunk := connection.recv(65536):
            said += chunk
        return said


def _pool(base_url, tmp_path, **fields):
    config = _config()
    config.providers[0].base_url = base_url
    config.update(fields)
    cards = cards_from_config(config)
    return Pool(config, cards, ledger_path=tmp_path / "ledger.jsonl", cache_path=tmp_path / "call_cache"), cards


def test_a_model_that_fails_half_of_the_time_is_retried_to_an_answer(base_url, tmp_path):
    pool, cards = _pool(base_url, tmp_path)
    with pool:
        pool.check()
        futures = [
            pool.respond(f"Flaky: {i}?", cards=cards, episode=str(i), call=0, step=0, split="train") for i in range(60)
        ]
        replies = [future.result(timeout=60) for future in futures]
    assert {reply.outcome for reply in replies} == {Outcome.OK}
    assert sum(reply.attempts for reply in replies) > 80  # 120 on average


def test_calls_wait_for_a_server_that_went_away_and_came_back(tmp_path):
    """It is gone for 1.5 s, in the middle of a stream of calls; all of them end well."""
    cards = cards_from_config(_config())
    first = ExitStack()
    base_url = first.enter_context(start_server(WORLD, cards))
    pool, _ = _pool(base_url, tmp_path, deadline=60.0, backoff=0.05, backoff_max=0.5)
    futures = []
    stopped = threading.Event()

    def respond(i):
        futures.append(pool.respond(f"Reel: {i}?", cards=cards, episode=str(i), call=0, step=0, split="train"))

    def outage():
        first.close()
        stopped.set()
        time.sleep(1.5)

    with pool:
        for i in range(200):
            respond(i)
        away = threading.Thread(target=outage)
        away.start()
        stopped.wait(30)
        for i in range(200, 400):  # nobody listens now
            respond(i)
        away.join()
        with start_server(WORLD, cards, _port(base_url)) as second_url:
            assert second_url == base_url
            replies = [future.result(timeout=90) for future in futures]
    assert {reply.outcome for reply in replies} == {Outcome.OK}
    assert max(reply.attempts for reply in replies) > 1


_PARENT = """
import json, sys, time
from router_r1_jax.config import model_card
from router_r1_jax.pool.cards import Card
from router_r1_jax.synthetic.server import start_server
reel = Card("Reel", "Reel", "p", "reel", 1.0, 1.0, 0.0, {}, "", (), model_card().simulated.to_dict())
with start_server(json.loads(sys.argv[1]), [reel]) as base_url:
    print(base_url, flush=True)
    time.sleep(600)
"""


def test_the_server_ends_when_its_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, json.dumps(WORLD)], stdout=subprocess.PIPE, text=True)
    base_url = parent.stdout.readline().strip()
    assert _is_served(base_url)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    give_up = time.monotonic() + 60
    while _is_served(base_url):
        assert time.monotonic() < give_up, "the server is still there"
        time.sleep(0.02)


def _is_served(base_url):
    try:
        return _post(base_url, {"model": "reel", "messages": [{"content": "?"}]}).status_code == 200
    except requests.ConnectionError:
        return False


@pytest.mark.parametrize(
    ("films", "reason"), [(8, ".*Address already in use"), (1, r"synthetic\.world\.films is 1; at least 3")]
)
def test_a_server_that_cannot_start_says_why(base_url, films, reason):
    with (
        pytest.raises(PoolError, match=f"server did not start: {reason}"),
        start_server({**WORLD, "films": films}, cards_from_config(_config()), _port(base_url)),
    ):
        pass


def test_a_process_that_ends_without_a_word_is_reported(monkeypatch, tmp_path):
    executable = tmp_path / "python"
    executable.write_text("#!/bin/sh\nhead -c 1 >/dev/null\n")  # it has read something, so nothing is left to write
    executable.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(executable))
    with (
        pytest.raises(PoolError, match="server did not start: it ended without a word"),
        start_server(WORLD, cards_from_config(_config())),
    ):
        pass


def test_the_servers_process_loads_no_accelerator_library():
    code = "import sys, router_r1_jax.synthetic.server; print({'jax', 'tensorflow', 'requests'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def _faulty(faults, count, **fields):
    """Outcomes of calls, one after the other, to a model that the server serves with these faults."""
    config = _config()
    config.models[0].simulated.update(faults)
    cards = cards_from_config(config)
    with start_server(WORLD, cards) as faulty_url:
        config.providers[0].base_url = faulty_url
        config.update(fields)
        client = Client(config, providers_from_config(config))
        try:
            return [client.complete(cards[0], f"{i}?") for i in range(count)]
        finally:
            client.close()


@pytest.mark.parametrize(
    ("faults", "error"),
    [
        ({"malformed_rate": 1.0}, "not a chat completion"),
        ({"wrong_type_rate": 1.0}, "not a chat completion"),
        ({"dropped_rate": 1.0}, ""),
        ({"outage": (0, 3)}, "HTTP 503"),
    ],
)
def test_each_kind_of_fault_is_met_as_unavailable(faults, error):
    for got in _faulty(faults, 3, backoff=1000.0, backoff_max=1000.0):
        assert (got.outcome, got.attempts) == (Outcome.UNAVAILABLE, 1)
        assert error in got.error


def test_all_faults_at_once_are_retried_to_an_answer():
    rates = dict(failure_rate=0.1, malformed_rate=0.1, wrong_type_rate=0.1, dropped_rate=0.1, outage=(20, 30))
    got = _faulty(rates, 60)
    assert {each.outcome for each in got} == {Outcome.OK}
    assert sum(each.attempts for each in got) > 75


def test_a_rate_limited_model_says_when_to_come_again():
    first, second = _faulty({"requests_per_minute": 10}, 2, deadline=3.0)
    assert (first.outcome, second.outcome, second.attempts) == (Outcome.OK, Outcome.RATE_LIMITED, 1)
