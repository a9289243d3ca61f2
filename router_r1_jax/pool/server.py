"""An OpenAI-compatible HTTP server for the simulated models, as a process of its own.

`start_server` launches `python -m router_r1_jax.pool.server`, which reads its specification (one JSON line) from
standard input, prints its port, and ends when standard input closes: however the parent dies, no server is left behind.

Training wants the same few cores, so a request costs little: headers are split by hand (http.server's own parser goes
through the email package), and an answer is one write.
"""

import dataclasses
import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Self

from ml_collections import ConfigDict

from router_r1_jax.config import ConfigError
from router_r1_jax.data.world import World
from router_r1_jax.pool.cards import Card, Faults
from router_r1_jax.pool.outcomes import PoolError
from router_r1_jax.pool.simulated import SimulatedModels

_HOST = "127.0.0.1"
_MAX_BODY = 1 << 20
_MAX_HEADERS = 100


class _RequestError(Exception):
    """A request that cannot be answered: HTTP status and message, and perhaps when to come again."""

    def __init__(self, status: int, message: str, *, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


class _Broken(Exception):  # noqa: N818  nothing of ours is wrong
    """An answer that is to be broken: "malformed", "wrong_type" or "dropped"."""


class SimulatedServer(socketserver.ThreadingTCPServer):
    """Serves the models on the loopback `port`; 0 takes a free one. One thread per connection."""

    daemon_threads = True
    allow_reuse_address = True  # a restart takes the port that it had
    request_queue_size = 512  # all connections of a rollout may come at once

    def __init__(self, models: SimulatedModels, port: int = 0) -> None:
        self.models = models
        super().__init__((_HOST, port), _Handler)
        self.port = self.server_address[1]


class _Handler(socketserver.StreamRequestHandler):
    """One keep-alive connection: POST /v1/chat/completions and GET /v1/models."""

    server: SimulatedServer
    disable_nagle_algorithm = True

    def handle(self) -> None:
        """Answer requests until the client closes, or until one cannot be read to its end."""
        try:
            while line := self.rfile.readline(65537):
                keep, after = False, 0.0
                try:
                    method, path, body, keep = self._read_request(line)
                    status, answer = self._answer(method, path, body)
                except _RequestError as error:
                    status, answer = error.status, {"error": {"message": str(error), "type": "invalid_request_error"}}
                    after = error.retry_after
                except _Broken as broken:
                    if str(broken) == "dropped":
                        return
                    page = str(broken) == "wrong_type"
                    body, kind = (b"<html></html>", "text/html") if page else (b'{"choices": [{', "application/json")
                    self._send(200, body, keep, kind=kind)
                    continue
                self._send(status, json.dumps(answer).encode(), keep, retry_after=after)
                if not keep:
                    return
        except ConnectionError:
            pass  # the client is gone

    def _read_request(self, line: bytes) -> tuple[str, str, bytes, bool]:
        """Method, path, body, and whether the connection stays open."""
        parts = line.decode("latin-1").split()
        if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
            raise _RequestError(400, "this is not an HTTP/1.1 request")
        length, keep = 0, parts[2] != "HTTP/1.0"
        for _ in range(_MAX_HEADERS):
            header = self.rfile.readline(65537)
            if header in (b"\r\n", b"\n", b""):
                break
            name, _, value = header.partition(b":")
            name, value = name.strip().lower(), value.strip().lower()
            if name == b"content-length":
                if not value.isdigit():
                    raise _RequestError(400, "Content-Length is not a number")
                length = int(value)
            elif name == b"transfer-encoding":
                raise _RequestError(411, "send the body with a Content-Length")
            elif name == b"connection":
                keep = value != b"close"
        else:
            raise _RequestError(431, f"more than {_MAX_HEADERS} headers")
        if length > _MAX_BODY:
            raise _RequestError(413, f"the body is longer than {_MAX_BODY} bytes")
        return parts[0], parts[1], self.rfile.read(length) if length else b"", keep

    def _answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if (method, path) == ("GET", "/v1/models"):
            models = [{"id": name, "object": "model", "owned_by": "simulated"} for name in self.server.models.names]
            return 200, {"object": "list", "data": models}
        if (method, path) != ("POST", "/v1/chat/completions"):
            return _error(404, f"{method} {path} is not served here")
        try:
            request = json.loads(body)
            model, query = request["model"], request["messages"][-1]["content"]
            max_tokens = request.get("max_tokens")
            if not isinstance(query, str) or not (max_tokens is None or max_tokens > 0):
                raise ValueError
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return _error(400, "the body is not a chat completion request")
        if model not in self.server.models.names:
            return _error(404, f"there is no model {model!r}")
        return self._complete(model, query, max_tokens)

    def _complete(self, model: str, query: str, max_tokens: int | None) -> tuple[int, dict[str, Any]]:
        models = self.server.models
        number = models.next_request(model)
        if wait := models.retry_after(model, time.monotonic()):
            raise _RequestError(429, "too many requests to the simulated model", retry_after=wait)
        time.sleep(models.latency(model, number))
        fault = models.fault(model, query, number)
        if fault == "failure":
            return _error(503, "the simulated model is overloaded")
        if fault:
            raise _Broken(fault)
        answer = models.answer(model, query, max_tokens, number)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text},
            "finish_reason": "length" if answer.truncated else "stop",
        }
        usage = {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        }
        head = {"id": "simulated", "object": "chat.completion", "created": int(time.time()), "model": model}
        return 200, {**head, "choices": [choice], "usage": usage}

    def _send(
        self, status: int, body: bytes, keep: bool, *, kind: str = "application/json", retry_after: float = 0.0
    ) -> None:
        close = "" if keep else "Connection: close\r\n"
        if retry_after:
            close += f"Retry-After: {retry_after:.3f}\r\n"
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {kind}\r\n{close}"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self.wfile.write(head.encode() + body)


