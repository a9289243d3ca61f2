import email.utils
import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_provider import completion

from router_r1_jax.config import provider
from router_r1_jax.pool import client as client_module
from router_r1_jax.pool import http as http_module
from router_r1_jax.pool.cards import cards_from_config
from router_r1_jax.pool.client import Client
from router_r1_jax.pool.outcomes import Outcome, PoolError
from router_r1_jax.pool.providers import providers_from_config

KEY = "sk-marked-5ecre7-key"
ONCE = dict(backoff=1000.0, backoff_max=1000.0)  # the first pause would end behind any deadline


def _client(config):
    return Client(config, providers_from_config(config)), cards_from_config(config)[0]


@pytest.fixture
def ask(serve, pool_config):
    """ask(script, **fields) -> (Completion, Scripted): one call to a provider that behaves as scripted."""

    def ask(script, **fields):
        scripted = serve(script)
        client, card = _client(pool_config(scripted.base_url, **fields))
        try:
            return client.complete(card, "Who?"), scripted
        finally:
            client.close()

    return ask


class FakeTime:
    """A clock that only sleeping moves; stands in for the client's `time` and for its closing event."""

    start = 1000.0

    def __init__(self):
        self.now = self.start
        self.pauses = []

    def monotonic(self):
        return self.now

    def time(self):
        return self.now

    def wait(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds
        return False

    def set(self):
        pass


def _ask_in_fake_time(monkeypatch, serve, config_of, script, **fields):
    clock = FakeTime()
    scripted = serve(script)
    client, card = _client(config_of(scripted.base_url, **fields))
    for module in (client_module, http_module):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(client, "_closed", clock)
    return client.complete(card, "Who?"), clock.pauses


@pytest.mark.parametrize("limit", [{"requests_per_minute": 10}, {"tokens_per_minute": 5130}])
def test_a_providers_limits_space_its_requests(monkeypatch, serve, pool_config, limit):
    """Ten requests of at most 513 tokens (a short query, and 512 to write) a minute, of which one may go at once."""
    clock = FakeTime()
    scripted = serve(lambda n, b: completion("ok", prompt_tokens=1, completion_tokens=512))
    config = pool_config(scripted.base_url, deadline=1000.0)
    config.providers = (provider(name="p", base_url=scripted.base_url, **limit),)
    client, card = _client(config)
    for module in (client_module, http_module):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(client, "_closed", clock)
    sent = []
    for _ in range(30):
        assert client.complete(card, "?").outcome == Outcome.OK
        sent.append(clock.now)
    assert sent[0] == 1000.0
    assert all(later - earlier >= 60 for earlier, later in zip(sent, sent[10:], strict=False))
    assert sent[-1] <= 1000 + 29 * 60 / 9 + 1e-6  # the limit costs no more than the tenth that a rest may save up


def test_tokens_that_were_not_used_are_given_back(monkeypatch, serve, pool_config):
    scripted = serve(lambda n, b: completion("ok", prompt_tokens=1, completion_tokens=9))
    config = pool_config(scripted.base_url, deadline=1000.0)
    config.providers = (provider(name="p", base_url=scripted.base_url, tokens_per_minute=10_000),)
    client, card = _client(config)
    clock = FakeTime()
    for module in (client_module, http_module):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(client, "_closed", clock)
    for _ in range(40):  # 400 tokens, where 20,520 might have been written and 1,000 may go at once
        client.complete(card, "?")
    assert clock.pauses == []


def test_a_limit_that_the_deadline_does_not_wait_for_ends_the_call_unsent(serve, pool_config):
    scripted = serve(lambda n, b: completion("ok"))
    config = pool_config(scripted.base_url)
    config.providers = (provider(name="p", base_url=scripted.base_url, requests_per_minute=1),)
    client, card = _client(config)
    first, second = client.complete(card, "1?"), client.complete(card, "2?")
    assert (first.outcome, second.outcome, second.attempts) == (Outcome.OK, Outcome.RATE_LIMITED, 0)
    assert second.error == "not sent: pool.providers[0] lets no request through before the deadline"
    assert scripted.queries == ["1?"]


def test_a_providers_own_timeout_wins(serve, pool_config):
    released = threading.Event()
    scripted = serve(lambda n, b: lambda connection: released.wait(60))
    config = pool_config(scripted.base_url, request_timeout=90.0, deadline=100.0, **ONCE)
    config.providers = (provider(name="p", base_url=scripted.base_url, request_timeout=0.2),)
    client, card = _client(config)
    try:
        assert client.complete(card, "?").outcome == Outcome.TIMEOUT
    finally:
        released.set()


def test_a_completion_is_read_and_asked_for_as_documented(ask):
    got, scripted = ask(lambda number, body: completion("Kessan.", prompt_tokens=11, completion_tokens=2))
    assert (got.text, got.outcome, got.prompt_tokens, got.completion_tokens) == ("Kessan.", Outcome.OK, 11, 2)
    assert (got.attempts, got.error) == (1, "")
    assert [body["messages"] for _, body in scripted.requests] == [[{"role": "user", "content": "Who?"}]]
    assert scripted.requests[0][1]["model"] == "titan-70b"


@pytest.mark.parametrize(
    ("answer", "outcome", "text"),
    [
        (completion("half a sen", finish="length"), Outcome.TRUNCATED, "half a sen"),
        (completion(" \n"), Outcome.EMPTY, " \n"),
        (completion(None), Outcome.EMPTY, ""),
        (completion("", finish="length"), Outcome.EMPTY, ""),
    ],
)
def test_what_the_model_itself_falls_short_of_is_charged(ask, answer, outcome, text):
    got, _ = ask(lambda number, body: answer)
    assert (got.outcome, got.text, got.completion_tokens) == (outcome, text, 5)


def test_a_server_that_counts_no_tokens_is_not_free(ask):
    body = json.dumps({"choices": [{"message": {"content": "four and four and"}}]}).encode()
    got, _ = ask(lambda number, body_: (200, {}, body))
    assert got.completion_tokens == 5  # 17 characters
    assert got.prompt_tokens > 0


@pytest.mark.parametrize("kind", ["text/html", "text/plain; charset=latin-1", "application/json; charset=utf-16"])
def test_a_body_is_read_for_what_it_is_whatever_its_header_says(ask, kind):
    status, _, body = completion("Kessán.")
    got, _ = ask(lambda n, b: (status, {"Content-Type": kind}, body))
    assert (got.outcome, got.text) == (Outcome.OK, "Kessán.")


def test_bytes_that_are_no_utf8_are_replaced_and_the_answer_taken(ask):
    """Half a character, as a model leaves one where it is cut: no reason to ask, and to pay, again."""
    status, headers, body = completion("from A to B")
    got, scripted = ask(
        lambda n, b: (status, headers, b"\xef\xbb\xbf" + body.replace(b"to", b"\xe2\x82\xff\xed\xa0\x80"))
    )
    assert (got.outcome, got.text, len(scripted.requests)) == (Outcome.OK, "from A \ufffd\ufffd\ufffd\ufffd\ufffd B", 1)


def test_control_characters_that_json_escapes_arrive(ask):
    got, _ = ask(lambda n, b: completion("a\x00\x1b[0m\u2028\ud800b"))
    assert (got.outcome, got.text) == (Outcome.OK, "a\x00\x1b[0m\u2028\ud800b")


def _drop(connection):
    connection.close()


@pytest.mark.parametrize(
    "fault",
    [
        (408, {}, b""),
        (409, {}, b""),
        (429, {}, b""),
        (500, {}, b"x"),
        (503, {}, b"{}"),
        (200, {}, b"<html>"),
        (200, {}, b'{"choices": []}'),
        _drop,
    ],
)
def test_a_fault_that_may_pass_is_tried_again(ask, fault):
    got, scripted = ask(lambda number, body: fault if number < 2 else completion("late"))
    assert (got.outcome, got.text, got.attempts) == (Outcome.OK, "late", 3)
    assert len(scripted.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_is_final_and_says_why(ask, status):
    message = json.dumps({"error": {"message": "no\nsuch model"}}).encode()
    got, scripted = ask(lambda number, body: (status, {}, message))
    assert (got.outcome, got.text, got.attempts) == (Outcome.BAD_REQUEST, "", 1)
    assert got.error == f"HTTP {status}: no such model"
    assert len(scripted.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirection_is_not_followed_with_our_key(ask, status):
    got, scripted = ask(lambda number, body: (status, {"Location": "/v1/chat/completions"}, b""))
    assert (got.outcome, len(scripted.requests)) == (Outcome.BAD_REQUEST, 1)
    assert got.error == f"HTTP {status}: it redirects to /v1/chat/completions"


@pytest.mark.parametrize(
    ("status", "outcome"), [(503, Outcome.UNAVAILABLE), (429, Outcome.RATE_LIMITED), (408, Outcome.TIMEOUT)]
)
def test_pauses_double_up_to_their_limit_until_the_deadline(monkeypatch, serve, pool_config, status, outcome):
    got, pauses = _ask_in_fake_time(
        monkeypatch, serve, pool_config, lambda n, b: (status, {}, b""), deadline=60.0, backoff=0.2, backoff_max=5.0
    )
    assert (got.outcome, got.attempts, got.completion_tokens) == (outcome, len(pauses) + 1, 0)
    for i, pause in enumerate(pauses):
        longest = min(0.2 * 2**i, 5.0)
        assert longest / 2 <= pause <= longest
    assert 60 - 5 <= sum(pauses) < 60  # it gives up where the next pause would end too late
    assert len(set(pauses)) == len(pauses)  # jitter


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_honoured(monkeypatch, serve, pool_config, date):
    value = email.utils.formatdate(1007.0, usegmt=True) if date else "7"
    script = lambda n, b: completion("ok") if n else (429, {"Retry-After": value}, b"")  # noqa: E731
    got, pauses = _ask_in_fake_time(monkeypatch, serve, pool_config, script, deadline=60.0)
    assert (got.outcome, pauses) == (Outcome.OK, [7.0])


@pytest.mark.parametrize(
    ("headers", "pause"),
    [
        ({"Retry-After": "7s"}, 7.0),
        ({"Retry-After": "7.5 seconds"}, 7.5),
        ({"Retry-After": "7500ms"}, 7.5),
        ({"Retry-After": "0.1 minutes"}, 6.0),
        ({"Retry-After": "1700000007"}, 7.0),  # seconds since 1970
        ({"Retry-After": "1700000007000"}, 7.0),
        ({"retry-after-ms": "7000"}, 7.0),
        ({"retry-after-ms": "7000", "Retry-After": "8"}, 7.0),
        ({"Retry-After": "1600000000"}, None),  # long past
        ({"Retry-After": "inf"}, None),
        ({"Retry-After": "1e400"}, None),
    ],
)
def test_retry_after_is_read_in_all_its_forms(monkeypatch, serve, pool_config, headers, pause):
    monkeypatch.setattr(FakeTime, "start", 1.7e9)
    script = lambda n, b: completion("ok") if n else (429, headers, b"")  # noqa: E731
    got, pauses = _ask_in_fake_time(monkeypatch, serve, pool_config, script, deadline=60.0)
    assert got.outcome == Outcome.OK
    assert pauses == [pytest.approx(pause)] if pause else pauses[0] <= 0.05  # backoff_max


def test_a_stream_is_not_asked_for(ask):
    _, scripted = ask(lambda n, b: completion("ok"))
    assert scripted.requests[0][1]["stream"] is False


def test_a_retry_after_beyond_the_deadline_ends_the_call_at_once(monkeypatch, serve, pool_config):
    got, pauses = _ask_in_fake_time(
        monkeypatch, serve, pool_config, lambda n, b: (429, {"Retry-After": "61"}, b""), deadline=60.0
    )
    assert (got.outcome, got.attempts, pauses) == (Outcome.RATE_LIMITED, 1, [])


@pytest.mark.parametrize("value", ["soon", "-5", "nan", "Mon, 99 Zzz", ""])
def test_an_unreadable_retry_after_is_ignored(ask, value):
    got, _ = ask(lambda n, b: completion("ok") if n else (503, {"Retry-After": value}, b""))
    assert (got.outcome, got.attempts) == (Outcome.OK, 2)


@pytest.mark.parametrize("always", [True, False])
def test_a_silent_provider_times_out_and_is_tried_again(ask, always):
    released = threading.Event()
    silence = lambda connection: released.wait(60)  # noqa: E731
    try:
        got, _ = ask(
            lambda n, b: silence if always or not n else completion("late"),
            deadline=0.7 if always else 30.0,
            request_timeout=0.3,
        )
    finally:
        released.set()
    if always:
        assert (got.outcome, got.error) == (Outcome.TIMEOUT, "no answer in time")
    else:
        assert (got.outcome, got.text) == (Outcome.OK, "late")
        assert got.attempts > 1


def test_a_provider_that_drips_times_out_too(ask):
    """The whole answer would be there after 4 s, and no gap in it is as long as the timeout."""
    _, _, body = completion("slow")
    body = body.ljust(400)

    def drip(connection):
        connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        try:
            for i in range(0, len(body), 2):
                connection.sendall(body[i : i + 2])
                time.sleep(0.02)
        except OSError:
            pass  # the client has had enough

    got, _ = ask(lambda n, b: drip, deadline=0.5, request_timeout=0.4)
    assert got.outcome == Outcome.TIMEOUT


def test_an_endless_answer_is_cut_off(ask, monkeypatch):
    monkeypatch.setattr(http_module, "_MAX_BODY", 1000)
    got, _ = ask(lambda n, b: completion("x" * 1001), **ONCE)
    assert (got.outcome, got.error) == (Outcome.UNAVAILABLE, "an answer of more than 1000 bytes")


def test_an_address_where_nobody_listens_is_unavailable(pool_config):
    client, card = _client(pool_config("http://127.0.0.1:9/v1", **ONCE))
    got = client.complete(card, "Who?")
    assert (got.outcome, got.error) == (Outcome.UNAVAILABLE, "connection refused")


def test_connections_are_kept_alive(serve, pool_config):
    scripted = serve(lambda n, b: completion("ok") if n % 3 else (503, {}, b"busy"))
    client, card = _client(pool_config(scripted.base_url))
    outcomes = [client.complete(card, str(i)).outcome for i in range(30)]
    assert set(outcomes) == {Outcome.OK}
    assert len(scripted.requests) > 30  # retries among them
    assert scripted.connections == 1


def test_threads_share_no_more_connections_than_they_are(serve, pool_config):
    scripted = serve(lambda n, b: completion(b["messages"][0]["content"]))
    client, card = _client(pool_config(scripted.base_url, concurrency=8))
    with ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(lambda i: client.complete(card, f"q{i}").text, range(200)))
    assert texts == [f"q{i}" for i in range(200)]
    assert scripted.connections <= 8


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def almost_completions(draw):
    """Bodies that are nearly a chat completion: any part may be missing or of another kind."""
    message = {"role": "assistant", "content": draw(json_values)}
    choice = {
        "message": draw(st.just(message) | json_values),
        "finish_reason": draw(st.sampled_from(["stop", "length"])),
    }
    usage = {"prompt_tokens": draw(json_values), "completion_tokens": draw(json_values)}
    body = {"choices": draw(st.just([choice]) | json_values), "usage": draw(st.just(usage) | json_values)}
    return json.dumps(draw(st.just(body) | json_values)).encode()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=almost_completions() | st.binary(max_size=40) | st.just(b"[" * 100_000))
def test_no_body_makes_it_raise(serve_once, body):
    scripted, client, card = serve_once
    scripted.script = lambda n, b: (200, {}, body)
    got = client.complete(card, "Who?")
    assert got.outcome in (Outcome.OK, Outcome.TRUNCATED, Outcome.EMPTY, Outcome.UNAVAILABLE)
    assert isinstance(got.text, str)
    assert type(got.completion_tokens) is int
    assert min(got.completion_tokens, got.prompt_tokens) >= 0
    assert (got.outcome == Outcome.UNAVAILABLE) == bool(got.error)


@pytest.fixture
def serve_once(serve, pool_config):
    scripted = serve(None)
    client, card = _client(pool_config(scripted.base_url, **ONCE))
    return scripted, client, card


def _in_fake_time(monkeypatch, client, clock):
    for module in (client_module, http_module):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(client, "_closed", clock)


def test_an_open_circuit_sends_nothing_but_probes_at_growing_intervals(monkeypatch, serve, pool_config):
    clock, sent = FakeTime(), []
    up_at = 1200.0
    script = lambda n, b: sent.append(clock.now) or (completion("up") if clock.now >= up_at else (503, {}, b""))  # noqa: E731
    config = pool_config(serve(script).base_url, deadline=5.0, failures_to_open=3)
    config.circuit_breaker.update(dict(pause=10.0, pause_max=40.0))
    client, card = _client(config)
    _in_fake_time(monkeypatch, client, clock)
    outcomes = []
    while clock.now < 1300:
        got = client.complete(card, "Who?")
        outcomes.append(got.outcome)
        assert got.attempts or got.error.startswith(
            "not sent: the model failed too often (pool.circuit_breaker): HTTP 503"
        )
        clock.now += 1.0
    down = [at for at in sent if at < up_at]
    assert down[2] - down[0] < 1  # three in a row, and then
    gaps = [later - earlier for earlier, later in zip(down[2:], down[3:], strict=False)]
    for gap, pause in zip(gaps, [10, 20, 40, 40, 40], strict=False):
        assert pause - 1e-6 < gap < pause + 2
    first_up = outcomes.index(Outcome.OK)
    assert len(gaps) >= 4 and set(outcomes[:first_up]) == {Outcome.UNAVAILABLE}
    assert set(outcomes[first_up:]) == {Outcome.OK}


def test_a_circuit_breaker_waits_within_the_deadline_and_belongs_to_one_model(monkeypatch, serve, pool_config):
    """One model fails twice and recovers: a call waits for the open circuit; the other model never waits."""
    clock = FakeTime()
    script = lambda n, b: (503, {}, b"") if b["model"] == "titan-70b" and n < 2 else completion("ok")  # noqa: E731
    config = pool_config(serve(script).base_url, deadline=60.0, failures_to_open=2)
    config.circuit_breaker.update(dict(pause=10.0, pause_max=40.0))
    client, titan = _client(config)
    pico = cards_from_config(config)[1]
    _in_fake_time(monkeypatch, client, clock)
    got = client.complete(titan, "Who?")
    assert (got.outcome, got.attempts) == (Outcome.OK, 3)
    assert 1010 <= clock.now < 1011
    clock.pauses.clear()
    assert client.complete(pico, "Who?").outcome == Outcome.OK
    assert clock.pauses == []


@pytest.mark.parametrize(
    "answer",
    [
        (200, {}, b'{"choices": [{"message": {"content": null, "refusal": "I cannot help."}}]}'),
        (200, {}, b'{"choices": [{"message": {"content": "Well"}, "finish_reason": "content_filter"}]}'),
        (400, {}, b'{"error": {"code": "content_filter", "message": "filtered"}}'),
    ],
)
def test_a_refusal_to_answer_is_its_own_outcome_and_final(ask, answer):
    got, scripted = ask(lambda n, b: answer)
    assert (got.outcome, got.attempts) == (Outcome.REFUSED, 1)


def test_tokens_of_unusable_answers_are_not_free(ask):
    """Two answers without a text and with usage, then a good one: what was used beyond the answer is told."""
    useless = json.dumps({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 11}}).encode()
    got, _ = ask(lambda n, b: (200, {}, useless) if n < 2 else completion("ok"))
    assert (got.outcome, got.prompt_tokens, got.completion_tokens) == (Outcome.OK, 3, 5)
    assert (got.wasted_prompt_tokens, got.wasted_completion_tokens) == (14, 22)
    failed, _ = ask(lambda n, b: (200, {}, useless), **ONCE)
    assert (failed.outcome, failed.prompt_tokens, failed.completion_tokens) == (Outcome.UNAVAILABLE, 0, 0)
    assert (failed.wasted_prompt_tokens, failed.wasted_completion_tokens) == (7, 11)


