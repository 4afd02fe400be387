"""A coded tensor as bytes: the frame that all codecs share.

A stream says what it holds, and is checked before anything is decoded:

    magic 2 | version 1 | codec 1 | dtype 1 | CRC-32 of all else 4 | dimensions | chunks

A chunk holds at most `CHUNK` elements, whole rows of the tensor where they fit. It is a list of
*sections*, each of a kind (values, positions, codebook, code table, scales, header), so that a
ledger can tell what each byte is for without decoding any. Whole numbers are written as LEB128:
seven bits a byte, the lowest first.

A codec is a module with two functions on the symbols of a chunk, which
`workbench.storage.symbols` makes of the elements first:

    compress(codes, alphabet) -> sections            codes (rows, columns), each below alphabet
    expand(sections, shape, alphabet) -> codes       the inverse
"""

import importlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from zlib_ng.zlib_ng import crc32  # that of zlib, several times as fast

Kind = Literal["values", "positions", "codebook", "code table", "scales", "header"]
KINDS: tuple[Kind, ...] = ("values", "positions", "codebook", "code table", "scales", "header")
# The place in these two lists is what a stream stores: add to their ends only.
CODECS = ("plain", "run_length", "huffman", "rans", "mixing")
_DTYPES = tuple(
    getattr(torch, name)
    for name in (
        "float32", "bfloat16", "float16", "float64", "int8", "uint8", "bool", "int16", "uint16",
        "int32", "uint32", "int64", "uint64", "complex32", "complex64", "complex128",
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
        "float4_e2m1fn_x2",
    )
)  # fmt: skip
CHUNK = 2**20

_MAGIC, _VERSION = b"\xc5W", 1
_PIECE = 2**24  # bytes that are checked at a time
_FIXED = len(_MAGIC) + 3 + 4  # bytes before the dimensions


class StreamError(ValueError):
    """These bytes are not the stream that was written: cut short, altered, foreign, or newer."""


class Section(NamedTuple):
    kind: Kind
    data: bytes


class Codec(Protocol):
    NAME: str

    def compress(self, codes: np.ndarray, alphabet: int) -> list[Section]: ...

    def expand(
        self, sections: list[bytes], shape: tuple[int, int], alphabet: int
    ) -> np.ndarray: ...


@dataclass(frozen=True)
class Header:
    """What a stream says about itself; ``start`` is where its chunks begin."""

    codec: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def encode(tensor: Tensor | np.ndarray, codec: str) -> bytes:
    """The tensor as a stream; the same tensor always gives the same bytes.

    Raises:
        TypeError: no dense tensor, or of a dtype that has no bytes of its own (quantized).
        ValueError: an unknown codec.
    """
    from workbench.storage import symbols

    if codec not in CODECS:
        raise ValueError(f"codec is {codec!r}; choose one of {', '.join(CODECS)}")
    tensor = _checked(tensor)
    bits = symbols.bits_of(tensor)  # (elements,) unsigned
    width = _width(tuple(tensor.shape), bits.size)
    body = bytearray()
    for number in (tensor.dim(), *tensor.shape):
        body += _varint(number)
    for start, stop in _chunks(bits.size, width):
        piece = bits[start:stop]
        rows = piece.reshape(-1, width) if piece.size % width == 0 else piece[None]
        chunk = bytearray()
        for kind, data in symbols.compress(rows, tensor.dtype, _module(codec)):
            chunk += bytes([KINDS.index(kind)]) + _varint(len(data)) + data
        body += _varint(len(chunk)) + chunk
    fixed = _MAGIC + bytes([_VERSION, CODECS.index(codec), _DTYPES.index(tensor.dtype)])
    checksum = crc32(body, crc32(fixed))
    return fixed + checksum.to_bytes(4, "little") + bytes(body)


def decode(
    stream: bytes | memoryview,
    *,
    executor: Executor | None = None,
    release: Callable[[], None] | None = None,
) -> Tensor:
    """The tensor of a stream, bit for bit.

    Args:
        executor: decodes chunks side by side, as threads (the kernels release the interpreter).
        release: called now and then, to let go of memory into which a mapped file was read.

    Raises:
        StreamError: the bytes are not those that `encode` gave.
    """
    from workbench.storage import symbols

    found = header(stream, release=release)
    try:
        bits = np.empty(*symbols.layout_of(found.dtype, found.shape))
    except (ValueError, MemoryError) as error:
        raise StreamError(f"no memory for a tensor of shape {found.shape}: {error}") from error
    width = _width(found.shape, bits.size)
    codec = _module(found.codec)

    def expand(job: tuple[tuple[int, int], memoryview]) -> None:
        (start, stop), chunk = job
        out = bits[start:stop]
        rows = out.reshape(-1, width) if out.size % width == 0 else out[None]
        sections = [section.data for section in _sections(chunk)]
        symbols.expand(sections, rows, found.dtype, codec)
        if release:
            release()

    try:
        chunks = list(_split_chunks(memoryview(stream)[found.start :]))
        jobs = zip(_chunks(bits.size, width), chunks, strict=True)
        list((executor.map if executor else map)(expand, jobs))
    except StreamError:
        raise
    except (ValueError, IndexError, OverflowError) as error:
        raise StreamError(f"the stream is damaged: {error}") from error
    return symbols.tensor_of(bits, found.dtype, found.shape)


