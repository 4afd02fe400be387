"""A tensor as symbols to be coded, and the bits that are not worth coding.

Entropy coders want few symbols, some of them frequent. What these are depends on the tensor:

form      symbols                                         besides them
--------  ----------------------------------------------  --------------------------------------
bytes     the byte: int8, uint8, bool, float8             nothing
codebook  the number of a value among the distinct ones   the distinct values, in numeric order
float     exponent and first mantissa bits; 0 for zero    sign and other mantissa bits, verbatim
verbatim  none                                            all bits, as they are

Trained weights fill the last bits of a mantissa evenly, but use only some twenty exponents:
Hershcovitch et al. (2024), "ZipNN: lossless compression for AI models".
"""

import math

import numpy as np
import torch
from torch import Tensor

from workbench.storage.compiled import compiled
from workbench.storage.streams import Codec, Section, StreamError, numbers, read_numbers

_BYTES, _CODEBOOK, _FLOAT, _VERBATIM = range(4)
_SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
_MANTISSA = {  # bits of it; a complex number is two floats
    torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52,
    torch.complex32: 10, torch.complex64: 23, torch.complex128: 52,
}  # fmt: skip
_MOST_KEPT = 4  # mantissa bits among the symbols: the one after takes its whole bit, to 0.001
_MANY = 2**16  # elements of a chunk, from which a codec's `LEAST_GAIN` counts
_MOST_SYMBOLS = 2**16
_TABLE_BITS = 8  # of one symbol in a code table, about
_MANY_ZEROS = 1 / 16  # of all: where bits are left out for zeros, decoding takes longer


def bits_of(tensor: Tensor) -> np.ndarray:
    """The elements as unsigned integers of the same bits, (elements,)."""
    count, unsigned = layout_of(tensor.dtype, tuple(tensor.shape))
    if count == 0:
        return np.empty(0, unsigned)
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().view(unsigned)


