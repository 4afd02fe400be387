"""`measure.load` against servers whose speed and failures are known."""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from workbench.measure.load import Request, load, wrk


@contextmanager
def service(answer, *, protocol: str = "HTTP/1.1") -> Iterator[tuple[str, list]]:
    """A server's address and what it was sent; ``answer(number)`` gives status and seconds."""
    seen: list[tuple[str, bytes, object]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = protocol

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                seen.append((self.command + " " + self.path, body, self.client_address))
                status, seconds = answer(len(seen))
            time.sleep(seconds)
            if status is None:
                self.close_connection = True
                return
            content = b"x" * 1000
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_clients_are_many_at_once_and_times_are_those_of_the_service():
    with service(lambda number: (200, 0.1)) as (url, seen):
        frame = load({"slow": Request(url)}, clients=(1, 8), seconds=1.0)
    one, eight = frame.to_dict("records")
    assert 1 <= one["answers"] <= 10  # a tenth of a second each
    assert 2 * one["answers"] < eight["answers"] <= 80
    assert one["p50_ms"] >= 100
    assert eight["p99_ms"] >= eight["p50_ms"] >= 100
    assert one["requests_per_s"] == one["answers"]
    assert (frame["failed"] == 0).all()
    assert len(seen) >= frame["answers"].sum()


def test_body_path_and_headers_arrive_and_the_connection_is_kept():
    with service(lambda number: (200, 0.01)) as (url, seen):
        load({"a": Request(f"{url}/predict", {"inputs": [1, 2]})}, clients=(2,), seconds=0.2)
    assert {(line, body) for line, body, _ in seen} == {("POST /predict", b'{"inputs": [1, 2]}')}
    assert len({address for *_, address in seen}) == 2
    with service(lambda number: (200, 0.01)) as (url, seen):
        load({"a": Request(url, b"\0\1", {"X-Y": "z"})}, clients=(1,), seconds=0.1)
    assert {body for _, body, _ in seen} == {b"\0\1"}


def test_a_service_that_closes_each_connection_is_measured_too():
    with service(lambda number: (200, 0.01), protocol="HTTP/1.0") as (url, seen):
        frame = load({"old": Request(url)}, clients=(1,), seconds=0.3)
    assert frame["failed"].item() == 0
    assert len({address for *_, address in seen}) == len(seen) > 3


def test_refusals_and_failures_are_told_apart_from_good_answers():
    statuses = {0: 200, 1: 429, 2: 500, 3: None}
    with service(lambda number: (statuses[number % 4], 0.01)) as (url, _):
        row = load({"moody": Request(url)}, clients=(1,), seconds=1.0).iloc[0]
    assert row["answers"] > 3
    assert abs(row["answers"] - row["refused"]) <= 1
    assert abs(2 * row["answers"] - row["failed"]) <= 2
    assert row["requests_per_s"] == row["answers"]


def test_nobody_there_is_a_failure_without_a_time():
    with service(lambda number: (200, 0)) as (url, _):
        pass
    row = load({"gone": Request(url)}, clients=(1,), seconds=0.2).iloc[0]
    assert row["answers"] == 0
    assert row["failed"] > 0
    assert row["p50_ms"] != row["p50_ms"]


def test_services_take_turns():
    order = []
    with (
        service(lambda n: (order.append("a"), (200, 0.05))[1]) as (first, _),
        service(lambda n: (order.append("b"), (200, 0.05))[1]) as (second, _),
    ):
        frame = load(
            {"a": Request(first), "b": Request(second)}, clients=(1,), seconds=0.2, rounds=2
        )
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["a", "b", "a", "b"]
    assert frame["name"].tolist() == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clients": ()}, "clients is"),
        ({"clients": (0,)}, r"clients is \[0\]"),
        ({"seconds": 0}, "seconds 0"),
        ({"rounds": 0}, "rounds 0"),
    ],
)
def test_counts_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load({"a": Request("http://127.0.0.1:1")}, **arguments)


def test_no_service_and_no_http_are_refused():
    with pytest.raises(ValueError, match="services is empty"):
        load({})
    with pytest.raises(ValueError, match="http://"):
        Request("127.0.0.1:80")


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_wrk_sends_what_load_sends_and_counts_alike():
    with service(lambda number: (200 if number % 4 else 503, 0.005)) as (url, seen):
        request = Request(url, {"inputs": [[1.5, "a]=b"]]}, {"X-Key": "k"})
        row = wrk({"it": request}, clients=[2], seconds=1).iloc[0]
    assert {body for _, body, _ in seen} == {b'{"inputs": [[1.5, "a]=b"]]}'}
    assert row["name"] == "it"
    assert row["clients"] == 2
    assert row["answers"] / (row["answers"] + row["failed"]) == pytest.approx(0.75, abs=0.05)
    assert row["p99_ms"] >= row["p50_ms"] > 4


def test_wait_ends_when_somebody_answers():
    with service(lambda number: (500, 0)) as (url, seen):
        Request(url, {"a": 1}).wait()
        assert seen[0][1] == b'{"a": 1}'
    with pytest.raises(TimeoutError, match=r"nobody answers at .* within 0.3 s"):
        Request(url).wait(0.3)


def test_wrk_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="wrk is not installed"):
        wrk({"it": Request("http://127.0.0.1:1/")})
