"""What the files of a model hold, chunk by chunk, so that a lost or altered byte has a name.

A manifest lists files, a file has parts, and a part is cut into chunks of ``chunk_bytes``, each
known by its sha256. The parts of a ``.safetensors`` file are its header and its tensors, and the
chunks of each begin at its own start. So a tensor that is changed, grown, added or moved, even to
another shard, leaves the chunks of all others as they are. Within a tensor, new values in place of
old ones change the chunks they lie in, values added at its end leave the chunks before them, and
values inserted change all chunks from there on. Any other file is one part.

On disk it is ``manifest.json``, with a checksum of its own: it is read only if it is, byte for
byte, what `Manifest.write` wrote.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

MANIFEST = "manifest.json"
INDEX = "model.safetensors.index.json"
# What `workbench.transfer.sign` writes. It signs the manifest too, which hence cannot list it.
SIGNATURE = "model.sig"
CHUNK_BYTES = 2**18
# A manifest, an index or a signature of more is refused before it is read. With the default chunks,
# a manifest of this size describes 250 GB.
LIMIT_BYTES = 2**26


class IntegrityError(ValueError):
    """These bytes are not the ones that were promised: cut short, altered, or of another file."""


class Chunk(NamedTuple):
    """``size_bytes`` at ``offset`` of a file: piece ``number`` of one of its parts."""

    file: str
    part: str
    number: int
    offset: int
    size_bytes: int
    sha256: str

    def __str__(self) -> str:
        end = self.offset + self.size_bytes
        return f"{self.file}: chunk {self.number} of {self.part!r} (bytes {self.offset} to {end})"


@dataclass(frozen=True)
class Part:
    """A tensor, a header, or the whole of a file that is no ``.safetensors`` file."""

    name: str
    size_bytes: int
    chunks: tuple[str, ...] = field(repr=False)  # sha256 of each


@dataclass(frozen=True)
class File:
    """A file by its bytes; the parts lie in it one after the other, without gaps."""

    name: str
    size_bytes: int
    sha256: str
    parts: tuple[Part, ...] = field(repr=False)


@dataclass(frozen=True)
class Whole:
    """The one file that was split. ``header`` is its JSON text, from which it can be joined again.

    Of a file of `workbench.storage.save`, ``codec`` names its codecs, and ``decoded_sha256`` is
    what `workbench.storage.Artifact.sha256` gives, here and where it arrives.
    """

    size_bytes: int
    sha256: str
    header: str = field(repr=False)
    codec: str | None = None
    decoded_sha256: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The files of a model in the order of their names, and the file they were split from."""

    files: tuple[File, ...]
    chunk_bytes: int = CHUNK_BYTES
    whole: Whole | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, without the manifest itself."""
        return sum(file.size_bytes for file in self.files)

    def chunks(self) -> Iterator[Chunk]:
        """Every chunk, in the order of the bytes."""
        for file in self.files:
            part_start = 0
            for part in file.parts:
                for number, sha256 in enumerate(part.chunks):
                    start = number * self.chunk_bytes
                    size_bytes = min(self.chunk_bytes, part.size_bytes - start)
                    yield Chunk(
                        file.name, part.name, number, part_start + start, size_bytes, sha256
                    )
                part_start += part.size_bytes

    def text(self) -> str:
        """The content of ``manifest.json``."""
        body = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1).removesuffix("\n}")
        return f'{body},\n "checksum": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'

    def write(self, folder: str | os.PathLike) -> Path:
        """Write ``manifest.json`` into the folder that it describes."""
        from workbench.data import write_whole  # needs torch, which a machine that reads may lack

        path = Path(folder, MANIFEST)
        write_whole(path, lambda temporary: Path(temporary).write_text(self.text()))
        return path


@dataclass(frozen=True)
class Difference:
    """What has to be sent to someone who has the old version: the chunks that are new to them."""

    chunks: tuple[Chunk, ...] = field(repr=False)
    size_bytes: int  # of the new version

    @property
    def changed_bytes(self) -> int:
        return sum(chunk.size_bytes for chunk in self.chunks)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors (and headers) that have a chunk among these."""
        return tuple(dict.fromkeys(chunk.part for chunk in self.chunks))


