"""A whole training with a marked key, behind a provider that is as indiscreet as can be: the key stays nowhere."""

import http.client
import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import mains
import pytest
from tiny_config import get_config

from router_r1_jax.pool.cards import cards_from_config
from router_r1_jax.pool.ledger import read_ledger
from router_r1_jax.synthetic.server import start_server

KEY = "sk-marked-5ecre7-k3y-of-the-test"


def indiscreet(port, seen):
    """Passes requests on to `port`; quotes the Authorization header in every third reply, and fails with it once.

    Once, because a rollout ends the run where more than half of its calls fail.
    """
    numbers = itertools.count(1)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):  # noqa: N802
            body = self.rfile.read(int(self.headers["Content-Length"]))
            number, key = next(numbers), self.headers.get("Authorization", "")
            seen.append(key)
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("POST", self.path, body)
            answer = connection.getresponse()
            status, data = answer.status, json.loads(answer.read())
            if status == 200 and number % 3 == 0:
                data["choices"][0]["message"]["content"] += f" Your key is {key}."
            elif number == 2:
                status, data = 400, {"error": {"message": f"refused: {key}"}}
            self._say(status, data)

        def do_GET(self):  # noqa: N802
            self._say(200, {"data": []})

        def _say(self, status, data):
            content = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("X-Echo", KEY)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    return Handler


@pytest.mark.slow
def test_the_key_is_in_no_file_and_no_line_of_a_whole_training(tmp_path):
    config, seen = get_config(), []
    workdir = tmp_path / "run"
    with start_server(config.synthetic.world.to_dict(), cards_from_config(config.pool)) as base_url:
        proxy = ThreadingHTTPServer(("127.0.0.1", 0), indiscreet(urlsplit(base_url).port, seen))
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        variables = {"MARKED_KEY": KEY, "POOL_URL": f"http://127.0.0.1:{proxy.server_port}/v1"}
        secret = Path(__file__).with_name("secret_config.py")
        done = [mains.succeed(main, workdir, config=secret, **variables) for main in ("train", "evaluate")]
        proxy.shutdown()
    assert set(seen) == {f"Bearer {KEY}"}
    lines = read_ledger(workdir / "ledger.jsonl")
    assert {"ok", "bad_request"} <= {line["outcome"] for line in lines}
    assert any("[key]" in line["error"] for line in lines)
    files = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert len(files) > 10 and b"[key]" in b"".join(files.values())
    assert [path for path, content in files.items() if KEY.encode() in content] == []
    assert not [name for name in map(str, files) if KEY in name]
    assert KEY not in "".join(run.stdout + run.stderr for run in done)
