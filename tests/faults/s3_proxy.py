"""An HTTP proxy before an S3 server that fails as it is told, for tests on loopback."""

import http.client
import random
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import NamedTuple
from urllib.parse import urlsplit


class Request(NamedTuple):
    """What a fault may depend on."""

    number: int
    method: str
    path: str
    is_conditional: bool


FaultOf = Callable[[Request], str]
_CODES = {
    "500": (500, "InternalError"),
    "503": (503, "ServiceUnavailable"),
    "slow_down": (503, "SlowDown"),
    "conflict": (409, "ConditionalRequestConflict"),
    "skewed": (403, "RequestTimeTooSkewed"),
    "bare_412": (412, "PreconditionFailed"),
}
ALL_FAULTS = (
    "500",
    "503",
    "slow_down",
    "conflict",
    "reset_before",
    "reset_after",
    "lost",
    "cut",
    "reset_in_body",
    "delay",
)
"""Those that pass."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def _handle(self) -> None:
        proxy = self.server.proxy
        length = int(self.headers.get("Content-Length", 0))
        is_conditional = "If-None-Match" in self.headers
        fault = proxy.next_fault(self.command, self.path, is_conditional)
        if fault == "black_hole":
            proxy.stopped.wait(600)
            self._reset()
            return
        if fault == "reset_before":
            self.rfile.read(length // 2)
            self._reset()
            return
        body = self.rfile.read(length)
        if fault in _CODES and fault != "bare_412":
            self._refuse(*_CODES[fault])
            return
        if fault == "delay":
            time.sleep(proxy.delay_s)
        status, headers, content = proxy.ask(self.command, self.path, dict(self.headers), body)
        if fault == "bare_412" and status == 412:
            self._refuse(*_CODES[fault])
        elif fault == "lost":
            self._refuse(503, "ServiceUnavailable")
        elif fault == "reset_after":
            self._reset()
        else:
            self._answer(status, headers, content, fault)

    def _answer(
        self, status: int, headers: list[tuple[str, str]], content: bytes, fault: str
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = {name.lower(): value for name, value in headers}.get("content-length")
        is_head = self.command == "HEAD"
        self.send_header("Content-Length", length if is_head and length else str(len(content)))
        self.end_headers()
        if is_head:
            return
        if fault in ("cut", "reset_in_body"):
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if fault == "cut":
                self.close_connection = True
            else:
                self._reset()
            return
        self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        content = (
            f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"
        )
        self._answer(status, [("Content-Type", "application/xml")], content.encode(), "")

    def _reset(self) -> None:
        """Close so that the other side sees a reset."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()
        self.rfile.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64
    proxy: "S3Proxy"

    def handle_error(self, *_: object) -> None:
        pass  # connections that were reset on purpose


class S3Proxy:
    """Passes requests on; `fault_of` says what goes wrong with each."""

    def __init__(self, server_address: str) -> None:
        self._upstream = urlsplit(server_address).netloc
        self._lock = threading.Lock()
        self.fault_of: FaultOf = lambda _: ""
        self.requests: list[Request] = []
        self.num_faults = 0
        self.delay_s = 0.2
        self.stopped = threading.Event()

    def __enter__(self) -> "S3Proxy":
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def next_fault(self, method: str, path: str, is_conditional: bool) -> str:
        with self._lock:
            request = Request(len(self.requests), method, path, is_conditional)
            self.requests.append(request)
            fault = self.fault_of(request)
            self.num_faults += bool(fault)
        return fault

    def ask(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        # the signature covers Host; the server does not check it
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            passed = {k: v for k, v in headers.items() if k.lower() != "expect"}
            connection.request(method, path, body, passed)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


def first(count: int, fault: str, *, method: str = "", conditional: bool = False) -> FaultOf:
    """The first so many requests of a kind fail."""
    left = [count]

    def fault_of(request: Request) -> str:
        fits = method in ("", request.method) and (request.is_conditional or not conditional)
        if not fits or left[0] == 0:
            return ""
        left[0] -= 1
        return fault

    return fault_of


def at_random(seed: int, share: float) -> FaultOf:
    """A share of all requests fails, each in some way."""
    random_ = random.Random(seed)

    def fault_of(_: Request) -> str:
        return random_.choice(ALL_FAULTS) if random_.random() < share else ""

    return fault_of
