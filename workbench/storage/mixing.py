"""Context mixing: weights are predicted from their neighbours. Slow, and close to the limit.

A symbol is coded as yes-or-no decisions: is it another than the most frequent one (zero, where
weights are pruned), and if so, the bits of its number, the highest first. For each decision several
adaptive probabilities are looked up, each kept for one *context*: this row, this column, the
neighbours before and above, those a kernel row or an image row away (a *lag* that the encoder
finds). A logistic regression that learns as it goes mixes them into one, with which an arithmetic
coder codes the decision. The decoder learns the same, so no table is stored.

All arithmetic is in whole numbers, so that a stream decodes to the same on every machine.

References: Mahoney (2005), "Adaptive weighing of context models for lossless data compression";
Rissanen and Langdon (1979), "Arithmetic coding".

Shapes: R rows and C columns of a chunk.
"""

from decimal import Decimal, localcontext
from functools import cache

import numpy as np
from torch import Tensor

from workbench.storage import streams
from workbench.storage.compiled import compiled
from workbench.storage.streams import Section, StreamError, numbers, read_numbers

_DECISIONS_PER_S = 8e6  # on one core of a server of 2024
_CERTAIN = 2047  # the largest logit, in 256ths: odds of 3,000 to 1
_PATIENCE = 1023  # observations after which a probability adapts no more slowly
_RATE = 4  # of the regression
_LEVELS = 32  # of how large something is here, beside how large it is on average
_EVEN = 1 << 31  # a probability of 1/2 that was never seen to hold or not


def encode(tensor: Tensor | np.ndarray) -> bytes:
    """The tensor as a stream. It takes a core about a second for 5 million decisions."""
    return streams.encode(tensor, "mixing")


def decode(stream: bytes | memoryview) -> Tensor:
    """The inverse of `encode`, no faster. Raises `StreamError` for a damaged stream."""
    return streams.decode(stream)


def decode_rate(stream: bytes | memoryview) -> float:
    """Values a second that one core decodes, about: fewer, the more decisions a value takes."""
    values = decisions = 0
    for chunk in streams.chunks(stream):
        settings = [section.data for section in chunk if section.kind == "header"][1:]
        for size, made, *_ in map(read_numbers, settings):
            values, decisions = values + size, decisions + made
    return _DECISIONS_PER_S * values / decisions if decisions else _DECISIONS_PER_S


def compress(codes: np.ndarray, alphabet: int) -> list[Section]:
    """See `workbench.storage.streams.Codec`."""
    counts = np.bincount(codes.reshape(-1), minlength=alphabet)
    common = int(counts.argmax())
    rest = codes.size - int(counts[common])
    bits = _bits(alphabet)
    if 2 * rest >= codes.size:  # no symbol is so frequent that it is worth a flag
        settings = numbers(codes.size, codes.size * bits)
        return [Section("header", settings), Section("values", pack(codes, alphabet))]
    flags = (codes != common).astype(np.uint8)
    lag = _lag(flags)
    places, values = _room(codes.size), _room(rest * bits)
    used = _code_flags(flags, lag, places, False, *_tables())
    used_by_values = _code_values(codes, flags, bits, values, False, *_tables())
    return [
        Section("header", numbers(codes.size, codes.size + rest * bits, common, lag)),
        Section("positions", places[:used].tobytes()),
        Section("values", values[:used_by_values].tobytes()),
    ]


def expand(sections: list[memoryview], shape: tuple[int, int], alphabet: int) -> np.ndarray:
    """The inverse of `compress`."""
    size, _, *flagged = read_numbers(sections[0])
    if size != shape[0] * shape[1]:
        raise StreamError(f"the stream is damaged: {size} values for {shape}")
    if not flagged:
        return unpack(sections[1], shape, alphabet)
    common, lag = flagged
    if common >= alphabet or lag > shape[1]:
        raise StreamError(f"the stream is damaged: symbol {common} of {alphabet}, lag {lag}")
    codes = np.full(shape, common, np.uint8 if alphabet <= 256 else np.uint16)
    flags = np.empty(shape, np.uint8)
    places, values = (np.frombuffer(section, np.uint8).copy() for section in sections[1:3])
    _code_flags(flags, lag, places, True, *_tables())
    _code_values(codes, flags, _bits(alphabet), values, True, *_tables())
    return codes


def pack(codes: np.ndarray, alphabet: int) -> bytes:
    """A few codes, (R, C), with nothing around them: what other codecs keep in their tables."""
    data = _room(codes.size * _bits(alphabet))
    flags = np.ones(codes.shape, np.uint8)
    used = _code_values(codes, flags, _bits(alphabet), data, False, *_tables())
    return data[:used].tobytes()


def unpack(data: bytes | memoryview, shape: tuple[int, int], alphabet: int) -> np.ndarray:
    """The inverse of `pack`."""
    codes = np.zeros(shape, np.uint8 if alphabet <= 256 else np.uint16)
    values = np.frombuffer(data, np.uint8).copy()
    _code_values(codes, np.ones(shape, np.uint8), _bits(alphabet), values, True, *_tables())
    return codes


