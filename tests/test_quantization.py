import pytest
import torch
from networks import Branching, two_inputs
from torch import nn

from workbench import compress, models
from workbench.compress.computed import make_dense, weights
from workbench.compress.quantizers import QuantizedWeight, StaticQuantizer

BATCH = torch.rand(32, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of the difference, as a share of ``a``'s own spread."""
    return ((a - b).square().mean().sqrt() / a.std()).item()


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_static_stays_close_to_float(granularity, method):
    model = models.build("resnet-8").eval()
    small = compress.quantize_static(model, [BATCH], granularity=granularity, method=method)
    assert 0 < distance(model(BATCH), small(BATCH)) < 0.1


def test_static_covers_every_layer_and_folds_batch_norm():
    small = compress.quantize_static(models.build("resnet-8"), [BATCH])
    table = compress.coverage(small)
    assert (table.stored_as == "8-bit per channel").all()
    assert (table.activations == "uint8 static").all()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in small.modules())


def test_static_rounds_each_activation_once():
    small = compress.quantize_static(models.build("resnet-8"), [BATCH])
    rounded = [module for module in small.modules() if isinstance(module, StaticQuantizer)]
    # 1 input, 9 convolutions, 3 sums and the pooled features that the linear layer reads
    assert len(rounded) == 14


def test_static_ranges_are_those_of_the_calibration():
    model = nn.Sequential(nn.Linear(4, 4))
    x = torch.tensor([[-1.0, 0.0, 2.0, 4.0]])
    small = compress.quantize_static(model, [x, x / 2])
    quantizer = next(m for m in small.modules() if isinstance(m, StaticQuantizer))
    assert torch.isclose(quantizer.scale, torch.tensor(5 / 255))
    assert quantizer.zero_point == 51


