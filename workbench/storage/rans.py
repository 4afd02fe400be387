"""Range asymmetric numeral systems: the entropy bound to a thousandth, at the speed of a table.

A number ``x`` holds all symbols so far. A symbol of frequency ``f`` out of ``2**k``, whose share of
these begins at ``c``, makes it about ``2**k / f`` times larger:

    encode    x -> (x // f) * 2**k + x % f + c
    decode    slot = x % 2**k tells the symbol, then x -> f * (x // 2**k) + slot - c

What exceeds 32 bits moves out as words of 16. Several such numbers, the *lanes*, take turns, so
that the processor need not wait for one of them.

Frequencies are stored, in one table or in several: rows (output channels) whose symbols are
distributed alike form a class with a table of its own, and so do columns, where that saves more
than it costs. Where most symbols are the same one (zero, in a pruned layer), a mask of its places
comes first, coded in the same way, and then only the others.

References: Duda (2014), "Asymmetric numeral systems: entropy coding combining speed of Huffman
coding with compression rate of arithmetic coding"; Giesen (2014), "Interleaved entropy coders".

Shapes: R rows, C columns, A symbols, K classes.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from workbench.storage import mixing, streams
from workbench.storage.compiled import compiled
from workbench.storage.streams import Section, StreamError, numbers, read_numbers

_VALUES_PER_S = 1.5e8  # on one core of a server of 2024
_LANES = 8  # more are not faster
_LOW = 1 << 16  # where a lane takes in a word
_CLASSES = (2, 4, 8)
_MOST_HISTOGRAM, _MOST_CLUSTERED = 2**23, 512  # entries and rows, when classes are looked for
_MOST_SLOTS = 2**17  # of all tables: more do not stay in the cache
_DIGITS, _MOST_DIGITS = 4, 24  # binary ones of a frequency: those kept, and all
_ENTRY_BITS = 6  # of a frequency in a table, about


def encode(tensor: Tensor | np.ndarray) -> bytes:
    """The tensor as a stream."""
    return streams.encode(tensor, "rans")


def decode(stream: bytes | memoryview) -> Tensor:
    """The inverse of `encode`. Raises `StreamError` for a damaged stream."""
    return streams.decode(stream)


def decode_rate(stream: bytes | memoryview) -> float:
    """Values a second that one core decodes, about."""
    return _VALUES_PER_S


def compress(codes: np.ndarray, alphabet: int) -> list[Section]:
    """See `workbench.storage.streams.Codec`."""
    counts = np.bincount(codes.reshape(-1), minlength=alphabet)
    common = int(counts.argmax())
    if 2 * int(counts[common]) <= codes.size:
        return [Section("header", numbers(alphabet)), *_compress(codes, alphabet, "values")]
    mask = codes != common
    return [
        Section("header", numbers(common)),
        *_compress(mask.view(np.uint8), 2, "positions"),
        *_compress(codes[mask][None], alphabet, "values"),
    ]


def expand(sections: list[memoryview], shape: tuple[int, int], alphabet: int) -> np.ndarray:
    """The inverse of `compress`."""
    (common,) = read_numbers(sections[0])
    if common == alphabet:
        return _expand(sections[1:4], shape, alphabet)
    if common > alphabet:
        raise StreamError(f"the stream is damaged: symbol {common} of {alphabet}")
    mask = _expand(sections[1:4], shape, 2).view(bool)
    values = _expand(sections[4:7], (1, int(mask.sum())), alphabet)
    codes = np.full(shape, common, values.dtype)
    codes[mask] = values[0]
    return codes


@dataclass(frozen=True)
class _Classes:
    """Which table a symbol is coded with: that of its row's and its column's class."""

    of_rows: np.ndarray  # (R,)
    of_columns: np.ndarray  # (C,)
    counts: np.ndarray  # (classes of rows, classes of columns, A)

    @property
    def tables(self) -> int:
        return self.counts.shape[0] * self.counts.shape[1]

    def bits(self) -> float:
        """Size of all, about: symbols, tables, and which row and column is in which class."""
        totals = self.counts.sum(-1, keepdims=True)
        shares = np.divide(self.counts, totals, where=totals > 0, out=np.ones(self.counts.shape))
        symbols = -(self.counts * np.log2(shares, where=shares > 0, out=shares)).sum()
        rows, columns, _ = self.counts.shape
        members = self.of_rows.size * np.log2(rows) + self.of_columns.size * np.log2(columns)
        return float(symbols + _ENTRY_BITS * np.count_nonzero(self.counts) + members)


def _compress(codes: np.ndarray, alphabet: int, kind: streams.Kind) -> list[Section]:
    classes = _best_classes(codes, alphabet)
    rows, columns, _ = classes.counts.shape
    coarse = _coarse(classes.counts.reshape(-1, alphabet))
    bits = _table_bits(coarse)
    frequencies = np.stack([_normalize(row, bits) for row in coarse])
    lanes = _LANES if codes.size >= 2**14 else 1
    words = np.empty(codes.size + 2 * lanes, np.uint16)  # a symbol moves out one word at most
    of_rows = classes.of_rows * columns
    used = _encode(codes, of_rows, classes.of_columns, frequencies, bits, lanes, words)
    packed = [
        mixing.pack(of[None].astype(np.uint8), kinds) if kinds > 1 else b""
        for of, kinds in ((classes.of_rows, rows), (classes.of_columns, columns))
    ]
    return [
        Section("header", numbers(bits, lanes, rows, columns, *map(len, packed))),
        Section("code table", b"".join(packed) + _pack_table(coarse)),
        Section(kind, words[words.size - used :].tobytes()),
    ]


def _expand(sections: list[memoryview], shape: tuple[int, int], alphabet: int) -> np.ndarray:
    settings = read_numbers(sections[0])
    most = (16, _LANES, _CLASSES[-1], _CLASSES[-1])
    if len(settings) != 6 or any(not 1 <= a <= b for a, b in zip(settings, most, strict=False)):
        raise StreamError(f"the stream is damaged: settings {settings}")
    bits, lanes, rows, columns, *sizes = settings
    table = bytes(sections[1])
    ends = sizes[0], sum(sizes)
    of_rows, of_columns = (
        np.minimum(mixing.unpack(part, (1, size), kinds)[0], kinds - 1)
        if kinds > 1
        else np.zeros(size, np.uint8)
        for part, size, kinds in (
            (table[: ends[0]], shape[0], rows),
            (table[ends[0] : ends[1]], shape[1], columns),
        )
    )
    coarse = _unpack_table(table[ends[1] :], (rows * columns, alphabet))
    frequencies = np.stack([_normalize(row, bits) for row in coarse])
    words = np.frombuffer(sections[2], np.uint16).copy()
    codes = np.empty(shape, np.uint8 if alphabet <= 256 else np.uint16)
    if codes.size:
        slots = _slots(frequencies, bits)
        _decode(
            codes,
            of_rows * np.uint32(columns),
            of_columns.astype(np.uint32),
            slots,
            bits,
            lanes,
            words,
        )
    return codes


def _best_classes(codes: np.ndarray, alphabet: int) -> _Classes:
    """The classes with which the block takes the fewest bytes; most often one of each."""
    none = [np.zeros(size, np.int64) for size in codes.shape]
    found = [_Classes(*none, _histogram(codes, *none, alphabet))]
    if min(codes.shape) > 1 and max(codes.shape) * alphabet <= _MOST_HISTOGRAM:
        each = [np.arange(size) for size in codes.shape]
        of_rows = _cluster(_histogram(codes, each[0], none[1], alphabet)[:, 0])
        of_columns = _cluster(_histogram(codes, none[0], each[1], alphabet)[0])
        for of in (of_rows, none[1]), (none[0], of_columns), (of_rows, of_columns):
            found.append(_Classes(*of, _histogram(codes, *of, alphabet)))
    found = [c for c in found if c.tables << _table_bits(c.counts) <= _MOST_SLOTS] or found[:1]
    return min(found, key=_Classes.bits)


def _cluster(histograms: np.ndarray) -> np.ndarray:
    """The class of each row, or column, of these symbol counts, (R, A): k-means, in which the
    distance of a row from a class is the number of bits that it takes with that class's table."""
    rows, alphabet = histograms.shape
    symbols = np.arange(alphabet)
    spread = histograms @ abs(symbols - np.average(symbols, weights=histograms.sum(0)))
    some = histograms[:: -(-rows // _MOST_CLUSTERED)].astype(np.float32)
    start = spread[:: -(-rows // _MOST_CLUSTERED)].argsort(kind="stable").argsort(kind="stable")
    best = _Classes(np.zeros(rows, np.int64), symbols[:1] * 0, histograms.sum(0)[None, None])
    for kinds in _CLASSES:
        of = start * kinds // len(some)
        for _ in range(6):
            tables = (of == np.arange(kinds)[:, None]) @ some + np.float32(0.02)  # none ruled out
            bits = -np.log2(tables / tables.sum(1, keepdims=True))  # (K, A)
            of = (some @ bits.T).argmin(1)
        of = np.unique((histograms @ bits.T).argmin(1), return_inverse=True)[1]
        counts = (of == np.arange(of.max() + 1)[:, None]).astype(np.float64) @ histograms
        best = min(best, _Classes(of, best.of_columns, counts[:, None]), key=_Classes.bits)
    return best.of_rows


@compiled
def _histogram(codes, of_rows, of_columns, alphabet):
    """How often each symbol occurs in each class of rows and of columns."""
    rows = of_rows.max() + 1 if of_rows.size else 1
    columns = of_columns.max() + 1 if of_columns.size else 1
    counts = np.zeros((rows, columns, alphabet), np.int64)
    for r in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            counts[of_rows[r], of_columns[j], codes[r, j]] += 1
    return counts


def _coarse(counts: np.ndarray) -> np.ndarray:
    """Counts of which only the first `_DIGITS` binary digits are kept: half the table, as good."""
    dropped = np.maximum(_lengths(counts) - _DIGITS, 0)
    return counts >> dropped << dropped


def _lengths(counts: np.ndarray) -> np.ndarray:
    """Binary digits of each count; 0 for 0."""
    return np.frexp(counts.astype(np.float64))[1]


def _pack_table(coarse: np.ndarray) -> bytes:
    """The number of digits of each count by context mixing, then those after the first one."""
    lengths = _lengths(coarse)
    kept = np.clip(lengths - 1, 0, _DIGITS - 1)
    tail = (coarse >> np.maximum(lengths - _DIGITS, 0)) & ((1 << kept) - 1)
    wanted = np.arange(_DIGITS - 1) < kept[..., None]
    digits = (tail[..., None] >> np.arange(_DIGITS - 1) & 1)[wanted]
    packed = mixing.pack(lengths.astype(np.uint8), _MOST_DIGITS + 1)
    return numbers(len(packed)) + packed + np.packbits(digits.astype(np.uint8)).tobytes()


def _unpack_table(data: bytes, shape: tuple[int, int]) -> np.ndarray:
    """The inverse of `_pack_table`."""
    size, start = streams.read_number(data, 0)
    lengths = mixing.unpack(data[start : start + size], shape, _MOST_DIGITS + 1).astype(np.int64)
    kept = np.clip(lengths - 1, 0, _DIGITS - 1)
    wanted = np.arange(_DIGITS - 1) < kept[..., None]
    digits = np.unpackbits(np.frombuffer(data[start + size :], np.uint8))
    tail = np.zeros(wanted.shape, np.int64)
    if digits.size < wanted.sum():
        raise StreamError("the stream is damaged: its code table is cut short")
    tail[wanted] = digits[: wanted.sum()]
    leading = np.where(lengths > 0, 1 << kept, 0)
    return (leading + (tail << np.arange(_DIGITS - 1)).sum(-1)) << np.maximum(lengths - _DIGITS, 0)


def _table_bits(counts: np.ndarray) -> int:
    """Binary digits of the frequencies: enough for rare symbols, few enough for the cache."""
    return max(10, min(16, int(np.count_nonzero(counts, -1).max()).bit_length() + 5))


def _normalize(counts: np.ndarray, bits: int) -> np.ndarray:
    """Frequencies that sum to ``2**bits``, about in proportion to the counts, (A,)."""
    whole = 1 << bits
    if not counts.any():
        return counts
    frequencies = np.where(counts > 0, np.maximum(1, counts * whole // counts.sum()), 0)
    # Rounding, and the rare ones that were raised to 1, are made up for by the most frequent.
    order = counts.argsort(kind="stable")[::-1]
    while missing := whole - int(frequencies.sum()):
        for symbol in order[: np.count_nonzero(frequencies > 1) or 1]:
            step = max(missing // 4, 1) if missing > 0 else min(missing // 4, -1)
            step = max(step, 1 - frequencies[symbol])
            frequencies[symbol] += step
            missing -= step
            if not missing:
                break
    return frequencies


def _slots(frequencies: np.ndarray, bits: int) -> np.ndarray:
    """For each table and slot: the symbol, its frequency less 1, and how far into it the slot is.

    They share a word, of 32 bits where that is enough: the tables should stay in the cache.
    """
    small = bits <= 12 and frequencies.shape[1] <= 256
    width = 12 if small else 20
    tables = np.zeros((len(frequencies), 1 << bits), np.uint32 if small else np.uint64)
    for table, row in zip(tables, frequencies, strict=True):
        starts = np.cumsum(row) - row
        symbols = np.repeat(np.arange(row.size), row)
        inside = np.arange(symbols.size) - starts[symbols]
        table[: symbols.size] = (symbols << width | row[symbols] - 1) << width | inside
    return tables.reshape(-1)


@compiled
def _encode(codes, of_rows, of_columns, frequencies, bits, lanes, words):
    """Write backwards, what the decoder reads first last; returns how many words."""
    starts = np.zeros_like(frequencies)
    for k in range(frequencies.shape[0]):
        for s in range(1, frequencies.shape[1]):
            starts[k, s] = starts[k, s - 1] + frequencies[k, s - 1]
    states = np.full(lanes, _LOW, np.uint64)
    place = words.size
    for r in range(codes.shape[0] - 1, -1, -1):
        for j in range(codes.shape[1] - 1, -1, -1):
            table, symbol = of_rows[r] + of_columns[j], codes[r, j]
            frequency = np.uint64(frequencies[table, symbol])
            x = states[j % lanes]
            if x >= frequency << np.uint64(32 - bits):
                place -= 1
                words[place] = x & np.uint64(0xFFFF)
                x >>= np.uint64(16)
            quotient = x // frequency
            rest = x - quotient * frequency
            states[j % lanes] = (
                (quotient << np.uint64(bits)) + rest + np.uint64(starts[table, symbol])
            )
    for lane in range(lanes - 1, -1, -1):
        place -= 2
        words[place] = states[lane] & np.uint64(0xFFFF)
        words[place + 1] = states[lane] >> np.uint64(16)
    return words.size - place


@compiled
def _decode(codes, of_rows, of_columns, slots, bits, lanes, words):
    """The inverse of `_encode`; of damaged words it makes some symbols, and reads no others."""
    states = np.zeros(lanes, np.uint32)
    for lane in range(lanes):
        if 2 * lane + 1 < words.size:
            states[lane] = np.uint32(words[2 * lane]) | np.uint32(words[2 * lane + 1]) << np.uint32(
                16
            )
    # Unsigned all through: a signed index would be tested for being negative at every step.
    place, last = np.uint64(2 * lanes), np.uint64(max(0, words.size - 1))
    mask, shift, low, half = (
        np.uint32((1 << bits) - 1),
        np.uint32(bits),
        np.uint32(_LOW),
        np.uint32(16),
    )
    width = np.uint64(12 if slots.itemsize == 4 else 20)
    field = np.uint32((1 << width) - np.uint64(1))
    for r in range(codes.shape[0]):
        row = codes[r]
        base = np.uint32(of_rows[r])
        for start in range(0, row.size, lanes):
            for lane in range(min(lanes, row.size - start)):
                j = start + lane
                x = states[lane]
                slot = slots[((base + of_columns[j]) << shift) + (x & mask)]
                row[j] = slot >> (width + width)
                frequency = (np.uint32(slot >> width) & field) + np.uint32(1)
                x = frequency * (x >> shift) + (np.uint32(slot) & field)
                more = x < low
                word = np.uint32(words[min(place, last)])
                states[lane] = (x << half) | word if more else x
                place += np.uint64(more)
