import copy
import os

import pytest
import torch
from torch import nn
from torch.ao.quantization import FakeQuantize
from torch.nn.utils import parametrizations, prune

from workbench import compress, data, deploy, explore, models
from workbench.compress.computed import MaskedWeight
from workbench.compress.layers import layers_of, replace_weights


def network(width: int = 64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 3)).eval()


X = torch.zeros(1, 16)


def causes(*args, **keywords) -> dict[str, explore.diagnosis.Finding]:
    found = {finding.cause: finding for finding in explore.doctor(*args, **keywords)}
    assert all(f.evidence and f.advice and not f.advice.endswith(".") for f in found.values())
    return found


def test_nothing_wrong_says_what_was_measured():
    found = explore.doctor(network(), network(8))
    assert len(found) == 0
    assert repr(found) == (
        "Stored in 5,404 bytes before and 916 after; speed was not measured, for there was no "
        "example_input.\nNothing wrong was found."
    )
    assert "Nothing wrong was found." in found._repr_html_()


def test_plain_zeros():
    after = network()
    with torch.no_grad():
        after[0].weight[:32] = 0
    found = causes(network(), after)["Zeros are stored and multiplied like any other number"]
    assert found.evidence == (
        "42.1% of the weights are zero, and take 2,048 of 5,404 bytes; without them 3,356 and "
        "their places would be left"
    )


def test_masked_zeros():
    after = network()
    replace_weights(layers_of(after), lambda p: MaskedWeight(p.dense, p.dense > 0))
    assert "Zeros are stored and multiplied like any other number" in causes(network(), after)


def test_few_zeros_are_no_finding():
    after = network()
    with torch.no_grad():
        after[0].weight[0] = 0
    assert not causes(network(), after)


def test_int8_without_kernels():
    after = compress.quantize_static(network(), [X])
    found = causes(network(), after)
    assert list(found) == ["int8 is only imitated in this runtime"]
    assert "0 int8 kernels in eager" in found.popitem()[1].evidence


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
def test_4_bits_have_no_kernel_anywhere(runtime):
    after = compress.quantize_weights(network(), bits=4)
    found = causes(network(), (after, runtime), X)["No kernel computes with weights of this form"]
    assert found.evidence == (
        f"4-bit per channel weights become float in {runtime} before each product"
    )


def test_fake_quantization():
    after = nn.Sequential(FakeQuantize(), *network())
    assert "1 modules" in causes(network(), after)["Fake quantization was left in place"].evidence


def test_rounded_weights_in_float():
    after = network()
    with torch.no_grad():
        after[0].weight.mul_(20).round_().clamp_(-1, 1)
        after[0].weight[after[0].weight == 0] = 2  # not pruned
    found = causes(network(), after)["Rounded weights are stored as float"]
    assert found.evidence == (
        "1 weights hold 3 distinct values on average, in 4,096 bytes; packed codes would take 268"
    )


@pytest.mark.parametrize("used", [False, True])
def test_masks_of_torch(used):
    after = network()
    prune.l1_unstructured(after[0], "weight", 0.5)
    if used:
        after(X)
    weight = after[0].weight
    found = causes(network(), after, X)["torch.nn.utils.prune keeps mask and original"]
    assert found.evidence.startswith("1 masks add 4,096 bytes to the file")
    assert after[0].weight is weight
    prune.remove(after[0], "weight")
    assert "torch.nn.utils.prune keeps mask and original" not in causes(network(), after)


def test_parametrizations():
    after = network()
    parametrizations.weight_norm(after[0])
    found = causes(network(), after)["Parametrizations were left in place"]
    assert "1 layers" in found.evidence
    assert f"{4 * (64 + 64 * 16):,} stored bytes" in found.evidence


def test_layers_left_are_named_with_their_share():
    after = compress.quantize_weights(network(), skip=["0"])
    found = causes(network(), after)["The technique left layers as they were"]
    assert found.evidence == "84.2% of the weights are in 0 (84.2%: in skip)"


def test_float64():
    found = causes(network(), network().double())["Weights are stored in float64"]
    assert found.evidence == "4 tensors take 10,264 bytes; float32 would take 5,132"


def test_tied_weights_untied():
    before = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before[1].weight = before[0].weight
    after = copy.deepcopy(before)
    after[1].weight = nn.Parameter(before[0].weight.detach().clone())
    cause = "The same tensor is stored more than once"
    assert causes(before, after)[cause].evidence == "0.weight = 1.weight: 256 bytes too many"
    assert cause not in causes(after, before)


def test_buffers():
    after = network()
    after.register_buffer("table", torch.randn(1000))
    found = causes(network(), after)["Buffers are a large part of the file"]
    assert found.evidence.startswith("1 buffers take 4,000 of 9,")
    assert found.evidence.endswith("the largest is table")


def test_the_codes_of_a_quantized_weight_are_no_buffers():
    after = compress.quantize_weights(network(), bits=8)
    assert "Buffers are a large part of the file" not in causes(network(), after)