def header(stream: bytes | memoryview, *, release: Callable[[], None] | None = None) -> Header:
    """What the stream holds, after its checksum was compared; ``release`` is as for `decode`.

    Raises:
        StreamError: cut short, altered, or no stream.
    """
    view = memoryview(stream)
    if view.nbytes < _FIXED or bytes(view[:2]) != _MAGIC:
        raise StreamError(f"not a coded tensor: {view.nbytes} bytes, beginning {bytes(view[:2])!r}")
    version, codec, dtype = view[2:5]
    if version != _VERSION:
        raise StreamError(f"the stream has version {version}; this workbench reads {_VERSION}")
    expected = int.from_bytes(view[5:_FIXED], "little")
    checksum = crc32(view[:5])
    for start in range(_FIXED, view.nbytes, _PIECE):
        checksum = crc32(view[start : start + _PIECE], checksum)
        if release:
            release()
    if checksum != expected:
        raise StreamError("the stream is cut short or altered: its checksum does not match")
    if codec >= len(CODECS) or dtype >= len(_DTYPES):
        raise StreamError(f"the stream has codec {codec} and dtype {dtype}, unknown here")
    dimensions, place = read_number(view, _FIXED)
    shape = []
    for _ in range(dimensions):
        size, place = read_number(view, place)
        shape.append(size)
    return Header(CODECS[codec], _DTYPES[dtype], tuple(shape), place)


def chunks(stream: bytes | memoryview) -> Iterator[list[Section]]:
    """The sections of each chunk of a stream, as they are stored."""
    for chunk in _split_chunks(memoryview(stream)[header(stream).start :]):
        yield list(_sections(chunk))


def sections(stream: bytes | memoryview) -> Iterator[Section]:
    """All sections of a stream; what frames them comes last, as one of the kind "header"."""
    framing = memoryview(stream).nbytes
    for chunk in chunks(stream):
        for section in chunk:
            framing -= len(section.data)
            yield section
    yield Section("header", bytes(framing))


def numbers(*values: int) -> bytes:
    """Whole numbers from 0, one after the other, in as few bytes as each takes."""
    return b"".join(map(_varint, values))


def read_numbers(data: bytes | memoryview) -> list[int]:
    """The inverse of `numbers`."""
    found, place = [], 0
    while place < len(data):
        value, place = read_number(data, place)
        found.append(value)
    return found


def read_number(data: bytes | memoryview, place: int) -> tuple[int, int]:
    """The number at this place, and the place after it."""
    value = shift = 0
    while place < len(data) and shift < 64:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
    raise StreamError("the stream is damaged: a number does not end")


def _checked(tensor: Tensor | np.ndarray) -> Tensor:
    if isinstance(tensor, np.ndarray):
        tensor = torch.from_numpy(np.ascontiguousarray(tensor).reshape(tensor.shape))
    if not isinstance(tensor, Tensor):
        raise TypeError(f"got a {type(tensor).__name__}; expected a torch.Tensor or numpy array")
    if tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
        raise TypeError(f"cannot code a tensor of {tensor.dtype}, {tensor.layout}; make it dense")
    return tensor


def _module(codec: str) -> Codec | None:
    return None if codec == "plain" else importlib.import_module(f"workbench.storage.{codec}")


def _width(shape: tuple[int, ...], elements: int) -> int:
    """Elements of a row: of one output channel, or all of a vector."""
    if len(shape) < 2 or elements == 0:
        return max(1, elements)
    return elements // shape[0]


def _chunks(elements: int, width: int) -> Iterator[tuple[int, int]]:
    """Where each chunk begins and ends: whole rows if one fits, so that its rows are seen."""
    step = max(1, CHUNK // width) * width if width <= CHUNK else CHUNK
    for start in range(0, elements, step):
        yield start, min(start + step, elements)


def _split_chunks(body: memoryview) -> Iterator[memoryview]:
    place = 0
    while place < len(body):
        size, place = read_number(body, place)
        yield _slice(body, place, size)
        place += size


def _sections(chunk: memoryview) -> Iterator[Section]:
    place = 0
    while place < len(chunk):
        kind = KINDS[chunk[place]]
        size, place = read_number(chunk, place + 1)
        yield Section(kind, _slice(chunk, place, size))
        place += size


def _slice(data: memoryview, start: int, size: int) -> memoryview:
    if start + size > len(data):
        raise StreamError(f"the stream is damaged: {size} bytes at {start} of {len(data)}")
    return data[start : start + size]


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
