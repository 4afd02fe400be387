"""Where a model is fetched from: a folder, or a web server that knows byte ranges."""

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import quote, urlsplit

from workbench.transfer.manifests import LIMIT_BYTES, IntegrityError, read_small

if TYPE_CHECKING:
    from requests import Response

PIECE_BYTES = 2**17  # read and written at a time


class Source(Protocol):
    """Where files come from. Failures that may pass are ConnectionErrors."""

    def close(self) -> None:
        """End all connections."""

    def small(self, name: str) -> bytes | None:
        """A whole file of at most `LIMIT_BYTES`; None if it is not there."""

    def read(self, name: str, start: int, size_bytes: int) -> Iterator[bytes]:
        """Exactly these bytes of a file, in pieces."""


def open_source(source: str | os.PathLike, timeout_seconds: float) -> Source:
    address = os.fspath(source)
    if "://" in address:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError(f"{address} is no http:// or https:// address of a folder")
        return _Web(address, timeout_seconds)
    if not Path(source).is_dir():
        raise ValueError(f"{address} is not a folder; give one, or an http:// address")
    return _Folder(Path(source))


class Link:
    """A source for one thread, which counts, and knows when to give up."""

    def __init__(
        self, source: Source, retries: int, generator: random.Random, stop: threading.Event
    ):
        self.source, self.most_retries, self.generator, self.stop = source, retries, generator, stop
        self.transferred_bytes = self.retries = 0

    def close(self) -> None:
        self.source.close()

    def small(self, name: str) -> bytes | None:
        """A whole file, tried again after failures; None if the source does not have it."""
        failures = 0
        while True:
            try:
                data = self.source.small(name)
            except ConnectionError as error:
                failures += 1
                self.pause(failures, error)
                continue
            self.transferred_bytes += len(data or b"")
            return data

    def read(self, name: str, start: int, size_bytes: int) -> Iterator[bytes]:
        for data in self.source.read(name, start, size_bytes):
            self.transferred_bytes += len(data)
            yield data

    def pause(self, failures: int, error: ConnectionError) -> None:
        """Wait, longer each time, or raise when it has failed too often in a row."""
        if failures > self.most_retries:
            raise ConnectionError(f"gave up after {failures} tries in a row: {error}") from error
        self.retries += 1
        self.stop.wait(self.generator.uniform(0, min(10, 0.1 * 2**failures)))


class _Folder:
    def __init__(self, folder: Path):
        self.folder = folder

    def close(self) -> None:
        """Nothing stays open between reads."""

    def small(self, name: str) -> bytes | None:
        path = self.folder / name
        return read_small(path) if path.is_file() else None

    def read(self, name: str, start: int, size_bytes: int) -> Iterator[bytes]:
        path = self.folder / name
        if not path.is_file():
            raise IntegrityError(f"{name} is missing in {self.folder}")
        with open(path, "rb") as file:
            file.seek(start)
            while size_bytes:
                data = file.read(min(size_bytes, PIECE_BYTES))
                if not data:
                    raise IntegrityError(f"{path} is cut short: it ends before {start} bytes")
                size_bytes -= len(data)
                start += len(data)
                yield data


class _Web:
    def __init__(self, address: str, timeout_seconds: float):
        import requests

        self.address = address.rstrip("/")
        self.timeout_seconds = timeout_seconds
        self.session = requests.Session()
        # No proxy between a machine and itself, whatever the environment says.
        self.session.trust_env = urlsplit(address).hostname not in ("127.0.0.1", "localhost", "::1")

    def close(self) -> None:
        self.session.close()

    def small(self, name: str) -> bytes | None:
        with self._get(name) as response:
            if response.status_code in (404, 410):
                return None
            if response.status_code != 200:
                raise ValueError(f"{response.url} answered {response.status_code}, not 200")
            data = b"".join(self._pieces(response, LIMIT_BYTES + 1))
        if len(data) > LIMIT_BYTES:
            raise IntegrityError(f"{name} at {self.address} has more than {LIMIT_BYTES} bytes")
        return data

    def read(self, name: str, start: int, size_bytes: int) -> Iterator[bytes]:
        range_ = f"bytes={start}-{start + size_bytes - 1}"
        with self._get(name, Range=range_) as response:
            if response.status_code != 206:
                why = "; the server must know ranges" if response.status_code == 200 else ""
                raise ValueError(f"{response.url} answered {response.status_code} to {range_}{why}")
            for data in self._pieces(response, size_bytes):
                size_bytes -= len(data)
                yield data
        if size_bytes:
            raise ConnectionError(f"{name}: the answer ended {size_bytes} bytes early")

    @contextmanager
    def _get(self, name: str, **headers: str) -> "Iterator[Response]":
        import requests
        import urllib3

        # A compressed answer would have other byte positions.
        headers = {"Accept-Encoding": "identity", **headers}
        url = f"{self.address}/{quote(name)}"
        try:
            with self.session.get(
                url, headers=headers, stream=True, timeout=self.timeout_seconds
            ) as response:
                if response.status_code in (408, 429) or response.status_code >= 500:
                    raise ConnectionError(f"{url} answered {response.status_code}")
                yield response
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise ConnectionError(f"{url}: {error}") from error

    @staticmethod
    def _pieces(response: "Response", most_bytes: int) -> Iterator[bytes]:
        while most_bytes:
            # What is there, without waiting for more: a process that is killed loses nothing else.
            data = response.raw.read1(min(most_bytes, PIECE_BYTES))
            if not data:
                return
            most_bytes -= len(data)
            yield data
