"""One model file as several, and back: the shards that model hubs and their loaders use.

A shard is a ``.safetensors`` file like any other, ``model-00001-of-00003.safetensors``, and
``model.safetensors.index.json`` says which tensor lies in which. Beside them lies a manifest
(`workbench.transfer.manifests`), which the convention lacks: with it, each byte can be verified.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from workbench.transfer.manifests import (
    CHUNK_BYTES,
    INDEX,
    Header,
    IntegrityError,
    Whole,
    byte_bar,
    check_chunk_bytes,
    manifest,
    read_chunks,
    read_header,
)

COPY_BYTES = 2**20


def split(
    path: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    shard_bytes: int = 5_000_000_000,
    chunk_bytes: int = CHUNK_BYTES,
    progress: bool = True,
) -> Path:
    """Cut a ``.safetensors`` file into shards with an index and a manifest, in a new folder.

    Any such file will do, a coded artifact too. Every shard carries the metadata of the file, so
    that each can be read alone; `join` gives back the very same file. The same file and settings
    give the same bytes. Needs the memory of one chunk, and the folder is there whole or not at all.

    Args:
        folder: where to put them; it must not exist, or be empty.
        shard_bytes: most bytes of tensors in a shard. A tensor of more gets a shard of its own.
        chunk_bytes: bytes that are checked, and sent again, as one; 1 KiB to 64 MiB.

    Raises:
        ValueError: a setting out of range, or ``folder`` holds something.
        IntegrityError: ``path`` is not a whole ``.safetensors`` file.
    """
    path, folder = Path(path), Path(folder)
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes!r}; give 1 byte or more")
    check_chunk_bytes(chunk_bytes)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the path of a .safetensors file")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; give each version of a model a new folder")
    header = read_header(path)
    groups = _groups(header, shard_bytes)
    temporary = folder.absolute().with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        whole = _write_shards(path, temporary, header, groups, progress)
        replace(manifest(temporary, chunk_bytes=chunk_bytes, progress=progress), whole=whole).write(
            temporary
        )
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def join(folder: str | os.PathLike, path: str | os.PathLike, *, progress: bool = True) -> Path:
    """Put shards that `split` made together again: the same file, byte for byte.

    Each chunk is verified on the way, and ``path`` appears only when all were right.

    Raises:
        ValueError: the folder is not one that `split` made.
        IntegrityError: naming the file and chunk that is missing, cut short or altered.
    """
    from workbench.data import write_whole

    folder, path = Path(folder), Path(path)
    book = manifest(folder)
    whole = book.whole
    if whole is None:
        raise ValueError(f"{folder} was not made by split, which keeps the header to join with")

    def content() -> Iterator[bytes]:
        header = whole.header.encode()
        yield len(header).to_bytes(8, "little") + header
        for file in book.files:
            if file.name != INDEX:
                header_bytes = file.parts[0].size_bytes if file.parts else 0
                chunks = read_chunks(folder, book, file)
                yield from (data for chunk, data in chunks if chunk.offset >= header_bytes)

    def write(temporary: str) -> None:
        digest = hashlib.sha256()
        with open(temporary, "wb") as out, byte_bar(whole.size_bytes, "join", progress) as bar:
            for data in content():
                digest.update(data)
                out.write(data)
                bar.update(len(data))
        if digest.hexdigest() != whole.sha256:
            raise IntegrityError(f"the shards in {folder} are not those of the file that was split")

    write_whole(path, write)
    return path


def _groups(header: Header, shard_bytes: int) -> list[list[str]]:
    """Names of the tensors of each shard, in the order of the file; at least one shard."""
    groups, filled = [[]], 0
    for name, entry in header.tensors.items():
        start, end = entry["data_offsets"]
        if groups[-1] and filled + end - start > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += end - start
    return groups


def _write_shards(
    path: Path, folder: Path, header: Header, groups: list[list[str]], progress: bool
) -> Whole:
    names = [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
    size_bytes = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb") as source, byte_bar(size_bytes, "split", progress) as bar:
        digest.update(source.read(header.size_bytes))
        bar.update(header.size_bytes)
        for name, group in zip(names, groups, strict=True):
            with open(folder / name, "wb") as shard:
                left = _write_header(shard, header, group)
                while left:
                    data = source.read(min(left, COPY_BYTES))
                    if not data:
                        raise IntegrityError(f"{path} became shorter while it was read")
                    digest.update(data)
                    shard.write(data)
                    bar.update(len(data))
                    left -= len(data)
    weight_map = {
        tensor: name for name, group in zip(names, groups, strict=True) for tensor in group
    }
    index = {
        "metadata": {"total_size": size_bytes - header.size_bytes},
        "weight_map": weight_map,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return Whole(size_bytes, digest.hexdigest(), header.text, *_decoded(path, header))


def _decoded(path: Path, header: Header) -> tuple[str | None, str | None]:
    """Codecs of a file that `workbench.storage.save` wrote, and the sha256 of its tensors."""
    if not header.metadata:
        return None, None
    from workbench import storage  # needs torch, which plain files do not

    artifact = storage.Artifact(path)
    if not artifact.is_coded:
        return None, None
    codecs = set(storage.inspect(path).frame["codec"]) - {""}
    return ", ".join(sorted(codecs)), artifact.sha256()


def _write_header(shard: BinaryIO, header: Header, names: list[str]) -> int:
    """Write the header of a shard with these tensors; returns how many bytes they take."""
    entries = {"__metadata__": header.metadata} if header.metadata else {}
    end = 0
    for name in names:
        entry = header.tensors[name]
        start, end = end, end + entry["data_offsets"][1] - entry["data_offsets"][0]
        entries[name] = {**entry, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned, as the format asks
    shard.write(len(text).to_bytes(8, "little") + text)
    return end
