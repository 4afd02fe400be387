"""Huffman coding: frequent symbols get short codes.

The code is *canonical*: from the lengths of the codes alone follow their bits, so that only the
lengths are stored, in few bits each. No code is longer than a limit, so that one look into a table
with the next bits of a stream gives a symbol at once, and where codes are short, several. A large
chunk is written as four streams, since a processor that waits for one can work on the others.

A chunk has two sections, "code table" and "values". The second holds the sizes of all streams but
the last, four bytes each, and then the streams, with the highest bit of a byte first.

References: Huffman (1952), "A method for the construction of minimum-redundancy codes"; Larmore and
Hirschberg (1990), "A fast algorithm for optimal length-limited Huffman codes"; Giesen (2014),
"Interleaved entropy coders".
"""

import itertools
import math

import numpy as np
from torch import Tensor

from workbench.storage import streams
from workbench.storage.compiled import compiled, inlined
from workbench.storage.streams import Section, StreamError

NAME = "huffman"
_VALUES_PER_S = 3e8  # nominal: int8 and bfloat16 are faster, sparse floats slower
LEAST_GAIN = 0.1  # bits that a mantissa bit among the symbols has to save: longer codes are slower
_STREAMS = 4
_WORTH_SPLITTING = 2**16  # symbols from which the sizes of four streams do not matter
_SHORTEST_WINDOW, _LONGEST_WINDOW = 12, 16  # bits: 32 KiB of table stay in the first-level cache
_PER_LOAD = 3  # lookups from 64 bits, of which the first 7 may be used already: 3 * 16 <= 57
_PER_ENTRY = 6  # bytes of symbols in an entry of the table
# Where an entry has the bytes of its symbols, their number, and that of the bits of their codes.
_COUNT, _USED, _BYTE = np.uint64(48), np.uint64(56), np.uint64(255)


def encode(tensor: Tensor | np.ndarray) -> bytes:
    """The tensor as a stream of Huffman codes; see `workbench.storage.streams.encode`."""
    return streams.encode(tensor, NAME)


def decode(stream: bytes | memoryview) -> Tensor:
    """The tensor of a stream, bit for bit; see `workbench.storage.streams.decode`."""
    return streams.decode(stream)


def decode_rate(stream: bytes | memoryview) -> float:
    """Values a second that one core decodes, about."""
    return _VALUES_PER_S


