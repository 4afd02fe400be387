"""Exported graphs in JAX: the same answers as torch, or an error that names the layer."""

import builtins

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Transposed, TwoInputs
from torch import nn
from torch.export import Dim

from workbench import data, models
from workbench.deploy import xla

jax = pytest.importorskip("jax", reason='needs the extra: pip install -e ".[tpu]"')


def images(count: int) -> torch.Tensor:
    (x,), _ = next(iter(data.fashion_mnist().test.batches(count)))
    return x


def example(name: str, count: int) -> torch.Tensor:
    if name == "char-transformer":
        (x,), _ = next(iter(data.austen().test.batches(count)))
        return x
    return images(count)


def same(predictor: xla.XlaPredictor, model: nn.Module, *inputs: torch.Tensor) -> None:
    with torch.no_grad():
        expected = model.eval()(*inputs)
    found = predictor.predict(*inputs)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def perceptron() -> xla.XlaPredictor:
    return xla.XlaPredictor(models.pretrained("lenet-300-100"), (images(1),))


@pytest.mark.parametrize("name", ["lenet-5", "resnet-8", "char-transformer"])
def test_a_reference_network_gives_the_same_answers(name):
    model, x = models.pretrained(name), example(name, 20)
    predictor = xla.XlaPredictor(model, (x[:1],))
    same(predictor, model, x)
    with torch.no_grad():
        assert torch.equal(predictor.predict(x).argmax(-1), model(x).argmax(-1))


@pytest.mark.parametrize("batch", [1, 2, 33])
def test_any_batch(batch, perceptron):
    same(perceptron, perceptron.model, images(batch))


class Operators(nn.Module):
    """What the reference networks leave out of the signatures that they use."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(
            4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2
        )
        self.norm = nn.BatchNorm2d(6, affine=False)
        self.norm.running_mean.fill_(0.3)
        self.norm.running_var.fill_(2.0)
        self.plain = nn.LayerNorm(5, elementwise_affine=False)

    def forward(self, x):
        x = F.max_pool2d(self.norm(self.conv(x)), 3, stride=1, padding=1)
        x = F.gelu(self.plain(x[:, 1:-1:2, :, -5:]), approximate="tanh")
        return x.mean((-1, -2), keepdim=True).squeeze(-1) * 3


def test_other_arguments_of_the_same_operators():
    torch.manual_seed(0)
    x = torch.randn(3, 4, 11, 12)
    model = Operators()
    same(xla.XlaPredictor(model, (x,)), model, x)


def test_several_inputs_and_tied_weights():
    torch.manual_seed(0)
    model = TwoInputs().eval()
    inputs = torch.randn(4, 3, 8, 8), torch.randn(4, 5)
    same(xla.XlaPredictor(model, inputs), model, *inputs)


def test_an_exported_program_needs_no_module():
    model = models.pretrained("lenet-300-100")
    program = torch.export.export(
        model, (torch.ones(2, 1, 28, 28),), dynamic_shapes=[{0: Dim.DYNAMIC}]
    )
    predictor = xla.XlaPredictor(program)
    assert predictor.model is None
    same(predictor, model, images(3))


def test_the_model_keeps_its_mode():
    model = models.build("resnet-8").train()
    xla.XlaPredictor(model, (torch.ones(1, 1, 28, 28),))
    assert model.training


def test_an_operator_that_is_missing_is_named_with_its_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Sigmoid()))
    with pytest.raises(xla.UnsupportedOperator, match=r"sigmoid.* in layer 1\.1 has no form"):
        xla.XlaPredictor(model, (torch.ones(1, 4),))


class Bare(nn.Module):
    def forward(self, x):
        return torch.cumsum(x, 1)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (Bare(), (2, 4), "cumsum.*in layer of the model itself"),
        (Transposed(), (2, 3, 8, 8), "convolution.*in layer up "),
        (nn.MaxPool2d(2, ceil_mode=True), (2, 3, 5, 5), "max_pool2d.*True"),
    ],
)
def test_what_has_no_form(model, shape, message):
    with pytest.raises(ValueError, match=message):
        xla.XlaPredictor(model, (torch.ones(shape),))


def test_the_compiled_program_can_be_read(perceptron):
    compiled = perceptron.compiled(images(16))
    assert perceptron.platform == jax.default_backend()
    assert "f32[16,784]" in compiled.as_text()
    flops = compiled.cost_analysis()["flops"]
    assert flops == pytest.approx(2 * 16 * (784 * 300 + 300 * 100 + 100 * 10), rel=0.02)


def test_weights_are_inputs_of_the_program_and_not_constants_in_it(perceptron):
    text = perceptron.stablehlo(images(2))
    assert "tensor<300x784xf32>" in text
    assert len(text) < 20_000
    assert len(perceptron.weights) == 6


def test_the_program_is_lowered_for_a_tpu_that_is_not_here():
    predictor = xla.XlaPredictor(models.pretrained("lenet-5"), (images(1),))
    text = predictor.stablehlo(images(2), platform="tpu")
    assert "stablehlo.convolution" in text
    assert "2x1x28x28xf32" in text
    # Without this a TPU would multiply in bfloat16, and answers would differ.
    assert "HIGHEST" in text


def test_unused_buffers_are_not_sent():
    predictor = xla.XlaPredictor(models.build("resnet-8"), (images(1),))
    assert not any("num_batches_tracked" in name for name in predictor.weights)


def test_jax_is_missing(monkeypatch):
    real = builtins.__import__

    def without_jax(name, *rest, **options):
        if name.split(".")[0] == "jax":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_jax)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[tpu\]"'):
        xla.XlaPredictor(nn.Linear(3, 3), (torch.ones(1, 3),))


def test_outputs_can_be_written_to(perceptron):
    found = perceptron.predict(images(2))
    found += 1
    assert np.isfinite(found.numpy()).all()
