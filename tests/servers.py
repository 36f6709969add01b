"""Servers on loopback, in threads: honest ones, and such as no client should have to meet."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import uvicorn

from ablate.recipe import RewardTerm
from runners.reward_server import Limits, RewardServer
from runners.rewards import load_term


@dataclass
class Asked:
    """A request, and ways to answer it."""

    handler: BaseHTTPRequestHandler
    number: int  # how many were asked before
    path: str
    body: Any
    closing: threading.Event

    def say(self, answer: Any, status: int = 200, **headers: str) -> None:
        self.send((answer if isinstance(answer, str) else json.dumps(answer)).encode(), status, **headers)

    def send(self, content: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.handler.send_response(status)
        self.handler.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.end_headers()
        self.handler.wfile.write(content)

    def hang(self) -> None:
        self.closing.wait(30)

    def drip(self, content: bytes) -> None:
        """A byte now and then, so that no read ever waits long."""
        for byte in content:
            if self.closing.wait(0.05):
                return
            self.handler.wfile.write(bytes([byte]))

    def close(self) -> None:
        self.handler.close_connection = True
        self.handler.connection.shutdown(socket.SHUT_RDWR)


@dataclass
class Server:
    url: str
    asked: list[Asked] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def behaving(behave: Callable[[Asked], None]) -> Iterator[Server]:
    """A server that does to each request what it is told to."""
    closing, lock = threading.Event(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            with lock:
                asked = Asked(self, len(server.asked), self.path, body, closing)
                server.asked.append(asked)
                server.headers.append(dict(self.headers))
            try:
                behave(asked)
            except OSError:  # the client has gone
                self.close_connection = True

        do_GET = do_POST = do

        def log_message(self, *_: object) -> None: ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads, listening.block_on_close = True, False
    server = Server(f"http://127.0.0.1:{listening.server_port}")
    threading.Thread(target=lambda: listening.serve_forever(0.01), daemon=True).start()
    try:
        yield server
    finally:
        closing.set()
        listening.shutdown()
        listening.server_close()


@contextmanager
def reward_server(
    name: str, port: int = 0, *, token: str | None = None, limits: Limits | None = None, **parameters: Any
) -> Iterator[str]:
    """The reference server with a reward, and its address."""
    reward = load_term(RewardTerm(name=name, **parameters))
    config = RewardServer(reward=reward, token=token, limits=limits or Limits()).configured("critical")
    config.timeout_graceful_shutdown = 1
    with socket.create_server(("127.0.0.1", port)) as listening:
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            while not server.started:
                time.sleep(0.01)
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()
