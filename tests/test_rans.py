import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from workbench.storage import rans, streams
from workbench.storage.streams import StreamError


def entropy_bytes(codes: np.ndarray) -> float:
    counts = np.bincount(codes.reshape(-1))
    counts = counts[counts > 0]
    return -(counts * np.log2(counts / counts.sum())).sum() / 8


def coded_bytes(codes: np.ndarray, alphabet: int) -> int:
    sections = rans.compress(codes, alphabet)
    data = [section.data for section in sections]
    assert (rans.expand(data, codes.shape, alphabet) == codes).all()
    return sum(map(len, data))


def normal(shape: tuple[int, int], spread: np.ndarray | float, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape) * spread
    return np.clip(np.round(values) + 100, 0, 200).astype(np.uint8)


@given(
    arrays.arrays(np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=40)),
    st.integers(0, 300),
)
def test_round_trip(codes, more):
    coded_bytes(codes, int(codes.max()) + 1 + more)


@pytest.mark.parametrize("shape", [(1, 2**14), (300, 100), (7, 3001)])  # one lane, and eight
def test_close_to_the_entropy(shape):
    codes = normal(shape, 10)
    assert entropy_bytes(codes) < coded_bytes(codes, 201) < 1.01 * entropy_bytes(codes) + 80


def test_rows_that_differ_get_tables_of_their_own():
    spread = np.where(np.arange(200) % 3, 3, 20)[:, None]
    codes = normal((200, 300), spread)
    apart = sum(entropy_bytes(codes[spread[:, 0] == s]) for s in (3, 20))
    assert coded_bytes(codes, 201) < 1.01 * apart + 120 < 0.97 * entropy_bytes(codes)


def test_columns_that_differ_get_tables_of_their_own():
    spread = np.where(np.arange(300) % 3, 3, 20)
    codes = normal((200, 300), spread)
    apart = sum(entropy_bytes(codes[:, spread == s]) for s in (3, 20))
    assert coded_bytes(codes, 201) < 1.01 * apart + 120


def test_both_at_once():
    spread = np.where(np.arange(200) % 3, 1, 4)[:, None] * np.where(np.arange(300) % 2, 1, 5)
    codes = normal((200, 300), spread)
    apart = sum(entropy_bytes(codes[spread == s]) for s in (1, 4, 5, 20))
    assert coded_bytes(codes, 201) < 1.01 * apart + 200


def test_a_mask_knows_dead_rows_and_columns():
    rng = np.random.default_rng(0)
    density = np.where(rng.random((400, 1)) < 0.5, 0.3, 0.01) * (rng.random(300) < 0.5)
    codes = ((rng.random((400, 300)) < density) * rng.integers(1, 32, (400, 300))).astype(np.uint8)
    assert (codes == 0).mean() > 0.5
    sections = {section.kind: len(section.data) for section in rans.compress(codes, 32)}
    # A row and a column are of one of two kinds each: a bit for each of them, and the flags.
    ideal = sum(entropy_bytes(codes[density == d] > 0) for d in np.unique(density))
    assert sections["positions"] < 1.05 * ideal + 20
    assert coded_bytes(codes, 32) < 0.9 * entropy_bytes(codes)


@given(st.lists(st.integers(0, 2**22), min_size=1, max_size=300), st.integers(10, 16))
def test_frequencies_sum_to_a_power_of_two(counts, bits):
    counts = np.array(counts)
    found = rans._normalize(counts, bits)
    assert found.sum() == (2**bits if counts.any() else 0)
    assert ((found > 0) == (counts > 0)).all()


def test_frequencies_are_in_proportion():
    found = rans._normalize(np.array([1, 1000, 3000, 0, 4000]), 12)
    np.testing.assert_allclose(found, [1, 512, 1536, 0, 2047], atol=2)


@given(arrays.arrays(np.int64, (3, 40), elements=st.integers(0, 2**22)))
def test_a_table_reads_back(counts):
    coarse = rans._coarse(counts)
    assert (abs(coarse - counts) <= counts / 8).all()
    assert (rans._unpack_table(rans._pack_table(coarse), counts.shape) == coarse).all()


def test_more_symbols_than_a_byte():
    codes = np.random.default_rng(0).integers(0, 5000, (50, 4000)).astype(np.uint16)
    assert coded_bytes(codes, 5000) < 1.06 * codes.size * np.log2(5000) / 8


def test_settings_that_make_no_sense_are_refused():
    codes = normal((40, 50), 5)
    sections = [section.data for section in rans.compress(codes, 201)]
    for settings in ([17, 1, 1, 1, 0, 0], [12, 9, 1, 1, 0, 0], [12, 1, 0, 1, 0, 0], [12, 1, 1], []):
        damaged = [sections[0], streams.numbers(*settings), *sections[2:]]
        with pytest.raises(StreamError, match="settings"):
            rans.expand(damaged, codes.shape, 201)
    with pytest.raises(StreamError, match="symbol 202 of 201"):
        rans.expand([streams.numbers(202), *sections[1:]], codes.shape, 201)


def test_float_weights_take_fewer_bits_than_their_elements_could():
    weight = torch.randn(400, 500, generator=torch.Generator().manual_seed(0)) * 0.02
    for dtype, most in ((torch.bfloat16, 10.7), (torch.float32, 26.7), (torch.float16, 13.8)):
        stream = rans.encode(weight.to(dtype))
        assert torch.equal(rans.decode(stream), weight.to(dtype))
        assert 8 * len(stream) / weight.numel() < most
    assert rans.decode_rate(stream) > 0