@pytest.mark.parametrize("tokens", [10**9 + 1, 2**63, 10**400, -1])
@pytest.mark.parametrize("field", ["prompt_tokens", "completion_tokens"])
def test_a_count_that_nobody_can_have_used_is_estimated(ask, tokens, field):
    """No database column, no price and no budget has room for it; and the answer is there, so nobody pays again."""
    usage = {"prompt_tokens": 3, "completion_tokens": 5, field: tokens}
    body = {"choices": [{"message": {"content": "ok"}}], "usage": usage}
    got, scripted = ask(lambda n, b: (200, {}, json.dumps(body).encode()))
    assert (got.outcome, got.estimated, len(scripted.requests)) == (Outcome.OK, True, 1)
    assert 0 < getattr(got, field) < 100


def test_no_more_tokens_are_cached_than_were_asked(ask):
    """They would be subtracted from what is spent, and a budget would never be reached."""
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 10**6}}
    body = {"choices": [{"message": {"content": "ok"}}], "usage": usage}
    got, _ = ask(lambda n, b: (200, {}, json.dumps(body).encode()))
    assert (got.cached_tokens, got.prompt_tokens) == (9, 9)


def test_cached_tokens_and_the_served_model_are_told(ask):
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 8}}
    body = {"model": "titan-70b-0925", "choices": [{"message": {"content": "ok"}}], "usage": usage}
    got, _ = ask(lambda n, b: (200, {}, json.dumps(body).encode()))
    assert (got.cached_tokens, got.served) == (8, "titan-70b-0925")


