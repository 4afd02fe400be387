import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import Branching, Tied, Transposed, Twice, two_inputs
from torch import nn

from workbench import compress, models, storage
from workbench.compress.equalization import ChannelClip, equalize_layers


def uneven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Channels of very different sizes, and statistics in the batch norms."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            sizes = 10 ** (torch.rand(len(module.weight), generator=generator) * 3 - 2)
            module.weight.data *= sizes.view(-1, *[1] * (module.weight.dim() - 1))
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.1, 4, generator=generator)
    return model.eval()


def inverted_residual() -> nn.Module:
    """Pointwise, depthwise and pointwise, with clips at 6, as in networks for phones."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(), nn.ZeroPad2d(1),
        nn.Conv2d(12, 12, 3, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6(),
        nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 6), nn.ReLU6(), nn.Dropout(), nn.Linear(6, 4),
    )  # fmt: skip


def close(ours: nn.Module, theirs: nn.Module, *inputs: torch.Tensor) -> bool:
    expected = theirs(*inputs)
    return ((ours(*inputs) - expected).abs().max() / expected.abs().max()).item() < 1e-5


IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 4


@given(seed=st.integers(0, 999))
def test_outputs_stay_and_both_sides_become_equally_large(seed):
    torch.manual_seed(seed)
    model = uneven(inverted_residual(), seed)
    even = equalize_layers(model, iterations=100)
    assert close(even, model, IMAGES)
    layers = [even.get_submodule(name) for name in ("0", "4", "7", "11", "14")]
    made = [layer.weight.detach().flatten(1).abs().amax(1) for layer in layers]
    read = [
        layers[1].weight.detach().abs().amax((1, 2, 3)),
        layers[2].weight.detach().abs().amax((0, 2, 3)),
        layers[3].weight.detach().view(6, 8, 4).abs().amax((0, 2)),
        layers[4].weight.detach().abs().amax(0),
    ]
    for before, after in zip(made, read, strict=False):
        torch.testing.assert_close(before, after, rtol=0.01, atol=0)


def test_one_pair_by_hand():
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([[4.0], [1.0]])
    model[0].bias.data = torch.tensor([2.0, 2.0])
    model[2].weight.data = torch.tensor([[1.0, 9.0]])
    even = equalize_layers(model)
    torch.testing.assert_close(even.get_submodule("0").weight, torch.tensor([[2.0], [3.0]]))
    torch.testing.assert_close(even.get_submodule("0").bias, torch.tensor([1.0, 6.0]))
    torch.testing.assert_close(even.get_submodule("2").weight, torch.tensor([[2.0, 3.0]]))


def test_one_scale_for_a_tensor_is_enough_afterwards():
    torch.manual_seed(0)
    model = uneven(inverted_residual())
    even = equalize_layers(model)
    expected = model(IMAGES)
    errors = [
        (compress.quantize_weights(m, bits=8, granularity="tensor")(IMAGES) - expected).norm()
        for m in (model, even)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_a_clip_at_6_becomes_one_for_each_channel():
    torch.manual_seed(0)
    model = uneven(inverted_residual())
    even = equalize_layers(model)
    clips = [module for module in even.modules() if isinstance(module, ChannelClip)]
    assert [tuple(clip.high.shape) for clip in clips] == [(12, 1, 1), (12, 1, 1), (6,)]
    assert not any(isinstance(module, nn.ReLU6) for module in even.modules())
    assert not torch.allclose(clips[0].high, torch.tensor(6.0))
    x = torch.linspace(-9, 9, 24).view(2, 12, 1, 1)
    torch.testing.assert_close(ChannelClip(torch.full((12, 1, 1), 6.0))(x), F.relu6(x))


def test_the_clip_and_its_layer_are_rounded_once():
    torch.manual_seed(0)
    small = compress.quantize_static(equalize_layers(uneven(inverted_residual())), [IMAGES])
    rounded = [name for name, _ in small.named_children() if name.startswith("round_")]
    after = ["input_1", "clip__2", "clip__6", "_7", "_9", "clip__12"]  # pooling rounds anew
    assert rounded == [f"round_{name}" for name in after]


class Shared(nn.Module):
    """What a layer sends goes to two others."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.a(x).relu()
        return self.c(self.b(x).relu() + x)


def test_what_has_other_readers_is_left():
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="nothing equalized"):
        even = equalize_layers(Shared())
    x = torch.randn(5, 4)
    assert compress.steps(even) == ("layers equalized: nothing equalized",)
    reason = "no layer that reads it alone could be rescaled with it"
    assert set(compress.coverage(even).reason) == {reason}
    assert close(even, even, x)


