"""Fixed point: rounded as ap_fixed rounds, and equal to hls4ml's C++ in every bit."""

import builtins
import itertools
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from workbench import models
from workbench.deploy import fpga
from workbench.deploy.fpga import FixedPoint


def perceptron(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


formats = st.builds(FixedPoint, st.integers(2, 18), st.integers(-6, 12), st.booleans())


def grid(form: FixedPoint) -> np.ndarray:
    lowest = -(2 ** (form.bits - 1)) if form.signed else 0
    return np.arange(lowest, lowest + 2**form.bits) * 2.0 ** (form.integer - form.bits)


@given(
    st.builds(FixedPoint, st.integers(2, 6), st.integers(-3, 5), st.booleans()),
    st.lists(st.floats(-40, 40), min_size=1, max_size=8),
)
def test_a_number_becomes_the_nearest_of_the_grid(form, values):
    every = grid(form)
    for value, found in zip(values, form.rounded(np.array(values)), strict=True):
        away = np.abs(every - value)
        nearest = every[away == away.min()]
        assert found == nearest.max()  # halves go up


@given(formats, st.floats(-1e6, 1e6))
def test_rounding_twice_changes_nothing(form, value):
    once = form.rounded(np.array([value]))
    assert form.rounded(once) == once


@given(
    st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=1, max_size=9),
    st.integers(2, 12),
)
def test_the_format_covers_all_values_and_no_finer_one_does(values, bits):
    values = np.array(values)
    form = FixedPoint.covering(values, bits)
    assert form.signed == (values.min() < 0)
    if abs(values).max() < 1e-300:
        return
    top = 2.0 ** (form.integer - form.signed)  # the range ends just below it
    assert values.max() < top
    assert values.min() >= -top
    finer = top / 2
    assert values.max() >= finer or values.min() < -finer


def test_zeros_have_a_format():
    assert FixedPoint.covering(np.zeros(3), 4).rounded(np.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (FixedPoint(8, 3), "fixed<8,3,RND,SAT>"),
        (FixedPoint(4, -2, signed=False), "ufixed<4,-2,RND,SAT>"),
    ],
)
def test_formats_are_called_as_in_hls(form, text):
    assert str(form) == text