def test_percentile_leaves_out_an_outlier():
    x = torch.linspace(0, 1, 40_000).view(-1, 4).clone()
    x[0, 0] = 1000
    linear = nn.Sequential(nn.Linear(4, 4))
    scales = {}
    for method in ("minmax", "percentile", "mse"):
        small = compress.quantize_static(linear, [x], method=method)
        scales[method] = next(m for m in small.modules() if isinstance(m, StaticQuantizer)).scale
    assert scales["percentile"] < scales["minmax"] / 100
    assert scales["mse"] <= scales["minmax"]


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv1d(4, 6, 3), torch.randn(8, 4, 9)),
        (nn.Conv2d(4, 6, 3, groups=2), torch.randn(8, 4, 9, 9)),
        (nn.Conv3d(4, 6, 3), torch.randn(8, 4, 5, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3), torch.randn(8, 4, 9)),
        (nn.ConvTranspose2d(4, 6, 3), torch.randn(8, 4, 9, 9)),
        (nn.Linear(4, 6), torch.randn(8, 3, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_layer(layer, x):
    model = nn.Sequential(layer, nn.ReLU())
    for small in (
        compress.quantize_static(model, [x]),
        compress.quantize_weights(model, bits=8),
        compress.quantize_weights(model, bits=6, granularity="group", group_size=5),
    ):
        assert 0 < distance(model(x), small(x)) < 0.1


def test_transposed_convolution_has_a_scale_per_output_channel():
    weight = torch.ones(4, 6, 3) * torch.arange(1, 7).view(1, 6, 1)
    layer = nn.ConvTranspose1d(4, 6, 3)
    layer.weight.data = weight
    small = compress.quantize_weights(layer, bits=8)
    assert torch.allclose(small.weight, weight)


def test_two_inputs_tied_weights_grouped_and_residual():
    model, inputs = two_inputs()
    small = compress.quantize_static(model, [inputs])
    assert distance(model(*inputs), small(*inputs)) < 0.1
    assert (compress.coverage(small).stored_as != "float").all()
    assert small.first.sources["weight"] is small.second.sources["weight"]
    names = [name for name, _ in weights(small)]
    assert "first.weight" in names
    assert "second.weight" not in names


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_dynamic_recurrent(kind):
    model = kind(32, 32, num_layers=2, bidirectional=True)
    small = compress.quantize_dynamic(model)
    x = torch.randn(5, 3, 32)
    assert 0 < distance(model(x)[0], small(x)[0]) < 0.05
    assert small.sources["weight_ih_l0"].codes.dtype == torch.int8


@pytest.mark.parametrize("kind", [nn.LSTM, nn.Linear])
def test_make_dense_gives_a_plain_layer_of_the_same_answers(kind):
    layer = compress.quantize_weights(kind(8, 8), bits=8)
    x = torch.randn(3, 2, 8)
    before = layer(x)
    make_dense(layer)
    assert type(layer) is kind
    torch.testing.assert_close(layer(x), before)
    assert all("sources" not in name for name in layer.state_dict())


def test_dynamic_transformer_covers_linear_and_embedding():
    model = models.build("char-transformer").eval()
    small = compress.quantize_dynamic(model)
    table = compress.coverage(small)
    assert (table.stored_as != "float").all()
    assert set(table[table.type == "Linear"].activations) == {"uint8 dynamic"}
    codes = torch.randint(0, 81, (2, 64))
    assert 0 < distance(model(codes), small(codes)) < 0.05


def test_dynamic_rounds_the_input_of_each_call():
    model = nn.Linear(64, 64)
    small = compress.quantize_dynamic(model)
    x = torch.randn(4, 64)
    # A range fixed beforehand could not serve inputs of such different sizes.
    for size in (1e-3, 1, 1e3):
        assert distance(model(size * x), small(size * x)) < 0.05
    weights_only = compress.quantize_weights(model, bits=8)
    assert not torch.equal(small(x), weights_only(x))


def test_dynamic_on_a_cnn_says_nothing_quantized():
    with pytest.warns(UserWarning, match=r"nothing quantized \(15 layers: a convolution needs"):
        small = compress.quantize_dynamic(models.build("resnet-14"))
    assert compress.steps(small) == ("int8 dynamic per channel: nothing quantized",)
    assert (compress.coverage(small).reason != "").all()


def test_binarize_keeps_signs_and_mean_sizes():
    model = nn.Linear(50, 3)
    small = compress.binarize(model)
    assert torch.equal(small.weight.sign(), model.weight.sign())
    assert torch.allclose(small.weight.abs().mean(1), model.weight.abs().mean(1))
    assert small.weight.abs().unique().numel() == 3


def test_skip_leaves_a_layer_and_says_so():
    small = compress.quantize_weights(models.build("lenet-5"), bits=4, skip=["0", "9"])
    table = compress.coverage(small).set_index("layer")
    assert list(table.index[table.stored_as == "float"]) == ["0", "9"]
    assert table.reason["0"] == "in skip"


def test_untraceable_part_is_named_and_left():
    model = nn.Sequential(nn.Linear(4, 4), Branching())
    table = compress.coverage(compress.quantize_static(model, [torch.randn(8, 4)]))
    reasons = table.set_index("layer").reason
    assert reasons["0"] == ""
    assert reasons["1.inner"].startswith("inside 1, which cannot be traced")


def test_untraceable_model_is_refused_by_name():
    with pytest.raises(ValueError, match="forward pass of Branching cannot be traced"):
        compress.quantize_static(Branching(), [torch.randn(8, 4)])


def test_state_loads_into_another_model_of_the_same_form():
    first = compress.quantize_static(models.build("lenet-5", seed=1), [BATCH])
    second = compress.quantize_static(models.build("lenet-5", seed=2), [BATCH])
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(BATCH), second(BATCH))


def test_k_bit_weights_take_k_bits_in_the_state():
    model = nn.Linear(64, 64, bias=False)
    four = compress.quantize_weights(model, bits=4).state_dict()
    assert sum(value.nbytes for value in four.values()) == 64 * 64 // 2 + 64 * 4


def test_quantizing_twice_rounds_what_is_there():
    eight = compress.quantize_weights(models.build("lenet-5"), bits=8)
    four = compress.quantize_weights(eight, bits=4)
    assert compress.steps(four) == ("8-bit per channel weights", "4-bit per channel weights")
    assert all(s.grid.bits == 4 for s in four.modules() if isinstance(s, QuantizedWeight))


@pytest.mark.parametrize("technique", [
    lambda model: compress.quantize_static(model, [BATCH]),
    compress.quantize_dynamic,
    compress.quantize_weights,
])  # fmt: skip
def test_nan_weights_are_refused_by_name(technique):
    model = models.build("lenet-5")
    model[0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"weight 0\.weight holds NaN"):
        technique(model)


def test_refusals_say_what_to_do():
    model = models.build("lenet-5")
    refusals = [
        (lambda: compress.quantize_static(model, []), ValueError, "calibration is empty"),
        (lambda: compress.quantize_static(model, BATCH), TypeError, "give a Task or a list"),
        (lambda: compress.quantize_static(model, [BATCH], method="max"), ValueError, "choose from"),
        (lambda: compress.quantize_static(model, [BATCH], granularity="group"), ValueError,
         "choose 'tensor' or 'channel'"),
        (lambda: compress.quantize_static(model, [BATCH * float("nan")]), ValueError,
         "holds NaN or infinity during calibration"),
        (lambda: compress.quantize_weights(model, skip=["10"]), ValueError, "layers are"),
        (lambda: compress.quantize_weights(model, skip="0"), TypeError, "give a list"),
        (lambda: compress.quantize_weights(nn.ReLU()), ValueError, "no layer with weights"),
        (lambda: compress.quantize_static(nn.ReLU(), [BATCH]), ValueError, "no layer with weights"),
        (lambda: compress.quantize_weights("model"), TypeError, "expected a torch.nn.Module"),
    ]  # fmt: skip
    for call, error, message in refusals:
        with pytest.raises(error, match=message):
            call()