class Slow(nn.Sequential):
    """Does more than the same layers alone, without a product more, so that it is never faster."""

    def forward(self, x):
        torch.rand(200_000).sort()
        return super().forward(x)


def test_weights_that_are_read_for_a_few_products():
    before = nn.Sequential(nn.Linear(600, 600), nn.Linear(600, 600))
    x = torch.zeros(1, 600)
    cause = "Reading the weights takes longer than computing with them"
    found = causes(before, Slow(*before), x, repeats=10)[cause]
    assert found.evidence == (
        "720,000 multiply-accumulates for 2,880,000 bytes of weights, 0.25 for each byte, at batch "
        "size 1"
    )
    assert cause not in causes(before, Slow(*before), x, repeats=10, batch_size=16)


def test_weights_that_each_call_makes_anew():
    after = compress.share_weights(Slow(*network()), clusters=4)
    cause = "Each call makes the weights anew"
    found = causes(network(), after, X, repeats=10)[cause]
    assert found.evidence.startswith("2 weights, 4,864 bytes, are computed from codes")
    assert cause not in causes(network(), Slow(*network()), X, repeats=10)
    masked = Slow(*network())  # masks serve training; answers do without them
    replace_weights(layers_of(masked), lambda p: MaskedWeight(p.dense, p.dense > -1))
    assert cause not in causes(network(), masked, X, repeats=10)


def test_equal_tensors_of_little_weight_are_no_finding():
    after = network()
    after.register_parameter("first", nn.Parameter(torch.arange(4.0)))
    after.register_parameter("second", nn.Parameter(torch.arange(4.0)))
    assert not causes(network(), after)


def test_a_small_model_is_mostly_overhead():
    found = causes(network(), Slow(*network()), X, threads=1, repeats=10)
    assert "for a batch of 1" in found["Most of a call is not arithmetic"].evidence


def test_what_is_faster_is_not_called_slow():
    found = explore.doctor(Slow(*network()), network(), X, threads=1)
    assert len(found) == 0
    assert found.measured.endswith("times faster.")


def test_small_int8_layers():
    after = compress.quantize_static(network(), [X])
    before = deploy.prepare(network(), "onnxruntime", example_input=(X,))
    # One session for both: neither is faster.
    after = deploy.prepare(after, "onnxruntime", example_input=(X,))
    before.session = after.session
    found = causes(before, after, X, threads=1)
    assert "int8 is only imitated in this runtime" not in found
    small = found["Layers are too small for int8 to pay"]
    assert small.evidence.startswith("2 int8 layers have fewer than 4,096 weights: 0, 2; ")


def test_more_threads_than_cores():
    cores = len(os.sched_getaffinity(0))
    found = causes(network(), network(), threads=cores + 1)["More threads than cores"]
    assert found.evidence == f"{cores + 1} threads share {cores} cores"
    assert "More threads than cores" not in causes(network(), network(), threads=cores)


def test_runtimes_with_different_threads():
    after = deploy.prepare(network(), "onnxruntime", example_input=(X,), threads=2)
    cause = "The runtimes have different numbers of threads"
    assert causes(network(), after, threads=1)[cause].evidence == (
        "2 in onnxruntime (after), 1 in PyTorch"
    )
    assert cause not in causes(network(), after, threads=2)


def test_a_task_gives_the_example():
    x, y = torch.randn(20, 16), torch.zeros(20).long()
    task = data.task((x, y), (x, y), (x, y))
    found = explore.doctor(network(), network(), task, batch_size=3, threads=1, repeats=10)
    assert "one call on a batch of 3 with 1 threads" in found.measured


def test_reference_networks_are_not_ill():
    for name in ("resnet-8", "char-transformer", "lenet-5"):
        assert not causes(models.build(name), models.build(name))


def test_the_table_holds_all_three_columns():
    found = explore.doctor(network(), network().double())
    html = found._repr_html_()
    for text in ("cause", "evidence", "advice", "stored in float64", "model.float()"):
        assert text in html
    assert "- Weights are stored in float64: " in repr(found)


def test_models_are_left_as_they_were():
    before, after = network().train(), network()
    state = copy.deepcopy(after.state_dict())
    explore.doctor(before, after, X, repeats=10)
    assert before.training
    assert not after.training
    torch.testing.assert_close(after.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("after", "keywords", "error", "message"),
    [
        (network(), {"batch_size": 0}, ValueError, "batch_size is 0; give 1 or more"),
        (network(), {"threads": 0}, ValueError, "threads is 0; give 1 or more"),
        (network(), {"repeats": 9}, ValueError, "repeats is 9; give 10 or more"),
        ((network(), "onnxruntime"), {}, ValueError, "after is to run in onnxruntime; give exampl"),
        (len, {}, TypeError, "after is a builtin_function_or_method, which cannot be looked into"),
        (nn.Linear(5, 5), {"example_input": X}, ValueError, "after cannot be run on the example"),
    ],
)
def test_messages(after, keywords, error, message):
    with pytest.raises(error, match=message):
        explore.doctor(network(), after, **keywords)