def _with_key(config, monkeypatch):
    monkeypatch.setenv("MARKED_KEY", KEY)
    config.providers = (provider(name="p", base_url=config.providers[0].base_url, key_env="MARKED_KEY"),)
    return config


@pytest.mark.parametrize("status", [200, 401, 500])
def test_a_key_is_sent_and_shows_up_nowhere_else(serve, pool_config, monkeypatch, caplog, capfd, status):
    """The provider is as indiscreet as can be: it echoes the key in reply, error and header."""
    message = {"error": {"message": f"bad key {KEY}"}, "choices": [{"message": {"content": f"you sent {KEY}"}}]}
    scripted = serve(lambda n, b: (status, {"X-Echo": KEY}, json.dumps(message).encode()))
    client, card = _client(_with_key(pool_config(scripted.base_url, **ONCE), monkeypatch))
    with caplog.at_level(logging.DEBUG):
        got = client.complete(card, "Who?")
        with pytest.raises(PoolError) if status == 401 else _nothing() as caught:
            client.check()
    assert scripted.requests[0][0]["Authorization"] == f"Bearer {KEY}"
    shown = [repr(got), repr(client), caplog.text, *capfd.readouterr(), str(caught and caught.value)]
    assert KEY not in "".join(shown)
    assert "[key]" in got.text + got.error


