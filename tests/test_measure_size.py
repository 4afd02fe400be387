"""Counts against closed forms, sizes against the file, memory against a known allocation."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_model, save_model
from torch import nn

from workbench import models, storage
from workbench.deploy.runtimes import Predictor, prepare
from workbench.measure import size


def eager(model):
    return prepare(model, example_input=())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, codes):
        return self.head(self.embedding(codes))


def test_bytes_are_those_of_the_file(tmp_path):
    model = models.build("lenet-300-100")
    save_model(model, str(tmp_path / "m.safetensors"))
    expected = (tmp_path / "m.safetensors").stat().st_size
    assert size.artifact_bytes(model) == size.artifact_bytes(eager(model)) == expected
    load_model(models.build("lenet-300-100", seed=1), tmp_path / "m.safetensors")


def test_bytes_count_every_file_that_is_written():
    class TwoFiles(Predictor):
        def save(self, path):
            path.write_bytes(b"graph")
            path.with_name("weights.data").write_bytes(b"weights")

    assert size.artifact_bytes(TwoFiles()) == 12


def test_tied_weights_are_stored_and_counted_once():
    model = Tied()
    assert size.parameters(model) == 50 * 8
    assert 50 * 8 * 4 < size.artifact_bytes(model) < 50 * 8 * 4 + 500


def test_non_contiguous_weights_are_saved():
    layer = nn.Linear(30, 20, bias=False)
    layer.weight = nn.Parameter(torch.randn(30, 20).t())
    assert size.artifact_bytes(layer) >= 30 * 20 * 4
    assert not layer.weight.is_contiguous()


def test_a_callable_has_no_bytes():
    for codec in (None, "huffman"):
        with pytest.raises(TypeError, match="function has no size"):
            size.artifact_bytes(lambda x: x, codec=codec)


def test_coded_bytes_are_those_of_the_coded_file(tmp_path):
    model = models.build("lenet-300-100")
    account = storage.save(model, tmp_path / "m.safetensors", codec="huffman", progress=False)
    assert account.size_bytes == (tmp_path / "m.safetensors").stat().st_size
    assert size.artifact_bytes(model, codec="huffman") == account.size_bytes
    assert size.artifact_bytes(eager(model), codec="huffman") == account.size_bytes
    assert account.size_bytes < size.artifact_bytes(model)


def test_only_safetensors_files_are_coded():
    class Other(Predictor):
        suffix, runtime, model = ".onnx", "onnxruntime", nn.Linear(2, 2)

    with pytest.raises(ValueError, match="codec is 'auto', but a onnxruntime artifact"):
        size.artifact_bytes(Other(), codec="auto")
    with pytest.raises(ValueError, match="codec is 'zip'; choose"):
        size.artifact_bytes(nn.Linear(2, 2), codec="zip")


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -2.0]), min_size=1, max_size=30))
def test_density_and_sparsity_count_zeros(values):
    layer = nn.Linear(len(values), 1, bias=False)
    layer.weight.data = torch.tensor([values])
    zeros = sum(value == 0 for value in values)
    assert size.nonzeros(layer) == len(values) - zeros
    assert size.sparsity(layer) == pytest.approx(zeros / len(values))
    assert size.density(layer) + size.sparsity(layer) == 1


def test_no_parameters_no_density():
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        size.density(nn.ReLU())


def test_compression_ratio():
    assert size.compression_ratio(400, 100) == 4
    with pytest.raises(ValueError, match="400 and 0 bytes"):
        size.compression_ratio(400, 0)


def test_macs_of_a_network_worked_by_hand():
    convolutions = 20 * 25 * 24 * 24 + 50 * 20 * 25 * 8 * 8
    linear = 800 * 500 + 500 * 10
    assert size.macs(models.build("lenet-5"), torch.rand(1, 1, 28, 28)) == convolutions + linear


def test_macs_are_for_one_example_whatever_the_batch():
    model = models.build("lenet-5")
    one, many = torch.rand(1, 1, 28, 28), torch.rand(7, 1, 28, 28)
    assert size.macs(model, one) == size.macs(model, (many,))


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)]),
    st.integers(1, 3),
    st.booleans(),
    st.integers(1, 5),
    st.booleans(),
)
def test_macs_of_recurrent_layers(kind, layers, both_ways, positions, batch_first):
    cls, gates = kind
    inputs, hidden, directions = 6, 5, 1 + both_ways
    model = cls(inputs, hidden, layers, bidirectional=both_ways, batch_first=batch_first)
    # A leading batch of 1 in both layouts, so that the first "example" is the whole sequence.
    x = torch.rand(1, positions, inputs) if batch_first else torch.rand(1, 1, inputs)
    steps = positions if batch_first else 1
    expected = 0
    for layer in range(layers):
        width = inputs if layer == 0 else hidden * directions
        expected += directions * gates * hidden * (width + hidden)
    assert size.macs(model, x) == steps * expected


def test_macs_of_attention_do_not_depend_on_the_kernel():
    q = torch.rand(1, 2, 5, 8)

    class Fused(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q)

    assert size.macs(Fused(), q) == 2 * (2 * 5 * 5 * 8)

    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    linear = 5 * (16 * 48 + 16 * 16 + 2 * 16 * 32)
    assert size.macs(layer, torch.rand(1, 5, 16)) == linear + 2 * 5 * 5 * 16
    assert torch.backends.mha.get_fastpath_enabled()


def test_counting_leaves_the_model_alone():
    model = models.build("resnet-8").train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    size.macs(model, torch.rand(1, 1, 28, 28))
    size.artifact_bytes(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_peak_memory_of_known_allocations():
    class Chain(nn.Module):
        def forward(self, x):
            first = x + 1  # 4 kB
            second = torch.cat([first, first])  # 8 kB while the first is still held
            del first
            return second.sum()

    peak_bytes = size.peak_memory_bytes(eager(Chain()), torch.zeros(1000))
    assert 12_000 <= peak_bytes < 12_000 + 100


def test_measuring_memory_writes_nothing_to_stderr(capfd):
    size.peak_memory_bytes(eager(nn.ReLU()), torch.zeros(10))
    assert capfd.readouterr().err == ""


def test_memory_outside_torch_is_unknown():
    predictor = eager(nn.ReLU())
    predictor.runtime = "onnxruntime"
    assert math.isnan(size.peak_memory_bytes(predictor, torch.zeros(10)))
