"""A server of this machine that speaks the chat completions protocol and can misbehave."""

import base64
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple

import cv2
import numpy as np


class Answer(NamedTuple):
    """What the server says to one request."""

    status: int
    body: bytes
    headers: Mapping[str, str] = MappingProxyType({})
    delay_s: float = 0.0


class Request(NamedTuple):
    """What the server was asked."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    def pictures(self) -> list[np.ndarray]:
        """The frames that came, decoded."""
        parts = self.body["messages"][0]["content"]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        raw = [base64.b64decode(url.removeprefix("data:image/jpeg;base64,")) for url in urls]
        return [cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) for data in raw]


class ChatServer:
    """Keeps what it was asked; `answer` decides what it says to the n-th request, from 0."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self.requests: list[Request] = []
        self.answer: Callable[[int, Request], Answer] = lambda *_: said("a short one", "a long one")
        self.most_at_once = 0


def said(short: Any, long: Any, **options: Any) -> Answer:
    """The answer of a model that keeps to the schema."""
    return text_said(json.dumps({"short": short, "long": long}), **options)


def text_said(text: Any, **options: Any) -> Answer:
    """The answer of a model that says any text."""
    message = {"role": "assistant", "content": text}
    body = {"object": "chat.completion", "choices": [{"index": 0, "message": message}]}
    return Answer(200, json.dumps(body).encode(), **options)


@contextlib.contextmanager
def running_chat_server() -> Iterator[ChatServer]:
    """Run a server in a thread."""
    lock = threading.Lock()
    at_once = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            nonlocal at_once
            with lock:
                at_once += 1
                chat.most_at_once = max(chat.most_at_once, at_once)
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request = Request(self.path, dict(self.headers), body)
            with lock:
                number = len(chat.requests)
                chat.requests.append(request)
            answer = chat.answer(number, request)
            time.sleep(answer.delay_s)
            with lock:
                at_once -= 1
            with contextlib.suppress(OSError):  # the client may have gone
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Handler) as server:
        chat = ChatServer(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield chat
        finally:
            server.shutdown()
            thread.join()