def code_lengths(counts: np.ndarray, limit: int) -> np.ndarray:
    """Bits of the code of each symbol: of all codes that keep to the limit, those of least sum.

    Package-merge: a code of length n is a coin of each value 1/2, 1/4, ..., 2**-n at the price of
    the symbol's count. The cheapest coins that add up to (symbols - 1) are the best code. From the
    smallest value up, coins are packed in pairs, in the order of their price, and each pair is a
    coin of the next value.

    Args:
        counts: how often each symbol occurs, (symbols,).
        limit: bits of the longest code.

    Returns:
        (symbols,) lengths; 0 for a symbol that does not occur, 1 for one that is alone.

    Raises:
        ValueError: a negative count, or more symbols than there are codes of ``limit`` bits.

    Reference: Larmore and Hirschberg (1990), "A fast algorithm for optimal length-limited Huffman
    codes".

    >>> code_lengths([90, 5, 0, 3, 2], limit=12)
    array([1, 2, 0, 3, 3], dtype=uint8)
    """
    counts = np.asarray(counts, np.int64)
    if (counts < 0).any():
        raise ValueError(f"a symbol is counted {counts.min()} times; counts are 0 or more")
    symbols = np.flatnonzero(counts)
    if len(symbols) > 2**limit:
        raise ValueError(
            f"limit is {limit} bits; {len(symbols):,} symbols take at least "
            f"{_bits_to_tell_apart(len(symbols))}"
        )
    lengths = np.zeros(len(counts), np.uint8)
    if len(symbols) == 1:
        lengths[symbols] = 1
        return lengths
    symbols = symbols[np.argsort(counts[symbols], kind="stable")]
    prices = counts[symbols]
    coins, is_single = prices, [np.ones(len(symbols), bool)]  # by value, the smallest first
    for _ in range(limit - 1):
        pairs = coins[0 : len(coins) // 2 * 2].reshape(-1, 2).sum(1)
        both = np.concatenate([prices, pairs])
        order = np.argsort(both, kind="stable")
        coins = both[order]
        is_single.append(order < len(prices))
    taken = 2 * len(symbols) - 2  # coins of 1/2
    for single in reversed(is_single):
        singles = int(single[:taken].sum())
        lengths[symbols[:singles]] += 1
        taken = 2 * (taken - singles)
    return lengths


def canonical_codes(lengths: np.ndarray) -> np.ndarray:
    """The codes that follow from their lengths: counted up, the short ones first.

    Args:
        lengths: bits of the code of each symbol, (symbols,); 0 for none.

    Returns:
        (symbols,) codes, of which the lowest ``lengths`` bits count, to be written highest first.

    Raises:
        ValueError: there is no code of these lengths in which none begins with another.

    Reference: Schwartz and Kallick (1964), "Generating a canonical prefix encoding".

    >>> lengths = [1, 2, 0, 3, 3]
    >>> [f"{c:0{n}b}" if n else "" for c, n in zip(canonical_codes(lengths), lengths)]
    ['0', '10', '', '110', '111']
    """
    lengths = np.asarray(lengths, np.int64)
    symbols = np.flatnonzero(lengths)
    order = symbols[np.argsort(lengths[symbols], kind="stable")]
    longest = int(lengths.max(initial=0))
    spans = 1 << (longest - lengths[order])  # how many of the longest codes each takes
    if spans.sum() > 1 << longest:
        raise ValueError(f"no code has these lengths: they take {spans.sum() / 2**longest} of 1")
    codes = np.zeros(len(lengths), np.int64)
    codes[order] = (np.cumsum(spans) - spans) >> (longest - lengths[order])
    return codes


def compress(codes: np.ndarray, alphabet: int) -> list[Section]:
    """The symbols of a chunk, uint8 or uint16 and below ``alphabet``, as sections."""
    codes = np.ascontiguousarray(codes).reshape(-1)
    counts = np.bincount(codes, minlength=alphabet)
    if len(counts) > alphabet:
        raise ValueError(f"a symbol is {len(counts) - 1}; the alphabet is 0 to {alphabet - 1}")
    lengths = _lengths(counts)
    table = Section("code table", pack_lengths(lengths))
    if np.count_nonzero(lengths) < 2:  # nothing to tell
        return [table, Section("values", b"")]
    # Each entry is a code, at the highest bits, and at the lowest its length.
    entries = canonical_codes(lengths).astype(np.uint64) << (64 - lengths).astype(np.uint64)
    entries |= lengths
    bounds = _bounds(codes.size)
    room = (counts * lengths).sum() // 8 + len(bounds)
    out = np.empty(room, np.uint8)
    ends = [0]
    for start, stop in itertools.pairwise(bounds):
        ends.append(_write(codes[start:stop], entries, out, ends[-1]))
    sizes = np.diff(ends)[:-1].astype("<u4")
    return [table, Section("values", sizes.tobytes() + out[: ends[-1]].tobytes())]


def expand(sections: list[bytes], shape: tuple[int, int], alphabet: int) -> np.ndarray:
    """The inverse of `compress`.

    Raises:
        StreamError: the sections are damaged.
    """
    table, values = sections
    lengths = unpack_lengths(table, alphabet)
    out = np.empty(shape, np.uint8 if alphabet <= 256 else np.uint16)
    if np.count_nonzero(lengths) < 2:
        if len(values) or (out.size and not lengths.any()):
            raise StreamError(f"the stream is damaged: {len(values)} bytes of 1 symbol or none")
        out[...] = lengths.argmax()
        return out
    shortest_window = min(_SHORTEST_WINDOW, out.size.bit_length() - 4)  # of few codes, few looks
    bounds, raw = _bounds(out.size) * out.itemsize, out.reshape(-1).view(np.uint8)
    data = np.frombuffer(values, np.uint8)
    trouble = _read(data, lengths, shortest_window, bounds, out.itemsize, raw)
    if trouble:
        raise StreamError(f"the stream is damaged: {_TROUBLES[trouble]}")
    return out


def coded_bytes(counts: np.ndarray) -> int:
    """Bytes that `compress` takes for symbols that occur so often, less 3 at most."""
    lengths = _lengths(counts)
    table = len(pack_lengths(lengths))
    if np.count_nonzero(lengths) < 2:
        return table
    sizes = 4 * (len(_bounds(counts.sum())) - 2)
    return table + sizes + math.ceil((counts * lengths).sum() / 8)


def pack_lengths(lengths: np.ndarray) -> bytes:
    """The lengths of a code in few bits: the table that a stream stores.

    First come the runs of symbols that occur and that do not, in turn, after a bit that says with
    which it begins. Then, for each that occurs, how much longer its code is than the one before:
    0, 1, -1, 2, -2, ... as 1, 2, 3, 4, 5, ... All numbers are in Elias' gamma code: as many zeros
    as it has binary digits after the first, then its digits.

    Reference: Elias (1975), "Universal codeword sets and representations of the integers".
    """
    lengths = np.asarray(lengths, np.int64)
    occurs = lengths > 0
    changes = np.flatnonzero(np.diff(occurs)) + 1
    runs = np.diff([0, *changes, len(lengths)])
    present = lengths[occurs]
    steps = np.diff(present, prepend=_bits_to_tell_apart(len(present)))
    numbers = [*runs.tolist(), *np.where(steps > 0, 2 * steps, 1 - 2 * steps).tolist()]
    digits = "01"[int(occurs[0])] + "".join("0" * (n.bit_length() - 1) + f"{n:b}" for n in numbers)
    size = math.ceil(len(digits) / 8)
    return int(digits.ljust(8 * size, "0"), 2).to_bytes(size, "big")


def unpack_lengths(table: bytes | memoryview, alphabet: int) -> np.ndarray:
    """The inverse of `pack_lengths`, (alphabet,).

    Raises:
        StreamError: no table, or not of a code for so many symbols.
    """
    if not 0 < alphabet <= 2**_LONGEST_WINDOW:
        raise StreamError(f"the stream is damaged: no code of {alphabet} symbols")
    lengths = np.zeros(alphabet, np.uint8)
    trouble = _read_lengths(np.frombuffer(table, np.uint8), lengths)
    if trouble:
        raise StreamError(f"the stream is damaged: {_TROUBLES[trouble]}")
    return lengths


_TROUBLES = (
    "", "its code table is cut short", "no code of so many symbols",
    "the length of a code is out of range", "its code is not complete",
    "its bytes are too few for its codes", "its codes do not end where it does",
)  # fmt: skip


def _lengths(counts: np.ndarray) -> np.ndarray:
    """Lengths with a limit that leaves the rarest symbols a sixteenth of all codes, or less."""
    enough = _bits_to_tell_apart(np.count_nonzero(counts)) + 4
    return code_lengths(counts, min(max(_SHORTEST_WINDOW, enough), _LONGEST_WINDOW))


def _bits_to_tell_apart(count: int) -> int:
    return max(0, int(count) - 1).bit_length()


def _bounds(count: int) -> np.ndarray:
    """Where the symbols of each stream begin, and where the last ends."""
    parts = _STREAMS if count >= _WORTH_SPLITTING else 1
    return np.arange(parts + 1) * int(count) // parts


@compiled
def _read_lengths(table, lengths):  # pragma: no cover
    """Read what `pack_lengths` wrote into ``lengths``; gives which of `_TROUBLES` there is."""
    place = 1
    occurs = table.size > 0 and table[0] >= 128
    symbol = present = 0
    while symbol < lengths.size:
        run, place = _read_gamma(table, place)
        if run < 0:
            return 1
        if run > lengths.size - symbol:
            return 2
        lengths[symbol : symbol + run] = occurs
        present += run * occurs
        symbol += run
        occurs = not occurs
    length = 0
    while 1 << length < present:
        length += 1
    taken = 0
    for symbol in range(lengths.size):
        if not lengths[symbol]:
            continue
        zigzag, place = _read_gamma(table, place)
        if zigzag < 0:
            return 1
        length += zigzag >> 1 if zigzag & 1 == 0 else -(zigzag >> 1)
        if not 1 <= length <= _LONGEST_WINDOW:
            return 3
        lengths[symbol] = length
        taken += 1 << (_LONGEST_WINDOW - length)
    # Only of a complete code does every entry of the decoder's table get a symbol.
    return 4 if present > 1 and taken != 1 << _LONGEST_WINDOW else 0


@compiled
def _read_gamma(table, place):  # pragma: no cover
    """The number in Elias' gamma code at this bit, or -1, and the bit after it."""
    zeros = 0
    while place < 8 * table.size and not table[place >> 3] >> (7 - (place & 7)) & 1:
        place += 1
        zeros += 1
    if zeros > 40 or place + zeros >= 8 * table.size:
        return -1, place
    number = 0
    for _ in range(zeros + 1):
        number = number << 1 | (np.int64(table[place >> 3]) >> (7 - (place & 7)) & 1)
        place += 1
    return number, place


@compiled
def _write(codes, entries, out, place):  # pragma: no cover
    """Write one stream of codes from the byte at ``place``; gives where it ends."""
    waiting, count = np.uint64(0), np.uint64(0)  # bits, at the highest places, and how many
    for code in codes:
        entry = entries[code]
        waiting |= (entry & ~np.uint64(255)) >> count
        count += entry & np.uint64(255)
        if count >= 32:
            for shift in (56, 48, 40, 32):
                out[place] = waiting >> np.uint64(shift)
                place += 1
            waiting <<= np.uint64(32)
            count -= np.uint64(32)
    for shift in range(56, 56 - np.int64(count), -8):
        out[place] = waiting >> np.uint64(shift)
        place += 1
    return place


@compiled
def _read(data, lengths, shortest_window, bounds, itemsize, out):  # pragma: no cover
    """Read all streams side by side into ``out``; gives which of `_TROUBLES` there is.

    Whatever the data: reads none of it past its end, and writes no byte of ``out`` past its bounds.
    """
    count = bounds.size - 1  # of streams
    ends = np.full(count + 1, data.size)  # where they begin, and where the last ends
    ends[0] = 4 * (count - 1)
    if ends[0] > data.size:
        return 5
    for s in range(count - 1):
        size = 0
        for i in range(4):
            size |= np.int64(data[4 * s + i]) << 8 * i
        ends[s + 1] = ends[s] + size
        if ends[s + 1] > data.size:
            return 5
    window = max(shortest_window, np.int64(lengths.max()))
    entries, singles = _tables(lengths, itemsize, window)
    drop = np.uint64(64 - window)
    most = np.int64(entries[0] >> _COUNT & _BYTE)  # of all: the shortest code is the one of zeros
    places, done = 8 * ends[:-1], bounds[:-1].copy()
    while True:
        # As many rounds as are safe whatever is read: then nothing is checked within them.
        rounds = np.int64(out.size)
        for s in range(count):
            whole = (bounds[s + 1] - done[s] - 8) // (_PER_LOAD * most)
            loads = (8 * (data.size - 8) - places[s]) // (_PER_LOAD * window)
            rounds = min(rounds, whole, loads)
        if rounds <= 0:
            break
        place0, at0 = np.uint64(places[0]), np.uint64(done[0])
        if count == 1:
            for _ in range(rounds):
                place0, at0 = _look(data, entries, drop, place0, at0, out)
        else:  # four, each in variables of its own, which registers can hold
            place1, at1 = np.uint64(places[1]), np.uint64(done[1])
            place2, at2 = np.uint64(places[2]), np.uint64(done[2])
            place3, at3 = np.uint64(places[3]), np.uint64(done[3])
            for _ in range(rounds):
                place0, at0 = _look(data, entries, drop, place0, at0, out)
                place1, at1 = _look(data, entries, drop, place1, at1, out)
                place2, at2 = _look(data, entries, drop, place2, at2, out)
                place3, at3 = _look(data, entries, drop, place3, at3, out)
            places[1], places[2], places[3] = place1, place2, place3
            done[1], done[2], done[3] = at1, at2, at3
        places[0], done[0] = place0, at0
    for s in range(count):  # the rest one by one, with zeros after the end
        place = places[s]
        for at in range(done[s], bounds[s + 1], itemsize):
            bits = 0
            for byte in range(place >> 3, (place >> 3) + 3):
                bits = bits << 8 | (np.int64(data[byte]) if byte < data.size else 0)
            symbol = singles[bits >> (24 - window - (place & 7)) & (1 << window) - 1]
            for i in range(itemsize):
                out[at + i] = symbol >> 8 * i
            place += lengths[symbol]
        if (place + 7) >> 3 != ends[s + 1]:
            return 6
    return 0


@compiled
def _tables(lengths, itemsize, window):  # pragma: no cover
    """What the next bits of a stream stand for, for each value that a window of them can have.

    Returns:
        (2**window,) entries: the symbols of all whole codes among these bits, at most `_PER_ENTRY`
        bytes of them; from bit 48, how many bytes; from bit 56, how many bits their codes take.
        (2**window,) the first symbol alone.
    """
    singles, entries = np.empty(1 << window, np.uint16), np.empty(1 << window, np.uint64)
    start, mask = 0, (1 << window) - 1
    for length in range(1, window + 1):
        for symbol in range(lengths.size):
            if lengths[symbol] == length:
                stop = start + (1 << window - length)
                singles[start:stop] = symbol
                start = stop
    for bits in range(entries.size):
        symbols, used, place = 0, 0, 0
        while place < _PER_ENTRY:
            symbol = np.int64(singles[bits << used & mask])
            length = np.int64(lengths[symbol])
            if used + length > window:
                break
            symbols |= symbol << (8 * place)
            used += length
            place += itemsize
        entries[bits] = symbols | place << 48 | used << 56
    return entries, singles


# numba makes float64 of int64 and uint64 together: here what is shifted is uint64, what counts is
# int64. It looks for negative indexes, except in unsigned ones: these make `_read` twice as fast.


@inlined
def _look(data, entries, drop, place, at, out):  # pragma: no cover
    """Read from the bit at ``place``, write to the byte at ``at``; gives where both go on."""
    byte, bits = place >> np.uint64(3), np.uint64(0)
    for i in range(8):
        bits = bits << np.uint64(8) | np.uint64(data[byte + np.uint64(i)])
    bits <<= place & np.uint64(7)
    for _ in range(_PER_LOAD):
        entry = entries[bits >> drop]
        for i in range(8):  # those after its symbols are written over
            out[at + np.uint64(i)] = entry >> np.uint64(8 * i)
        at += entry >> _COUNT & _BYTE
        bits <<= entry >> _USED
        place += entry >> _USED
    return place, at
