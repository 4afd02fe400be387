"""Bring a model from a folder or a web server to this machine, and trust nothing on the way.

What arrives is written to ``FOLDER.part``, checked chunk by chunk against the manifest, and renamed
when all of it is right. A break costs little: what lies in ``FOLDER.part`` is kept, even when the
process was killed, and only the rest is asked for.

No journal says what has arrived, since a journal can be wrong after a crash; the bytes themselves
say it. A chunk with the right sha256 is there. Any other chunk was written from its front into a
file that was zero everywhere, so of it all has arrived that comes before the zeros at its end.
"""

import hashlib
import os
import random
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from workbench.transfer.manifests import (
    INDEX,
    MANIFEST,
    SIGNATURE,
    Chunk,
    File,
    IntegrityError,
    Manifest,
    byte_bar,
    check_index,
    manifest,
    parse,
    read_chunks,
)
from workbench.transfer.sources import Link, open_source


@dataclass(frozen=True)
class Fetched:
    """What a fetch did. Bytes that had to be sent twice count twice as transferred."""

    folder: Path
    size_bytes: int  # of the model's files
    transferred_bytes: int  # received by this call, manifest and signature included
    reused_bytes: int  # found on this machine: left by a broken fetch, or in `have`
    retries: int  # requests that failed, or brought wrong bytes
    seconds: float


def fetch(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    have: str | os.PathLike | None = None,
    connections: int = 4,
    retries: int = 8,
    timeout_seconds: float = 10.0,
    seed: int = 0,
    progress: bool = True,
) -> Fetched:
    """Copy a folder that has a manifest from elsewhere to here; after a break, call it again.

    The folder appears whole and verified, or not at all. A version is never replaced by another,
    since a break could leave a mixture of the two: give each a folder of its own. Into a folder
    that has the same version, only damaged chunks are fetched. A signature comes along.

    Args:
        source: a folder, or the http:// or https:// address of one; the server must know ranges.
        folder: where the model shall be.
        have: an older version on this machine, a folder or a file. Chunks that are in it, wherever,
            are copied from there; `diff` tells which are not.
        connections: requests at a time.
        retries: failed requests in a row, without one byte, after which a connection gives up.
            Pauses between them are drawn with ``seed``, up to 0.2 seconds, then 0.4, ... 10.
        timeout_seconds: silence after which a request has failed.

    Raises:
        ValueError: a setting out of range, no manifest at the source, a folder that holds another
            version or other files, or too little room on the disk.
        IntegrityError: the manifest is damaged, or a chunk came wrong three times.
        ConnectionError: the source is out of reach; what has arrived is kept.

    Reference: Brooker (2015), "Exponential backoff and jitter".
    """
    start = time.perf_counter()
    folder = Path(folder)
    for name, value in {"connections": connections, "retries": retries}.items():
        if type(value) is not int or not 1 <= value <= 100:
            raise ValueError(f"{name} is {value!r}; give 1 to 100")
    if not 0 < timeout_seconds <= 3600:
        raise ValueError(f"timeout_seconds is {timeout_seconds}; give more than 0, to 3600")
    stop = threading.Event()
    with ExitStack() as opened:
        links = [
            Link(open_source(source, timeout_seconds), retries, random.Random(f"{seed} {n}"), stop)
            for n in range(connections)
        ]
        for link in links:
            opened.callback(link.close)
        content = links[0].small(MANIFEST)
        if content is None:
            raise ValueError(
                f"{source} has no {MANIFEST}; manifest(folder).write(folder) makes one there"
            )
        book = parse(content, f"{MANIFEST} of {source}")
        reused_bytes = _bring(links, folder, content, book, have, progress)
    return Fetched(
        folder,
        book.size_bytes,
        sum(link.transferred_bytes for link in links),
        reused_bytes,
        sum(link.retries for link in links),
        time.perf_counter() - start,
    )


RUN_BYTES = 2**23  # most bytes of one request
_TRIES = 3  # for a chunk that comes with other bytes than the manifest says


