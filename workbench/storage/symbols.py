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
    codebook = _codebook(rows, dtype) if codec is not None else None
    split = _best_split(rows, dtype) if codec is not None else None
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
        np.take(values, codec.expand(sections[2:], rows.shape, len(values)), out=rows)
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


def _best_split(rows: np.ndarray, dtype: torch.dtype) -> tuple[float, int, int, int, bool] | None:
    """Bits an element takes as a float, mantissa bits to keep, where the symbols begin, how many
    there are, and whether nothing is stored for zeros besides their symbol."""
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
        if len(present) and (best is None or bits < best[0]):
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
    """The symbols of floats, and the ``low`` bits below them and the sign as bytes."""
    codes = np.empty(rows.shape, np.uint8 if alphabet <= 256 else np.uint16)
    words = np.zeros(rows.size * (low + 1) // 64 + 2, np.uint64)
    used = _split_bits(rows.reshape(-1), codes.reshape(-1), words, low, base - 1, gaps)
    return codes, words.view(np.uint8)[: -(-used // 8)].tobytes()


@compiled
def _split_bits(bits, codes, words, low, below, gaps):
    size = bits.itemsize * 8
    magnitude = np.uint64((1 << (size - 1)) - 1)
    place = 0
    for i in range(bits.size):
        value = np.uint64(bits[i])
        if value == 0:
            codes[i] = 0
            place += 0 if gaps else low + 1
            continue
        sign = value >> np.uint64(size - 1)
        value &= magnitude
        codes[i] = np.int64(value >> np.uint64(low)) - below
        rest = (value & np.uint64((1 << low) - 1)) | (sign << np.uint64(low))
        word, shift = place >> 6, np.uint64(place & 63)
        words[word] |= rest << shift
        words[word + 1] |= (rest >> np.uint64(1)) >> (np.uint64(63) - shift)
        place += low + 1
    return place


def _unsplit(codes, rest, rows: np.ndarray, low: int, base: int, gaps: int) -> None:
    """The inverse of `_split`, into ``rows``."""
    filled = int(np.count_nonzero(codes)) if gaps else codes.size
    if -(-filled * (low + 1) // 8) != len(rest):
        raise StreamError(f"the stream is damaged: {len(rest)} bytes for {filled} values")
    words = np.zeros(len(rest) // 8 + 2, np.uint64)
    words.view(np.uint8)[: len(rest)] = np.frombuffer(rest, np.uint8)
    high = np.arange(256**codes.itemsize, dtype=np.uint64) + np.uint64(base) - np.uint64(1)
    high[0] = 0
    _join_bits(codes.reshape(-1), high << np.uint64(low), words, rows.reshape(-1), low, bool(gaps))


@compiled
def _join_bits(codes, high, words, bits, low, gaps):
    """The inverse of `_split_bits`; ``high`` is what each symbol stands for."""
    width, field = np.uint64(low + 1), np.uint64((1 << low) - 1)
    sign_at, sign_to, one = np.uint64(low), np.uint64(bits.itemsize * 8 - 1), np.uint64(1)
    waiting, count, following = words[0], np.uint64(64), 1
    for i in range(codes.size):
        code = codes[i]
        if gaps and code == 0:
            bits[i] = 0
            continue
        rest = waiting
        if count >= width:
            waiting >>= width
            count -= width
        else:
            word = words[following]
            following += 1
            rest |= word << count
            waiting = word >> (width - count)
            count = np.uint64(64) - (width - count)
        bits[i] = high[code] | (rest & field) | ((rest >> sign_at) & one) << sign_to