def manifest(
    path: str | os.PathLike, *, chunk_bytes: int | None = None, progress: bool = True
) -> Manifest:
    """The manifest that lies in a folder or, where there is none, one made from the bytes.

    Args:
        path: a folder, or one file. Only `verify` compares a manifest that lies in a folder with
            the files there.
        chunk_bytes: the size of chunks to make it with, 1 KiB to 64 MiB; a manifest that lies in
            the folder is then taken only if it has this size. None takes what is there, or 256 KiB.

    Raises:
        ValueError: nothing there, a setting out of range, a folder with folders or links in it, or
            a name that is not safe to use on another machine.
        IntegrityError: the manifest, or a ``.safetensors`` file without one, is damaged.
    """
    path = Path(path)
    if chunk_bytes is not None:
        check_chunk_bytes(chunk_bytes)
    if (path / MANIFEST).is_file():
        found = parse(read_small(path / MANIFEST), str(path / MANIFEST))
        if chunk_bytes in (None, found.chunk_bytes):
            return found
    if path.is_file():
        paths = [path]
    elif path.is_dir():
        paths = sorted(path.iterdir())
        paths = [each for each in paths if each.name not in (MANIFEST, SIGNATURE)]
    else:
        raise ValueError(f"{path} is no file and no folder; give the path of a model")
    for each in paths:
        if each.is_symlink() or not each.is_file():
            raise ValueError(f"{each} is no plain file; a manifest describes plain files only")
        _check_name(each.name)
    chunk_bytes = chunk_bytes or CHUNK_BYTES
    total_bytes = sum(each.stat().st_size for each in paths)
    with byte_bar(total_bytes, "manifest", progress) as bar:
        return Manifest(tuple(_describe(each, chunk_bytes, bar) for each in paths), chunk_bytes)


def diff(old: Manifest | str | os.PathLike, new: Manifest | str | os.PathLike) -> Difference:
    """Which chunks of ``new`` are nowhere in ``old``: what `fetch` with ``have=old`` transfers.

    Args:
        old, new: manifests, or the paths of folders or files, as `manifest` takes them.
    """
    if not isinstance(new, Manifest):
        new = manifest(new)
    if not isinstance(old, Manifest):
        old = manifest(old, chunk_bytes=new.chunk_bytes)
    had = {chunk.sha256 for chunk in old.chunks()}
    chunks = tuple(chunk for chunk in new.chunks() if chunk.sha256 not in had)
    return Difference(chunks, new.size_bytes)


