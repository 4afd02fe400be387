"""Run-length coding: where one symbol is most of the data, say how many of it come in a row.

`runs` is the plain form. What pays for pruned weights is the form of Deep Compression: for each
symbol that is not the most frequent one ("zero" here), the *gap*, how many zeros come before it.
Gaps have a field of a few bits. Where one is longer than the field can say, a zero is coded as if
it were a value, which ends the gap early: a *filler*.

    0 0 7 0 0 0 0 0 4   with 2 bits   gaps 2 3 1   values 7 0 4

Gaps and values are then Huffman coded, with a code each, for the field that gives the fewest bytes.

A chunk has up to five sections: "header" (bits of the field, the zero, gaps), "code table" and
"positions" of the gaps, "code table" and "values" of the values. Zeros alone have only the first.

Reference: Han, Mao and Dally (2016), "Deep compression: compressing deep neural networks with
pruning, trained quantization and Huffman coding".
"""

import math

import numpy as np
from torch import Tensor

from workbench.storage import huffman, streams
from workbench.storage.streams import Section, StreamError, numbers, read_numbers

NAME = "run_length"
_VALUES_PER_S = 5e7  # nominal: dense weights are slower, sparse ones ten times as fast
_FIELDS = range(2, 9)  # bits of a gap that are tried


def encode(tensor: Tensor | np.ndarray) -> bytes:
    """The tensor as a stream of gaps and values; see `workbench.storage.streams.encode`."""
    return streams.encode(tensor, NAME)


def decode(stream: bytes | memoryview) -> Tensor:
    """The tensor of a stream, bit for bit; see `workbench.storage.streams.decode`."""
    return streams.decode(stream)


def decode_rate(stream: bytes | memoryview) -> float:
    """Values a second that one core decodes, about."""
    return _VALUES_PER_S


def runs(symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each run of equal symbols as its symbol and its length.

    Args:
        symbols: of any shape; read in order.

    Returns:
        (runs,) symbols, and (runs,) lengths from 1.

    >>> runs(np.array([0, 0, 0, 7, 0, 0]))
    (array([0, 7, 0]), array([3, 1, 2]))
    """
    symbols = np.asarray(symbols).reshape(-1)
    changes = np.flatnonzero(symbols[1:] != symbols[:-1]) + 1
    starts = np.concatenate([np.arange(min(1, symbols.size)), changes])
    return symbols[starts], np.diff(starts, append=symbols.size)


def from_runs(symbols: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The inverse of `runs`, flat.

    >>> from_runs([0, 7, 0], [3, 1, 2])
    array([0, 0, 0, 7, 0, 0])
    """
    return np.repeat(symbols, lengths)


def gaps(symbols: np.ndarray, zero: int, field: int) -> tuple[np.ndarray, np.ndarray]:
    """How many zeros come before each value, in ``field`` bits, and the values, fillers among them.

    Args:
        symbols: (symbols,) of any integer type.
        zero: the symbol that is left out.
        field: bits of a gap, 1 to 8.

    Returns:
        (values,) uint8 gaps and (values,) values. Zeros after the last value are in neither.

    Raises:
        ValueError: a field out of range.

    >>> gaps(np.array([0, 0, 7, 0, 0, 0, 0, 0, 4]), zero=0, field=2)
    (array([2, 3, 1], dtype=uint8), array([7, 0, 4]))
    """
    if not 1 <= field <= 8:
        raise ValueError(f"field is {field}; a gap has 1 to 8 bits")
    places, before = _zeros_before(symbols, zero)
    last = np.cumsum((before >> field) + 1) - 1  # of the gaps that lead to a value, fillers first
    count = last[-1] + 1 if last.size else 0
    found = np.full(count, 2**field - 1, np.uint8)
    values = np.full(count, zero, symbols.dtype)
    found[last] = before & (2**field - 1)
    values[last] = symbols[places]
    return found, values


def compress(codes: np.ndarray, alphabet: int) -> list[Section]:
    """The symbols of a chunk, uint8 or uint16 and below ``alphabet``, as sections."""
    codes = codes.reshape(-1)
    counts = np.bincount(codes, minlength=alphabet)
    zero = int(counts.argmax())
    field = _best_field(codes, counts, zero)
    found, values = gaps(codes, zero, field)
    header = Section("header", numbers(field, zero, len(found)))
    if not len(found):
        return [header]
    gap_table, gap_codes = huffman.compress(found, 2**field)
    positions = Section("positions", gap_codes.data)
    return [header, gap_table, positions, *huffman.compress(values, alphabet)]


def expand(sections: list[bytes], shape: tuple[int, int], alphabet: int) -> np.ndarray:
    """The inverse of `compress`.

    Raises:
        StreamError: the sections are damaged.
    """
    field, zero, count = _read_header(sections, math.prod(shape), alphabet)
    out = np.full(shape, zero, np.uint8 if alphabet <= 256 else np.uint16)
    if count:
        found = huffman.expand(sections[1:3], (1, count), 2**field)
        values = huffman.expand(sections[3:], (1, count), alphabet)
        places = np.cumsum(found, dtype=np.int64) + np.arange(count)
        if places[-1] >= out.size:
            raise StreamError(f"the stream is damaged: a value at {places[-1]} of {out.size}")
        out.reshape(-1)[places] = values[0]
    return out


def _zeros_before(symbols: np.ndarray, zero: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the values are, and how many zeros come right before each."""
    places = np.flatnonzero(symbols != zero)
    return places, np.diff(places, prepend=-1) - 1


def _best_field(codes: np.ndarray, counts: np.ndarray, zero: int) -> int:
    """The field that gives the fewest bytes: a short one has more fillers, and fewer gaps to tell
    apart."""
    _, before = _zeros_before(codes, zero)
    times = np.bincount(before)  # how often each number of zeros occurs
    distinct = np.flatnonzero(times)
    times = times[distinct]

    def size(field: int) -> int:
        fillers = ((distinct >> field) * times).sum()
        of_gaps = np.bincount(distinct & (2**field - 1), times, 2**field).astype(np.int64)
        of_gaps[-1] += fillers
        of_values = counts.copy()
        of_values[zero] = fillers
        return huffman.coded_bytes(of_gaps) + huffman.coded_bytes(of_values)

    return min(_FIELDS, key=size)


def _read_header(sections: list[bytes], size: int, alphabet: int) -> tuple[int, int, int]:
    header = read_numbers(sections[0]) if sections else []
    if len(header) != 3:
        raise StreamError(f"the stream is damaged: its header has {len(header)} numbers of 3")
    field, zero, count = header
    if field not in _FIELDS or zero >= min(alphabet, 2**16) or count > size:
        raise StreamError(
            f"the stream is damaged: {count} gaps of {field} bits and the zero {zero}, for {size} "
            f"of {alphabet} symbols"
        )
    if len(sections) != (5 if count else 1):
        raise StreamError(f"the stream is damaged: {len(sections)} sections for {count} gaps")
    return field, zero, count
