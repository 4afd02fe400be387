import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from workbench import compress, data, training
from workbench.compress.grid import Grid
from workbench.compress.quantization_aware import TrainedGrid


@pytest.fixture(scope="module")
def task() -> data.Task:
    """Which of three random directions is an input closest to?"""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1200, 16, generator=generator)
    y = (x @ torch.randn(16, 3, generator=generator)).argmax(1)
    return data.task(TensorDataset(x[:1000], y[:1000]), TensorDataset(x[1000:], y[1000:]))


@pytest.fixture(scope="module")
def model(task) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3))
    training.fit(model, task, epochs=20, progress=False)
    return model


@pytest.mark.parametrize("bits", [1, 2])
def test_training_repairs_what_rounding_broke(task, model, bits):
    rounded = training.evaluate(compress.quantize_weights(model, bits=bits), task).value
    trained = compress.quantize_aware(model, task, bits=bits, epochs=10, progress=False)
    assert training.evaluate(trained, task).value > rounded + 0.05


def test_the_result_is_stored_in_k_bits(task, model):
    trained = compress.quantize_aware(model, task, bits=2, progress=False)
    assert (compress.coverage(trained).stored_as == "2-bit per channel").all()
    assert trained[0].weight.unique().numel() <= 64 * 3
    assert compress.steps(trained) == ("2-bit per channel weights, trained",)


def test_what_is_stored_is_what_was_trained():
    for bits in (1, 2, 4, 8):
        source = TrainedGrid(torch.randn(5, 12), Grid(bits, "group", group_size=5), axis=0)
        assert torch.allclose(source(), source.rounded()(), atol=1e-6)


def test_gradient_passes_the_rounding():
    source = TrainedGrid(torch.randn(4, 9), Grid(2), axis=0)
    source().sum().backward()
    inside = (source.weight / source.log_scale.exp()).abs() < 1
    assert torch.allclose(source.weight.grad[inside], torch.ones(()))
    assert torch.equal(source.weight.grad[~inside], torch.zeros(int((~inside).sum())))
    assert source.log_scale.grad.abs().sum() > 0


def test_tied_weights_are_trained_as_one(task):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3))
    model[2].weight = model[0].weight
    trained = compress.quantize_aware(model, task, bits=4, progress=False)
    assert trained[0].sources["weight"] is trained[2].sources["weight"]


def test_same_seed_same_codes(task, model):
    first, second = (
        compress.quantize_aware(model, task, bits=2, seed=3, progress=False) for _ in range(2)
    )
    assert torch.equal(first[0].sources["weight"].codes, second[0].sources["weight"].codes)
