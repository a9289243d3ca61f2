"""A real HTTP server whose behaviour a test scripts, built on the standard library and not on our own server."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, *, prompt_tokens=3, completion_tokens=5, finish="stop"):
    """(status, headers, body) of a chat completion."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return 200, {}, json.dumps({"choices": [choice], "usage": usage}).encode()


@dataclass
class Scripted:
    """`script(number, body)` gives (status, headers, body), or a function that is handed the handler's socket."""

    script: Callable
    base_url: str = ""
    requests: list = field(default_factory=list)  # (headers, body) of each POST, in order of arrival
    connections: int = 0

    @property
    def queries(self):
        return [body["messages"][-1]["content"] for _, body in self.requests]


@contextmanager
def serving(script: Callable) -> Iterator[Scripted]:
    """A running server on a free loopback port, with its address for a provider in `base_url`."""
    scripted = Scripted(script)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(scripted, threading.Lock()))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    scripted.base_url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield scripted
    finally:
        server.shutdown()
        server.server_close()


def _handler(scripted, lock):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are two writes, which would otherwise take 40 ms

        def setup(self):
            super().setup()
            with lock:
                scripted.connections += 1

        def _send(self, answer):
            if callable(answer):
                self.close_connection = True
                return answer(self.connection)
            status, headers, body = answer
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):  # noqa: N802
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(scripted.requests)
                scripted.requests.append((dict(self.headers), body))
            self._send(scripted.script(number, body) if self.path == "/v1/chat/completions" else (404, {}, b""))

        def do_GET(self):  # noqa: N802
            self._send(scripted.script(-1, None))

        def log_message(self, *args):
            pass

    return Handler