def _error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    return status, {"error": {"message": message, "type": "server_error" if status >= 500 else "invalid_request_error"}}


class ServerProcess:
    """A running server. `base_url` is what a provider's base_url takes. A context manager."""

    def __init__(self, process: subprocess.Popen, port: int) -> None:
        self._process = process
        self.port = port
        self.base_url = f"http://{_HOST}:{port}/v1"

    def stop(self) -> None:
        """End the process; calls on their way are cut."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def start_server(world_config: Mapping[str, int], cards: Sequence[Card], port: int = 0) -> ServerProcess:
    """Start the simulated models' server and wait until it takes connections; port 0 takes a free one.

    Raises PoolError with the server's own words where it cannot start.
    """
    spec = {"world": dict(world_config), "cards": [dataclasses.asdict(card) for card in cards], "port": port}
    process = subprocess.Popen(
        [sys.executable, "-m", "router_r1_jax.pool.server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        process.stdin.write(json.dumps(spec) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it is gone already; what it said stands on its output
    said = process.stdout.readline().strip()
    if said.isdigit():
        return ServerProcess(process, int(said))
    process.kill()
    process.wait()
    raise PoolError(f"the simulated models' server did not start: {said or 'it ended without a word'}")


def simulated_providers(pool_config: ConfigDict, base_url: str) -> ConfigDict:
    """A copy of `config.pool` whose provider "simulated" is at `base_url`."""
    settings = pool_config.copy_and_resolve_references()
    # The copy shares the tuple's entries with the run's configuration, whose hash must not hold a free port.
    settings.providers = tuple(entry.copy_and_resolve_references() for entry in settings.providers)
    for entry in settings.providers:
        if entry.name == "simulated":
            entry.base_url = base_url
    return settings


def main() -> None:
    """Serve what standard input's first line specifies, until standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which may still need us for its last step
    spec = json.loads(sys.stdin.readline())
    cards = [
        Card(**{**card, "aliases": tuple(card["aliases"]), "simulated": Faults(**card["simulated"])})
        for card in spec["cards"]
    ]
    try:
        server = SimulatedServer(SimulatedModels(World(spec["world"]), cards), spec["port"])
    except (ConfigError, OSError) as error:
        print(error, flush=True)
        sys.exit(1)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.port, flush=True)
    sys.stdin.read()
    os._exit(0)  # connections may be in the middle of a reply


if __name__ == "__main__":
    main()
