"""The safetensors format: a length, a header in JSON, and the bytes of all tensors after it.

    length 8 | {"__metadata__": {...}, "name": {"dtype", "shape", "data_offsets"}, ...} | bytes

Read here, not by its own package, so that the bytes of a tensor are mapped, looked at and let go of
one after the other, and so that it can be said what is wrong with a file.
"""

import json
import math
import mmap
import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workbench.data import write_whole
from workbench.storage.streams import StreamError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
METADATA = "__metadata__"
_LENGTH = 8  # bytes that say how long the header is
_LONGEST = 100_000_000  # bytes of a header: the limit of the safetensors package


class Held(NamedTuple):
    """A tensor as a file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


def header(tensors: Mapping[str, Held], metadata: Mapping[str, str]) -> dict:
    """The header of a file with these tensors, one after the other."""
    start, found = 0, {METADATA: dict(metadata)}
    for name, held in tensors.items():
        stop = start + len(held.data)
        found[name] = {
            "dtype": held.dtype, "shape": list(held.shape), "data_offsets": [start, stop]
        }  # fmt: skip
        start = stop
    return found


def write(path: str | os.PathLike, header: Mapping, tensors: Mapping[str, Held]) -> None:
    """Write a file, wholly or not at all."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that a tensor of wide numbers begins where it may

    def write_all(temporary: str) -> None:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(_LENGTH, "little") + text)
            for held in tensors.values():
                file.write(held.data)

    write_whole(path, write_all)


def tensor_of(data: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor of these bytes, copied."""
    tensor = torch.empty(shape, dtype=dtype)
    if len(data):
        tensor.reshape(-1).view(torch.uint8).numpy()[:] = np.frombuffer(data, np.uint8)
    return tensor


class Container:
    """A safetensors file that was opened, and whose header is sound; its bytes are mapped.

    Attributes:
        header: as it stands in the file.
        metadata: its texts by name.
        header_bytes: of the file, all that is no tensor.
        size_bytes: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        StreamError: it is cut short, altered, or of another format.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        with open(path, "rb") as file:
            start = file.read(_LENGTH + 1)
            self.size_bytes = os.fstat(file.fileno()).st_size
            self.header_bytes = _LENGTH + int.from_bytes(start[:_LENGTH], "little")
            self._refuse_foreign(start)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = memoryview(self._map)
        try:
            text = bytes(self._bytes[_LENGTH : self.header_bytes])
            self.header = json.loads(text.decode(), object_pairs_hook=_distinct)
            self.metadata = _metadata(self.header)
            self._spans = _spans(self.header, self.size_bytes - self.header_bytes)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise StreamError(f"{self.path} is damaged: its header says {error}") from error

    def __iter__(self):
        return iter(self._spans)

    def __getitem__(self, name: str) -> Held:
        """A tensor of the file; its data is a view of the file."""
        dtype, shape, start, stop = self._spans[name]
        return Held(dtype, shape, self._bytes[self.header_bytes + start : self.header_bytes + stop])

    def release(self, name: str) -> None:
        """Let go of the memory into which a tensor's bytes were read; they can be read again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            _, _, start, stop = self._spans[name]
            start = (self.header_bytes + start) // mmap.PAGESIZE * mmap.PAGESIZE
            length = self.header_bytes + stop - start
            if length:
                self._map.madvise(mmap.MADV_DONTNEED, start, length)

    def _refuse_foreign(self, start: bytes) -> None:
        """Say what the file is, if the first bytes are not those of a safetensors file."""
        begins = len(start) <= _LENGTH or start[_LENGTH:] == b"{"
        if begins and _LENGTH < self.header_bytes <= min(self.size_bytes, _LONGEST):
            return
        if start[:2] == b"PK" or (start[:1] == b"\x80" and start[1] in range(2, 6)):
            raise StreamError(
                f"{self.path} is a pickled checkpoint, as torch.save writes. Such a file can run "
                "any program when it is loaded, so it is refused. If you trust its origin, convert "
                "it once: "
                "safetensors.torch.save_file(torch.load(path, weights_only=True), new_path)"
            )
        if begins:
            raise StreamError(
                f"{self.path} is cut short or altered: it has {self.size_bytes:,} bytes, and its "
                f"header alone should have {self.header_bytes:,}; fetch or save it again"
            )
        raise StreamError(
            f"{self.path} is no safetensors file: it begins {start!r}; save the model with "
            "workbench.storage.save or safetensors.torch.save_file"
        )


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("one name twice")
    return found


def _metadata(header: dict) -> dict[str, str]:
    found = header.get(METADATA, {})
    if not all(isinstance(text, str) for text in found.values()):
        raise ValueError("metadata that is no text")
    return found


def _spans(header: dict, size: int) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Dtype, shape and place of each tensor, in the order of the places, which leave no gap."""
    found = {}
    for name, entry in header.items():
        if name == METADATA:
            continue
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = [*shape, start, stop]
        if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in whole):
            raise ValueError(f"{name}: {entry}")
        if dtype in DTYPES and stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"{name} of {dtype} {shape} has {stop - start:,} bytes")
        found[name] = dtype, tuple(shape), start, stop
    end = 0
    found = dict(sorted(found.items(), key=lambda item: item[1][2:]))
    for name, (_, _, start, stop) in found.items():
        if start != end or stop < start:
            raise ValueError(
                f"{name} at {start:,} to {stop:,}, after a tensor that ends at {end:,}"
            )
        end = stop
    if end != size:
        raise ValueError(f"{end:,} bytes of tensors, and there are {size:,}: cut short or altered")
    return found
