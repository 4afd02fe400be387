import copy

import pytest
import torch
from networks import Branching, Tied, Transposed, Twice, two_inputs
from torch import nn

from workbench import compress, models, storage
from workbench.compress.bias_correction import correct_bias


def depthwise() -> nn.Sequential:
    """Depthwise and pointwise convolutions, with batch norms that have statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 12, 3, groups=12), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    model(IMAGES)
    return model.eval()


IMAGES = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def channel_means(model: nn.Module, name: str, *inputs: torch.Tensor) -> torch.Tensor:
    """The mean of each channel that a layer sends, by a hook of our own."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        model(*inputs)
    handle.remove()
    channel = 1 if seen[0].dim() == 4 else -1
    return seen[0].movedim(channel, 0).flatten(1).mean(1)


def test_the_mean_of_each_channel_comes_back():
    model = depthwise()
    small = compress.quantize_weights(model, bits=3)
    right = correct_bias(small, model, [IMAGES])
    for name in ("0", "3", "6", "10"):
        expected = channel_means(model, name, IMAGES)
        assert (channel_means(small, name, IMAGES) - expected).abs().max() > 1e-3
        torch.testing.assert_close(channel_means(right, name, IMAGES), expected)
        weights = [m.get_submodule(name).sources["weight"].codes for m in (small, right)]
        assert torch.equal(*weights)
    before, after = ((m(IMAGES) - model(IMAGES)).square().mean() for m in (small, right))
    assert after < 0.5 * before
    assert compress.steps(right) == ("3-bit per channel weights", "biases corrected")


def test_one_linear_layer_by_hand():
    model = nn.Sequential(nn.Linear(2, 1))
    model[0].weight.data, model[0].bias.data = torch.tensor([[7.0, 0.4]]), torch.tensor([1.0])
    small = compress.quantize_weights(model, bits=4)  # scale 1: 0.4 is rounded to 0
    right = correct_bias(small, model, [torch.tensor([[1.0, 2.0], [3.0, 4.0]])])
    torch.testing.assert_close(right[0].bias, torch.tensor([1 + 0.4 * 3]))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_static_quantization_corrects_its_own(granularity):
    model = depthwise()
    plain, right = (
        compress.quantize_static(model, [IMAGES], granularity=granularity, correct_bias=correct)
        for correct in (False, True)
    )
    for name in ("0", "3", "6", "10"):  # the teacher's convolutions are not yet normalised
        norm = {"0": "1", "3": "4"}.get(name, name)
        expected = channel_means(model, norm, IMAGES)
        torch.testing.assert_close(channel_means(right, name, IMAGES), expected)
    again = correct_bias(plain, model, [IMAGES])
    for ours, theirs in zip(right.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert compress.steps(right) == (f"int8 static per {granularity}, biases corrected",)
    assert (compress.coverage(again).activations == "uint8 static").all()


def test_examples_that_can_be_read_once():
    model = depthwise()
    once, again = (
        compress.quantize_static(model, batches, correct_bias=True)
        for batches in (iter([IMAGES[:32], IMAGES[32:]]), [IMAGES[:32], IMAGES[32:]])
    )
    assert torch.equal(once(IMAGES), again(IMAGES))


def test_the_file_loads_into_the_plain_network(tmp_path):
    small = compress.quantize_static(depthwise(), [IMAGES], correct_bias=True)
    storage.save(small, tmp_path / "small.safetensors", progress=False)
    again = storage.load(tmp_path / "small.safetensors", into=depthwise())
    assert torch.equal(again(IMAGES), small(IMAGES))


@pytest.mark.parametrize("make", [Twice, Transposed], ids=["twice", "transposed"])
def test_modules_called_twice_and_transposed_ones(make):
    torch.manual_seed(0)
    model = make().eval()
    right = correct_bias(compress.quantize_weights(model, bits=3), model, [IMAGES])
    name = "out" if make is Twice else "up"
    expected = channel_means(model, name, IMAGES)
    torch.testing.assert_close(channel_means(right, name, IMAGES), expected)


def test_two_inputs_and_one_that_cannot_be_traced():
    model, inputs = two_inputs()
    right = correct_bias(compress.quantize_weights(model, bits=3), model, [inputs])
    expected = channel_means(model, "out", *inputs)
    torch.testing.assert_close(channel_means(right, "out", *inputs), expected)
    torch.manual_seed(0)
    model, x = Branching().eval(), torch.rand(16, 4)
    right = correct_bias(compress.quantize_weights(model, bits=2), model, [x])
    torch.testing.assert_close(right(x).mean(0), model(x).mean(0))


def test_layers_without_a_bias_are_left():
    model = Tied().eval()
    right = correct_bias(compress.quantize_weights(model), model, [torch.arange(4).view(2, 2)])
    left = compress.coverage(right).set_index("layer").reason
    assert left.to_dict() == {
        "embedding": "has no bias to correct", "middle": "", "out": "has no bias to correct",
    }  # fmt: skip
    bare = nn.Sequential(nn.Linear(4, 4, bias=False))
    with pytest.warns(UserWarning, match="nothing corrected"):
        correct_bias(compress.quantize_weights(bare), bare, [torch.rand(2, 4)])


def test_nothing_is_to_correct_where_nothing_was_rounded():
    model = depthwise()
    same = correct_bias(model, model, [IMAGES])
    torch.testing.assert_close(same.state_dict(), model.state_dict())


def test_samples_are_the_first_ones_and_a_task_gives_them(blobs):
    model = depthwise()
    small = compress.quantize_weights(model, bits=3)
    few = correct_bias(small, model, [IMAGES[:20], IMAGES[20:]], samples=24)
    expected = correct_bias(small, model, [IMAGES[:24]])
    torch.testing.assert_close(few.state_dict(), expected.state_dict())
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3))
    small = compress.quantize_weights(model, bits=2)
    first, second = (correct_bias(small, model, blobs, samples=32, seed=s) for s in (0, 0))
    assert torch.equal(first[0].bias, second[0].bias)
    step = compress.recipe.QuantizeStatic(correct_bias=True)
    assert "correct_bias=True" in repr(step)
    compress.Recipe(step)(model, blobs, progress=False)


def test_the_callers_models_are_unchanged():
    model = depthwise().train()
    small = compress.quantize_weights(model, bits=3)
    before = copy.deepcopy((model.state_dict(), small.state_dict()))
    right = correct_bias(small, model, [IMAGES])
    torch.testing.assert_close((model.state_dict(), small.state_dict()), before, rtol=0, atol=0)
    assert model.training
    assert right.training
    assert not any(module._forward_hooks for module in right.modules())


def test_refusals_say_what_to_do():
    model = models.build("lenet-5")
    x = torch.rand(2, 1, 28, 28)
    with pytest.raises(ValueError, match="teacher has no layer '3' with a bias"):
        correct_bias(model, nn.Sequential(model[0]), [x])
    with pytest.raises(ValueError, match="calibration is empty"):
        correct_bias(model, model, [])
    with pytest.raises(ValueError, match="samples is 0; give 1 or more"):
        correct_bias(model, model, [x], samples=0)
    with pytest.raises(TypeError, match="model is a str"):
        correct_bias("model", model, [x])
