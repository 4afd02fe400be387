import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from workbench.storage import huffman, run_length, streams
from workbench.storage.run_length import from_runs, gaps, runs
from workbench.storage.streams import Section, StreamError, numbers

SPARSE = hnp.arrays(
    np.uint8, st.integers(0, 400), elements=st.integers(1, 9), fill=st.just(0)
) | hnp.arrays(np.uint8, st.integers(0, 60), elements=st.integers(0, 2))


def sparse(count: int, density: float, seed: int = 0) -> np.ndarray:
    """Pruned weights of at most 31 values as symbols, (1, count)."""
    rng = np.random.default_rng(seed)
    values = rng.geometric(0.15, (1, count)).clip(1, 31)
    return (values * (rng.random((1, count)) < density)).astype(np.uint8)


def data_of(codes: np.ndarray, alphabet: int) -> list[bytes]:
    return [section.data for section in run_length.compress(codes, alphabet)]


def entropy(codes: np.ndarray) -> float:
    _, counts = np.unique(codes, return_counts=True)
    shares = counts / counts.sum()
    return -(shares * np.log2(shares)).sum()


def bits(sections: list[Section], codes: np.ndarray) -> float:
    return 8 * sum(len(section.data) for section in sections) / codes.size


def gaps_by_hand(symbols: np.ndarray, zero: int, field: int) -> list[tuple[int, int]]:
    """Gaps and values one by one, as Deep Compression tells it."""
    found, gap = [], 0
    for place in range(1 + max(np.flatnonzero(symbols != zero), default=-1)):
        if symbols[place] != zero or gap == 2**field - 1:
            found.append((gap, int(symbols[place])))
            gap = 0
        else:
            gap += 1
    return found


@given(SPARSE)
def test_runs_and_back(symbols):
    values, lengths = runs(symbols)
    assert (from_runs(values, lengths) == symbols).all()
    assert from_runs(values, lengths).dtype == symbols.dtype
    assert (lengths >= 1).all()
    assert (values[1:] != values[:-1]).all()


def test_runs_of_nothing_and_of_a_matrix():
    assert [len(part) for part in runs(np.empty((0, 3), np.uint8))] == [0, 0]
    values, lengths = runs(np.array([[4, 4], [4, 1]]).T)
    assert (values.tolist(), lengths.tolist()) == ([4, 1], [3, 1])


@given(SPARSE, st.integers(0, 9), st.integers(1, 8))
def test_gaps_are_those_of_deep_compression(symbols, zero, field):
    found, values = gaps(symbols, zero, field)
    assert found.dtype == np.uint8
    assert list(zip(found.tolist(), values.tolist(), strict=True)) == gaps_by_hand(
        symbols, zero, field
    )


