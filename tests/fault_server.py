"""A server that misbehaves on order: alone, or in front of a real one, to which it passes on the rest.

::

    with FaultServer(upstream=juicefs.endpoint) as faults:
        store = open_store(juicefs.url(bucket, endpoint=faults.endpoint))
        faults.set(Fault.CUT, at=0.5, method="GET", times=1)

Requests stay valid: their signature covers the host that the client named, and it is passed on unchanged.
"""

from __future__ import annotations

import contextlib
import enum
import http.client
import socket
import socketserver
import threading
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, cast
from urllib.parse import urlsplit

_DRIP_S = 0.02


class Fault(enum.Enum):
    """What happens to a request instead of an answer, or to its answer on the way."""

    HANG = "is read and never answered"
    ERROR = "500 with S3's XML"
    SLOW_DOWN = "503 SlowDown, asking for an hour's patience"
    FORBIDDEN = "403 AccessDenied"
    EXPIRED = "400 ExpiredToken"
    SKEWED = "403 RequestTimeTooSkewed"
    MISSING = "404 NoSuchKey"
    NOT_S3 = "200 with a web page"
    REDIRECT = "307 to another host"
    CUT = "the answer's body ends after a fraction `at`, and so does the connection"
    FLIP = "one byte of the answer's body is another one"
    SHORT = "the answer's body lacks its last byte, and its headers agree"
    DRIP = "the answer's body comes byte by byte"


class _Order(NamedTuple):
    fault: Fault
    at: float
    method: str | None
    path: str
    query: str


class _Message(NamedTuple):
    """A request or an answer: first line and headers as they came, and the body."""

    head: bytes
    body: bytes

    @property
    def method(self) -> str:
        return self.head.split(b" ", 1)[0].decode()

    @property
    def target(self) -> str:
        return self.head.split(b" ", 2)[1].decode()


_ERRORS = {
    Fault.ERROR: (500, "InternalError"),
    Fault.SLOW_DOWN: (503, "SlowDown"),
    Fault.FORBIDDEN: (403, "AccessDenied"),
    Fault.EXPIRED: (400, "ExpiredToken"),
    Fault.SKEWED: (403, "RequestTimeTooSkewed"),
    Fault.MISSING: (404, "NoSuchKey"),
}


class FaultServer:
    """Listens from its start to its end; all its connections and threads end with it."""

    def __init__(self, upstream: str | None = None) -> None:
        self.requests: list[str] = []  # "GET /bucket/key?query", as they came
        self._upstream = urlsplit(upstream).netloc if upstream else None
        self._orders: list[tuple[_Order, int | None]] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._server = _TcpServer(("127.0.0.1", 0), self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="faults")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def set(
        self,
        fault: Fault,
        *,
        times: int | None = None,
        at: float = 0.5,
        method: str | None = None,
        path: str = "",
        query: str = "",
    ) -> None:
        """The next ``times`` requests of this method, path and query (parts of them) meet this fault."""
        with self._lock:
            self._orders.append((_Order(fault, at, method, path, query), times))

    def heal(self) -> None:
        with self._lock:
            self._orders.clear()

    def __enter__(self) -> FaultServer:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        with self._lock:
            for each in self._sockets:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        self._server.server_close()  # joins the connections' threads

    def serve(self, connection: socket.socket) -> None:
        """One connection, as many requests as come on it."""
        with self._lock:
            self._sockets.add(connection)
        try:
            with contextlib.suppress(OSError), connection.makefile("rb") as reader:
                while not self._closing.is_set() and self._answer(connection, cast(BinaryIO, reader)):
                    pass
        finally:
            with self._lock:
                self._sockets.discard(connection)

    def _answer(self, connection: socket.socket, reader: BinaryIO) -> bool:
        """Whether the connection goes on."""
        request = _read_request(reader)
        if request is None:
            return False
        order = self._take(request)
        if order is not None and order.fault is Fault.HANG:
            self._closing.wait()
            return False
        answer = self._reply(request, order)
        return self._send(connection, answer, order)

    def _take(self, request: _Message) -> _Order | None:
        path, _, query = request.target.partition("?")
        with self._lock:
            self.requests.append(f"{request.method} {request.target}")
            for number, (order, times) in enumerate(self._orders):
                if order.method in (None, request.method) and order.path in path and order.query in query:
                    if times is not None:
                        self._orders[number : number + 1] = [(order, times - 1)] if times > 1 else []
                    return order
        return None

    def _reply(self, request: _Message, order: _Order | None) -> _Message:
        if order is not None and order.fault in _ERRORS:
            return _error(*_ERRORS[order.fault])
        if order is not None and order.fault is Fault.REDIRECT:
            return _message(307, b"", {"Location": "http://127.0.0.1:1/elsewhere"})
        if (order is not None and order.fault is Fault.NOT_S3) or self._upstream is None:
            return _message(200, b"<html>Welcome", {"Content-Type": "text/html"})
        return _forwarded(self._upstream, request)

    def _send(self, connection: socket.socket, answer: _Message, order: _Order | None) -> bool:
        fault = order.fault if order else None
        head, body = answer
        if fault is Fault.FLIP and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        elif fault is Fault.SHORT and body:
            head = head.replace(b"ength: %d\r\n" % len(body), b"ength: %d\r\n" % (len(body) - 1))
            body = body[:-1]
        elif fault is Fault.CUT and order is not None:
            connection.sendall(head + body[: int(len(body) * order.at)])
            connection.shutdown(socket.SHUT_RDWR)
            return False
        elif fault is Fault.DRIP:
            return self._drip(connection, head, body)
        connection.sendall(head + body)
        return True

    def _drip(self, connection: socket.socket, head: bytes, body: bytes) -> bool:
        connection.sendall(head)
        for number in range(len(body)):
            if self._closing.wait(_DRIP_S):
                return False
            connection.sendall(body[number : number + 1])
        return True


class _TcpServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], faults: FaultServer) -> None:
        self.faults = faults
        super().__init__(address, _Connection)


class _Connection(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        cast(_TcpServer, self.server).faults.serve(self.request)


@contextlib.contextmanager
def refusing() -> Iterator[str]:
    """An endpoint that refuses connections for as long as the block lasts: bound, and not listening."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def _read_request(reader: BinaryIO) -> _Message | None:
    lines = []
    while line := reader.readline():
        lines.append(line)
        if line == b"\r\n":
            break
    else:
        return None
    length = next((line[15:] for line in lines if line.lower().startswith(b"content-length:")), b"0")
    return _Message(b"".join(lines), reader.read(int(length)))


def _forwarded(upstream: str, request: _Message) -> _Message:
    host, port = upstream.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(request.head + request.body)
        response = http.client.HTTPResponse(connection, method=request.method)
        response.begin()
        body = response.read()
        kept = {"content-length": str(len(body))} if request.method != "HEAD" else {}
        skipped = {"transfer-encoding", "connection", *kept}
        headers = {name: value for name, value in response.getheaders() if name.lower() not in skipped}
        return _message(response.status, body, {**headers, **kept})


def _error(status: int, code: str) -> _Message:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as ordered</Message></Error>".encode()
    return _message(status, body, {"Content-Type": "application/xml", "Retry-After": "3600"})


def _message(status: int, body: bytes, headers: dict[str, str]) -> _Message:
    if not any(name.lower() == "content-length" for name in headers):
        headers = {**headers, "Content-Length": str(len(body))}
    lines = [f"HTTP/1.1 {status} {http.client.responses[status]}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return _Message("\r\n".join([*lines, "", ""]).encode("latin-1"), body)
