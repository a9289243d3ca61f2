"""A TCP proxy in front of a provider's server that goes down in the middle of a run, as the server itself would."""

import socket
import threading
from contextlib import suppress


class FlakyProxy:
    """Listens on a loopback port and forwards to `port`; a context manager.

    At HTTP request number `requests` it drops all connections and closes its port, so that the system refuses new ones.
    After `seconds` it listens again on the same port. If `seconds` is None, it stays down until `up` is called.
    """

    def __init__(self, port: int, *, requests: int, seconds: float | None):
        self._target, self._left, self._seconds = port, requests, seconds
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.port = 0

    def __enter__(self) -> "FlakyProxy":
        self.up()
        return self

    def __exit__(self, *exception: object) -> None:
        self._drop()

    @property
    def base_url(self) -> str:
        """The address for a provider's base_url."""
        return f"http://127.0.0.1:{self.port}/v1"

    def up(self) -> None:
        """Listen, on the same port as before."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(128)
        self.port, self._listener = listener.getsockname()[1], listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                with self._lock:
                    self._open |= {client, server}
                threading.Thread(target=self._forward, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._forward, args=(server, client, False), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        with suppress(OSError):  # either end is closed
            while data := source.recv(65536):
                if counts and data.startswith((b"GET ", b"POST ")) and self._is_last():
                    self._go_down()
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def _is_last(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left == 0

    def _go_down(self) -> None:
        self._drop()
        if self._seconds is not None:
            threading.Timer(self._seconds, self.up).start()

    def _drop(self) -> None:
        with self._lock:
            dropped, self._open = [self._listener, *self._open], set()
        for end in dropped:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes the threads that wait on it; close alone does not
            end.close()
