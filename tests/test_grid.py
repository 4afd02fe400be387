import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.compress.grid import (
    Grid,
    from_rows,
    pack,
    round_weight,
    scale_and_zero_point,
    to_rows,
    unpack,
)
from workbench.compress.quantizers import QuantizedWeight

GRANULARITIES = ("tensor", "channel", "group")


@given(
    low=st.floats(-100, 100),
    width=st.floats(0, 100),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
)
def test_every_grid_holds_zero_and_its_ends(low, width, bits, symmetric):
    low, high = torch.tensor(low), torch.tensor(low + width)
    codes = Grid(bits, symmetric=symmetric).codes
    scale, zero_point = scale_and_zero_point(low, high, codes, symmetric)
    assert codes[0] <= zero_point <= codes[1]
    for end in (low.clamp(max=0), high.clamp(min=0)):
        code = ((end / scale).round() + zero_point).clamp(*codes)
        assert ((code - zero_point) * scale - end).abs() <= scale * 0.51


def test_scale_and_zero_point_against_torch():
    observer = torch.ao.quantization.MinMaxObserver(dtype=torch.quint8, reduce_range=False)
    x = torch.linspace(-0.7, 2.9, 1000)
    observer(x)
    scale, zero_point = observer.calculate_qparams()
    ours = scale_and_zero_point(x.min(), x.max(), (0, 255), symmetric=False)
    assert torch.allclose(ours[0], scale[0])
    assert ours[1] == zero_point[0]


def test_per_channel_rounding_against_torch():
    weight = torch.randn(6, 5, 3, 3)
    codes, scale, _ = round_weight(weight, Grid(8))
    expected = torch.fake_quantize_per_channel_affine(
        weight, scale[:, 0], torch.zeros(6, dtype=torch.int32), 0, -127, 127
    )
    assert torch.allclose(codes * scale[:, 0].view(6, 1, 1, 1), expected, atol=1e-6)


@given(
    bits=st.integers(1, 8), granularity=st.sampled_from(GRANULARITIES), symmetric=st.booleans(),
    axis=st.integers(0, 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_rounding_errs_by_half_a_step_at_most(bits, granularity, symmetric, axis, seed):
    weight = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(seed))
    grid = Grid(bits, granularity, symmetric, group_size=4)
    source = QuantizedWeight.of(weight, grid, axis)
    dense = source()
    assert dense.shape == weight.shape
    if grid.binary:
        assert torch.equal(dense.sign(), weight.sign())
        return
    steps = to_rows(dense - weight, axis, grid).abs() / source.scale[..., None]
    assert steps.max() <= 0.51


@given(st.lists(st.integers(0, 255), max_size=50), st.integers(1, 8))
def test_unpack_is_the_inverse_of_pack(values, bits):
    codes = torch.tensor(values, dtype=torch.int64) % 2**bits
    packed = pack(codes, bits)
    assert packed.numel() == -(-len(values) * bits // 8)
    assert torch.equal(unpack(packed, bits, len(values)), codes)


@given(granularity=st.sampled_from(GRANULARITIES), axis=st.integers(0, 2), size=st.integers(1, 9))
def test_from_rows_is_the_inverse_of_to_rows(granularity, axis, size):
    weight = torch.arange(60.0).view(3, 4, 5)
    rows = to_rows(weight, axis, Grid(4, granularity, group_size=size))
    assert torch.equal(from_rows(rows, weight.shape, axis), weight)


def test_k_bits_take_k_bits():
    weight = torch.randn(64, 64)
    sizes = [QuantizedWeight.of(weight, Grid(bits)).codes.nbytes for bits in range(1, 9)]
    assert sizes == [512 * bits for bits in range(1, 9)]


def test_a_weight_of_zeros_stays_zero():
    for symmetric in (True, False):
        source = QuantizedWeight.of(torch.zeros(3, 4), Grid(4, symmetric=symmetric))
        assert torch.equal(source(), torch.zeros(3, 4))


def test_bfloat16_stays_bfloat16():
    weight = torch.randn(4, 4, dtype=torch.bfloat16)
    assert QuantizedWeight.of(weight, Grid(8))().dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "bits is 0; give a whole number from 1 to 8"),
        ({"bits": 9}, "bits is 9"),
        ({"bits": 2.5}, "bits is 2.5"),
        ({"granularity": "row"}, "granularity is 'row'; choose"),
        ({"group_size": 0}, "group_size is 0"),
    ],
)
def test_a_bad_grid_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Grid(**arguments)
