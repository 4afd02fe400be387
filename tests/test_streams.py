import importlib
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.storage import streams, symbols
from workbench.storage.streams import KINDS, Section, StreamError, numbers, read_numbers

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]
DTYPES = streams._DTYPES
EDGES = {  # bits of numbers that are easily lost, by bytes of an element
    1: [0x00, 0x80, 0x7F, 0xFF, 0x01],
    2: [0x0000, 0x8000, 0x0001, 0x7C00, 0x7C01, 0xFE00, 0xFFFF, 0x7F80, 0x7F81, 0xFFC1, 0x3F80],
    4: [0, 1 << 31, 1, 0x007FFFFF, 0x7F800000, 0x7F800001, 0xFFC00123, 0xFFFFFFFF, 0x3F800000],
    8: [0, 1 << 63, 1, 0x7FF0000000000000, 0x7FF0000000000001, 0xFFF8000000000123, 2**64 - 1],
}  # -0, denormals, infinities, NaN payloads, both quiet and signalling


def of_bits(bits: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of these bits; a bool has only two values, and a tensor may have none at all."""
    bits = bits & 1 if dtype == torch.bool else bits
    if bits.size == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(bits.view(np.uint8).copy()).view(dtype).reshape(shape)


def bits_of(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert bits_of(found) == bits_of(expected)


def part(dtype: torch.dtype) -> np.dtype:
    """Unsigned integers of the size of an element, or of half a complex one."""
    return np.dtype(f"u{dtype.itemsize // (1 + dtype.is_complex)}")


@st.composite
def tensors(draw) -> torch.Tensor:
    """Of every dtype, few or many distinct elements, edge values among them."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 16]), max_size=4)))
    unsigned, rng = part(dtype), np.random.default_rng(draw(st.integers(0, 99)))
    count = math.prod(shape) * (1 + dtype.is_complex)
    kind = draw(st.sampled_from(["any", "edges", "few", "sparse", "one", "normal"]))
    if kind == "normal" and dtype.is_floating_point and dtype.itemsize > 1:
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)
    few = rng.choice(np.array(EDGES[unsigned.itemsize], unsigned), 3)
    bits = {
        "any": rng.integers(0, 256, count * unsigned.itemsize, np.uint8).view(unsigned),
        "edges": rng.choice(np.array(EDGES[unsigned.itemsize], unsigned), count),
        "few": rng.choice(few, count),
        "sparse": rng.choice(few, count) * (rng.random(count) < 0.1),
        "one": np.repeat(few[:1], count),
    }.get(kind, np.arange(count).astype(unsigned))
    return of_bits(bits.astype(unsigned), dtype, shape)


