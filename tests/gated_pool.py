"""Simulated models over HTTP that answer only a given number of requests and list the ones they answered."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from router_r1_jax.synthetic.simulated_models import SimulatedModels


class GatedPool:
    """A server on a free loopback port. A context manager; `base_url` is the address for a provider's base_url."""

    def __init__(self, models: SimulatedModels) -> None:
        self.answered: list[tuple[str, str]] = []  # (model, query) of each answered request
        self._models, self._gate, self._era, self._most = models, threading.Condition(), 0, 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def answer_up_to(self, most: float) -> None:
        """Answer until `most` requests are answered. Waiting requests get no answer, because their client is gone."""
        with self._gate:
            self._era, self._most = self._era + 1, most
            self._gate.notify_all()

    def begin_anew(self) -> None:
        """Forget the answered requests."""
        self.answered.clear()

    def __enter__(self) -> "GatedPool":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.answer_up_to(0)
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: dict[str, Any]) -> bytes | None:
        model, query = request["model"], request["messages"][-1]["content"]
        with self._gate:
            era = self._era
            self._gate.wait_for(lambda: era != self._era or len(self.answered) < self._most)
            if era != self._era:
                return None
            self.answered.append((model, query))
        answer = self._models.answer(model, query, request.get("max_tokens"))
        choice = {"index": 0, "message": {"role": "assistant", "content": answer.text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        return json.dumps({"choices": [choice], "usage": usage, "model": model}).encode()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        pool = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _send(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:  # noqa: N802
                body = pool._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                if body is None:
                    self.close_connection = True
                else:
                    self._send(body)

            def do_GET(self) -> None:  # noqa: N802
                self._send(json.dumps({"data": []}).encode())

            def log_message(self, *args: object) -> None:
                pass

        return Handler