def _bits(alphabet: int) -> int:
    return max(1, (alphabet - 1).bit_length())


def _room(decisions: int) -> np.ndarray:
    """Bytes that are enough: a decision takes at most 12 bits."""
    return np.empty(decisions * 3 // 2 + 16, np.uint8)


def _lag(flags: np.ndarray) -> int:
    """The distance, from 2, at which flags of a row resemble each other most; 0 for none."""
    columns = flags.shape[1]
    if columns < 8:
        return 0
    spread = (flags - flags.mean(0))[:1024, :4096]
    spectrum = np.fft.rfft(spread, 2 * spread.shape[1], axis=1)
    alike = np.fft.irfft((spectrum * spectrum.conj()).sum(0))[: min(columns // 2, 512)]
    lag = 2 + int(alike[2:].argmax())
    noise = alike[0] / np.sqrt(spread.size)
    return lag if alike[lag] > 4 * noise else 0


@cache
def _tables() -> tuple[np.ndarray, ...]:
    """Probability (of 2**16) of each logit, logit of each 4,096th, and logarithms in eighths.

    In decimal arithmetic, which rounds alike everywhere; a processor's own exponential may not.
    """
    with localcontext() as context:
        context.prec = 20
        logits = [Decimal(x) / 256 for x in range(-_CERTAIN - 1, _CERTAIN + 1)]
        squash = [int(2**16 / (1 + (-x).exp())) for x in logits]
        odds = [Decimal(2 * p + 1) / (8191 - 2 * p) for p in range(4096)]
        stretch = [max(-_CERTAIN, min(_CERTAIN, round(x.ln() * 256))) for x in odds]
        two = Decimal(2).ln()
        log = [round(Decimal(max(1, x)).ln() / two * 8) for x in range(4096)]
    pace = [2**17 // (2 * n + 3) for n in range(_PATIENCE + 1)]
    return tuple(np.array(table, np.int64) for table in (squash, stretch, log, pace))


@compiled
def _code_flags(flags, lag, data, decoding, squash, stretch, log, pace):
    """Code ``flags``, (R, C), into ``data``, or decode them from it; returns the bytes used."""
    rows, columns = flags.shape
    starts = np.array([0, columns, 256, 16 * _LEVELS, _LEVELS * _LEVELS]).cumsum()
    cells = np.full(starts[4] + rows, _EVEN, np.int64)
    weights = np.full((8, 5), 1 << 14, np.int64)
    where, logits = np.empty(5, np.int64), np.empty(5, np.int64)
    coder = _start(data, decoding)
    margin = lag + 2  # so that every neighbour has a place
    in_column = np.zeros(columns + 2 * margin, np.int64)
    lines = np.zeros((2, columns + 2 * margin), np.int64)
    total = 1
    for r in range(rows):
        above, here = lines[r & 1], lines[1 - (r & 1)]
        here[:] = 0
        in_row = 0
        for j in range(columns):
            m = j + margin
            near = here[m - 1] + here[m - 2] + above[m]
            lagged = around = 0
            if lag:
                lagged = here[m - lag] | here[m - lag + 1] << 1 | here[m - lag - 1] << 2
                around = in_column[m - lag] + in_column[m + lag]
                near += 2 * here[m - lag] + here[m - lag + 1] + here[m - lag - 1]
            around += 2 * in_column[m] + in_column[m - 1] + in_column[m + 1]
            # How much denser than on average are this column, those around it, and this row?
            seen = r * columns + j + 1
            parts = 6 if lag else 4
            column_level = _level(in_column[m] * seen + 2 * total, (r + 2) * total, log)
            around_level = _level(around * seen + 2 * parts * total, parts * (r + 2) * total, log)
            row_level = _level(in_row * seen + 8 * total, (j + 8) * total, log)
            pattern = here[m - 1] | here[m - 2] << 1 | above[m] << 2
            pattern |= above[m - 1] << 3 | above[m + 1] << 4
            where[0] = j
            where[1] = starts[1] + (lagged << 5 | pattern)
            where[2] = starts[2] + (around_level << 4 | lagged << 1 | here[m - 1])
            where[3] = starts[3] + column_level * _LEVELS + row_level
            where[4] = starts[4] + r
            bit = _decide(
                np.int64(flags[r, j]), where, cells, weights[min(near, 7)], logits, coder, data,
                decoding, squash, stretch, pace,
            )  # fmt: skip
            flags[r, j] = bit
            here[m] = bit
            in_column[m] += bit
            in_row += bit
            total += bit
    return _finish(coder, data, decoding)


@compiled
def _code_values(codes, flags, bits, data, decoding, squash, stretch, log, pace):
    """Code those of ``codes``, (R, C), where ``flags`` is 1; or decode them into their places."""
    rows, columns = codes.shape
    slots = min(6, 18 - bits)  # bits of a context, beside those of the symbol that are known
    cells = np.full((6 << slots) << bits, _EVEN, np.int64)
    weights = np.full((bits, 6), 1 << 14, np.int64)
    where, context, logits = np.empty(6, np.int64), np.zeros(6, np.int64), np.empty(6, np.int64)
    coder = _start(data, decoding)
    last_in_column = np.zeros(columns, np.int64)
    column_size, column_count = np.zeros(columns, np.int64), np.zeros(columns, np.int64)
    size = count = 1
    middle = 1 << (bits - 1)
    for r in range(rows):
        last = row_size = row_count = 0
        for j in range(columns):
            if not flags[r, j]:
                continue
            # How far from the middle symbol are those of this row and column, beside all?
            row_level = _level((row_size + 1) * count, (row_count + 1) * size, log)
            column_level = _level((column_size[j] + 1) * count, (column_count[j] + 1) * size, log)
            context[1] = last << slots >> bits
            context[2] = last_in_column[j] << slots >> bits
            context[3] = row_level << slots >> 5
            context[4] = column_level << slots >> 5
            context[5] = (row_level >> 2 << 3 | column_level >> 2) << slots >> 6
            known = 1
            symbol = np.int64(codes[r, j])
            for depth in range(bits - 1, -1, -1):
                for k in range(6):
                    where[k] = ((k << slots | context[k]) << bits) + known
                bit = _decide(
                    symbol >> depth & 1, where, cells, weights[depth], logits, coder, data,
                    decoding, squash, stretch, pace,
                )  # fmt: skip
                known = known << 1 | bit
            symbol = known - (1 << bits)
            codes[r, j] = symbol
            last = last_in_column[j] = symbol
            away = abs(symbol - middle)
            row_size, row_count = row_size + away, row_count + 1
            column_size[j] += away
            column_count[j] += 1
            size, count = size + away, count + 1
    return _finish(coder, data, decoding)


@compiled
def _level(share, average, log):
    """How many times ``share`` is ``average``, in quarters of a power of two, 16 for once."""
    return min(max((_log(share, log) - _log(average, log) >> 1) + 16, 0), _LEVELS - 1)


@compiled
def _log(x, log):
    """The logarithm to base 2, in eighths, of a whole number from 1."""
    eighths = 0
    while x >= 4096:
        x >>= 4
        eighths += 32
    return log[x] + eighths


@compiled
def _decide(bit, where, cells, weights, logits, coder, data, decoding, squash, stretch, pace):
    """Code one decision, or decode it, and learn from it; returns it.

    A cell is a probability in 22 bits and, below it, 10 bits for how often it was seen.
    """
    total = 0
    for k in range(where.size):
        logits[k] = stretch[cells[where[k]] >> 20]
        total += weights[k] * logits[k]
    one = squash[min(max(total >> 16, -_CERTAIN), _CERTAIN) + _CERTAIN + 1]  # probability of 1
    low, high = coder[0], coder[1]
    split = low + ((high - low) >> 16) * one + (((high - low & 0xFFFF) * one) >> 16)
    if decoding:
        bit = 1 if coder[2] <= split else 0
    if bit:
        high = split
    else:
        low = split + 1
    while (low ^ high) >> 24 == 0:
        if decoding:
            coder[2] = (coder[2] << 8 & 0xFFFFFFFF) | _next_byte(data, coder)
        else:
            data[coder[3]] = high >> 24
            coder[3] += 1
        low = low << 8 & 0xFFFFFFFF
        high = (high << 8 & 0xFFFFFFFF) | 255
    coder[0], coder[1] = low, high
    error = ((bit << 16) - one) * _RATE
    target = (bit << 22) - bit
    for k in range(where.size):
        weights[k] += (logits[k] * error + (1 << 17)) >> 18
        cell = cells[where[k]]
        seen = cell & 1023
        moved = (cell >> 10) + (((target - (cell >> 10)) * pace[seen]) >> 16)
        cells[where[k]] = moved << 10 | min(seen + 1, _PATIENCE)
    return bit


@compiled
def _start(data, decoding):
    """Low and high end of the interval, the number read, and the place in ``data``."""
    coder = np.array([0, 0xFFFFFFFF, 0, 0])
    if decoding:
        for _ in range(4):
            coder[2] = coder[2] << 8 | _next_byte(data, coder)
    return coder


@compiled
def _next_byte(data, coder):
    """Past the end come zeros, which the encoder need not write."""
    place = coder[3]
    coder[3] += 1
    return np.int64(data[place]) if place < data.size else 0


@compiled
def _finish(coder, data, decoding):
    """Write as few bytes as tell the interval from all others, with zeros after them."""
    if decoding:
        return coder[3]
    low, high, place = coder[0], coder[1], coder[3]
    for kept in range(5):
        unit = 1 << (32 - 8 * kept)
        number = (low + unit - 1) // unit * unit
        if number <= high:
            break
    for k in range(kept):
        data[place] = number >> (24 - 8 * k) & 255
        place += 1
    return place
