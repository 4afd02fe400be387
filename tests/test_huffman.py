import heapq
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from workbench.storage import huffman, streams
from workbench.storage.huffman import canonical_codes, code_lengths, pack_lengths, unpack_lengths
from workbench.storage.streams import StreamError

COUNTS = st.lists(st.integers(0, 60), min_size=1, max_size=6)
FIBONACCI = [1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1597, 2584]


def gaussian(count: int, spread: float = 36, seed: int = 0) -> np.ndarray:
    """int8 weights as symbols, (1, count)."""
    normal = np.random.default_rng(seed).standard_normal((1, count))
    return (normal * spread).round().clip(-127, 127).astype(np.int8).view(np.uint8) ^ 128


def data_of(codes: np.ndarray, alphabet: int) -> list[bytes]:
    return [section.data for section in huffman.compress(codes, alphabet)]


def entropy(codes: np.ndarray) -> float:
    _, counts = np.unique(codes, return_counts=True)
    shares = counts / counts.sum()
    return -(shares * np.log2(shares)).sum()


def cost(counts, lengths) -> int:
    return sum(int(count) * int(length) for count, length in zip(counts, lengths, strict=True))


def huffman_cost(counts: list[int]) -> int:
    """Bits of Huffman's own code: the sum of all merged weights."""
    heap = [count for count in counts if count]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


def decoded(sections: list[bytes], count: int, alphabet: int, parts: int) -> list[int]:
    """The symbols, bit for bit by the words of the module's docstring."""
    lengths = unpack_lengths(sections[0], alphabet)
    codes = canonical_codes(lengths)
    symbol_of = {
        f"{code:0{length}b}": symbol
        for symbol, (code, length) in enumerate(zip(codes, lengths, strict=True))
        if length
    }
    sizes = [int.from_bytes(sections[1][4 * i : 4 * i + 4], "little") for i in range(parts - 1)]
    rest, found = sections[1][4 * (parts - 1) :], []
    for part in range(parts):
        size = sizes[part] if part < parts - 1 else len(rest)
        stream, rest = rest[:size], rest[size:]
        bits, word = "".join(f"{byte:08b}" for byte in stream), ""
        before = len(found)
        for bit in bits:
            word += bit
            if word in symbol_of and len(found) < count * (part + 1) // parts:
                found.append(symbol_of[word])
                word = ""
        assert len(word) < 8, "nothing but padding may be left"
        assert len(found) - before == count * (part + 1) // parts - count * part // parts
    return found


@given(COUNTS, st.integers(3, 5))
def test_no_code_within_the_limit_is_shorter(counts, limit):
    lengths = code_lengths(counts, limit)
    used = [count for count in counts if count]
    if len(used) > 1:
        best = min(
            cost(used, choice)
            for choice in itertools.product(range(1, limit + 1), repeat=len(used))
            if sum(2.0**-length for length in choice) <= 1
        )
        assert cost(counts, lengths) == best


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=300), st.integers(0, 3))
def test_without_a_limit_it_is_huffmans_code(counts, copies):
    counts += FIBONACCI * copies
    lengths = code_lengths(counts, 60)
    if np.count_nonzero(counts) > 1:
        assert cost(counts, lengths) == huffman_cost(counts)


@given(hnp.arrays(np.int64, st.integers(1, 400), elements=st.integers(0, 2**40)))
def test_codes_are_complete_and_within_the_limit(counts):
    lengths = code_lengths(counts, 12)
    assert ((lengths > 0) == (counts > 0)).all()
    used = lengths[lengths > 0].astype(float)
    assert (used <= 12).all()
    if len(used) > 1:
        assert (2**-used).sum() == 1
    for one, other in itertools.pairwise(np.argsort(counts, kind="stable")):
        if 0 < counts[one] < counts[other]:
            assert lengths[one] >= lengths[other]


def test_a_limit_that_binds():
    assert code_lengths(FIBONACCI, 60).max() == 17
    assert code_lengths(FIBONACCI, 7).max() == 7
    assert code_lengths([9] * 8, 3).tolist() == [3] * 8
    assert code_lengths([1] * 65536, 16).tolist() == [16] * 65536


def test_of_equally_frequent_symbols_the_first_have_the_longer_codes():
    counts = np.random.default_rng(0).integers(1, 4, 1000)
    lengths = code_lengths(counts, 12).astype(int)
    for count in (1, 2, 3):
        assert (np.diff(lengths[counts == count]) <= 0).all()
    assert len(np.unique(lengths[counts == 1])) == 2


