"""A file server whose faults a test chooses, built on the standard library."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer:
    """Serves `files` (path -> bytes).

    Attributes:
      breaks: for the next requests, the bytes of the body after which the connection breaks; None: it does not.
      ranges: whether it supports range requests.
      versions: header that names a file's version, "ETag", "Last-Modified" or "".
      announces: whether it sends the length of the body.
      refuses: HTTP status of the next requests.
      requests: (path, Range header) of every request.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.breaks, self.refuses, self.requests = files, [], [], []
        self.ranges, self.versions, self.announces = True, "ETag", True
        self.url = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path, asked = handler.path, handler.headers.get("Range")
        self.requests.append((path, asked))
        if self.refuses or path not in self.files:
            handler.send_error(self.refuses.pop(0) if self.refuses else 404)
            return
        body = self.files[path]
        version = f'"{hash(body)}"'
        start = 0
        if asked and self.ranges and handler.headers.get("If-Range") == version:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                handler.send_error(416)
                return
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if self.versions:
            handler.send_header(self.versions, version)
        if self.announces:
            handler.send_header("Content-Length", str(len(body) - start))
        handler.end_headers()
        length = self.breaks.pop(0) if self.breaks else None
        handler.wfile.write(body[start:] if length is None else body[start : start + length])
        handler.close_connection = True


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[FileServer]:
    """A running server, with its base URL in `url`."""
    scripted = FileServer(files)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            scripted.answer(self)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    scripted.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield scripted
    finally:
        server.shutdown()
        server.server_close()
