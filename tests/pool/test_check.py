import json
import subprocess
import sys
from pathlib import Path

from scripted_provider import completion

from router_r1_jax.config import SPLITS, base_config, provider
from router_r1_jax.pool.check import main

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
    assert heads.split("  ")[0] == "model" and "served as" in heads
    assert titan.split()[:2] == ["Titan", "yes"]
    assert titan.split()[3:] == ["1000", "500", "9.00e-03", "titan-7b"]  # 3 and 12 dollars per million tokens
    assert pico.split()[:2] == ["Pico", "no"] and pico.endswith("unavailable: HTTP 503: overloaded")
    assert sorted(body["model"] for _, body in scripted.requests) == ["pico-1b", "titan-70b"]


def test_the_key_is_sent_and_never_printed(serve, pool_config, capfd, monkeypatch):
    monkeypatch.setenv("MARKED_KEY", KEY)
    content = json.dumps({"model": KEY, "error": {"message": KEY}, "choices": [{"message": {"content": KEY}}]}).encode()
    for status in (200, 401):
        scripted = serve(lambda n, b, status=status: (status, {}, content))
        config = _config(pool_config, scripted.base_url)
        config.pool.providers = (provider(name="p", base_url=scripted.base_url, key_env="MARKED_KEY"),)
        assert main(config) == int(status != 200)
        assert scripted.requests[0][0]["Authorization"] == f"Bearer {KEY}"
    said = "".join(capfd.readouterr())
    assert "[key]" in said and KEY not in said


def test_the_command_serves_a_simulated_pool_itself():
    command = [sys.executable, "-m", "router_r1_jax.pool.check", f"--config={ROOT / 'configs/demo.py'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    assert [row.split()[0] for row in rows] == ["model", "Titan", "Reel", "Aria", "Atlas", "Pico"]
    assert [row.split()[-1] for row in rows[1:]] == ["titan", "reel", "aria", "atlas", "pico"]
    refused = subprocess.run([*command, "--config.pool.deadline=-1"], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1] == "error: pool.deadline is -1.0; it must be greater than 0"
