import gzip
import http.client
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from workbench import transfer
from workbench.transfer import fetching, manifests, sources
from workbench.transfer.manifests import INDEX, MANIFEST, File, IntegrityError

KIB = 2**10


def outgoing(
    folder: Path, tensors: dict, shard_bytes: int = 300 * KIB, chunk_bytes: int = 16 * KIB
) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".safetensors")
    save_file(tensors, path)
    return transfer.split(
        path, folder, shard_bytes=shard_bytes, chunk_bytes=chunk_bytes, progress=False
    )


def weights(count: int = 8, size: int = 30_000, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"layer{n}.weight": rng.normal(size=size).astype(np.float32) for n in range(count)}


fetch = partial(transfer.fetch, progress=False, retries=3, timeout_seconds=5)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path: Path, *places: int) -> None:
    data = bytearray(path.read_bytes())
    for place in places:
        data[place] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return outgoing(tmp_path_factory.mktemp("made") / "out", weights())


@pytest.fixture
def source(made, tmp_path):
    """Four shards of 240 KB in all 60 chunks and more, free to be damaged."""
    return shutil.copytree(made, tmp_path / "out")


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("connections", [1, 4, 9])
@pytest.mark.parametrize("over_http", [True, False], ids=["http", "folder"])
def test_what_arrives_is_what_was_sent_and_nothing_else_is_left(
    source, tmp_path, connections, over_http
):
    with transfer.serve(source) as server:
        done = fetch(server.url if over_http else source, tmp_path / "in", connections=connections)
    assert contents(tmp_path / "in") == contents(source)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    size_bytes = sum(map(len, contents(source).values()))
    assert done.transferred_bytes == size_bytes
    assert done.size_bytes == size_bytes - (source / MANIFEST).stat().st_size
    assert (done.folder, done.reused_bytes, done.retries) == (tmp_path / "in", 0, 0)
    assert done.seconds > 0
    if over_http:
        assert server.sent_bytes == size_bytes
    transfer.verify(tmp_path / "in", progress=False)


def test_a_second_fetch_reads_and_sends_nothing(source, tmp_path):
    fetch(source, tmp_path / "in")
    with transfer.serve(source) as server:
        done = fetch(server.url, tmp_path / "in")
    assert server.sent_bytes == done.transferred_bytes == (source / MANIFEST).stat().st_size


def test_only_damaged_chunks_are_fetched_again(source, tmp_path):
    fetch(source, tmp_path / "in")
    one, two, three, _ = sorted((tmp_path / "in").glob("*.safetensors"))
    flip(one, 20_000)
    flip(two, 30, 100_000)
    three.write_bytes(three.read_bytes()[:-5])
    (tmp_path / "in" / INDEX).unlink()
    with transfer.serve(source) as server:
        done = fetch(server.url, tmp_path / "in")
    assert contents(tmp_path / "in") == contents(source)
    hit = {one.name: (20_000,), two.name: (30, 100_000), three.name: (len(three.read_bytes()) - 1,)}
    chunks = [
        chunk.size_bytes
        for chunk in transfer.manifest(source).chunks()
        for place in hit.get(chunk.file, ())
        if chunk.offset <= place < chunk.offset + chunk.size_bytes
    ]
    assert len(chunks) == 4
    small_files = sum((source / name).stat().st_size for name in (MANIFEST, INDEX))
    assert done.transferred_bytes == small_files + sum(chunks)


@pytest.mark.parametrize("change", ["value", "removed", "added", "resharded"])
def test_with_an_older_version_only_the_difference_is_sent(tmp_path, change):
    old, new = weights(), weights()
    if change == "value":
        new["layer3.weight"][17] = 5
    elif change == "removed":
        del new["layer2.weight"]
    elif change == "added":
        new["aaa"] = np.ones(99, np.float32)
    out = outgoing(tmp_path / "new" / "out", new, 200 * KIB if change == "resharded" else 300 * KIB)
    had = outgoing(tmp_path / "old" / "out", old)
    fetch(had, tmp_path / "v1")
    before = contents(tmp_path / "v1")
    with transfer.serve(out) as server:
        done = fetch(server.url, tmp_path / "v2", have=tmp_path / "v1")
    assert contents(tmp_path / "v2") == contents(out)
    assert contents(tmp_path / "v1") == before
    expected = transfer.diff(had, out).changed_bytes
    assert done.transferred_bytes == expected + (out / MANIFEST).stat().st_size
    assert done.reused_bytes == done.size_bytes - expected
    assert expected < 40 * KIB
    # The one file before it was split serves as well.
    single = fetch(out, tmp_path / "v3", have=tmp_path / "old" / "out.safetensors")
    assert single.transferred_bytes < done.transferred_bytes + 10 * KIB


