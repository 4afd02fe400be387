"""What a service stands: answers a second, and the time to an answer, with so many clients at once.

Each client keeps one connection and asks again as soon as it has its answer: a *closed loop*. The
more clients, the more requests wait at the service at any moment, and the larger its batches can
be; a client that waits long asks less often. (An open loop, where requests come at their own times,
shows how a service fails under more load than it can bear; see Schroeder, Wierman and
Harchol-Balter, 2006, "Open versus closed: a cautionary tale".)
"""

import asyncio
import json
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import requests
from tqdm.auto import tqdm

_WARM_UP_S = 0.3
_PATIENCE_S = 30.0  # for one answer


@dataclass(frozen=True)
class Request:
    """What each client sends, again and again.

    Attributes:
        url: ``http://host:port/path``.
        body: bytes, or an object that becomes JSON; without one the method is GET, else POST.
        headers: beside ``Host``, ``Content-Type`` and ``Content-Length``.

    Raises:
        ValueError: an address that is not ``http://``.
    """

    url: str
    body: object = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"url is {self.url!r}; give one that starts with http://")

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return parts.hostname, parts.port or 80

    @property
    def method(self) -> str:
        return "GET" if self.body is None else "POST"

    @property
    def content(self) -> bytes:
        """The body in bytes."""
        if self.body is None:
            return b""
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()

    @property
    def fields(self) -> dict[str, str]:
        """The headers, with the type of the body."""
        if self.body is None:
            return dict(self.headers)
        kind = "octet-stream" if isinstance(self.body, bytes) else "json"
        return {**self.headers, "Content-Type": f"application/{kind}"}

    def wait(self, seconds: float = 20.0) -> None:
        """Until the service answers, whatever it says.

        Raises:
            TimeoutError: it has not within so many seconds.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(requests.RequestException):
                requests.request(
                    self.method, self.url, data=self.content, headers=self.fields, timeout=seconds
                )
                return
            time.sleep(0.1)
        raise TimeoutError(f"nobody answers at {self.url} within {seconds:g} s")

    def encoded(self) -> bytes:
        """The request as it goes over the wire."""
        parts = urlsplit(self.url)
        lines = [f"{self.method} {parts.path or '/'} HTTP/1.1", f"Host: {parts.netloc}"]
        lines += [f"{k}: {v}" for k, v in self.fields.items()]
        if self.body is not None:
            lines.append(f"Content-Length: {len(self.content)}")
        return "\r\n".join([*lines, "", ""]).encode() + self.content


def load(
    services: Mapping[str, Request],
    *,
    clients: Sequence[int] = (1, 16, 64),
    seconds: float = 2.0,
    rounds: int = 1,
    progress: bool = False,
) -> pd.DataFrame:
    """Put services under load, one after the other.

    Args:
        services: name -> what its clients send.
        clients: numbers of clients at once.
        seconds: of each measurement, after a short warm-up.
        rounds: how often to go through all services, so that a slow moment meets each of them.

    Returns:
        A row for each service and number of clients: ``name``, ``clients``, ``requests_per_s``,
        ``p50_ms`` and ``p99_ms``, all of good answers, whose number is ``answers``; ``refused``
        (status 429) and ``failed`` (any other status, or no answer).

    Raises:
        ValueError: no services, or a count out of range.

    Shown in notebook 14.
    """
    counts = [*clients]
    if not services:
        raise ValueError("services is empty; give name -> Request")
    if not counts or min(counts) < 1 or not seconds > 0 or rounds < 1:
        raise ValueError(
            f"clients is {counts}, seconds {seconds}, rounds {rounds}; give clients and rounds "
            "from 1 and seconds above 0"
        )
    turns = [(n, name) for _ in range(rounds) for n in counts for name in services]
    measured: dict[tuple[int, str], list[_Turn]] = {}
    for count, name in tqdm(turns, desc="load", unit="run", disable=not progress):
        # A loop of its own: in a notebook, the main thread has one already.
        with ThreadPoolExecutor(1) as thread:
            turn = thread.submit(asyncio.run, _turn(services[name], count, seconds)).result()
        measured.setdefault((count, name), []).append(turn)
    return pd.DataFrame([_row(name, n, turns) for (n, name), turns in measured.items()])


def wrk(
    services: Mapping[str, Request],
    *,
    clients: Sequence[int] = (1, 16, 64),
    seconds: int = 5,
    progress: bool = False,
) -> pd.DataFrame:
    """What `load` measures, with the program wrk as the clients.

    Clients in Python take about as much time as a good server does, and on a small machine they
    take it from the server; wrk takes little. It does not tell refusals from failures.

    Returns:
        The columns of `load` without ``refused``.

    Raises:
        FileNotFoundError: wrk is not installed.

    Reference: Glozer (2012), "wrk, a HTTP benchmarking tool".
    """
    if shutil.which("wrk") is None:
        raise FileNotFoundError("wrk is not installed; it is a package of most systems")
    turns = [(name, n) for name in services for n in clients]
    rows = []
    for name, count in tqdm(turns, desc="load", unit="run", disable=not progress):
        rows.append({"name": name, "clients": count} | _wrk(services[name], count, seconds))
    return pd.DataFrame(rows)


# Lua's long brackets hold any text without "]==]", which no JSON of numbers has.
_SCRIPT = """
wrk.method, wrk.body = "%s", [==[%s]==]
%s
function done(summary, latency, requests)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.timeout + errors.status
  print(string.format("RESULT %%d %%d %%f %%f %%f", summary.requests, failed,
    summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
"""


def _wrk(request: Request, count: int, seconds: int) -> dict:
    headers = "\n".join(f"wrk.headers[{k!r}] = {v!r}" for k, v in request.fields.items())
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(_SCRIPT % (request.method, request.content.decode(), headers))
        file.flush()
        command = ["wrk", "-t1", f"-c{count}", f"-d{seconds}s", "-s", file.name, request.url]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    answers, failed, took, p50, p99 = map(float, shown.split("RESULT")[1].split())
    measured = {"requests_per_s": (answers - failed) / took, "p50_ms": p50, "p99_ms": p99}
    return measured | {"answers": int(answers - failed), "failed": int(failed)}


@dataclass
class _Turn:
    """What one measurement saw."""

    seconds: float
    milliseconds: list[float] = field(default_factory=list)  # of good answers
    statuses: Counter = field(default_factory=Counter)  # 0 where there was no answer


async def _turn(request: Request, count: int, seconds: float) -> _Turn:
    turn, start = _Turn(seconds), time.perf_counter() + _WARM_UP_S
    await asyncio.gather(*(_client(request, turn, start, start + seconds) for _ in range(count)))
    return turn


async def _client(request: Request, turn: _Turn, start: float, end: float) -> None:
    """Ask until the end; answers that come between start and end count."""
    message, writer = request.encoded(), None
    while (asked := time.perf_counter()) < end:
        status = 0
        try:
            async with asyncio.timeout(_PATIENCE_S):
                if writer is None:
                    reader, writer = await asyncio.open_connection(*request.address)
                writer.write(message)
                status, stays = await _answer(reader)
        except (OSError, asyncio.IncompleteReadError):  # TimeoutError is an OSError
            stays = False
            await asyncio.sleep(0.01)
        answered = time.perf_counter()
        if start <= answered <= end:
            turn.statuses[status] += 1
            if status == 200:
                turn.milliseconds.append(1e3 * (answered - asked))
        if not stays and writer is not None:
            writer.close()
            writer = None
    if writer is not None:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Status of the next answer, and whether the connection stays open after it."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    first, *lines = head.strip().split("\r\n")
    headers = dict(line.split(":", 1) for line in lines)
    length = headers.get("content-length")
    if length is None:
        await reader.read()  # to the end of the connection
        return int(first.split()[1]), False
    await reader.readexactly(int(length))
    closes = first.startswith("http/1.0") or "close" in headers.get("connection", "")
    return int(first.split()[1]), not closes


def _row(name: str, count: int, turns: list[_Turn]) -> dict:
    milliseconds = np.concatenate([turn.milliseconds for turn in turns])
    statuses = sum((turn.statuses for turn in turns), Counter())
    good, refused = statuses.pop(200, 0), statuses.pop(429, 0)
    p50, p99 = np.percentile(milliseconds, (50, 99)) if good else (np.nan, np.nan)
    return {
        "name": name,
        "clients": count,
        "requests_per_s": good / sum(turn.seconds for turn in turns),
        "p50_ms": p50,
        "p99_ms": p99,
        "answers": good,
        "refused": refused,
        "failed": statuses.total(),
    }
