import json
import subprocess
import sys
from pathlib import Path

import pytest
from scripted_provider import completion

from router_r1_jax.config import SPLITS, base_config, provider
from router_r1_jax.pool.cards import Card
from router_r1_jax.pool.check import main, table_row
from router_r1_jax.pool.outcomes import Completion, Outcome

ROOT = Path(__file__).parents[2]
KEY = "sk-marked-5ecre7-key"


def _config(pool_config, url):
    config = base_config()
    config.pool = pool_config(url, backoff=1000.0, backoff_max=1000.0)
    config.data.update({split: ("nq",) for split in SPLITS})  # no synthetic world
    return config


def test_each_model_is_asked_once_and_told_in_a_row(serve, pool_config, capsys):
    def script(number, body):
        if body["model"] == "pico-1b":
            return 503, {}, b'{"error": {"message": "overloaded"}}'
        status, headers, content = completion("Paris", prompt_tokens=1000, completion_tokens=500)
        return status, headers, json.dumps(json.loads(content) | {"model": "titan-7b"}).encode()

    scripted = serve(script)
    assert main(_config(pool_config, scripted.base_url)) == 1
    heads, titan, pico = capsys.readouterr().out.splitlines()
    assert heads.split() == ["model", "outcome", "seconds", "tokens", "in", "tokens", "out", "dollars", "reply"]
    assert titan.split()[:2] == ["Titan", "ok"]
    assert titan.split()[3:6] == ["1000", "500", "9.00e-03"]  # 3 and 12 dollars per million tokens
    assert titan.endswith(" Paris; served by titan-7b")
    assert pico.split()[:2] == ["Pico", "unavailable"] and pico.endswith(" HTTP 503: overloaded")
    assert sorted(body["model"] for _, body in scripted.requests) == ["pico-1b", "titan-70b"]


@pytest.mark.parametrize(
    ("answer", "row", "status"),
    [
        (completion("Paris " * 20), "ok", 0),
        (completion("Paris", completion_tokens=0), "2 (estimated)", 0),
        (completion("Par", finish="length"), "truncated", 0),
        (completion("<think>Let me", finish="length"), "empty", 1),
        (completion("", completion_tokens=512, finish="length"), "no text in 512 tokens; if the model thinks", 1),
        (completion(None, finish="content_filter"), "refused", 1),
        ((200, {}, b'{"error": {"code": 402, "message": "no credits"}}'), "bad_request", 1),
    ],
)
def test_the_exit_status_is_0_only_if_every_model_gave_text(serve, pool_config, capsys, answer, row, status):
    scripted = serve(lambda n, b: answer)
    assert main(_config(pool_config, scripted.base_url)) == status
    assert all(row in line for line in capsys.readouterr().out.splitlines()[1:])
    assert len(scripted.requests) == 2  # a final fault ends a model's call at once


@pytest.mark.parametrize(
    ("asked", "served", "same"),
    [
        ("gpt-5-mini", "gpt-5-mini-2025-08-07", True),
        ("openai/gpt-5-mini", "gpt-5-mini", True),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen/qwen2.5-7b-instruct", True),
        ("gpt-5", "gpt-4o", False),
        ("m", "", True),
    ],
)
def test_another_model_than_the_one_asked_for_is_named(asked, served, same):
    card = Card("M", "M", "p", asked, 0.0, 1.0, None, {}, "", ())
    cell = table_row(card, Completion("Paris", Outcome.OK, served=served))[-1]
    assert cell == ("Paris" if same else f"Paris; served by {served}")


def test_the_key_is_sent_and_never_printed(serve, pool_config, capfd, monkeypatch):
    monkeypatch.setenv("MARKED_KEY", KEY)
    answer = json.dumps({"model": KEY, "choices": [{"message": {"content": KEY}}]}).encode()
    refusal = json.dumps({"error": {"message": KEY}}).encode()
    for status, content in ((200, answer), (200, refusal), (401, refusal)):
        scripted = serve(lambda n, b, status=status, content=content: (status, {}, content))
        config = _config(pool_config, scripted.base_url)
        config.pool.providers = (provider(name="p", base_url=scripted.base_url, key_env="MARKED_KEY"),)
        assert main(config) == int(content == refusal)
        assert scripted.requests[0][0]["Authorization"] == f"Bearer {KEY}"
    said = "".join(capfd.readouterr())
    assert "[key]" in said and KEY not in said


def test_the_command_serves_a_simulated_pool_itself():
    command = [sys.executable, "-m", "router_r1_jax.pool.check", f"--config={ROOT / 'configs/demo.py'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    assert [row.split()[0] for row in rows] == ["model", "Titan", "Reel", "Aria", "Atlas", "Pico"]
    assert [row.split()[1] for row in rows[1:]] == ["ok"] * 5
    refused = subprocess.run([*command, "--config.pool.deadline=-1"], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1] == "error: pool.deadline is -1.0; it must be greater than 0"