def _bring(
    links: list[Link],
    folder: Path,
    content: bytes,
    book: Manifest,
    have: str | os.PathLike | None,
    progress: bool,
) -> int:
    """Make the folder what its manifest says; returns how many bytes were on this machine."""
    is_there = _is_there(folder, book)
    local = _LocalChunks(book)
    wanted = book.files
    if is_there:
        wanted = tuple(file for file in book.files if not _is_right(folder, book, file))
        local.add(folder, book)
    if have is not None:
        local.add(Path(have), manifest(have, chunk_bytes=book.chunk_bytes, progress=progress))
    signature = links[0].small(SIGNATURE)
    with _stage(folder, content) as stage:
        reused_bytes = _gather(links, stage, Manifest(wanted, book.chunk_bytes), local, progress)
        if any(file.name == INDEX for file in wanted):
            check_index(stage, book)
        if signature is not None:
            (stage / SIGNATURE).write_bytes(signature)
        if is_there:  # the same version: each file is as good as the one it replaces, or better
            for name in [*(file.name for file in wanted), SIGNATURE]:
                if (stage / name).exists():
                    os.replace(stage / name, folder / name)
            shutil.rmtree(stage)
        else:
            os.replace(stage, folder)
    return reused_bytes


def _is_there(folder: Path, book: Manifest) -> bool:
    """Whether the folder has this version already; ValueError if it has anything else."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the folder where the model shall be")
    advice = f"fetch into a new folder, with have={str(folder)!r} to reuse what is the same"
    if (folder / MANIFEST).is_file():
        try:
            found = manifest(folder)
        except IntegrityError as error:
            raise ValueError(f"{error}; delete it, and {advice}") from None
        if found != book:
            raise ValueError(f"{folder} holds another version; {advice}")
        return True
    if any(folder.iterdir()):
        raise ValueError(f"{folder} holds files without a {MANIFEST}; {advice}")
    return False


def _is_right(folder: Path, book: Manifest, file: File) -> bool:
    try:
        return all(data is not None for _, data in read_chunks(folder, book, file))
    except IntegrityError:
        return False


class _LocalChunks:
    """Chunks of a manifest that lie somewhere on this machine, found by their sha256."""

    def __init__(self, book: Manifest):
        self.wanted = {chunk.sha256 for chunk in book.chunks()}
        self.places: dict[str, tuple[Path, int]] = {}

    def add(self, path: Path, book: Manifest) -> None:
        for chunk in book.chunks():
            if chunk.sha256 in self.wanted:
                place = path if path.is_file() else path / chunk.file
                self.places[chunk.sha256] = (place, chunk.offset)

    def read(self, chunk: Chunk) -> bytes | None:
        if chunk.sha256 not in self.places:
            return None
        path, offset = self.places[chunk.sha256]
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(chunk.size_bytes)
        except OSError:
            return None
        return data if hashlib.sha256(data).hexdigest() == chunk.sha256 else None


@contextmanager
def _stage(folder: Path, content: bytes) -> Iterator[Path]:
    """``FOLDER.part`` with the manifest, and whatever of this version is there from before."""
    stage = folder.absolute().with_name(folder.name + ".part")
    stage.mkdir(parents=True, exist_ok=True)
    with _alone(stage):
        written = stage / MANIFEST
        if not written.is_file() or written.read_bytes() != content:
            for path in stage.iterdir():  # of another version
                path.unlink()
            written.write_bytes(content)
        yield stage


@contextmanager
def _alone(stage: Path) -> Iterator[None]:
    """No second process at the same files. The lock goes when the process does, killed or not."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock, and does not rename files in use
        yield
        return
    handle = os.open(stage, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another fetch is writing into {stage}; wait for it") from None
        yield
    finally:
        os.close(handle)


def _gather(
    links: list[Link], stage: Path, book: Manifest, local: _LocalChunks, progress: bool
) -> int:
    """Bring all files of ``book`` into the stage; returns how many bytes were on this machine."""
    with byte_bar(book.size_bytes, "fetch", progress) as bar:
        lock = threading.Lock()

        def advance(size_bytes: int) -> None:
            with lock:
                bar.update(size_bytes)

        _check_room(stage, book)
        missing, reused_bytes = _take_local(stage, book, local, advance)
        runs = _runs(missing, len(links))
        stop = links[0].stop

        def work(link: Link) -> None:
            while not stop.is_set():
                try:
                    run = runs.popleft()
                except IndexError:
                    return
                _carry(link, stage, run, advance)

        with ThreadPoolExecutor(len(links), "fetch") as pool:
            try:
                for future in as_completed([pool.submit(work, link) for link in links]):
                    future.result()
            finally:
                stop.set()  # one has failed, or the user interrupts: the others end too
    for file in book.files:
        with open(stage / file.name, "rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != file.sha256:
                raise IntegrityError(f"{file.name}: the manifest contradicts itself on its sha256")
    return reused_bytes


def _check_room(stage: Path, book: Manifest) -> None:
    """Refuse what does not fit on the disk before a byte of it is asked for."""
    there = sum(path.stat().st_size for path in stage.iterdir())
    free = shutil.disk_usage(stage).free + there
    if book.size_bytes > free:
        raise ValueError(
            f"{book.size_bytes} bytes do not fit on the disk of {stage.parent}: {free} are free"
        )


def _take_local(
    stage: Path, book: Manifest, local: _LocalChunks, advance: Callable[[int], None]
) -> tuple[list[tuple[Chunk, int]], int]:
    """Make the files, zero where nothing has arrived, and fill in what this machine has.

    Returns what is missing, with the number of bytes that have arrived of each chunk.
    """
    missing, reused_bytes = [], 0
    for file in book.files:
        path = stage / file.name
        is_new = not path.exists()
        with open(path, "w+b" if is_new else "r+b") as opened:
            opened.truncate(file.size_bytes)
            for chunk in Manifest((file,), book.chunk_bytes).chunks():
                opened.seek(chunk.offset)
                data = b"" if is_new else opened.read(chunk.size_bytes)
                arrived = len(data)
                if hashlib.sha256(data).hexdigest() != chunk.sha256:
                    found = local.read(chunk)
                    if found is None:
                        arrived = len(data.rstrip(b"\0")) % chunk.size_bytes  # all: all wrong
                        missing.append((chunk, arrived))
                    else:
                        arrived = chunk.size_bytes
                        opened.seek(chunk.offset)
                        opened.write(found)
                reused_bytes += arrived
                advance(arrived)
    return missing, reused_bytes


Run = tuple[deque[Chunk], int]  # neighbours in a file, and the bytes that the first has already


def _runs(missing: list[tuple[Chunk, int]], connections: int) -> deque[Run]:
    """Neighbouring chunks together, so that a request is worth its round trip."""
    total_bytes = sum(chunk.size_bytes - arrived for chunk, arrived in missing)
    most_bytes = min(RUN_BYTES, total_bytes // connections)
    runs: deque[Run] = deque()
    end, filled = None, 0
    for chunk, arrived in missing:
        if end != (chunk.file, chunk.offset + arrived) or filled + chunk.size_bytes > most_bytes:
            runs.append((deque(), arrived))
            filled = 0
        runs[-1][0].append(chunk)
        filled += chunk.size_bytes
        end = (chunk.file, chunk.offset + chunk.size_bytes)
    return runs


def _carry(link: Link, stage: Path, run: Run, advance: Callable[[int], None]) -> None:
    """Write the chunks of one run to their places, request after request, until all are right."""
    chunks, arrived = run
    failures = wrong = 0
    with open(stage / chunks[0].file, "r+b") as file:
        while chunks and not link.stop.is_set():
            first, last = chunks[0], chunks[-1]
            file.seek(first.offset)
            digest = hashlib.sha256(file.read(arrived))
            start, end = first.offset + arrived, last.offset + last.size_bytes
            try:
                for data in _cut(link.read(first.file, start, end - start), chunks, arrived):
                    file.write(data)
                    file.flush()  # what has arrived survives if the process does not
                    digest.update(data)
                    arrived += len(data)
                    advance(len(data))
                    failures = 0
                    if arrived == chunks[0].size_bytes:
                        if digest.hexdigest() != chunks[0].sha256:
                            break
                        chunks.popleft()
                        arrived, wrong, digest = 0, 0, hashlib.sha256()
                    if link.stop.is_set():
                        return
            except ConnectionError as error:
                failures += 1
                link.pause(failures, error)
                continue
            if chunks:
                wrong += 1
                link.retries += 1
                if wrong == _TRIES:
                    raise IntegrityError(
                        f"{chunks[0]} came wrong {_TRIES} times: the source is damaged, or has "
                        "changed since"
                    )
                advance(-arrived)
                arrived = 0


def _cut(pieces: Iterator[bytes], chunks: deque[Chunk], arrived: int) -> Iterator[bytes]:
    """The same bytes in pieces that end where a chunk ends."""
    left = [chunk.size_bytes for chunk in chunks]
    left[0] -= arrived
    left.reverse()
    for piece in pieces:
        while piece:
            data, piece = piece[: left[-1]], piece[left[-1] :]
            left[-1] -= len(data)
            if not left[-1]:
                left.pop()
            yield data