def test_one_symbol_or_none():
    assert code_lengths([0, 7, 0], 12).tolist() == [0, 1, 0]
    assert code_lengths([0, 0], 12).tolist() == [0, 0]
    assert code_lengths([], 12).size == canonical_codes([]).size == 0


@given(hnp.arrays(np.int64, st.integers(1, 60), elements=st.integers(0, 999)))
def test_canonical_codes_count_up_and_none_begins_another(counts):
    lengths = code_lengths(counts, 10)
    codes = canonical_codes(lengths)
    words = [f"{code:0{n}b}" for code, n in zip(codes, lengths, strict=True) if n]
    assert all(len(word) == n for word, n in zip(words, lengths[lengths > 0], strict=True))
    for word, other in itertools.permutations(words, 2):
        assert not other.startswith(word)
    order = sorted(np.flatnonzero(lengths), key=lambda symbol: (lengths[symbol], symbol))
    in_order = [f"{codes[symbol]:0{lengths[symbol]}b}" for symbol in order]
    assert in_order == sorted(words)


def test_codes_that_cannot_be():
    with pytest.raises(ValueError, match=r"no code has these lengths: they take 1\.25 of 1"):
        canonical_codes([1, 1, 2])
    with pytest.raises(ValueError, match="limit is 2 bits; 5 symbols take at least 3"):
        code_lengths([1] * 5, 2)
    with pytest.raises(ValueError, match="counted -3 times; counts are 0 or more"):
        code_lengths([5, -3], 12)


@given(hnp.arrays(np.int64, st.integers(1, 300), elements=st.integers(0, 9) | st.integers(0, 9999)))
def test_the_table_of_lengths_reads_back(counts):
    lengths = code_lengths(counts, 12)
    table = pack_lengths(lengths)
    assert (unpack_lengths(table, len(counts)) == lengths).all()
    assert (unpack_lengths(memoryview(table), len(counts)) == lengths).all()
    for size in range(len(table)):
        with pytest.raises(StreamError, match="its code table is cut short"):
            unpack_lengths(table[:size], len(counts))


def test_the_table_is_small():
    lengths = code_lengths(np.bincount(gaussian(2**16)[0], minlength=256), 12)
    assert len(pack_lengths(lengths)) <= 48  # of 256 symbols
    absent = np.zeros(65536, np.uint8)
    absent[[7, 60000]] = 1
    assert len(pack_lengths(absent)) <= 9
    assert len(pack_lengths(np.full(32, 5, np.uint8))) <= 6


@given(st.data(), st.sampled_from([2, 3, 32, 256, 257, 5000]), st.sampled_from([1, 20, 2**16]))
def test_the_stream_says_what_the_docstring_says(data, alphabet, splitting):
    dtype = np.uint8 if alphabet <= 256 else np.uint16
    elements = st.integers(0, alphabet - 1) | st.integers(0, 3).map(lambda n: n % alphabet)
    codes = data.draw(hnp.arrays(dtype, (1, data.draw(st.integers(1, 60))), elements=elements))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huffman, "_WORTH_SPLITTING", splitting)
        sections = data_of(codes, alphabet)
        found = huffman.expand(sections, codes.shape, alphabet)
    assert found.dtype == dtype
    assert (found == codes).all()
    if len(np.unique(codes)) > 1:
        parts = 4 if codes.size >= splitting else 1
        assert decoded(sections, codes.size, alphabet, parts) == codes[0].tolist()


@pytest.mark.parametrize("spread", [0.01, 0.2, 0.6, 2, 36, 1000])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 4095, 2**16 - 1, 2**16, 2**16 + 3, 200_001])
def test_round_trips_in_one_stream_and_in_four(spread, count):
    codes = gaussian(count, spread)
    for rows in (codes, codes.astype(np.uint16) * 2):
        sections = data_of(rows, 512)
        shape = (rows.size, 1)
        assert (huffman.expand(sections, shape, 512).ravel() == rows.ravel()).all()
        expected = huffman.coded_bytes(np.bincount(rows[0], minlength=512))
        assert 0 <= sum(map(len, sections)) - expected <= 3


@pytest.mark.parametrize("copies", [1, 2])
def test_all_of_65536_symbols(copies):
    codes = np.random.default_rng(0).permutation(np.arange(2**16 * copies) % 2**16)
    codes = codes.astype(np.uint16)[None]
    sections = data_of(codes, 2**16)
    assert len(sections[1]) == 2 * codes.size + 12
    assert (huffman.expand(sections, codes.shape, 2**16) == codes).all()