def verify(folder: str | os.PathLike, *, progress: bool = True) -> Manifest:
    """Read every byte of a folder and compare it with its manifest, which is returned.

    Files that the manifest does not list are left alone; a signature covers those too (`sign`).

    Raises:
        IntegrityError: naming the first file and chunk that is missing, cut short or altered, or
            an index that points to other files.
        ValueError: the folder has no manifest.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} has no {MANIFEST}; make one with manifest(folder).write(folder)"
        )
    found = manifest(folder)
    with tqdm(total=found.size_bytes, desc="verify", unit="B", unit_scale=True,
              disable=not progress) as bar:  # fmt: skip
        for file in found.files:
            whole = hashlib.sha256()
            for _, data in read_chunks(folder, found, file):
                whole.update(data)
                bar.update(len(data))
            if whole.hexdigest() != file.sha256:
                raise IntegrityError(f"{file.name}: the manifest contradicts itself on its sha256")
    check_index(folder, found)
    return found


def read_chunks(folder: Path, book: Manifest, file: File) -> Iterator[tuple[Chunk, bytes]]:
    """The chunks of one file, each compared with its sha256 before it is given.

    Raises:
        IntegrityError: at the first that is missing, cut short or altered.
    """
    path = folder / file.name
    if not path.is_file():
        raise IntegrityError(f"{file.name} is missing in {folder}; fetch it again")
    with open(path, "rb") as opened:
        for chunk in Manifest((file,), book.chunk_bytes).chunks():
            data = opened.read(chunk.size_bytes)
            if len(data) < chunk.size_bytes:
                raise IntegrityError(f"{chunk} is cut short; fetch it again")
            if hashlib.sha256(data).hexdigest() != chunk.sha256:
                raise IntegrityError(f"{chunk} is altered: its sha256 differs; fetch it again")
            yield chunk, data
        if opened.read(1):
            raise IntegrityError(f"{file.name} goes on after its {file.size_bytes} bytes")


def check_index(folder: Path, found: Manifest) -> None:
    """An index may only point to files that the manifest lists, hence never out of the folder.

    Raises:
        IntegrityError: it does, or is no index.
    """
    names = {file.name for file in found.files}
    if INDEX not in names:
        return
    try:
        pointed = set(json.loads(read_small(folder / INDEX))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{INDEX} is no index of shards: {error}") from None
    if pointed - names:
        raise IntegrityError(
            f"{INDEX} points to {sorted(map(str, pointed - names))[:3]}, which the manifest does "
            "not list"
        )


def read_small(path: Path) -> bytes:
    """The content of a manifest, an index or a signature, never more than `LIMIT_BYTES`."""
    if path.stat().st_size > LIMIT_BYTES:
        raise IntegrityError(f"{path.name} has more than {LIMIT_BYTES} bytes")
    return path.read_bytes()


def parse(data: bytes, origin: str) -> Manifest:
    """The manifest in the bytes of a ``manifest.json``; ``origin`` is named in errors.

    Raises:
        IntegrityError: one byte is not as `Manifest.write` wrote it, or what it says is no
            manifest: sizes that do not add up, a name that is not safe to use.
    """
    try:
        body = json.loads(data)
        body["files"] = tuple(
            File(**{**file, "parts": tuple(_part(**part) for part in file["parts"])})
            for file in body["files"]
        )
        body["whole"] = body["whole"] and Whole(**body["whole"])
        found = Manifest(body["files"], body["chunk_bytes"], body["whole"])
        same = found.text().encode() == data
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        same = False
    if not same:
        raise IntegrityError(f"{origin} is damaged, or no {_FORMAT!r}")
    try:
        _check(found)
    except (ValueError, TypeError) as error:
        raise IntegrityError(f"{origin} is refused: {error}") from None
    return found


def byte_bar(total_bytes: int, description: str, progress: bool) -> tqdm:
    """The progress bar of everything in this room: in bytes."""
    return tqdm(
        total=total_bytes, desc=description, unit="B", unit_scale=True, disable=not progress
    )


class Header(NamedTuple):
    """The start of a ``.safetensors`` file; tensors in the order of their bytes."""

    text: str
    metadata: dict[str, str]
    tensors: dict[str, dict]  # dtype, shape and data_offsets, from the end of the header on
    size_bytes: int  # with the eight bytes of its length


def read_header(path: Path) -> Header:
    """The header of a ``.safetensors`` file, checked by the ``safetensors`` library itself.

    Raises:
        IntegrityError: the library refuses the file: cut short, or another format.
    """
    try:
        with safe_open(path, framework="np"), open(path, "rb") as file:
            size_bytes = int.from_bytes(file.read(8), "little")
            text = file.read(size_bytes).decode()
    except SafetensorError as error:
        raise IntegrityError(f"{path} is no readable .safetensors file: {error}") from None
    tensors = json.loads(text)
    metadata = tensors.pop("__metadata__", None) or {}
    ordered = dict(sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]))
    return Header(text, metadata, ordered, 8 + size_bytes)


_FORMAT = "workbench manifest 1"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. +-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def _describe(path: Path, chunk_bytes: int, bar: tqdm) -> File:
    """Read a file once, in pieces of at most a chunk."""
    if path.suffix == ".safetensors":
        header = read_header(path)
        sizes = {name: end - start for name, (start, end) in _offsets(header).items()}
        sizes = [("header", header.size_bytes), *sizes.items()]
    else:
        sizes = [("content", path.stat().st_size)]
    whole = hashlib.sha256()
    parts = []
    with open(path, "rb") as file:
        for name, size_bytes in sizes:
            chunks = []
            for start in range(0, size_bytes, chunk_bytes):
                data = file.read(min(chunk_bytes, size_bytes - start))
                whole.update(data)
                bar.update(len(data))
                chunks.append(hashlib.sha256(data).hexdigest())
            parts.append(Part(name, size_bytes, tuple(chunks)))
    return File(path.name, sum(size for _, size in sizes), whole.hexdigest(), tuple(parts))


def _offsets(header: Header) -> dict[str, tuple[int, int]]:
    return {name: entry["data_offsets"] for name, entry in header.tensors.items()}


def _part(name: str, size_bytes: int, chunks: list[str]) -> Part:
    return Part(name, size_bytes, tuple(chunks))


def _check(found: Manifest) -> None:
    """What a hostile manifest, whose checksum is right, could still say."""
    check_chunk_bytes(found.chunk_bytes)
    names = [file.name for file in found.files]
    if names != sorted(names) or len({name.lower() for name in names}) < len(names):
        raise ValueError("its files are not in order, or two have one name")
    for file in found.files:
        _check_name(file.name)
        sizes = [file.size_bytes, *(part.size_bytes for part in file.parts)]
        if not all(type(size) is int and size >= 0 for size in sizes) or sizes[0] != sum(sizes[1:]):
            raise ValueError(f"the sizes of {file.name} do not add up")
        for part in file.parts:
            if not isinstance(part.name, str):
                raise ValueError(f"{file.name} has a part named {part.name!r}")
            if len(part.chunks) != -(-part.size_bytes // found.chunk_bytes):
                raise ValueError(f"{part.name!r} of {file.name} has {len(part.chunks)} chunks")
        for sha256 in [file.sha256, *(sha256 for part in file.parts for sha256 in part.chunks)]:
            if not _SHA256.fullmatch(sha256):
                raise ValueError(f"{sha256!r} of {file.name} is no sha256")
    if found.whole is not None:
        found.whole.header.encode()


def _check_name(name: str) -> None:
    reserved = name in (MANIFEST, SIGNATURE) or name.endswith(".part")
    if not _NAME.fullmatch(name) or reserved:
        raise ValueError(
            f"the file name {name!r} is not safe to use on another machine; use letters, digits, "
            "and ._+- (not at the start), and neither a path nor a reserved name"
        )


def check_chunk_bytes(chunk_bytes: int) -> None:
    if type(chunk_bytes) is not int:
        raise TypeError(f"chunk_bytes is {chunk_bytes!r}; give a whole number of bytes")
    if not 2**10 <= chunk_bytes <= 2**26:
        raise ValueError(f"chunk_bytes is {chunk_bytes}; give {2**10} to {2**26}")
