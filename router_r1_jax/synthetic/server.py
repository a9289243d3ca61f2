"""An OpenAI-compatible HTTP server for the simulated models, with fault injection, in a separate process.

`start_server` launches `python -m router_r1_jax.synthetic.server`. The process reads what it is to serve from standard
input, prints its port, and ends when standard input closes. So no server is left behind, however the parent dies.
"""

import json
import os
import pickle
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from router_r1_jax.config import ConfigError
from router_r1_jax.pool.cards import Card
from router_r1_jax.pool.outcomes import PoolError
from router_r1_jax.synthetic.simulated_models import SimulatedModels
from router_r1_jax.synthetic.world import World

_HOST = "127.0.0.1"
_BROKEN_ANSWERS = {"malformed": ("application/json", b'{"choices": [{'), "wrong_type": ("text/html", b"<html></html>")}


class _Server(socketserver.ThreadingTCPServer):
    """Serves the models on the loopback `port`; 0 takes a free one. Each connection has its thread."""

    daemon_threads = True
    allow_reuse_address = True  # a server that is started again takes the same port
    request_queue_size = 512  # all connections of a rollout may come at once

    def __init__(self, models: SimulatedModels, port: int) -> None:
        self.models = models
        super().__init__((_HOST, port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    """One keep-alive connection. It serves chat completions to `pool.http`, whose requests are well-formed."""

    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body are sent in one write

    def handle(self) -> None:
        """Answer requests until the client closes the connection."""
        try:
            super().handle()
        except (ConnectionError, json.JSONDecodeError):
            pass  # the client is gone, perhaps in the middle of a request

    def log_message(self, *args: object) -> None:
        """Print nothing."""

    def do_POST(self) -> None:  # noqa: N802  the name is http.server's
        """Complete a chat."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model, query = request["model"], request["messages"][-1]["content"]
        if model not in self.server.models.names:
            return self._refuse(404, f"there is no model {model!r}")
        self._complete(model, query, request.get("max_tokens"))

    def _complete(self, model: str, query: str, max_tokens: int | None) -> None:
        models = self.server.models
        number = models.next_request(model)
        if wait := models.retry_after(model, time.monotonic()):
            return self._refuse(429, "too many requests to the simulated model", {"Retry-After": f"{wait:.3f}"})
        time.sleep(models.latency(model, number))
        fault = models.fault(model, query, number)
        if fault == "dropped":
            self.close_connection = True
        elif fault == "failure":
            self._refuse(503, "the simulated model is overloaded")
        elif fault:
            self._send(200, *_BROKEN_ANSWERS[fault])
        else:
            answer = models.answer(model, query, max_tokens)
            finish_reason = "length" if answer.truncated else "stop"
            message = {"role": "assistant", "content": answer.text}
            usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
            self._send_json(
                200,
                {
                    "id": "simulated",
                    "object": "chat.completion",
                    "created": int(time.time()),
                    "model": model,
                    "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
                    "usage": usage | {"total_tokens": sum(usage.values())},
                },
            )

    def _refuse(self, status: int, message: str, headers: Mapping[str, str] = {}) -> None:
        self._send_json(status, {"error": {"message": message}}, headers)

    def _send_json(self, status: int, answer: Mapping[str, Any], headers: Mapping[str, str] = {}) -> None:
        self._send(status, "application/json", json.dumps(answer).encode(), headers)

    def _send(self, status: int, content_type: str, body: bytes, headers: Mapping[str, str] = {}) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def start_server(world_config: Mapping[str, int], cards: Sequence[Card], port: int = 0) -> Iterator[str]:
    """Start the simulated models' server and wait until it takes connections; gives the `base_url` for a provider.

    Port 0 takes a free one. The server ends with the context; calls in flight are broken off. Raises PoolError with
    the server's message if it cannot start.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "router_r1_jax.synthetic.server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:  # closes standard input at the end, and waits for the process
        pickle.dump((dict(world_config), tuple(cards), port), process.stdin)
        process.stdin.flush()
        said = process.stdout.readline().decode().strip()
        if not said.isdigit():
            raise PoolError(f"the simulated models' server did not start: {said or 'it ended without a word'}")
        yield f"http://{_HOST}:{said}/v1"


def main() -> None:
    """Serve the world and the cards that standard input holds, until standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which may still need us for its last step
    world_config, cards, port = pickle.load(sys.stdin.buffer)
    try:
        server = _Server(SimulatedModels(World(world_config), cards), port)
    except (ConfigError, OSError) as error:
        print(error, flush=True)
        sys.exit(1)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.buffer.read()
    os._exit(0)  # connections may be in the middle of a reply


if __name__ == "__main__":
    main()
