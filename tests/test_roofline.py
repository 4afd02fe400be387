"""Work and speed of each operation of a model."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from workbench import compress, data, measure, models
from workbench.deploy.runtimes import prepare
from workbench.explore import plots
from workbench.measure import peaks, roofline

ROOFS = peaks.Roofs(1, "cpu", {"float32": 100e9, "int8": 400e9}, {"L2": 100e9, "memory": 20e9})
WORK = ["layer", "operation", "dtype", "flops", "moved_bytes"]


def example(name: str, batch: int = 1) -> torch.Tensor:
    if name == "char-transformer":
        return torch.randint(0, 81, (batch, 128), generator=torch.Generator().manual_seed(0))
    return torch.randn(batch, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def exported(model: nn.Module, x: torch.Tensor) -> bytes:
    return prepare(model, "onnxruntime", example_input=(x,)).artifact


@pytest.mark.parametrize("name", models.names())
def test_work_of_the_parts_is_the_work_of_the_whole(name):
    model = models.build(name)
    frame = roofline.layers(model, example(name), passes=3)
    assert frame["flops"].sum() == 2 * measure.macs(model, example(name))
    assert frame["share"].sum() == pytest.approx(1)
    assert (frame["latency_ms"] > 0).all()
    names = dict(model.named_modules())
    assert set(frame["layer"]) <= set(names)


@pytest.mark.parametrize("name", ["mlp-wide", "resnet-8", "char-transformer"])
def test_onnx_nodes_do_the_same_work(name):
    model = models.build(name)
    frame = roofline.onnx_layers(exported(model, example(name)), example(name), passes=3)
    assert frame["flops"].sum() == 2 * measure.macs(model, example(name))


def test_channels_that_the_runtime_adds_are_counted():
    if "AVX-512" not in measure.hardware().vector_extensions:
        pytest.skip("registers of other sizes")
    x = example("lenet-5")
    frame = roofline.onnx_layers(exported(models.build("lenet-5"), x), x, passes=3)
    first, second = frame.loc[frame["operation"] == "Conv", "flops"]
    assert first == 2 * 24 * 24 * 25 * 32  # 20 channels in registers of 16
    assert second == 2 * 8 * 8 * 25 * 32 * 64  # 20 become 32, and 50 become 64


def test_work_of_a_linear_layer_by_hand():
    model = nn.Sequential(nn.Linear(30, 20), nn.ReLU())
    frame = roofline.layers(model, torch.ones(7, 30), passes=3)
    assert frame["operation"].tolist() == ["addmm", "relu"]  # the transposed weight is a view
    assert frame["layer"].tolist() == ["0", "1"]
    assert frame["flops"].tolist() == [2 * 7 * 30 * 20, 0]
    by_hand = [4 * (7 * 30 + 30 * 20 + 20 + 7 * 20), 4 * (7 * 20 + 7 * 20)]
    assert frame["moved_bytes"].tolist() == by_hand
    assert frame["intensity"].tolist() == pytest.approx([8400 / by_hand[0], 0])
    np.testing.assert_allclose(frame["flops_s"], frame["flops"] / frame["latency_ms"] * 1e3)


def test_what_a_module_does_itself_after_its_parts_is_its_own():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 3))

        def forward(self, x):
            return self.inner(x).relu()

    frame = roofline.layers(nn.Sequential(Block(), nn.Tanh()), torch.ones(2, 3), passes=3)
    found = dict(zip(frame["operation"], frame["layer"], strict=True))
    assert found == {"addmm": "0.inner.0", "relu": "0", "tanh": "1"}


def test_a_row_of_a_table_is_read_not_the_table():
    frame = roofline.layers(nn.Embedding(10_000, 8), torch.tensor([3, 5]), passes=3)
    assert frame["moved_bytes"].tolist() == [2 * (2 * 8 * 4) + 2 * 8]


def test_a_number_that_is_repeated_is_read_once():
    class Repeated(nn.Module):
        def forward(self, x):
            return x.expand(1000, 4) * 2

    frame = roofline.layers(Repeated(), torch.ones(1, 4), passes=3)
    assert frame["moved_bytes"].tolist()[-1] == 1000 * 4 * 4 + 4 * 4


def test_batches_share_the_weights():
    model = nn.Linear(100, 100)
    one, many = (roofline.layers(model, torch.ones(n, 100), passes=3).iloc[0] for n in (1, 64))
    assert many["flops"] == 64 * one["flops"]
    assert many["moved_bytes"] < 3 * one["moved_bytes"]
    assert many["intensity"] > 64 / 3 * one["intensity"]


def test_the_model_is_left_as_it_was():
    model = models.build("resnet-8").train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    threads = torch.get_num_threads()
    roofline.layers(model, example("resnet-8", 2), passes=3, threads=threads + 1)
    assert model.training
    assert torch.get_num_threads() == threads
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_hooks_are_gone_after_an_error():
    with pytest.raises(RuntimeError):
        roofline.layers(nn.Linear(3, 3), torch.ones(1, 4))
    assert not torch.nn.modules.module._global_forward_hooks


def test_times_are_medians_over_passes(monkeypatch):
    passes = iter([[9.0, 9.0]] * roofline._WARM_UP + [[1.0, 5.0], [2.0, 6.0], [9.0, 70.0]])
    monkeypatch.setattr(roofline._Clock, "times_ms", lambda self: next(passes))
    monkeypatch.setattr(roofline._Clock, "_mark", lambda self: 0.0)
    frame = roofline.layers(nn.Sequential(nn.ReLU(), nn.Sigmoid()), torch.ones(2, 2), passes=3)
    assert frame["latency_ms"].tolist() == [2.0, 6.0]


def test_int8_nodes_do_the_same_work_and_move_a_quarter_of_the_bytes():
    model, x = models.pretrained("resnet-8"), example("resnet-8")
    small = compress.quantize_static(model, data.fashion_mnist())
    frames = [roofline.onnx_layers(exported(m, x), x, passes=3) for m in (model, small)]
    whole, int8 = (f[f["operation"].isin(["Conv", "QLinearConv"])] for f in frames)
    assert sorted(whole["flops"]) == sorted(int8["flops"])
    assert set(whole["dtype"]) == {"float32"}
    assert set(int8["dtype"]) == {"uint8"}
    # Fused additions read more in float32; scales and 32-bit biases come on top in int8.
    assert 3 < whole["moved_bytes"].sum() / int8["moved_bytes"].sum() < 6


def test_points_are_put_under_their_roofs():
    frame = roofline.layers(models.build("lenet-5"), example("lenet-5"), passes=3)
    under = roofline.under(frame, ROOFS)
    assert (under["flops"] > 0).all()
    assert len(under) == 4
    roof = np.minimum(20e9 * under["intensity"], 100e9)
    np.testing.assert_allclose(under["roof_flops_s"], roof)
    np.testing.assert_allclose(under["attained"], under["flops_s"] / roof)
    assert under["bound"].tolist() == ["arithmetic", "arithmetic", "memory", "memory"]
    assert set(roofline.under(frame, ROOFS, "L2")["bound"]) == {"arithmetic", "L2"}


def test_signed_and_unsigned_bytes_have_the_int8_roof():
    frame = roofline.layers(nn.Linear(9, 9), torch.ones(1, 9), passes=3)
    for dtype in ("int8", "uint8"):
        (roof,) = roofline.under(frame.assign(dtype=dtype, intensity=1e6), ROOFS)["roof_flops_s"]
        assert roof == 400e9


def test_a_number_type_without_a_roof():
    frame = roofline.layers(nn.Linear(9, 9).double(), torch.ones(1, 9).double(), passes=3)
    with pytest.raises(ValueError, match=r"no roof is known for \['float64'\]"):
        roofline.under(frame, ROOFS)


@pytest.mark.parametrize(("name", "value"), [("passes", 2), ("threads", 0)])
def test_what_is_refused(name, value):
    for call in (roofline.layers, roofline.onnx_layers):
        with pytest.raises(ValueError, match=f"{name} is {value}; give"):
            call(nn.Linear(3, 3), torch.ones(1, 3), **{name: value})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_device_events_time_a_cuda_device():
    model = models.build("lenet-5")
    frame = roofline.layers(model, example("lenet-5"), passes=3, device="cuda")
    assert (frame["latency_ms"] > 0).all()
    assert next(model.parameters()).device.type == "cpu"


def test_the_picture_has_each_point_and_each_roof():
    frame = roofline.layers(models.build("lenet-5"), example("lenet-5"), passes=3)
    two = pd.concat([frame.assign(network="a"), frame.assign(network="b")])
    picture = plots.roofline(
        two, ROOFS, by="network", dtypes=("float32", "int8"), sources=("memory", "L2")
    )
    (axes,) = picture.axes
    points = [line for line in axes.get_lines() if line.get_marker() != "None"]
    multiplies = frame[frame["flops"] > 0]
    assert [line.get_label() for line in points] == ["a", "b"]
    for line in points:
        np.testing.assert_allclose(line.get_xdata(), multiplies["intensity"])
        np.testing.assert_allclose(line.get_ydata(), multiplies["flops_s"] / 1e9)
    words = [text.get_text() for text in axes.texts]
    assert words == ["float32 100", "int8 400", "memory 20 GB/s", "L2 100 GB/s"]
    roofs = [line for line in axes.get_lines() if line.get_marker() == "None"]
    assert [line.get_ydata().max() for line in roofs] == [400, 400, 100, 400]
    assert picture.png()


def test_nothing_to_draw():
    frame = roofline.layers(nn.ReLU(), torch.ones(1, 3), passes=3)
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.roofline(frame, ROOFS)
    with pytest.raises(ValueError, match="flops"):
        plots.roofline(frame.drop(columns="flops"), ROOFS)
