"""A TCP proxy in front of a real server that a test can cut, slow down or rob of its answers."""

import contextlib
import socket
import threading
import time
from types import TracebackType
from typing import Literal, Self

Mode = Literal["pass", "refuse", "silent", "lose"]


class FlakyProxy:
    """Forwards connections to a port of this machine.

    Attributes:
        mode: "pass" forwards; "refuse" closes every connection at once; "silent" takes requests
            and never answers; "lose" forwards requests whose head holds `losing`, waits until the
            server has answered and closes the connection instead.
        losing: See `mode`.
        num_lost: Answers lost so far.
        delay_s: Every answer is that much later.
    """

    def __init__(self, port: int) -> None:
        self.mode: Mode = "pass"
        self.losing = b""
        self.num_lost = 0
        self.delay_s = 0.0
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        self.cut()

    def cut(self, mode: Mode | None = None) -> None:
        """Close all connections, in the middle of whatever they are doing."""
        if mode is not None:
            self.mode = mode
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        self._open.add(client)
        with contextlib.suppress(OSError), client:
            if self.mode == "refuse":
                return
            if self.mode == "silent":
                while client.recv(1 << 16):
                    pass
                return
            with socket.create_connection(("127.0.0.1", self._port)) as server:
                self._open.add(server)
                is_lost = threading.Event()
                back = threading.Thread(
                    target=self._answer, args=(server, client, is_lost), daemon=True
                )
                back.start()
                while data := client.recv(1 << 16):
                    if self.mode == "lose" and self.losing in data:
                        is_lost.set()
                    server.sendall(data)
                server.shutdown(socket.SHUT_WR)
                back.join()
                self._open.discard(server)
        self._open.discard(client)

    def _answer(
        self, server: socket.socket, client: socket.socket, is_lost: threading.Event
    ) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                if is_lost.is_set():
                    self.num_lost += 1
                    break
                time.sleep(self.delay_s)
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)