def test_a_key_can_go_into_a_header_of_another_name(serve, pool_config, monkeypatch):
    scripted = serve(lambda n, b: completion("ok"))
    config = _with_key(pool_config(scripted.base_url), monkeypatch)
    config.providers[0].key_header = "x-goog-api-key"
    client, card = _client(config)
    client.complete(card, "Who?")
    headers = scripted.requests[0][0]
    assert headers["x-goog-api-key"] == KEY and "Authorization" not in headers


def test_no_part_of_a_key_is_left_where_a_long_error_is_cut(serve, pool_config, monkeypatch):
    lengths = (100, 180, 190, 199, 280, 290)  # of what stands before the key

    def script(number, body):
        return 400, {}, json.dumps({"error": {"message": "x" * lengths[number] + KEY}}).encode()

    client, card = _client(_with_key(pool_config(serve(script).base_url), monkeypatch))
    for _ in lengths:
        error = client.complete(card, "Who?").error
        assert len(error) <= 300 and KEY[:3] not in error


class _nothing:  # noqa: N801
    def __enter__(self):
        return None

    def __exit__(self, *exception):
        pass


def test_a_netrc_file_does_not_replace_the_key(serve, pool_config, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    scripted = serve(lambda n, b: completion("ok"))
    client, card = _client(_with_key(pool_config(scripted.base_url), monkeypatch))
    client.complete(card, "Who?")
    assert scripted.requests[0][0]["Authorization"] == f"Bearer {KEY}"


def test_a_placeholder_key_is_not_redacted_in_replies(serve, pool_config, monkeypatch):
    config = _with_key(pool_config(serve(lambda n, b: completion("EMPTY is a word")).base_url), monkeypatch)
    monkeypatch.setenv("MARKED_KEY", "EMPTY")
    client, card = _client(config)
    assert client.complete(card, "Who?").text == "EMPTY is a word"


def test_check_names_the_provider_that_does_not_answer(pool_config):
    client, _ = _client(pool_config("http://127.0.0.1:9/v1"))
    said = (
        r"pool provider 'p' at http://127\.0\.0\.1:9/v1 does not answer \(connection refused\); "
        r"start it or correct pool\.providers\[0\]\.base_url$"
    )
    with pytest.raises(PoolError, match=said):
        client.check()


@pytest.mark.parametrize(("status", "fine"), [(200, True), (404, True), (503, True), (401, False), (403, False)])
def test_check_takes_any_answer_but_a_refusal_of_the_key(serve, pool_config, monkeypatch, status, fine):
    scripted = serve(lambda n, b: (status, {}, b""))
    client, _ = _client(_with_key(pool_config(scripted.base_url), monkeypatch))
    if fine:
        client.check()
    else:
        with pytest.raises(PoolError, match=rf"refuses the key \(HTTP {status}\); correct the key in MARKED_KEY"):
            client.check()


def test_closing_ends_a_call_between_two_attempts(serve, pool_config):
    scripted = serve(lambda n, b: (503, {}, b""))
    client, card = _client(pool_config(scripted.base_url, deadline=300.0, backoff=200.0, backoff_max=200.0))
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(client.complete, card, "Who?")
        while not scripted.requests:
            time.sleep(0.005)
        client.close()
        assert running.result(timeout=60).outcome == Outcome.UNAVAILABLE
