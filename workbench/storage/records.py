"""A computed weight, or the quantizer of an activation, as bytes.

    magic 3 | CRC-32 of all else 4 | length of the head | head | parts

The head has whole numbers: the kind of module; its dimensions, after how many they are; its
settings, after how many they are; and for each part which it is, its length and, unless it is a
stream of `workbench.storage.streams`, dtype and dimensions: small tensors stand as they are.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workbench.compress.computed import Stored
from workbench.compress.parts import KINDS, QUANTIZERS
from workbench.storage import streams, symbols
from workbench.storage.container import DTYPES, tensor_of
from workbench.storage.streams import Kind, Section, StreamError, numbers, read_numbers

MAGIC = b"\xc5M\x01"  # not that of a stream; its last byte is the version
_CHECKED = len(MAGIC) + 4
# The place in these two lists is what a record stores: add to their ends only.
_PARTS: tuple[tuple[str, Kind], ...] = (
    ("codes", "values"), ("weight", "values"), ("codebook", "codebook"), ("scale", "scales"),
    ("zero_point", "scales"),
)  # fmt: skip
_DTYPES = tuple(DTYPES.values())


@dataclass(frozen=True)
class Part:
    """A tensor of a record; ``codec`` is "" where it stands as it is."""

    name: str
    kind: Kind  # what its values are for
    codec: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: memoryview

    def tensor(self, executor: Executor | None = None) -> Tensor:
        if self.codec:
            return streams.decode(self.data, executor=executor)
        return tensor_of(self.data, self.dtype, self.shape)

    def sections(self) -> Iterator[Section]:
        found = streams.sections(self.data) if self.codec else [Section("values", self.data)]
        for kind, data in found:
            yield Section(self.kind if kind == "values" else kind, data)


@dataclass(frozen=True)
class Record:
    """What a record says before any part is decoded; ``shape`` is that of the dense weight, None
    for a quantizer."""

    kind: type[nn.Module]
    shape: tuple[int, ...] | None
    settings: tuple[int, ...]
    parts: tuple[Part, ...]
    head_bytes: int

    @property
    def main(self) -> Part | None:
        """The part that stands for the weight itself: its codes, if it has any."""
        return next((p for name in ("codes", "weight") for p in self.parts if p.name == name), None)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the dense weight: that of the numbers which its codes stand for."""
        return next((part.dtype for part in self.parts if part.dtype.is_floating_point), None)

    def sections(self) -> Iterator[Section]:
        yield Section("header", bytes(self.head_bytes))
        for part in self.parts:
            yield from part.sections()


def encode(module: nn.Module, code: Callable[[Tensor], bytes]) -> bytes:
    """A source or quantizer as bytes; ``code`` gives the stream of a tensor."""
    stored = module.stored()
    head = [KINDS.index(type(module)), len(stored.shape), *stored.shape]
    head += [len(stored.settings), *stored.settings]
    parts = []
    for name, tensor in stored.parts.items():
        place = next(i for i, (known, _) in enumerate(_PARTS) if known == name)
        stream, bare = code(tensor), symbols.bits_of(tensor).tobytes()
        if len(stream) < len(bare) or tensor.dtype not in _DTYPES:
            head += [2 * place + 1, len(stream)]
            parts.append(stream)
        else:
            head += [2 * place, len(bare), _DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape]
            parts.append(bare)
    text = numbers(*head)
    body = numbers(len(text)) + text + b"".join(parts)
    return MAGIC + streams.crc32(body).to_bytes(4, "little") + body


def decode(data: memoryview, *, executor: Executor | None = None) -> nn.Module:
    """The inverse of `encode`.

    Raises:
        StreamError: the bytes are not those that `encode` gave.
    """
    record = read(data)
    try:
        parts = {part.name: part.tensor(executor) for part in record.parts}
        return record.kind.restored(Stored(record.shape or (), record.settings, parts))
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, OverflowError) as error:
        raise StreamError(f"the record is damaged: {error}") from error


def read(data: memoryview) -> Record:
    """What a record holds, after its checksum was compared.

    Raises:
        StreamError: cut short, altered, or no record.
    """
    if len(data) < _CHECKED or data[:3] != MAGIC:
        raise StreamError(f"no computed weight: {len(data)} bytes that begin {bytes(data[:3])!r}")
    if streams.crc32(data[_CHECKED:]) != int.from_bytes(data[3:_CHECKED], "little"):
        raise StreamError("the record is cut short or altered: its checksum does not match")
    try:
        start = _CHECKED + 1
        while data[start - 1] > 127:
            start += 1
        (length,) = read_numbers(data[_CHECKED:start])
        place = start + length
        head = iter(read_numbers(data[start:place]))
        kind = KINDS[next(head)]
        shape, settings = _several(head), _several(head)
        parts = []
        for which in head:
            part, place = _part(which, next(head), head, data, place)
            parts.append(part)
    except (ValueError, IndexError, StopIteration) as error:
        raise StreamError(f"the record is damaged: {error or 'its head ends early'}") from error
    if place != len(data):
        raise StreamError(f"the record is damaged: parts end at {place} of {len(data)} bytes")
    shape = None if kind in QUANTIZERS else shape
    return Record(kind, shape, settings, tuple(parts), start + length)


def _several(head: Iterator[int]) -> tuple[int, ...]:
    count = next(head)
    found = tuple(itertools.islice(head, count))
    if len(found) < count:
        raise StreamError(f"the record is damaged: {len(found)} of {count} numbers")
    return found


def _part(
    which: int, size: int, head: Iterator[int], data: memoryview, place: int
) -> tuple[Part, int]:
    name, kind = _PARTS[which // 2]
    content = data[place : place + size]
    if which % 2:
        found = streams.header(content)
        return Part(name, kind, found.codec, found.dtype, found.shape, content), place + size
    dtype, shape = _DTYPES[next(head)], _several(head)
    if math.prod(shape) * dtype.itemsize != len(content):
        raise StreamError(f"the record is damaged: {len(content)} bytes for {dtype} {shape}")
    return Part(name, kind, "", dtype, shape, content), place + size