def test_many_bits_come_close_to_floats():
    model, x = perceptron(12, 9, 5, 3), normal(50, 12)
    with torch.no_grad():
        expected = model(x)
    errors = [(fpga.fix(model, x, bits=b)(x) - expected).abs().max() for b in (6, 10, 14, 18)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3
    assert errors[0] > 10 * errors[1]


def test_all_numbers_lie_on_their_grids():
    fixed = fpga.fix(perceptron(12, 9, 3), normal(50, 12), bits=4)
    for layer in fixed.layers:
        assert set(layer.weight.flatten()) <= set(grid(layer.weight_format))
        assert set(layer.bias) <= set(grid(layer.bias_format))
        assert len(np.unique(layer.weight)) <= 16
    assert [layer.activation_format is None for layer in fixed.layers] == [False, True]
    assert not fixed.layers[0].activation_format.signed  # after a ReLU nothing is below zero


def test_images_are_flattened_and_a_missing_bias_is_zero():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False))
    x = normal(5, 3, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(fpga.fix(model, x, bits=18)(x), model(x), rtol=0, atol=1e-3)


def test_resources_by_hand():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    # With 4 bits the grid of the first layer is of quarters: 7, 4, 0, -1, 2 and 3 steps.
    model[0].weight.data = torch.tensor([[1.75, 1.0, 0.0], [-0.25, 0.5, 0.75]])
    model[2].weight.data = torch.tensor([[0.5, 0.0]])
    for layer in (model[0], model[2]):
        layer.bias.data.zero_()
    x = torch.tensor([[1.0, 1.0, 1.0]])
    found = fpga.resources(fpga.fix(model, x, bits=4))
    # 7 is 111, 4 is 1 and two zeros, 3 is 11: their bits from first to last one.
    assert found["ebops"] == 4 * (3 + 1 + 0 + 1 + 1 + 2) + 4 * 1
    assert found["multipliers"] == 6
    assert found["weight_bits"] == 4 * (6 + 2 + 2 + 1)
    assert found["chip"] == "Artix-7 35T"
    assert found["source"] == "modelled"
    assert fpga.resources(fpga.fix(model, x, bits=4), reuse=3)["multipliers"] == 2 + 1


@given(st.lists(st.integers(-(2**17), 2**17 - 1), min_size=1, max_size=9))
def test_effective_bits_by_their_text(codes):
    expected = [len(bin(abs(code))[2:].strip("0")) for code in codes]
    assert fpga._effective_bits(np.array(codes, dtype=float)).tolist() == expected


def test_zeros_cost_nothing_and_the_chip_grows_with_the_network():
    model, x = models.build("lenet-300-100"), normal(20, 1, 28, 28)
    whole = fpga.resources(fpga.fix(model, x, bits=8))
    for layer in (model[1], model[3], model[5]):
        layer.weight.data *= torch.rand_like(layer.weight) < 0.1
    pruned = fpga.resources(fpga.fix(model, x, bits=8))
    assert whole["chip"] == "none"
    assert pruned["chip"] == "Virtex UltraScale+ VU9P"
    assert pruned["ebops"] < 0.15 * whole["ebops"]
    assert pruned["weight_bits"] == whole["weight_bits"]


def test_reuse_trades_time_for_multipliers():
    fixed = fpga.fix(models.build("lenet-300-100"), normal(20, 1, 28, 28), bits=8)
    many, few = (fpga.resources(fixed, reuse=reuse) for reuse in (64, 2048))
    assert many["multipliers"] > 20 * few["multipliers"]
    assert few["chip"] == "Zynq-7020"


def test_a_sweep_has_one_row_for_each_width(blobs):
    model = perceptron(2, 3)
    frame = fpga.sweep(model, blobs, bits=(2, 5, 9))
    assert frame["bits"].tolist() == [2, 5, 9]
    assert frame["score"].between(0, 1).all()
    assert frame["ebops"].is_monotonic_increasing


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 3), "model is a Linear; give an nn.Sequential"),
        (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), "layer 1 follows a Linear"),
        (nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten()), "layer 0 is a Conv2d; here are"),
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU()), "must end with a Linear"),
        (nn.Sequential(nn.Flatten()), "must end with a Linear"),
    ],
)
def test_other_networks_are_refused(model, message):
    with pytest.raises(TypeError, match=message):
        fpga.fix(model, torch.ones(1, 3))


def test_numbers_out_of_range_are_refused():
    for bits in (1, 19):
        with pytest.raises(ValueError, match=f"bits is {bits}; give 2 to 18"):
            fpga.fix(perceptron(2, 2), torch.ones(1, 2), bits=bits)
    with pytest.raises(ValueError, match="reuse is 0; give 1 or more"):
        fpga.resources(fpga.fix(perceptron(2, 2), torch.ones(1, 2)), reuse=0)


def test_hls4ml_is_missing(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *rest, **options):
        if name == "hls4ml":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    fixed = fpga.fix(perceptron(2, 2), torch.ones(1, 2))
    with pytest.raises(ImportError, match=r'pip install -e "\.\[fpga\]"'):
        fpga.compile_emulator(fixed, tmp_path)


def test_there_is_no_compiler(monkeypatch, tmp_path):
    pytest.importorskip("hls4ml", reason='needs the extra: pip install -e ".[fpga]"')
    monkeypatch.setattr(shutil, "which", lambda name: None)
    fixed = fpga.fix(perceptron(2, 2), torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="there is no g"):
        fpga.compile_emulator(fixed, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(("bits", "reuse"), [(6, 1), (11, 4)])
def test_the_emulation_is_equal_in_every_bit(bits, reuse, tmp_path):
    pytest.importorskip("hls4ml", reason='needs the extra: pip install -e ".[fpga]"')
    model, x = perceptron(16, 8, 8, 4), normal(300, 16)
    fixed = fpga.fix(model, x, bits=bits)
    emulate = fpga.compile_emulator(fixed, tmp_path, reuse=reuse)
    for scale in (1, 4):  # four times the range that was seen: inputs and activations saturate
        assert torch.equal(emulate(scale * x), fixed(scale * x))
    assert not torch.equal(fixed(4 * x), 4 * fixed(x))