def sample(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A pruned weight, (24, 40)."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(24, 40, generator=generator)
    if not dtype.is_floating_point:
        dense = 20 * dense
    return (dense * (torch.rand(24, 40, generator=generator) < 0.3)).to(dtype)


def with_checksum(stream: bytes | bytearray) -> bytes:
    """The stream as one whose writer meant what it says."""
    checksum = zlib.crc32(stream[9:], zlib.crc32(stream[:5]))
    return bytes(stream[:5]) + checksum.to_bytes(4, "little") + bytes(stream[9:])


@pytest.mark.parametrize("codec", streams.CODECS)
@given(tensor=tensors(), chunk=st.sampled_from([1, 5, 40, 2**22]))
@settings(max_examples=60)
def test_round_trips_bit_for_bit(codec, tensor, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "CHUNK", max(chunk, tensor.numel() // 8))
        stream = streams.encode(tensor, codec)
        assert_same(streams.decode(stream), tensor)
        assert_same(streams.decode(memoryview(stream)), tensor)
        assert stream == streams.encode(tensor.clone(), codec)
        header = streams.header(stream)
    assert (header.codec, header.dtype, header.shape) == (codec, tensor.dtype, tensor.shape)
    assert header.nbytes == tensor.nbytes


@pytest.mark.parametrize("codec", streams.CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_edge_value(codec, dtype):
    unsigned = part(dtype)
    edges = np.array(EDGES[unsigned.itemsize] * (1 + dtype.is_complex), unsigned)
    count = len(edges) // (1 + dtype.is_complex)
    for times in (1, 50):  # too few to be coded, and enough
        tensor = of_bits(np.tile(edges, times), dtype, (times, count))
        assert_same(streams.decode(streams.encode(tensor, codec)), tensor)
    assert_same(streams.decode(streams.encode(tensor[0, 0], codec)), tensor[0, 0])  # 0-d
    assert_same(streams.decode(streams.encode(tensor[:0], codec)), tensor[:0])


@pytest.mark.parametrize("codec", streams.CODECS)
def test_tensors_that_are_not_contiguous(codec):
    tensor = sample()
    lazy = torch.randn(6, 4, dtype=torch.complex64).conj()
    for view in (tensor.T, tensor[::2, 1::3], tensor[3].expand(5, 40), lazy, lazy.imag):
        assert_same(streams.decode(streams.encode(view, codec)), view.resolve_conj().clone())
    parameter = torch.nn.Parameter(tensor.float())
    assert_same(streams.decode(streams.encode(parameter, codec)), parameter.detach())


@pytest.mark.parametrize("codec", streams.CODECS)
def test_arrays_are_taken_for_tensors(codec):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    for view in (array, array[:, ::-1], array.T, array[0, 0, 0:1].reshape(())):
        found = streams.decode(streams.encode(view, codec))
        assert found.shape == view.shape
        assert (found.numpy() == view).all()


@pytest.mark.parametrize("codec", streams.CODECS)
@pytest.mark.parametrize("size", [2**16, 2**17 + 5])
def test_all_of_65536_symbols(codec, size):
    if codec == "mixing":
        size //= 16  # it is slow
    values = torch.from_numpy(np.random.default_rng(0).permutation(size).astype(np.uint16))
    assert_same(streams.decode(streams.encode(values, codec)), values)


@pytest.mark.parametrize("codec", streams.CODECS)
def test_one_symbol_takes_no_bits(codec):
    if codec == "plain":
        return
    for value in (0.0, 1.5):
        stream = streams.encode(torch.full((100, 200), value), codec)
        assert len(stream) < 100
        assert_same(streams.decode(stream), torch.full((100, 200), value))


@pytest.mark.parametrize("codec", streams.CODECS)
def test_chunks_are_decoded_side_by_side_or_in_turn(codec, monkeypatch):
    monkeypatch.setattr(streams, "CHUNK", 100)
    tensor = sample()
    stream = streams.encode(tensor, codec)
    with ThreadPoolExecutor(2) as executor:
        assert_same(streams.decode(stream, executor=executor), tensor)
    tables = [s for s in streams.sections(stream) if s.kind == "header"]
    assert len(tables) - 1 >= 12  # one chunk of two rows after the other, and the framing
    monkeypatch.setattr(streams, "CHUNK", 7)  # less than a row
    assert_same(streams.decode(streams.encode(tensor, codec)), tensor)


@pytest.mark.parametrize("codec", streams.CODECS)
def test_sections_add_up_to_the_stream(codec):
    stream = streams.encode(sample(), codec)
    found = list(streams.sections(stream))
    assert sum(len(section.data) for section in found) == len(stream)
    assert {section.kind for section in found} <= set(KINDS)
    assert found[-1].kind == "header"


@pytest.mark.parametrize("codec", streams.CODECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_a_stream_that_was_altered_is_refused(codec, dtype):
    stream = streams.encode(sample(dtype), codec)
    rng = np.random.default_rng(0)
    for trial in range(1000):
        damaged = bytearray(stream)
        place = int(rng.integers(len(stream)))
        if trial % 4 == 0:
            damaged = damaged[:place]
        elif trial % 4 == 1:
            damaged[place] ^= 1 << int(rng.integers(8))
        elif trial % 4 == 2:
            damaged[place : place + 4] = rng.bytes(4)
        else:
            damaged += rng.bytes(1 + trial % 9)
        if damaged != stream:
            with pytest.raises(StreamError):
                streams.decode(bytes(damaged))


@pytest.mark.parametrize("codec", streams.CODECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_a_damaged_stream_with_the_right_checksum_crashes_nothing(codec, dtype, monkeypatch):
    if codec in ("huffman", "run_length"):  # four streams of a few symbols
        huffman = importlib.import_module("workbench.storage.huffman")
        monkeypatch.setattr(huffman, "_WORTH_SPLITTING", 50)
    tensor = sample(dtype)
    stream = streams.encode(tensor, codec)
    start = streams.header(stream).start
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(500):
        damaged = bytearray(stream)
        # The framing and the tables are where a reader could be led astray.
        place = start + int(rng.integers(min(60, len(stream) - start) if trial % 2 else 10**6))
        place = min(place, len(stream) - 1)
        if trial % 3 == 0:
            damaged[place] ^= 1 << int(rng.integers(8))
        elif trial % 3 == 1:
            damaged[place : place + 3] = rng.bytes(3)
        else:
            del damaged[place : place + int(rng.integers(1, 9))]
        try:
            found = streams.decode(with_checksum(damaged))
        except StreamError:
            refused += 1
        else:
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert refused > 0


@pytest.mark.parametrize("codec", streams.CODECS)
@given(data=st.data())
@settings(max_examples=50)
def test_any_bytes_for_a_chunk_crash_nothing(codec, data):
    stream = streams.encode(sample(), codec)
    start = streams.header(stream).start
    kinds = st.sampled_from(range(len(KINDS) + 1))
    parts = data.draw(st.lists(st.tuples(kinds, st.binary(max_size=30)), max_size=6))
    chunk = b"".join(bytes([kind]) + numbers(len(body)) + body for kind, body in parts)
    try:
        found = streams.decode(with_checksum(stream[:start] + numbers(len(chunk)) + chunk))
    except StreamError:
        return
    assert found.shape == (24, 40)


def test_nothing_but_a_codebook_is_read_for_its_codes():
    rows, values = np.zeros((2, 3), np.uint16), np.array([4, 5, 6], np.uint16).tobytes()
    codec = SimpleNamespace(expand=lambda *_: np.full((2, 3), 9, np.uint8))
    symbols.expand([numbers(1), values, b""], rows, torch.bfloat16, codec)
    assert (rows == 6).all()
    with pytest.raises(StreamError, match="no value in its codebook"):
        symbols.expand([numbers(1), b"", b""], rows, torch.bfloat16, codec)


@pytest.mark.parametrize("codec", streams.CODECS)
def test_a_shape_or_dtype_that_is_not_the_streams_own(codec):
    stream = streams.encode(sample(), codec)
    for dimensions in ([], [24], [25, 40], [24, 39], [2**31, 2**31], [2**62, 2], [0, 3]):
        start = streams.header(stream).start
        body = numbers(len(dimensions), *dimensions) + stream[start:]
        try:
            found = streams.decode(with_checksum(stream[:9] + body))
        except StreamError:
            continue
        assert found.shape == tuple(dimensions)
    for dtype in range(len(DTYPES)):
        altered = bytearray(stream)
        altered[4] = dtype
        try:
            found = streams.decode(with_checksum(altered))
        except StreamError:
            continue
        assert (found.dtype, found.shape) == (DTYPES[dtype], (24, 40))


def test_refusals_say_what_is_wrong():
    stream = streams.encode(sample(), "plain")
    start = streams.header(stream).start
    refusals = [
        (b"", "not a coded tensor: 0 bytes, beginning b''"),
        (stream[:8], "not a coded tensor: 8 bytes, beginning"),
        (b"PK" + stream[2:], "not a coded tensor: .* beginning b'PK'"),
        (stream[:2] + b"\2" + stream[3:], "the stream has version 2; this workbench reads 1"),
        (stream[:-1], "cut short or altered: its checksum does not match"),
        (with_checksum(stream[:3] + b"\x63" + stream[4:]), "codec 99 and dtype 1, unknown here"),
        (with_checksum(stream[:4] + b"\x63" + stream[5:]), "codec 0 and dtype 99, unknown here"),
        (with_checksum(stream[:9]), "the stream is damaged: a number does not end"),
        (with_checksum(stream[:-1]), r"the stream is damaged: \d+ bytes at 2 of \d+"),
        (with_checksum(stream[:start]), "the stream is damaged"),
        (with_checksum(stream + b"\0"), "the stream is damaged"),
    ]
    for damaged, message in refusals:
        with pytest.raises(StreamError, match=message):
            streams.decode(damaged)


def test_what_cannot_be_coded_is_refused():
    with pytest.raises(ValueError, match="codec is 'zip'; choose one of plain, run_length, huff"):
        streams.encode(torch.ones(2), "zip")
    with pytest.raises(TypeError, match=r"got a list; expected a torch\.Tensor or numpy array"):
        streams.encode([1.0], "plain")
    with pytest.raises(TypeError, match=r"cannot code a tensor of torch\.float32, torch\.sparse"):
        streams.encode(torch.eye(3).to_sparse(), "plain")
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"cannot code a tensor of torch\.qint8"):
        streams.encode(quantized, "plain")


@given(st.lists(st.integers(0, 2**63)))
def test_numbers_read_back(values):
    assert read_numbers(numbers(*values)) == values


def test_the_frame_is_what_the_docstring_says():
    tensor = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
    stream = streams.encode(tensor, "plain")
    assert stream[:5] == b"\xc5W\x01\x00" + bytes([DTYPES.index(torch.uint8)])
    body = stream[9:]
    assert body[:3] == bytes([2, 1, 3])
    assert int.from_bytes(stream[5:9], "little") == zlib.crc32(body, zlib.crc32(stream[:5]))
    chunk = body[4:]
    assert body[3] == len(chunk)
    assert chunk[-5:] == bytes([KINDS.index("values"), 3, 1, 2, 3])
    assert list(streams.sections(stream))[-2] == Section("values", b"\1\2\3")


@given(
    width=st.integers(1, 64),
    numbers=st.lists(st.integers(0, 2**64 - 1), max_size=40),
    itemsize=st.sampled_from([2, 4, 8]),
)
def test_bits_in_planes_come_back_and_take_no_more_than_they_are(width, numbers, itemsize):
    width = min(width, 8 * itemsize)
    numbers = np.array(numbers, np.uint64).astype(f"u{itemsize}")
    data = symbols.pack_bits(numbers, width)
    assert len(data) == math.ceil(len(numbers) * width / 8)
    back = np.full_like(numbers, -1 % 2 ** (8 * itemsize))
    symbols.unpack_bits(data, width, back)
    low = np.array((1 << width) - 1, back.dtype)
    assert (back & low == numbers & low).all()
    with pytest.raises(StreamError, match="bytes for"):
        symbols.unpack_bits(data + b"x", width, back)


def test_the_lowest_bits_of_groups_are_the_first_plane():
    numbers = np.arange(16, dtype=np.uint16)  # groups (0, 2, 4, ...) and (1, 3, 5, ...)
    data = symbols.pack_bits(numbers, 4)
    assert [*data[:2]] == [0 | 2 << 4, 1 | 3 << 4]
