import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from workbench.storage import mixing, rans
from workbench.storage.streams import read_numbers


def coded_bytes(codes: np.ndarray, alphabet: int) -> int:
    sections = mixing.compress(codes, alphabet)
    data = [section.data for section in sections]
    assert (mixing.expand(data, codes.shape, alphabet) == codes).all()
    return sum(map(len, data))


@given(
    arrays.arrays(
        np.uint8,
        arrays.array_shapes(min_dims=2, max_dims=2, max_side=30),
        elements=st.sampled_from([0, 0, 0, 0, 1, 2, 9, 255]),
    )
)
def test_round_trip(codes):
    coded_bytes(codes, int(codes.max()) + 1)
    packed = mixing.pack(codes, 256)
    assert (mixing.unpack(packed, codes.shape, 256) == codes).all()


def test_what_it_learns_beats_tables():
    """Flags that follow those a row of an image before: no table can know that."""
    rng = np.random.default_rng(0)
    rows = [(rng.random(28) < 0.15)]
    for _ in range(399):
        same = rng.random(28) < 0.8
        rows.append(np.where(same, rows[-1], rng.random(28) < 0.15))
    codes = (np.array(rows).reshape(20, -1) * rng.integers(1, 8, (20, 560))).astype(np.uint8)
    sections = mixing.compress(codes, 8)
    size, decisions, common, lag = read_numbers(sections[0].data)
    assert (size, common, lag) == (codes.size, 0, 28)
    assert decisions == codes.size + 3 * np.count_nonzero(codes)
    tables = sum(len(s.data) for s in rans.compress(codes, 8) if s.kind == "positions")
    positions = sum(len(s.data) for s in sections if s.kind == "positions")
    assert positions < 0.75 * tables


def test_no_lag_in_noise():
    flags = np.random.default_rng(0).random((50, 400)) < 0.1
    assert mixing._lag(flags.astype(np.uint8)) == 0


def test_near_the_entropy_where_there_is_nothing_to_learn():
    flags = np.random.default_rng(0).random((200, 300)) < 0.1
    ideal = flags.size * 0.469 / 8  # the entropy of 1 in 10
    assert ideal * 0.97 < coded_bytes(flags.astype(np.uint8), 2) < 1.04 * ideal + 20


def test_rows_of_their_own_scale():
    rng = np.random.default_rng(0)
    spread = np.exp(rng.normal(0, 1, (300, 1)))
    codes = np.clip(np.round(rng.standard_normal((300, 100)) * spread * 8) + 128, 0, 255)
    codes = codes.astype(np.uint8)
    shares = np.bincount(codes.reshape(-1)) / codes.size
    entropy = -(shares * np.log2(shares, where=shares > 0, out=np.zeros(shares.shape))).sum()
    assert coded_bytes(codes, 256) < 0.95 * entropy * codes.size / 8


def test_tables_are_whole_numbers_that_no_processor_rounds_otherwise():
    squash, stretch, log, pace = mixing._tables()
    assert all(table.dtype == np.int64 for table in (squash, stretch, log, pace))
    assert squash[0] == 21  # 2**16 / (1 + e**8), rounded down
    assert squash[2048] == 2**15
    assert (np.diff(squash) >= 0).all()
    assert (stretch == -stretch[::-1]).all()
    assert 0 < squash.min() <= squash.max() < 2**16
    assert (log[[1, 2, 3, 1024]] == [0, 8, 13, 80]).all()


def test_the_bytes_of_a_stream_do_not_change():
    """Streams of earlier versions must still decode: the same symbols, the same bytes."""
    codes = (np.arange(600).reshape(20, 30) * 7 % 11 % 5).astype(np.uint8)
    assert (
        mixing.pack(codes, 5).hex()
        == "e7fd62bf7a515d628cb4d43b8c2b4b6f27239df97642f7073e9905caa8c65c8754aeb1"
    )


def test_the_rate_follows_the_decisions():
    dense = torch.randint(-100, 100, (50, 40), dtype=torch.int8)
    sparse = dense * (torch.rand(50, 40) < 0.05)
    rates = [mixing.decode_rate(mixing.encode(t)) for t in (dense, sparse)]
    assert 4 * rates[0] < rates[1]