def test_many_rare_symbols_take_no_room_from_the_frequent_ones():
    rng = np.random.default_rng(0)
    codes = rng.geometric(0.5, (1, 2**18)).astype(np.uint16)
    codes[0, :3000] = np.arange(3000)
    sections = data_of(codes, 4000)
    assert (huffman.expand(sections, codes.shape, 4000) == codes).all()
    assert 8 * len(sections[1]) / codes.size < entropy(codes) + 0.1
    codes[0, :30_000] = np.arange(30_000)
    sections = data_of(codes, 30_000)
    assert unpack_lengths(sections[0], 30_000).max() == 16
    assert (huffman.expand(sections, codes.shape, 30_000) == codes).all()


def test_bits_are_near_the_entropy():
    codes = gaussian(2**20)
    bits = 8 * sum(map(len, data_of(codes, 256))) / codes.size
    assert entropy(codes) < bits < entropy(codes) + 0.05


def test_sparse_symbols_take_a_bit_each():
    codes = np.zeros((1, 2**18), np.uint8)
    codes[0, ::50] = np.arange(codes.size // 50 + 1) % 31 + 1
    bits = 8 * sum(map(len, data_of(codes, 32))) / codes.size
    assert 1 < bits < 1.2
    assert entropy(codes) < 0.3


def test_an_entry_holds_as_many_symbols_as_fit():
    lengths = np.array([1, 2, 3, 3], np.uint8)
    for itemsize, most in ((1, 6), (2, 3)):
        entries, singles = huffman._tables(lengths, itemsize, 12)
        assert len(entries) == len(singles) == 2**12
        entry = int(entries[0b0_10_0_111_00000])
        symbols = [0, 1, 0, 3, 0, 0][:most]
        packed = b"".join(symbol.to_bytes(itemsize, "little") for symbol in symbols)
        assert entry % 2**48 == int.from_bytes(packed, "little")
        assert entry >> 48 & 255 == 6
        assert entry >> 56 == sum(lengths[symbols])
        assert singles[0b111 << 9] == 3
    entries, _ = huffman._tables(np.full(64, 6, np.uint8), 1, 12)
    assert set((entries >> 48).tolist()) == {2 | 12 << 8}  # two codes fill the window
    longest = code_lengths(FIBONACCI, 16)
    entries, singles = huffman._tables(longest, 1, 16)
    assert int(entries[-1]) == int(singles[-1]) | 1 << 48 | 16 << 56


@given(hnp.arrays(np.int64, st.integers(2, 60), elements=st.integers(1, 999)))
def test_no_entry_has_more_symbols_than_the_first(counts):
    lengths = code_lengths(counts, 12)
    entries, singles = huffman._tables(lengths, 1, 12)
    assert (entries >> 48 & 255).max() == entries[0] >> 48 & 255
    codes = canonical_codes(lengths).astype(np.int64) << (12 - lengths.astype(np.int64))
    assert (singles[codes] == np.arange(len(counts))).all()


def test_one_symbol_takes_no_bits_and_nothing_takes_nothing():
    table, values = data_of(np.full((3, 5), 9, np.uint8), 32)
    assert len(table) <= 3
    assert values == b""
    assert (huffman.expand([table, values], (3, 5), 32) == np.full((3, 5), 9)).all()
    assert len(huffman.encode(torch.ones(10**6, dtype=torch.int8))) < 30
    empty = np.empty((0, 5), np.uint8)
    sections = data_of(empty, 32)
    assert huffman.expand(sections, (0, 5), 32).shape == (0, 5)


def test_symbols_that_are_not_contiguous():
    codes = gaussian(4000).reshape(40, 100)
    sections = data_of(codes.T[::2], 256)
    assert (huffman.expand(sections, (50, 40), 256) == codes.T[::2]).all()


def test_a_symbol_outside_the_alphabet_is_refused():
    with pytest.raises(ValueError, match="a symbol is 32; the alphabet is 0 to 31"):
        huffman.compress(np.array([[0, 32]], np.uint8), 32)


class Guarded:
    """An array without negative indexes, so that Python sees what numba would not."""

    def __init__(self, array: np.ndarray):
        self.array, self.size, self.max = array, array.size, array.max

    def __getitem__(self, at):
        if isinstance(at, slice):
            return self.array[at]
        assert 0 <= at < self.size
        return self.array[at]

    def __setitem__(self, at, value):
        assert 0 <= at < self.size
        self.array[at] = value

    def __iter__(self):
        return iter(self.array)


def test_a_damaged_stream_is_never_read_or_written_past_its_ends(monkeypatch):
    monkeypatch.setattr(huffman, "_WORTH_SPLITTING", 100)
    kernel, tables, written = huffman._read.py_func, huffman._tables, []

    def guarded(data, lengths, shortest_window, bounds, itemsize, out):
        with monkeypatch.context() as patch:
            patch.setattr(huffman, "_look", huffman._look.py_func)
            patch.setattr(huffman, "_tables", lambda *a: map(Guarded, tables(lengths, *a[1:])))
            arguments = shortest_window, bounds, itemsize, Guarded(out)
            trouble = kernel(Guarded(data), Guarded(lengths), *arguments)
        written.append(out.copy())
        return trouble

    rng = np.random.default_rng(0)
    for trial in range(60):
        codes = [gaussian(156, 0.3, trial), gaussian(156, 5, trial), rng.permutation(156)[None]]
        codes = codes[trial % 3]  # of the last, a stream is 13 rounds of 3 symbols
        codes = codes.astype((np.uint8, np.uint16)[trial % 2])
        alphabet = (256, 300)[trial % 2]
        table, values = data_of(codes, alphabet)
        damaged = bytearray(values)
        for _ in range(trial % 5):
            damaged[rng.integers(12, len(damaged))] ^= 1 << rng.integers(8)
        if trial % 4 == 2:
            damaged += rng.bytes(60)
        if trial % 4 == 3:
            damaged = damaged[: rng.integers(12, len(damaged)) if trial > 3 else 3]
        results = []
        for reader in (guarded, huffman._read):
            monkeypatch.setattr(huffman, "_read", reader)
            try:
                results.append(huffman.expand([table, bytes(damaged)], codes.shape, alphabet))
            except StreamError:
                results.append(None)
        monkeypatch.undo()
        monkeypatch.setattr(huffman, "_WORTH_SPLITTING", 100)
        if bytes(damaged) == values:
            assert all((result == codes).all() for result in results)
        assert len({None if result is None else result.tobytes() for result in results}) == 1
    assert len(written) > 40


def test_damaged_sections_are_refused_by_name():
    codes = gaussian(2**16)
    table, values = data_of(codes, 256)
    one, _ = data_of(codes * 0, 256)
    none, _ = data_of(codes[:, :0], 256)
    huge = (2**32 - 1).to_bytes(4, "little")
    refusals = [
        (table, values[:-1], "its codes do not end where it does"),
        (table, values + b"\0", "its codes do not end where it does"),
        (table, values[:11], "its bytes are too few for its codes"),
        (table, huge * 3 + values[12:], "bytes are too few for its codes"),
        (table, b"", "its bytes are too few for its codes"),
        (table[:-1], values, "its code table is cut short"),
        (b"", values, "its code table is cut short"),
        (one, values, "bytes of 1 symbol or none"),
        (none, b"", "0 bytes of 1 symbol or none"),
        (pack_lengths(np.full(300, 9, np.uint8)), values, "no code of so many symbols"),
        (pack_lengths(np.full(256, 9, np.uint8)), values, "its code is not complete"),
        (pack_lengths(np.full(256, 17, np.uint8)), values, "the length of a code is out of range"),
        (pack_lengths(np.full(256, 7, np.uint8)), values, "its code is not complete"),
    ]
    for bad_table, bad_values, message in refusals:
        with pytest.raises(StreamError, match=message):
            huffman.expand([bad_table, bad_values], codes.shape, 256)
    with pytest.raises(StreamError, match="no code of 70000 symbols"):
        huffman.expand(
            [pack_lengths(np.eye(1, 70_000, dtype=np.uint8)[0]), b""], codes.shape, 70_000
        )


@given(st.binary(max_size=40), st.integers(1, 300))
def test_any_bytes_as_a_table_are_a_code_or_refused(table, alphabet):
    try:
        lengths = unpack_lengths(table, alphabet)
    except StreamError:
        return
    assert len(lengths) == alphabet
    assert (lengths <= 16).all()
    used = lengths[lengths > 0].astype(float)
    assert len(used) < 2 or (2**-used).sum() == 1


def test_encode_and_decode_are_those_of_streams():
    tensor = torch.randn(30, 40, dtype=torch.bfloat16)
    stream = huffman.encode(tensor)
    assert stream == streams.encode(tensor, "huffman") == huffman.encode(tensor)
    assert streams.header(stream).codec == huffman.NAME == "huffman"
    assert torch.equal(huffman.decode(stream), tensor)
    kinds = {section.kind for section in streams.sections(stream)}
    assert {"code table", "values"} <= kinds
    assert math.isfinite(huffman.decode_rate(stream))
    assert huffman.decode_rate(stream) > 0