def test_a_damaged_older_version_costs_bytes_but_not_correctness(source, tmp_path):
    fetch(source, tmp_path / "v1")
    path = sorted((tmp_path / "v1").glob("*.safetensors"))[0]
    flip(path, 20_000)
    sorted((tmp_path / "v1").glob("*.safetensors"))[1].unlink()
    done = fetch(source, tmp_path / "v2", have=tmp_path / "v1")
    assert contents(tmp_path / "v2") == contents(source)
    missing = (source / "model-00002-of-00004.safetensors").stat().st_size
    assert missing < done.transferred_bytes < missing + 60 * KIB


CHILD = """
import sys
from workbench.transfer import fetch
fetch(sys.argv[1], sys.argv[2], progress=False)
"""


def start_fetching(url: str, folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", CHILD, url, folder])


def test_killed_five_times_at_random_points(tmp_path):
    source = outgoing(tmp_path / "out", weights(20, 100_000), 10**6, 64 * KIB)  # 8 MB
    size_bytes = sum(map(len, contents(source).values()))
    generator = random.Random(0)
    with transfer.serve(source, rate_mbit_s=80) as server:
        for stop in sorted(generator.sample(range(size_bytes // 20, size_bytes), 5)):
            child = start_fetching(server.url, tmp_path / "in")
            while server.sent_bytes < stop and child.poll() is None:
                time.sleep(0.001)
            child.kill()
            assert child.wait() == -signal.SIGKILL
            assert not (tmp_path / "in").exists()
        assert start_fetching(server.url, tmp_path / "in").wait() == 0
    assert contents(tmp_path / "in") == contents(source)
    assert not (tmp_path / "in.part").exists()
    assert server.sent_bytes <= 1.1 * size_bytes


def killed(action) -> None:
    """Run something in a process of its own that is killed by what was patched."""
    child = os.fork()
    if not child:
        try:
            action()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_while_renaming_leaves_nothing_then_all(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        killed(lambda: fetch(source, tmp_path / "in"))
    assert not (tmp_path / "in").exists()
    done = fetch(source, tmp_path / "in")
    assert done.reused_bytes == done.size_bytes
    assert contents(tmp_path / "in") == contents(source)


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_killed_while_repairing_leaves_each_file_old_or_right(
    source, tmp_path, monkeypatch, renamed
):
    fetch(source, tmp_path / "in")
    shards = sorted((tmp_path / "in").glob("*.safetensors"))
    for path in shards[:3]:
        flip(path, 50)
    before = contents(tmp_path / "in")
    left, really = iter(range(renamed)), os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *a: die() if next(left, None) is None else really(*a))
        killed(lambda: fetch(source, tmp_path / "in"))
    found, right = contents(tmp_path / "in"), contents(source)
    assert all(data in (before[name], right[name]) for name, data in found.items())
    assert sum(found[name] == right[name] for name in right) == len(right) - 3 + renamed
    fetch(source, tmp_path / "in")
    assert contents(tmp_path / "in") == right
    assert not (tmp_path / "in.part").exists()


def test_what_lies_beside_a_repaired_file_is_not_replaced(source, tmp_path, monkeypatch):
    """Half a file of a repair that was killed must not be renamed by the next."""
    fetch(source, tmp_path / "in")
    one, two = sorted((tmp_path / "in").glob("*.safetensors"))[:2]
    flip(one, 50)
    flip(two, 50)
    with monkeypatch.context() as patch:
        patch.setattr(fetching, "_carry", die)
        killed(lambda: fetch(source, tmp_path / "in"))
    shutil.copy(source / one.name, one)
    flip(tmp_path / "in.part" / one.name, 70)
    fetch(source, tmp_path / "in")
    assert contents(tmp_path / "in") == contents(source)


def test_what_has_arrived_of_a_chunk_is_kept_and_wrong_bytes_are_not_trusted(
    source, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        killed(lambda: fetch(source, tmp_path / "in"))
    part = tmp_path / "in.part" / "model-00001-of-00004.safetensors"
    data = bytearray(part.read_bytes())
    header = transfer.manifest(source).files[0].parts[0].size_bytes
    data[header + 10_000 :] = bytes(len(data) - header - 10_000)  # as if it had not come yet
    part.write_bytes(data)
    flip(part.with_name("model-00002-of-00004.safetensors"), 20_000)
    flip(part.with_name("model-00003-of-00004.safetensors"), 20_000)
    with open(part.with_name("model-00003-of-00004.safetensors"), "r+b") as file:
        file.seek(20_001)
        file.write(bytes(10_000))  # wrong bytes, then none
    with transfer.serve(source) as server:
        done = fetch(server.url, tmp_path / "in")
    assert contents(tmp_path / "in") == contents(source)
    missing = len(data) - header - 10_000
    rest = done.transferred_bytes - (source / MANIFEST).stat().st_size - missing
    assert 0 <= rest <= 4 * 16 * KIB


def test_a_part_of_another_version_is_not_continued(source, tmp_path, monkeypatch):
    other = outgoing(tmp_path / "other", weights(seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        killed(lambda: fetch(other, tmp_path / "in"))
    (tmp_path / "in.part" / "stray").touch()
    fetch(source, tmp_path / "in")
    assert contents(tmp_path / "in") == contents(source)


def test_the_line_may_break_any_number_of_times(source, tmp_path):
    breaks = range(40_000, 900_000, 40_000)
    with transfer.serve(source, rate_mbit_s=200, break_at_bytes=breaks) as server:
        done = fetch(server.url, tmp_path / "in", connections=2)
    assert contents(tmp_path / "in") == contents(source)
    assert len(breaks) - 4 <= done.retries <= len(breaks)
    assert server.sent_bytes <= 1.1 * done.size_bytes


class Liar(BaseHTTPRequestHandler):
    """Gives the right manifest, and then whatever ``answer`` says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = self.path.lstrip("/")
        if name == MANIFEST:
            self.reply(200, (self.server.folder / name).read_bytes())
        else:
            self.server.count += 1
            self.server.answer(self, name)

    def reply(self, status: int, body: bytes = b"", length: int | None = None, **headers: str):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for key, value in {"Connection": "close", **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def asked(self, name: str) -> bytes:
        if "Range" not in self.headers:
            return b""
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        return (self.server.folder / name).read_bytes()[int(first) : int(last) + 1]

    def log_message(self, *args):
        pass


@pytest.fixture
def liar(source):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Liar)
    server.daemon_threads = False
    server.folder, server.count = source, 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def hang_up(handler: Liar) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def absent_signature(answer):
    """The signature is not there; everything else is as ``answer`` says."""
    return lambda self, name: self.reply(404) if name == "model.sig" else answer(self, name)


def test_wrong_bytes_are_asked_for_three_times_and_never_kept(liar, tmp_path):
    liar.answer = absent_signature(lambda self, name: self.reply(206, bytes(len(self.asked(name)))))
    with pytest.raises(IntegrityError, match=r"chunk 0 of .* came wrong 3 times"):
        fetch(liar.url, tmp_path / "in", connections=1)
    assert liar.count == 4
    assert not (tmp_path / "in").exists()


def test_a_chunk_that_comes_wrong_once_is_fetched_again(liar, tmp_path):
    bad = iter([True, True])

    def answer(self, name):
        data = bytearray(self.asked(name))
        if next(bad, False):
            data[100] ^= 1
        self.reply(206, data)

    liar.answer = absent_signature(answer)
    done = fetch(liar.url, tmp_path / "in", connections=1)
    assert contents(tmp_path / "in") == contents(liar.folder)
    assert done.retries == 2


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda self, name: self.reply(500), ConnectionError, "gave up after 4 tries .* 500"),
        (lambda self, name: self.reply(429), ConnectionError, "answered 429"),
        (lambda self, name: self.reply(206), ConnectionError, "ended .* bytes early"),
        (lambda self, name: self.reply(206, length=9), ConnectionError, "gave up after"),
        (lambda self, name: hang_up(self), ConnectionError, "gave up after"),
        (lambda self, name: self.reply(404), ValueError, "answered 404"),
        (lambda self, name: self.reply(403), ValueError, "answered 403"),
        (lambda self, name: self.reply(200, b"x"), ValueError, "the server must know ranges"),
        (
            lambda self, name: self.reply(206, gzip.compress(self.asked(name)),
                                          Content_Encoding="gzip"),
            IntegrityError, "came wrong",
        ),
    ],
)  # fmt: skip
def test_servers_that_fail(liar, tmp_path, answer, error, message, monkeypatch):
    monkeypatch.setattr(sources.random.Random, "uniform", lambda *_: 0)
    liar.answer = absent_signature(answer)
    with pytest.raises(error, match=message):
        fetch(liar.url, tmp_path / "in")
    assert not (tmp_path / "in").exists()


def test_a_server_that_recovers_is_forgiven(liar, tmp_path):
    failures = iter(range(3))
    liar.answer = absent_signature(
        lambda self, name: (
            self.reply(503)
            if next(failures, None) is not None
            else self.reply(206, self.asked(name))
        )
    )
    assert fetch(liar.url, tmp_path / "in", connections=1).retries == 3
    assert contents(tmp_path / "in") == contents(liar.folder)


def test_no_compression_is_asked_for(liar, tmp_path):
    """A server that compresses where it may would give other bytes than the range asked for."""

    def answer(self, name):
        body, may = self.asked(name), "gzip" in self.headers["Accept-Encoding"]
        self.reply(206, gzip.compress(body) if may else body)

    liar.answer = absent_signature(answer)
    fetch(liar.url, tmp_path / "in")
    assert contents(tmp_path / "in") == contents(liar.folder)


def test_more_bytes_than_asked_for_are_not_read(liar, tmp_path):
    liar.answer = absent_signature(
        lambda self, name: self.reply(206, self.asked(name) + bytes(10**6))
    )
    done = fetch(liar.url, tmp_path / "in")
    assert contents(tmp_path / "in") == contents(liar.folder)
    assert done.transferred_bytes == sum(map(len, contents(liar.folder).values()))


def test_a_server_without_ranges_is_refused(source, tmp_path):
    class Plain(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Plain, directory=source)) as server:
        server.daemon_threads = False
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        with pytest.raises(ValueError, match=r"answered 200 to bytes=.*must know ranges"):
            fetch(f"http://127.0.0.1:{server.server_port}", tmp_path / "in")
        server.shutdown()
        thread.join()


def test_nobody_there_is_a_connection_error(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(ConnectionError, match="gave up after 2 tries in a row"):
        fetch(url, tmp_path / "in", retries=1)
    assert list(tmp_path.iterdir()) == []


def test_a_silent_server_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConnectionError, match="timed out"):
            fetch(url, tmp_path / "in", retries=1, timeout_seconds=0.1)


def test_pauses_double_up_to_ten_seconds_and_follow_the_seed():
    def pauses(seed: int) -> list[float]:
        waited = []
        stop = threading.Event()
        stop.wait = waited.append
        link = sources.Link(None, 9, random.Random(seed), stop)
        for failures in range(1, 10):
            link.pause(failures, ConnectionError("x"))
        with pytest.raises(ConnectionError, match="gave up after 10 tries in a row: x"):
            link.pause(10, ConnectionError("x"))
        assert link.retries == 9
        return waited

    most = [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10, 10]
    many = np.array([pauses(seed) for seed in range(200)])
    assert (many <= most).all()
    np.testing.assert_allclose(many.max(0), most, rtol=0.1)
    np.testing.assert_allclose(many.mean(0), np.array(most) / 2, rtol=0.2)
    assert pauses(1) == pauses(1) != pauses(2)


@pytest.mark.parametrize("over_http", [True, False])
def test_a_manifest_with_hostile_names_writes_nothing(source, tmp_path, over_http):
    book = transfer.manifest(source)
    for name in ("../evil", "/tmp/evil", "sub/evil"):
        bad = File(name, *(getattr(book.files[-1], f) for f in ("size_bytes", "sha256", "parts")))
        (source / MANIFEST).write_text(replace(book, files=(bad,)).text())
        with transfer.serve(source) as server, pytest.raises(IntegrityError, match="not safe"):
            fetch(server.url if over_http else source, tmp_path / "in")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_index_that_points_elsewhere_does_not_appear(source, tmp_path):
    (source / INDEX).write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    (source / MANIFEST).unlink()
    transfer.manifest(source, progress=False).write(source)
    with pytest.raises(IntegrityError, match="points to"):
        fetch(source, tmp_path / "in")
    assert not (tmp_path / "in").exists()


def test_sizes_that_are_claimed_cost_neither_memory_nor_disk(source, tmp_path, monkeypatch):
    with transfer.serve(source) as server, monkeypatch.context() as patch:
        for module in (manifests, sources):
            patch.setattr(module, "LIMIT_BYTES", 1000)
        for each in (server.url, source):
            with pytest.raises(IntegrityError, match=r"manifest.json.* has more than 1000 bytes"):
                fetch(each, tmp_path / "in")
        assert server.sent_bytes < 10**6
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=500_000))
    with pytest.raises(ValueError, match=r"bytes do not fit on the disk .* 50\d+ are free"):
        fetch(source, tmp_path / "in")


def test_a_manifest_that_contradicts_itself_is_refused(source, tmp_path):
    book = transfer.manifest(source)
    files = (replace(book.files[0], sha256="0" * 64), *book.files[1:])
    (source / MANIFEST).write_text(replace(book, files=files).text())
    with pytest.raises(IntegrityError, match="contradicts itself on its sha256"):
        fetch(source, tmp_path / "in")
    assert not (tmp_path / "in").exists()


def test_a_damaged_source_folder_is_named(source, tmp_path):
    one, two = sorted(source.glob("*.safetensors"))[:2]
    flip(one, 20_000)
    with pytest.raises(IntegrityError, match=f"{one.name}: chunk 1 .* came wrong 3 times"):
        fetch(source, tmp_path / "in")
    flip(one, 20_000)
    two.write_bytes(two.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=f"{two.name} is cut short"):
        fetch(source, tmp_path / "in2")
    two.unlink()
    with pytest.raises(IntegrityError, match=f"{two.name} is missing"):
        fetch(source, tmp_path / "in3")


def test_another_version_or_other_files_are_never_touched(source, tmp_path):
    target = fetch(outgoing(tmp_path / "old", weights(seed=1)), tmp_path / "in").folder
    before = contents(target)
    with pytest.raises(ValueError, match="holds another version; fetch into a new folder, with"):
        fetch(source, target)
    flip(target / MANIFEST, 500)
    with pytest.raises(ValueError, match=r"damaged.*; delete it, and fetch into a new folder"):
        fetch(source, target)
    (target / MANIFEST).unlink()
    with pytest.raises(ValueError, match="holds files without a"):
        fetch(source, target)
    assert contents(target) == {name: data for name, data in before.items() if name != MANIFEST}
    with pytest.raises(ValueError, match="is a file"):
        fetch(source, target / INDEX)
    (tmp_path / "empty").mkdir()
    fetch(source, tmp_path / "empty")
    assert contents(tmp_path / "empty") == contents(source)


def test_two_fetches_do_not_write_the_same_files(source, tmp_path):
    with (
        fetching._stage(tmp_path / "in", b""),
        pytest.raises(ValueError, match="another fetch is writing into"),
    ):
        fetch(source, tmp_path / "in")
    fetch(source, tmp_path / "in")


def test_an_interrupt_ends_all_threads_and_keeps_what_has_arrived(source, tmp_path, monkeypatch):
    def interrupted(futures):
        while server.sent_bytes < 300_000:
            time.sleep(0.001)
        raise KeyboardInterrupt

    with transfer.serve(source, rate_mbit_s=20) as server:
        with monkeypatch.context() as patch:
            patch.setattr(fetching, "as_completed", interrupted)
            with pytest.raises(KeyboardInterrupt):
                fetch(server.url, tmp_path / "in")
        assert not [t for t in threading.enumerate() if t.name.startswith("fetch")]
        assert not (tmp_path / "in").exists()
        done = fetch(server.url, tmp_path / "in")
    assert 200_000 < done.reused_bytes < 700_000
    assert contents(tmp_path / "in") == contents(source)


def test_a_signature_comes_along(source, tmp_path):
    (source / "model.sig").write_bytes(b"signed")
    with transfer.serve(source) as server:
        fetch(server.url, tmp_path / "in")
        assert (tmp_path / "in" / "model.sig").read_bytes() == b"signed"
        (source / "model.sig").write_bytes(b"signed anew")
        fetch(server.url, tmp_path / "in")
    assert contents(tmp_path / "in") == contents(source)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"connections": 0}, "connections is 0; give 1 to 100"),
        ({"connections": 2.5}, "connections is 2.5; give 1 to 100"),
        ({"retries": 101}, "retries is 101; give 1 to 100"),
        ({"timeout_seconds": 0}, "timeout_seconds is 0; give more than 0"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds is nan"),
        ({"have": "nowhere"}, "nowhere is no file and no folder"),
    ],
)
def test_settings_are_checked(source, tmp_path, settings_, message):
    with pytest.raises(ValueError, match=message):
        fetch(source, tmp_path / "in", **settings_)
    assert not (tmp_path / "in").exists()
    assert not (tmp_path / "in.part").exists()


@pytest.mark.parametrize("address", ["ftp://x/y", "http:///y", "http://x/y?z=1", "gopher://x/y"])
def test_other_addresses_are_refused(address, tmp_path):
    with pytest.raises(ValueError, match="is no http:// or https:// address"):
        fetch(address, tmp_path / "in")


def test_a_source_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no manifest.json; manifest\(folder\).write"):
        fetch(tmp_path, tmp_path / "in")
    with pytest.raises(ValueError, match="is not a folder; give one, or an http"):
        fetch(tmp_path / "gone", tmp_path / "in")
    with (
        transfer.serve(tmp_path) as server,
        pytest.raises(ValueError, match=r"has no manifest.json"),
    ):
        fetch(server.url, tmp_path / "in")


# The server


def ask(server, path: str, method: str = "GET", **headers: str) -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
    try:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, dict(response.headers), response.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "site"
    (folder / "sub").mkdir(parents=True)
    (folder / "a b").write_bytes(bytes(range(100)))
    (folder / "sub" / "c").write_bytes(b"deep")
    (folder / "empty").touch()
    (folder.parent / "secret").write_bytes(b"secret")
    (folder.parent / "site-secret").write_bytes(b"secret")
    (folder / "out").symlink_to(folder.parent / "secret")
    (folder / "up").symlink_to(folder.parent)
    (folder / "in").symlink_to(folder / "a b")
    return folder


@settings(max_examples=40)
@given(st.none() | st.integers(0, 120), st.none() | st.integers(0, 120))
def test_ranges_are_those_of_python(served, first, last):
    data = (served / "a b").read_bytes()
    with transfer.serve(served) as server:
        show = ("" if first is None else str(first)) + "-" + ("" if last is None else str(last))
        status, headers, body = ask(server, "/a%20b", Range=f"bytes={show}")
    if (first, last) == (None, None) or (None not in (first, last) and last < first):
        assert (status, body) == (200, data)
        return
    if first is None:
        expected = data[-last:] if last else b""
    else:
        expected = data[first:] if last is None else data[first : last + 1]
    assert body == expected
    if not expected:
        assert status == 416
        assert headers["Content-Range"] == "bytes */100"
    else:
        assert status == 206
        start = data.index(expected)
        assert headers["Content-Range"] == f"bytes {start}-{start + len(expected) - 1}/100"


def test_whole_files_heads_and_other_ranges(served):
    data = (served / "a b").read_bytes()
    with transfer.serve(served) as server:
        status, headers, body = ask(server, "/a%20b?x=1")
        assert (status, body, headers["Accept-Ranges"]) == (200, data, "bytes")
        status, headers, body = ask(server, "/a%20b", "HEAD")
        assert (status, body, headers["Content-Length"]) == (200, b"", "100")
        for other in ("bytes=0-1,5-6", "lines=0-1", "bytes=x-", "bytes=", "bytes=-", "bytes 0-1"):
            assert ask(server, "/a%20b", Range=other)[::2] == (200, data)
        assert ask(server, "/empty")[::2] == (200, b"")
        assert ask(server, "/sub/c")[::2] == (200, b"deep")
        assert ask(server, "/in")[::2] == (200, data)


def test_if_range_gives_the_rest_only_of_the_same_file(tmp_path):
    (tmp_path / "x").write_bytes(b"0123456789")
    with transfer.serve(tmp_path) as server:
        _, headers, _ = ask(server, "/x")
        for name in ("ETag", "Last-Modified"):
            answer = ask(server, "/x", Range="bytes=5-", If_Range=headers[name])
            assert answer[::2] == (206, b"56789")
        (tmp_path / "x").write_bytes(b"abcdefghij")
        os.utime(tmp_path / "x", (1, 1))
        for name in ("ETag", "Last-Modified"):
            answer = ask(server, "/x", Range="bytes=5-", If_Range=headers[name])
            assert answer[::2] == (200, b"abcdefghij")


def test_a_break_cuts_one_answer_in_the_middle(served):
    with transfer.serve(served, break_at_bytes=[30]) as server:
        with pytest.raises(http.client.IncompleteRead) as caught:
            ask(server, "/a%20b")
        assert caught.value.partial == bytes(range(30))
        assert ask(server, "/a%20b")[2] == bytes(range(100))
    assert (server.sent_bytes, server.requests) == (130, 2)


@pytest.mark.parametrize(
    "path",
    ["/", "/sub", "/nothing", "/../secret", "/%2e%2e/secret", "/..%2fsecret", "/sub/../../secret",
     "/out", "/up/secret", "//etc/passwd", "/%2fetc/passwd", "/../site-secret", "/a%00b",
     "/" + "a" * 5000, "/a%20b/x"],
)  # fmt: skip
def test_nothing_outside_the_folder_is_served(served, path):
    with transfer.serve(served) as server:
        status, _, body = ask(server, path)
    assert status == 404
    assert b"secret" not in body.removeprefix(b"x")
    assert server.sent_bytes == 0


def test_the_server_is_reached_from_this_machine_only(served):
    with transfer.serve(served) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert server.url == f"http://127.0.0.1:{server.server_port}"


def test_all_connections_share_the_rate(source, tmp_path):
    with transfer.serve(source, rate_mbit_s=40) as server:
        done = fetch(server.url, tmp_path / "in")
    # Never faster; how much slower depends on the machine.
    assert done.seconds >= 0.95 * server.sent_bytes * 8e-6 / 40


def test_the_server_ends_with_its_block_whatever_happens(source):
    def fail_in_the_middle():
        with transfer.serve(source, rate_mbit_s=1) as server:
            addresses.append(server.server_address)
            connections.extend(socket.create_connection(server.server_address) for _ in range(2))
            connections[1].sendall(b"GET /model-00001-of-00004.safetensors HTTP/1.1\r\n\r\n")
            connections[1].recv(10)
            raise ZeroDivisionError

    addresses, connections = [], []
    with pytest.raises(ZeroDivisionError):
        fail_in_the_middle()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(addresses[0], timeout=1)
    for connection in connections:
        connection.close()


def test_settings_of_the_server_are_checked(tmp_path):
    for settings_, message in (
        ({"rate_mbit_s": 0}, "rate_mbit_s is 0; give more than 0"),
        ({"rate_mbit_s": float("nan")}, "rate_mbit_s is nan"),
        ({"break_at_bytes": [0]}, "counts of 1 byte or more"),
    ):
        with pytest.raises(ValueError, match=message), transfer.serve(tmp_path, **settings_):
            pass
    with pytest.raises(ValueError, match="is not a folder"), transfer.serve(tmp_path / "x"):
        pass
