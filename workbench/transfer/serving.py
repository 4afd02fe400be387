"""A small web server for one folder, on this machine only: to see and test how a model travels.

It knows byte ranges, can be slowed down to the rate of a real line, and can break connections on
purpose. It is made for notebooks and tests; to the world, a folder is served by nginx or the like.
"""

import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit


class Server(ThreadingHTTPServer):
    """What `serve` gives: its ``url``, and what has been sent so far."""

    daemon_threads = True

    def __init__(self, folder: Path, rate_mbit_s: float | None, break_at_bytes: Sequence[int]):
        self.folder = folder.resolve()
        self.rate_mbit_s = rate_mbit_s
        self.sent_bytes = 0  # of files, without the headers of answers
        self.requests = 0
        self._granted_bytes = 0
        self._breaks = sorted(break_at_bytes)
        self._free_at = 0.0  # when the line is free again
        self._lock = threading.Lock()
        self._open: dict[threading.Thread, socket.socket] = {}
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def grant(self, size_bytes: int) -> int:
        """Wait for the line; returns how many of these bytes may be sent before it breaks."""
        with self._lock:
            if self._breaks and self._granted_bytes + size_bytes > self._breaks[0]:
                size_bytes = self._breaks.pop(0) - self._granted_bytes
            self._granted_bytes += size_bytes
            now = time.monotonic()
            if self.rate_mbit_s is not None:
                self._free_at = max(self._free_at, now) + size_bytes * 8e-6 / self.rate_mbit_s
            wait_seconds = self._free_at - now
        if wait_seconds > 0:
            time.sleep(wait_seconds)
        return size_bytes

    def count(self, *, sent_bytes: int = 0, requests: int = 0) -> None:
        with self._lock:
            self.sent_bytes += sent_bytes
            self.requests += requests

    def process_request(self, request: socket.socket, client_address: tuple) -> None:
        """A thread for each connection, as in the base class, but known by `close`."""
        thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), daemon=True
        )
        with self._lock:
            self._open = {t: s for t, s in self._open.items() if t.is_alive() or t.ident is None}
            self._open[thread] = request
        thread.start()

    def handle_error(self, request: socket.socket, client_address: tuple) -> None:
        """A client that goes away is no error of the server's."""

    def close(self) -> None:
        """End every connection and its thread."""
        self.shutdown()
        self.server_close()
        for thread, request in self._open.items():
            with suppress(OSError):  # it has ended by itself
                request.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextmanager
def serve(
    folder: str | os.PathLike,
    *,
    rate_mbit_s: float | None = None,
    break_at_bytes: Sequence[int] = (),
) -> Iterator[Server]:
    """Serve the files of a folder over HTTP to this machine, until the ``with`` block ends.

    ``server.url`` is what `fetch` takes; ``server.sent_bytes`` and ``server.requests`` count. Only
    plain files inside the folder are given: no listing, and no link that leads out of it.

    Args:
        rate_mbit_s: of the line that all connections share; None is as fast as it goes.
        break_at_bytes: each time the server has sent this many bytes in all, the connection that
            sends is cut in the middle.

    Raises:
        ValueError: not a folder, or a rate or a byte count that is not positive.

    >>> with serve(".") as server:
    ...     server.url.startswith("http://127.0.0.1:")
    True
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder; give the one that holds the model's files")
    if rate_mbit_s is not None and not rate_mbit_s > 0:
        raise ValueError(f"rate_mbit_s is {rate_mbit_s}; give more than 0, or None for no limit")
    if any(count < 1 for count in break_at_bytes):
        raise ValueError(f"break_at_bytes is {break_at_bytes}; give counts of 1 byte or more")
    server = Server(Path(folder), rate_mbit_s, break_at_bytes)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()


_SEND_BYTES = 2**13  # at a time, on a slow line
_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open between requests
    timeout = 30

    def setup(self) -> None:
        if self.server.rate_mbit_s is not None:
            # What waits in a buffer counts as sent, so keep it short on a slow line.
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _SEND_BYTES)
        super().setup()

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Notebooks need no log of requests."""

    def _answer(self, with_body: bool) -> None:
        self.server.count(requests=1)
        path = self._path()
        if path is None:
            self.send_error(404)
            return
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            etag = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
            modified = formatdate(status.st_mtime, usegmt=True)
            start, end = 0, status.st_size
            asked = self._range(status.st_size)
            if asked is not None and self.headers.get("If-Range", etag) in (etag, modified):
                start, end = asked
                if start >= end:
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{status.st_size}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{status.st_size}")
            else:
                self.send_response(200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(end - start))
            self.send_header("ETag", etag)
            self.send_header("Last-Modified", modified)
            self.end_headers()
            if with_body:
                file.seek(start)
                self._send(file, end - start)

    def _send(self, file: BinaryIO, left: int) -> None:
        piece_bytes = _SEND_BYTES if self.server.rate_mbit_s is not None else 2**18
        while left:
            data = file.read(min(left, piece_bytes))
            granted = self.server.grant(len(data))
            self.wfile.write(data[:granted])
            self.server.count(sent_bytes=granted)
            left -= len(data)
            if granted < len(data) or not data:  # the line breaks, or the file became shorter
                self.close_connection = True
                return

    def _path(self) -> Path | None:
        """The file that is asked for, if it lies inside the folder with all links followed."""
        name = unquote(urlsplit(self.path).path).lstrip("/")
        try:
            path = (self.server.folder / name).resolve()
            inside = path.is_relative_to(self.server.folder) and path.is_file()
        except (ValueError, OSError):  # a zero byte, or a name that is too long
            return None
        return path if inside else None

    def _range(self, size_bytes: int) -> tuple[int, int] | None:
        """First byte and end of the one range asked for; of several, none is honoured."""
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        if match is None or match.groups() == ("", ""):
            return None
        first, last = match.groups()
        if not first:
            return max(0, size_bytes - int(last)), size_bytes
        end = min(int(last) + 1, size_bytes) if last else size_bytes
        if last and int(last) < int(first):
            return None
        return int(first), end
