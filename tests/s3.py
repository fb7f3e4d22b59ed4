"""An S3 server on loopback behind a proxy that spoils answers on demand, and a plain file server.

The fixtures are those of every test: ``s3_corpus(folder) -> URL`` puts a corpus on the server, and
``s3_corpus.proxy`` is the proxy; ``file_server(folder) -> FileServer``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import http.server
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

import pytest

BUCKET = "cells"


@dataclasses.dataclass
class Fault:
    """What happens to the answers to the GETs whose path holds ``where``.

    Attributes:
      kind: "slow" (answers after ``seconds``), "503", "429", "403", "reset" (hangs up at once), "close"
        (hangs up after half of the body), "stall" (sends half, the rest after ``seconds``), "short" (sends
        half, and says so), "flip" (one bit of the body differs).
      where: part of the path.
      times: how many answers are spoiled; the others are as they should be.
    """

    kind: str
    where: str = ""
    times: int = 10**9
    seconds: float = 30.0


class Proxy(http.server.ThreadingHTTPServer):
    """Hands requests on to an S3 server.

    Attributes:
      faults: in effect now; the first that fits is applied.
      requests: (method, path, Range header) of all that came.
      most: most requests that were under way at a time.
    """

    daemon_threads = True

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str]] = []
        self.lock, self.now, self.most = threading.Lock(), 0, 0
        self.hold = 0.0  # seconds that every answer takes, so that requests overlap

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """A client that hung up is no event."""

    def spoil(self, kind: str, where: str = "", times: int = 10**9, seconds: float = 30.0) -> None:
        """Adds a fault; with ``heal`` all end."""
        self.faults.append(Fault(kind, where, times, seconds))

    def heal(self) -> None:
        self.faults.clear()

    def fault(self, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.where in path and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def gets(self, where: str = "") -> list[tuple[str, str]]:
        """(path, range) of the GETs whose path holds ``where``."""
        return [(path, span) for method, path, span in self.requests if method == "GET" and where in path]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body waits 40 ms for the headers to be acknowledged
    server: Proxy

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.requests.append((self.command, self.path, self.headers.get("Range", "")))
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            time.sleep(server.hold)
            self._answer(server.fault(self.path) if self.command == "GET" else None)
        finally:
            with server.lock:
                server.now -= 1

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _answer(self, fault: Fault | None) -> None:
        kind = fault.kind if fault else ""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if kind == "reset":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if kind == "slow" and fault:
            time.sleep(fault.seconds)
        if kind.isdigit():
            self.send_response(int(kind))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=30)
        try:
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            content, headers = answer.read(), dict(answer.getheaders())
        finally:
            upstream.close()
        if kind == "flip":
            content = (
                content[: len(content) // 2]
                + bytes([content[len(content) // 2] ^ 1])
                + content[len(content) // 2 + 1 :]
            )
        sent = content[: len(content) // 2] if kind in ("short", "close") else content
        self.send_response(answer.status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "server", "date"):
                self.send_header(name, value)
        length = len(sent) if kind == "short" else len(content)
        if self.command == "HEAD":
            length = int(headers.get("Content-Length", headers.get("content-length", 0)))
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if kind == "stall" and fault:
            self.wfile.write(sent[: len(sent) // 2])
            time.sleep(fault.seconds)
            sent = sent[len(sent) // 2 :]
        self.wfile.write(sent)
        if kind == "close":
            self.close_connection = True


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """The port of a fresh moto server in a process of its own, with the bucket made."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        make = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
        for _ in range(600):
            assert server.poll() is None, "the S3 server ended"
            with contextlib.suppress(OSError), urllib.request.urlopen(make, timeout=10):
                break
            time.sleep(0.1)
        else:
            pytest.fail("the S3 server does not come up")
        yield port
    finally:
        server.terminate()
        server.wait(30)


@contextlib.contextmanager
def serving(server: http.server.ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    with s3_server() as port:
        yield port


@pytest.fixture
def s3_proxy(s3_port, monkeypatch, tmp_path) -> Iterator[Proxy]:
    """The proxy before the server; the environment sends S3 requests, and the cache, there."""
    proxy = Proxy(s3_port)
    with serving(proxy):
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        monkeypatch.setenv("SCJAX_CACHE", str(tmp_path / "default-cache"))
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1")
        yield proxy


def upload(folder: pathlib.Path, port: int, prefix: str) -> str:
    """Puts a corpus folder on the server, past the proxy; returns its URL."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                target = f"/{BUCKET}/{prefix}/{path.relative_to(folder).as_posix()}".replace(" ", "%20")
                connection.request("PUT", target, path.read_bytes())
                answer = connection.getresponse()
                answer.read()
                assert answer.status == 200, (target, answer.status)
    finally:
        connection.close()
    return f"s3://{BUCKET}/{prefix}"


@pytest.fixture
def s3_corpus(s3_proxy):
    """Puts a corpus folder onto the S3 server: ``s3_corpus(folder) -> URL``.

    ``s3_corpus.proxy`` is the proxy that all requests go through.
    """
    count = 0

    def put(folder: pathlib.Path) -> str:
        nonlocal count
        count += 1
        return upload(pathlib.Path(folder), s3_proxy.upstream, f"{os.getpid()}-{id(s3_proxy)}-{count}")

    put.proxy = s3_proxy  # type: ignore[attr-defined]
    return put


class FileServer(http.server.ThreadingHTTPServer):
    """The files of a folder over plain HTTP, with ranges."""

    daemon_threads = True

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(("127.0.0.1", 0), _FileHandler)
        self.folder = folder
        self.requests: list[tuple[str, str]] = []  # path, Range header
        self.ranges = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """A client that hung up is no event."""


class _FileHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body waits 40 ms for the headers to be acknowledged
    server: FileServer

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Range", "")))
        path = self.server.folder / urllib.request.unquote(self.path).lstrip("/")
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size, span = path.stat().st_size, self.headers.get("Range", "bytes=0-")
        span = span if self.server.ranges else "bytes=0-"
        first, last = span.removeprefix("bytes=").split("-")
        last = min(int(last or size - 1), size - 1)
        with open(path, "rb") as file:
            file.seek(int(first))
            content = file.read(last + 1 - int(first))
        if "Range" in self.headers and self.server.ranges:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_GET


@pytest.fixture
def file_server(tmp_path, monkeypatch):
    """Serves folders: ``file_server(folder) -> FileServer``; the cache's default folder is the test's own."""
    pytest.importorskip("obstore")
    monkeypatch.setenv("SCJAX_CACHE", str(tmp_path / "default-cache"))
    with contextlib.ExitStack() as stack:

        def serve(folder: pathlib.Path) -> FileServer:
            server = FileServer(pathlib.Path(folder))
            stack.enter_context(serving(server))
            return server

        yield serve