@pytest.mark.parametrize(
    ("between", "inner"),
    [
        (nn.GELU(), 0), (nn.Sigmoid(), 0), (nn.Flatten(0), 0), (nn.Softmax(-1), 0),
        (nn.MaxPool1d(1), 0), (nn.LayerNorm(6), 0), (nn.Flatten(2), 1), (nn.MaxPool2d(1), 1),
        (nn.Hardtanh(), 1), (nn.AvgPool2d(1), 3),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_pass_a_factor_on_is_left(between, inner):
    kinds = {0: nn.Linear, 1: lambda i, o: nn.Conv1d(i, o, 1), 3: lambda i, o: nn.Conv3d(i, o, 1)}
    make = kinds[inner]
    with pytest.warns(UserWarning, match="nothing equalized"):
        equalize_layers(nn.Sequential(make(4, 6), between, make(6, 4)))


def test_layers_of_other_dimensions_are_no_pair():
    for layers in ([nn.Linear(4, 6), nn.Conv1d(6, 2, 1)], [nn.Conv1d(4, 6, 1), nn.Linear(6, 2)]):
        with pytest.warns(UserWarning, match="nothing equalized"):
            equalize_layers(nn.Sequential(*layers))


class Functional(nn.Module):
    """The same operations as functions and methods."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
        self.c, self.d = nn.Linear(32, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu6(input=self.a(x))
        x = F.adaptive_avg_pool2d(self.b(x).relu(), 2)
        return self.d(F.leaky_relu(self.c(x.flatten(1))))


def test_functions_and_groups():
    torch.manual_seed(0)
    model = uneven(Functional())
    even = equalize_layers(model)
    assert close(even, model, IMAGES)
    assert (compress.coverage(even).reason == "").all()
    assert sum(isinstance(module, ChannelClip) for module in even.modules()) == 1


@pytest.mark.filterwarnings("ignore:layers equalized")
@pytest.mark.parametrize("make", [Twice, Transposed], ids=["twice", "transposed"])
def test_modules_called_twice_and_transposed_ones_are_left(make):
    torch.manual_seed(0)
    model = uneven(make())
    even = equalize_layers(model)
    assert close(even, model, IMAGES)
    left = compress.coverage(even).set_index("layer").reason
    assert left["conv" if make is Twice else "up"] != ""


def test_tied_weights_are_left():
    model = Tied().eval()
    with pytest.warns(UserWarning, match="nothing equalized"):
        equalize_layers(model)
    model, inputs = two_inputs()
    with pytest.warns(UserWarning, match="nothing equalized"):
        even = equalize_layers(model)
    assert close(even, model, *inputs)
    assert even.first.weight is even.second.weight
    assert compress.coverage(even).set_index("layer").reason["first"] != ""


def test_dead_channels_are_kept():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1))
    model[0].weight.data[1] = 0
    model[2].weight.data[:, 2] = 0
    even = equalize_layers(model)
    assert close(even, model, IMAGES)
    assert torch.isfinite(even.get_submodule("clip__1").high).all()


@pytest.mark.parametrize("name", ["lenet-5", "resnet-8", "resnet-14"])
def test_reference_networks(name):
    model, x = models.pretrained(name), torch.rand(8, 1, 28, 28)
    even = equalize_layers(model.to(memory_format=torch.channels_last))
    assert close(even, model, x)
    assert (compress.coverage(even).reason == "").any()


def test_skip_and_steps():
    model = models.pretrained("lenet-5")
    even = equalize_layers(model, skip=["3"])
    assert compress.coverage(even).set_index("layer").reason.to_dict() == {
        "0": "no layer that reads it alone could be rescaled with it", "3": "in skip",
        "7": "", "9": "",
    }  # fmt: skip
    assert compress.steps(even) == ("layers equalized",)
    assert torch.equal(even.get_submodule("3").weight, model[3].weight)


@pytest.mark.parametrize("then", ["nothing", "static", "weights"])
def test_the_file_loads_into_the_plain_network(then, tmp_path):
    torch.manual_seed(0)
    small = equalize_layers(uneven(inverted_residual()))
    if then == "static":
        small = compress.quantize_static(small, [IMAGES], granularity="tensor", correct_bias=True)
    elif then == "weights":
        small = compress.quantize_weights(small)
    storage.save(small, tmp_path / "small.safetensors", progress=False)
    again = storage.load(tmp_path / "small.safetensors", into=inverted_residual())
    assert torch.equal(again(IMAGES), small(IMAGES))
    assert compress.steps(again) == compress.steps(small)


def test_in_a_recipe(blobs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU6(), nn.Linear(16, 3))
    recipe = compress.Recipe(
        compress.recipe.EqualizeLayers(), compress.recipe.QuantizeStatic(granularity="tensor")
    )
    assert compress.Recipe.from_json(recipe.to_json()) == recipe
    small = recipe(model, blobs, progress=False)
    assert compress.steps(small) == ("layers equalized", "int8 static per tensor")


def test_what_is_quantized_becomes_dense_again():
    model = compress.quantize_weights(models.pretrained("lenet-5"), bits=4)
    even = equalize_layers(model)
    assert close(even, model, torch.rand(4, 1, 28, 28))
    assert (compress.coverage(even).stored_as == "float").all()


def test_the_callers_model_is_unchanged():
    model = uneven(inverted_residual()).train()
    before = copy.deepcopy(model.state_dict())
    equalize_layers(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training


def test_refusals_say_what_to_do():
    model = models.build("lenet-5")
    refusals = [
        ({"iterations": 0}, "iterations is 0; give a whole number from 1"),
        ({"iterations": 1.5}, r"iterations is 1\.5; give"),
        ({"skip": ["10"]}, r"skip names \['10'\]"),
    ]
    for settings, message in refusals:
        with pytest.raises(ValueError, match=message):
            equalize_layers(model, **settings)
    with pytest.raises(ValueError, match="cannot be traced"):
        equalize_layers(Branching())
    with pytest.raises(ValueError, match="nothing to equalize"):
        equalize_layers(nn.ReLU())
    model[0].weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"weight 0\.weight holds NaN"):
        equalize_layers(model)
    with pytest.raises(TypeError, match="model is a str"):
        equalize_layers("model")
