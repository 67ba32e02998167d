"""A real HTTP proxy in front of a real server that does one wrong thing at one chosen request. Test helper, no tests."""

import http.client
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Fault = Callable[["Exchange"], None]


class Exchange:
    """One request on its way: a fault forwards it or not, and answers or not."""

    def __init__(self, handler: BaseHTTPRequestHandler, upstream: tuple[str, int], body: bytes) -> None:
        self.handler, self.upstream, self.body = handler, upstream, body

    def forward(self) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.upstream, timeout=60)
        try:
            connection.putrequest(self.handler.command, self.handler.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.handler.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(self.body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: int | None = None) -> None:
        self.handler.send_response_only(status)
        length = str(len(body))
        for name, value in headers:
            if name.lower() == "content-length" and self.handler.command == "HEAD":
                length = value
            elif name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.handler.send_header(name, value)
        self.handler.send_header("Content-Length", length)
        self.handler.end_headers()
        if self.handler.command != "HEAD":
            self.handler.wfile.write(body[:cut])
        if cut is not None:
            self.drop()

    def drop(self) -> None:
        self.handler.wfile.flush()
        self.handler.connection.close()
        self.handler.close_connection = True


def status(code: int) -> Fault:
    """Answers `code`; the server never sees the request."""
    return lambda exchange: exchange.answer(code, [("Content-Type", "application/json")], b'{"message":"injected by the test"}')


def status_after(code: int) -> Fault:
    """The request takes effect, its answer is replaced by `code`."""

    def fault(exchange: Exchange) -> None:
        exchange.forward()
        status(code)(exchange)

    return fault


def drop_before(exchange: Exchange) -> None:
    """The connection breaks before the server sees the request."""
    exchange.drop()


def drop_after(exchange: Exchange) -> None:
    """The request takes effect, the connection breaks before the answer."""
    exchange.forward()
    exchange.drop()


def stall(seconds: float) -> Fault:
    """The request takes effect, the answer comes `seconds` later."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.forward()
        time.sleep(seconds)
        try:
            exchange.answer(*answer)
        except OSError:
            exchange.handler.close_connection = True  # the client gave up meanwhile, as it should

    return fault


def cut_body(after: int) -> Fault:
    """The answer breaks off after `after` bytes of its body."""

    def fault(exchange: Exchange) -> None:
        exchange.answer(*exchange.forward(), cut=after)

    return fault


def arrive_late() -> Fault:
    """Plan it for many requests: the first one is lost to its client and reaches the server only when the client repeats it."""
    held: list[Exchange] = []
    late: list[Exchange] = []

    def fault(exchange: Exchange) -> None:
        if not held:
            held.append(exchange)
            late.append(exchange)
            exchange.drop()
            return
        if late and exchange.handler.path == held[0].handler.path:
            late.pop().forward()
        exchange.answer(*exchange.forward())

    return fault


class Proxy:
    """Forwards to `endpoint`. `plan(n, fault, times)` spoils the n-th request from now (0 is the next) and the following ones."""

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        upstream = (parts.hostname or "", parts.port or 80)
        self._lock = threading.Lock()
        self.requests: list[str] = []
        self._faults: dict[int, Fault] = {}
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                exchange = Exchange(self, upstream, body)
                fault = proxy._next(f"{self.command} {self.path}")
                if fault is None:
                    exchange.answer(*exchange.forward())
                else:
                    fault(exchange)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def _next(self, request: str) -> Fault | None:
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            return self._faults.pop(number, None)

    def plan(self, number: int, fault: Fault, times: int = 1) -> None:
        with self._lock:
            start = len(self.requests) + number
            self._faults = {start + offset: fault for offset in range(times)}

    def clear(self) -> None:
        with self._lock:
            self._faults = {}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