def layout_of(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[int, np.dtype]:
    """How many unsigned integers a tensor is here, and of which type."""
    parts = 2 if dtype.is_complex else 1
    return math.prod(shape) * parts, np.dtype(f"u{dtype.itemsize // parts}")


def tensor_of(bits: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `bits_of`; shares the memory of ``bits``."""
    return torch.from_numpy(bits.view(np.uint8)).view(dtype).reshape(shape)


def compress(rows: np.ndarray, dtype: torch.dtype, codec: Codec | None) -> list[Section]:
    """Code a chunk of `bits_of`, (rows, columns); verbatim where there is no codec."""
    if codec is not None and rows.itemsize == 1:
        codes = rows ^ _flip(dtype, rows.dtype) if dtype in _SIGNED else rows
        alphabet = int(codes.max(initial=0)) + 1
        return [Section("header", numbers(_BYTES, alphabet)), *codec.compress(codes, alphabet)]
    codebook = split = None
    if codec is not None:
        codebook = _codebook(rows, dtype)
        least_gain = getattr(codec, "LEAST_GAIN", 0.0) if rows.size >= _MANY else 0.0
        split = _best_split(rows, dtype, least_gain)
    cheapest = min(entry[0] for entry in (codebook, split, (rows.itemsize * 8.0,)) if entry)
    if codebook and codebook[0] == cheapest:
        values = codebook[1]
        order = np.argsort(values)  # the numeric order need not be that of the bits
        codes = order[np.searchsorted(values[order], rows)]
        codes = codes.astype(np.uint8 if len(values) <= 256 else np.uint16)
        return [
            Section("header", numbers(_CODEBOOK)),
            Section("codebook", values.tobytes()),
            *codec.compress(codes, len(values)),
        ]
    if split and split[0] == cheapest:
        _, kept, base, alphabet, gaps = split
        codes, rest = _split(rows, _MANTISSA[dtype] - kept, base, alphabet, gaps)
        return [
            Section("header", numbers(_FLOAT, kept, base, alphabet, gaps)),
            *codec.compress(codes, alphabet),
            Section("values", rest),
        ]
    return [Section("header", numbers(_VERBATIM)), Section("values", rows.tobytes())]


def expand(
    sections: list[memoryview], rows: np.ndarray, dtype: torch.dtype, codec: Codec | None
) -> None:
    """The inverse of `compress`, into ``rows``."""
    form, *settings = read_numbers(sections[0])
    if form == _VERBATIM:
        rows[:] = np.frombuffer(sections[1], rows.dtype).reshape(rows.shape)
    elif form == _BYTES and codec:
        (alphabet,) = settings
        rows[:] = codec.expand(sections[1:], rows.shape, alphabet)
        if dtype in _SIGNED:
            rows ^= _flip(dtype, rows.dtype)
    elif form == _CODEBOOK and codec:
        values = np.frombuffer(sections[1], rows.dtype)
        if not len(values):
            raise StreamError("the stream is damaged: no value in its codebook")
        codes = codec.expand(sections[2:], rows.shape, len(values))
        _look_up(values, codes.reshape(-1), rows.reshape(-1))
    elif form == _FLOAT and codec and dtype in _MANTISSA:
        kept, base, alphabet, gaps = settings
        if kept > _MOST_KEPT or gaps > 1:
            raise StreamError(f"the stream is damaged: settings {settings}")
        codes = codec.expand(sections[1:-1], rows.shape, alphabet)
        _unsplit(codes, sections[-1], rows, _MANTISSA[dtype] - kept, base, gaps)
    else:
        raise StreamError(f"the stream is damaged: form {form} for {dtype}")


def _flip(dtype: torch.dtype, unsigned: np.dtype) -> np.unsignedinteger:
    """The sign bit: turned over, signed integers are in order as unsigned ones."""
    return unsigned.type(1 << (unsigned.itemsize * 8 - 1))


def _codebook(rows: np.ndarray, dtype: torch.dtype) -> tuple[float, np.ndarray] | None:
    """Bits an element takes with a codebook, and the distinct values in numeric order."""
    sample = rows.reshape(-1)[:: max(1, rows.size // 2**14)]
    if rows.size == 0 or (rows.itemsize > 2 and len(np.unique(sample)) > len(sample) // 2 + 256):
        return None
    if rows.itemsize == 2:
        counts = np.bincount(rows.reshape(-1))
        values, counts = np.flatnonzero(counts).astype(rows.dtype), counts[counts > 0]
    else:
        values, counts = np.unique(rows, return_counts=True)
    if len(values) > _MOST_SYMBOLS:
        return None
    sign = _flip(dtype, rows.dtype)
    if dtype in _SIGNED:
        order = np.argsort(values ^ sign)
    elif dtype in _MANTISSA:
        order = np.argsort(np.where(values & sign, ~values, values | sign))
    else:
        order = np.arange(len(values))
    table = len(values) * (rows.itemsize * 8 + _TABLE_BITS)
    return _entropy(counts) + table / rows.size, values[order]


def _entropy(counts: np.ndarray) -> float:
    """Bits a symbol takes at best, on average, of these counts."""
    counts = counts[counts > 0]
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # no -0.0


def _best_split(
    rows: np.ndarray, dtype: torch.dtype, least_gain: float
) -> tuple[float, int, int, int, bool] | None:
    """Bits an element takes as a float, mantissa bits to keep, where the symbols begin, how many
    there are, and whether nothing is stored for zeros besides their symbol.

    A mantissa bit is kept among the symbols only if that saves ``least_gain`` bits an element.
    """
    if dtype not in _MANTISSA or rows.size == 0:
        return None
    mantissa = _MANTISSA[dtype]
    counts, zeros = _count(rows.reshape(-1), mantissa - _MOST_KEPT)
    gaps = bool(zeros > _MANY_ZEROS * rows.size)
    filled = (rows.size - gaps * zeros) / rows.size
    best = None
    for kept in range(_MOST_KEPT, -1, -1):
        present = np.flatnonzero(counts)
        table = len(present) * _TABLE_BITS / rows.size
        bits = _entropy(np.append(counts, zeros)) + (mantissa - kept + 1) * filled + table
        if len(present) and (best is None or bits < best[0] + least_gain * (best[1] - kept)):
            base = int(present[0])
            best = bits, kept, base, int(present[-1]) - base + 2, gaps
        counts = counts.reshape(-1, 2).sum(1)
    return best


@compiled
def _count(bits, dropped):
    """How often each exponent with its first mantissa bits occurs, and how often +0."""
    size = bits.itemsize * 8
    counts = np.zeros(1 << (size - 1 - dropped), np.int64)
    zeros = 0
    for value in bits:
        if value == 0:
            zeros += 1
        else:
            counts[(np.uint64(value) & np.uint64((1 << (size - 1)) - 1)) >> np.uint64(dropped)] += 1
    return counts, zeros


def _split(rows: np.ndarray, low: int, base: int, alphabet: int, gaps: bool):
    """The symbols of floats, and the ``low`` bits below them with the sign above as bytes."""
    codes = np.empty(rows.shape, np.uint8 if alphabet <= 256 else np.uint16)
    rest = np.empty(rows.size, rows.dtype)
    filled = _take_apart(rows.reshape(-1), codes.reshape(-1), rest, low, base - 1, gaps)
    return codes, pack_bits(rest[:filled], low + 1)


def _unsplit(codes, rest, rows: np.ndarray, low: int, base: int, gaps: int) -> None:
    """The inverse of `_split`, into ``rows``."""
    flat = rows.reshape(-1)
    filled = int(np.count_nonzero(codes)) if gaps else codes.size
    unpack_bits(rest, low + 1, flat[:filled])
    if gaps:
        _spread(codes.reshape(-1), flat, filled)
    number = rows.dtype.type  # all numbers of as few bits as there are: many fit a register
    sign, top = number(1 << low), number(1 << (rows.itemsize * 8 - 1 - low))
    below = number((base - 1) % 2 ** (8 * rows.itemsize))
    _join(codes.reshape(-1), flat, below, sign, number(sign - 1), top)


def pack_bits(numbers: np.ndarray, width: int) -> bytes:
    """The lowest ``width`` bits of unsigned integers, (numbers,), one after the other.

    They stand in planes, so that a processor can take many at once. With a whole number n to an
    eighth of them, the bits of numbers i, n + i, 2 n + i, ... fill ``width`` bytes, the lowest
    first, and the first of these bytes for each i make the first plane. The up to seven numbers
    left over come last.
    """
    groups = len(numbers) // 8
    planes = np.zeros((width, groups), np.uint8)
    _to_planes(numbers[: 8 * groups], planes)
    left = 0
    for i, number in enumerate(numbers[8 * groups :].tolist()):
        left |= (number & ((1 << width) - 1)) << (width * i)
    return planes.tobytes() + left.to_bytes(-(-width * (len(numbers) % 8) // 8), "little")


def unpack_bits(data: bytes | memoryview, width: int, numbers: np.ndarray) -> None:
    """The inverse of `pack_bits`, into ``numbers``; their bits above ``width`` may be anything.

    Raises:
        StreamError: too few bytes, or too many.
    """
    groups = len(numbers) // 8
    if len(data) != -(-len(numbers) * width // 8):
        raise StreamError(f"the stream is damaged: {len(data)} bytes for {len(numbers)} values")
    raw = np.frombuffer(data, np.uint8)
    _from_planes(raw[: width * groups].reshape(width, groups), numbers[: 8 * groups])
    left = int.from_bytes(raw[width * groups :].tobytes(), "little")
    for i in range(8 * groups, len(numbers)):
        numbers[i] = left & ((1 << width) - 1)
        left >>= width


# Indexes are unsigned below: numba looks for negative ones, which no processor does many at once.


@compiled
def _take_apart(bits, codes, rest, low, below, gaps):
    """Fill the symbols and what is below them; gives how many have something below."""
    size = bits.itemsize * 8
    magnitude, field = np.uint64((1 << (size - 1)) - 1), np.uint64((1 << low) - 1)
    filled = 0
    for i in range(bits.size):
        value = np.uint64(bits[i])
        codes[i] = 0 if value == 0 else np.int64((value & magnitude) >> np.uint64(low)) - below
        rest[filled] = (value & field) | (value >> np.uint64(size - 1)) << np.uint64(low)
        filled += not (gaps and value == 0)
    return filled


@compiled
def _look_up(values, codes, bits):
    """The value of each code, the last of codes that no codebook has."""
    last = np.uint64(values.size - 1)
    for i in range(np.uint64(codes.size)):
        bits[i] = values[min(np.uint64(codes[i]), last)]


@compiled
def _spread(codes, bits, filled):
    """Move the first ``filled`` of ``bits`` to where the codes are not 0, from the end."""
    for i in range(codes.size - 1, -1, -1):
        if codes[i]:
            filled -= 1
            bits[i] = bits[filled]


@compiled
def _join(codes, bits, below, sign, field, top):
    """The inverse of `_take_apart`: ``bits`` come in as the rest, each at its place.

    Moves bits by products, not shifts, so that nothing needs more bits than it has.
    """
    for i in range(codes.size):
        code, rest = codes[i], bits[i]
        value = (code + below) * sign + (rest & field) + (rest & sign) * top
        bits[i] = value if code else np.uint64(0)


@compiled
def _to_planes(numbers, planes):
    """The planes of `pack_bits`, which come in as zeros."""
    width, groups = planes.shape
    for eighth in range(8):
        first = eighth * width  # bit of a group where the number begins
        for plane in range(first >> 3, (first + width + 7) >> 3):
            shift, start = 8 * plane - first, np.uint64(eighth * groups)
            mask = np.uint64((1 << width) - 1)
            for i in range(groups):
                number = np.uint64(numbers[start + np.uint64(i)]) & mask
                if shift < 0:
                    planes[plane, i] |= (number << np.uint64(-shift)) & np.uint64(255)
                else:
                    planes[plane, i] |= (number >> np.uint64(shift)) & np.uint64(255)


@compiled
def _from_planes(planes, numbers):
    """The inverse of `_to_planes`."""
    width, groups = planes.shape
    for eighth in range(8):
        first = eighth * width
        for plane in range(first >> 3, (first + width + 7) >> 3):
            shift, start = 8 * plane - first, np.uint64(eighth * groups)
            row = planes[plane]
            if shift <= 0:  # the first of this number
                for i in range(groups):
                    numbers[start + np.uint64(i)] = row[np.uint64(i)] >> np.uint64(-shift)
            else:
                for i in range(groups):
                    numbers[start + np.uint64(i)] |= np.uint64(row[np.uint64(i)]) << np.uint64(
                        shift
                    )