@pytest.mark.parametrize("before", [0, 1, 3, 4, 7, 8, 9, 255, 256, 257, 512])
def test_a_gap_at_the_edge_of_its_field(before):
    symbols = np.array([*[0] * before, 7, 0, 0], np.uint8)
    for field in (1, 2, 8):
        found, values = gaps(symbols, 0, field)
        assert len(found) == 1 + before // 2**field
        assert found.astype(int).sum() + len(found) == before + 1
        assert values.tolist() == [0] * (before // 2**field) + [7]


def test_fillers_and_a_longer_field_say_the_same():
    symbols = sparse(5000, 0.05)[0]
    lengths = []
    for field in range(1, 9):
        found, values = gaps(symbols, 0, field)
        places = np.cumsum(found.astype(int) + 1) - 1
        again = np.zeros_like(symbols)
        again[places] = values
        assert (again == symbols).all()
        lengths.append(len(found))
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 8 * np.count_nonzero(symbols)
    assert lengths[-1] == np.count_nonzero(symbols)


@pytest.mark.parametrize("field", [0, 9])
def test_a_field_out_of_range(field):
    with pytest.raises(ValueError, match=f"field is {field}; a gap has 1 to 8 bits"):
        gaps(np.zeros(3, np.uint8), 0, field)


@given(SPARSE, st.sampled_from([10, 256, 257, 65536]), st.integers(0, 9))
def test_round_trips(symbols, alphabet, most):
    codes = (np.where(symbols == 0, most, symbols))[None]
    codes = codes.astype(np.uint8 if alphabet <= 256 else np.uint16)
    found = run_length.expand(data_of(codes, alphabet), codes.shape, alphabet)
    assert found.dtype == codes.dtype
    assert (found == codes).all()


@pytest.mark.parametrize("density", [0, 1e-5, 0.001, 0.08, 0.5, 0.99, 1])
def test_round_trips_of_many(density):
    codes = sparse(300_000, density).reshape(300, 1000)
    assert (run_length.expand(data_of(codes, 32), codes.shape, 32) == codes).all()
    turned = codes.T[::3]
    assert (run_length.expand(data_of(turned, 32), turned.shape, 32) == turned).all()


@pytest.mark.parametrize(("density", "best"), [(0.9, 3), (0.5, 4), (0.02, 8)])
def test_the_field_that_is_chosen_is_the_smallest(density, best, monkeypatch):
    codes = sparse(60_000, density)
    sizes = {}
    chosen = bits(run_length.compress(codes, 32), codes)
    for field in range(2, 9):
        monkeypatch.setattr(run_length, "_best_field", lambda *_, field=field: field)
        sections = run_length.compress(codes, 32)
        assert sections[0].data[0] == field
        sizes[field] = bits(sections, codes)
        found = run_length.expand([data for _, data in sections], codes.shape, 32)
        assert (found == codes).all()
    assert chosen == min(sizes.values())
    assert min(sizes, key=sizes.get) == best


def test_gaps_and_values_come_near_the_entropy_where_one_code_cannot():
    codes = sparse(266_200, 0.08)
    assert bits(run_length.compress(codes, 32), codes) < entropy(codes) + 0.01
    assert bits(huffman.compress(codes, 32), codes) > 1.7 * entropy(codes)


def test_sections_say_what_they_are():
    codes = sparse(60_000, 0.08)
    sections = run_length.compress(codes, 32)
    kinds = [section.kind for section in sections]
    assert kinds == ["header", "code table", "positions", "code table", "values"]
    field, zero, count = streams.read_numbers(sections[0].data)
    assert zero == 0
    found, values = gaps(codes[0], zero, field)
    assert len(found) == count
    assert sections[1].data == huffman.compress(found, 2**field)[0].data
    assert sections[4].data == huffman.compress(values, 32)[1].data


def test_one_symbol_is_a_header():
    sections = run_length.compress(np.full((3, 5), 200, np.uint8), 256)
    assert [section.kind for section in sections] == ["header"]
    found = run_length.expand([sections[0].data], (3, 5), 256)
    assert (found == 200).all()
    assert run_length.expand(data_of(np.empty((0, 5), np.uint8), 8), (0, 5), 8).shape == (0, 5)
    assert len(run_length.encode(torch.zeros(10**6, dtype=torch.int8))) < 30


def test_damaged_sections_are_refused_by_name():
    codes = sparse(3000, 0.1)
    header, *rest = data_of(codes, 32)
    field, zero, count = streams.read_numbers(header)
    refusals = [
        ([numbers(field, zero), *rest], "its header has 2 numbers of 3"),
        ([], "its header has 0 numbers of 3"),
        ([numbers(9, zero, count), *rest], f"{count} gaps of 9 bits and the zero 0, for 3000 of"),
        ([numbers(1, zero, count), *rest], "gaps of 1 bits"),
        ([numbers(field, 32, count), *rest], "the zero 32, for 3000 of 32 symbols"),
        ([numbers(field, zero, 3001), *rest], "3001 gaps of"),
        ([numbers(field, zero, 0), *rest], "5 sections for 0 gaps"),
        ([header], f"1 sections for {count} gaps"),
        ([header, *rest, b""], f"6 sections for {count} gaps"),
        ([numbers(field, zero, count - 9), *rest], "its codes do not end where it does"),
    ]
    for sections, message in refusals:
        with pytest.raises(StreamError, match=message):
            run_length.expand(sections, codes.shape, 32)
    with pytest.raises(StreamError, match="the zero 70000, for 3000 of 80000 symbols"):
        run_length.expand([numbers(field, 70_000, 0)], codes.shape, 80_000)
    codes[0, -1] = 7
    sections = data_of(codes, 32)
    with pytest.raises(StreamError, match="a value at 2999 of 2999"):
        run_length.expand(sections, (1, 2999), 32)


def test_encode_and_decode_are_those_of_streams():
    tensor = torch.from_numpy(sparse(5000, 0.1).reshape(50, 100)).to(torch.float32)
    stream = run_length.encode(tensor)
    assert stream == streams.encode(tensor, "run_length") == run_length.encode(tensor)
    assert streams.header(stream).codec == run_length.NAME == "run_length"
    assert torch.equal(run_length.decode(stream), tensor)
    assert {"code table", "positions", "values"} <= {s.kind for s in streams.sections(stream)}
    assert math.isfinite(run_length.decode_rate(stream))
    assert run_length.decode_rate(stream) > 0
