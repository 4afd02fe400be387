import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Branching, Tied, two_inputs
from torch import nn

from workbench import compress, models, storage
from workbench.compress.smoothing import ChannelScale, smooth_activations
from workbench.models import MiniLM


class Normed(nn.Module):
    """A layer norm with outlier channels before two linear layers; and one beside a residual."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.norm1, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm2, self.c, self.out = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 4)
        for norm in (self.norm1, self.norm2):
            norm.weight.data[3], norm.bias.data[7] = 60.0, 30.0

    def forward(self, x):
        x = self.norm1(x)
        x = self.norm2(self.a(x) + self.b(x).tanh())
        return self.out(x + self.c(x))


X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))


def distance(model: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    expected = model(x)
    return ((other(x) - expected).abs().max() / expected.abs().max()).item()


@given(seed=st.integers(0, 99), strength=st.floats(0, 1))
def test_outputs_stay(seed, strength):
    model = Normed(seed)
    smooth = smooth_activations(model, [X[:40], X[40:]], strength=strength)
    assert distance(model, smooth, X) < 1e-5


def test_the_norm_divides_where_it_feeds_linear_layers_alone():
    model = Normed()
    smooth = smooth_activations(model, [X])
    assert not torch.equal(smooth.norm1.weight, model.norm1.weight)
    assert torch.equal(smooth.norm2.weight, model.norm2.weight)
    scales = {n: m for n, m in smooth.named_modules() if isinstance(m, ChannelScale)}
    assert list(scales) == ["smooth_norm2", "smooth_add_1"]
    assert (compress.coverage(smooth).reason == "").all()
    # At strength 1/2 what enters is as large as what reads it, channel by channel.
    entering = smooth.norm1(X).detach().abs().amax(0)
    reading = torch.stack([smooth.a.weight, smooth.b.weight]).detach().abs().amax((0, 1))
    torch.testing.assert_close(entering, reading)


def test_strength_0_and_1():
    model = Normed()
    entering = smooth_activations(model, [X], strength=1).norm1(X).abs().amax(0)
    torch.testing.assert_close(entering, torch.ones(16))
    none = smooth_activations(model, [X], strength=0)
    reading = torch.stack([none.a.weight, none.b.weight]).abs().amax((0, 1))
    torch.testing.assert_close(reading, torch.ones(16))


@pytest.mark.parametrize("how", ["static", "dynamic"])
def test_rounding_activations_loses_less_afterwards(how):
    def rounded(model):
        if how == "static":
            return compress.quantize_static(model, [X])
        return compress.quantize_dynamic(model, minimum_weights=0)

    model = Normed()
    smooth = smooth_activations(model, [X])
    before, after = ((rounded(m)(X) - model(X)).square().mean().item() for m in (model, smooth))
    assert after < 0.5 * before


def test_dead_channels_are_kept():
    model, x = nn.Sequential(nn.Linear(16, 4)), X.clone()
    x[:, 2] = 0
    model[0].weight.data[:, 5] = 0
    smooth = smooth_activations(model, [x])
    assert distance(model, smooth, x) < 1e-5
    factor = smooth.get_submodule("smooth_input_1").factor
    assert factor[2] == factor[5] == 1


def test_skip_keeps_those_that_read_the_same():
    model = Normed()
    smooth = smooth_activations(model, [X], skip=["a"])
    assert compress.coverage(smooth).set_index("layer").reason.to_dict() == {
        "a": "in skip", "b": "smoothing has no rule for it", "c": "", "out": "",
    }  # fmt: skip
    assert torch.equal(smooth.b.weight, model.b.weight)


def test_tied_weights_are_left():
    model, inputs = two_inputs()
    smooth = smooth_activations(model, [inputs])
    assert smooth.first.weight is smooth.second.weight
    torch.testing.assert_close(smooth(*inputs), model(*inputs))
    model = Tied().eval()
    smooth = smooth_activations(model, [torch.arange(4).view(2, 2)])
    assert compress.coverage(smooth).set_index("layer").reason["out"] != ""


def test_networks_with_attention():
    model, codes = models.pretrained("char-transformer"), torch.arange(60).view(2, 30)
    smooth = smooth_activations(model, [codes])
    assert distance(model, smooth, codes) < 1e-5
    norm = smooth.get_submodule("blocks.0.norm1")
    assert not torch.equal(norm.weight, model.blocks[0].norm1.weight)
    torch.manual_seed(0)
    model = MiniLM(words=40, context=16, width=24, depth=2, heads=3).eval()
    codes = torch.randint(0, 40, (6, 12))
    assert distance(model, smooth_activations(model, [codes]), codes) < 1e-5


@pytest.mark.parametrize("then", ["nothing", "static", "dynamic", "equalized first"])
def test_the_file_loads_into_the_plain_network(then, tmp_path):
    model = Normed()
    if then == "equalized first":
        model = nn.Sequential(Normed(), nn.Linear(4, 8), nn.ReLU6(), nn.Linear(8, 4))
        small = compress.equalization.equalize_layers(model)
        small = compress.quantize_static(smooth_activations(small, [X]), [X])
    else:
        small = smooth_activations(model, [X])
    if then == "static":
        small = compress.quantize_static(small, [X], correct_bias=True)
    elif then == "dynamic":
        small = compress.quantize_dynamic(small, minimum_weights=0)
    storage.save(small, tmp_path / "small.safetensors", progress=False)
    again = storage.load(tmp_path / "small.safetensors", into=model)
    assert torch.equal(again(X), small(X))
    assert compress.steps(again) == compress.steps(small)


def test_in_a_recipe(blobs):
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3))
    recipe = compress.Recipe(
        compress.recipe.SmoothActivations(strength=0.3), compress.recipe.QuantizeStatic()
    )
    assert compress.Recipe.from_json(recipe.to_json()) == recipe
    small = recipe(model, blobs, progress=False)
    assert compress.steps(small) == ("activations smoothed", "int8 static per channel")


def test_the_callers_model_is_unchanged():
    model = Normed().train()
    before = copy.deepcopy(model.state_dict())
    smooth_activations(model, [X])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training


def test_refusals_say_what_to_do():
    model = Normed()
    refusals = [
        ([X], {"strength": 1.5}, r"strength is 1\.5; give a number from 0 to 1"),
        ([X], {"strength": -1}, "strength is -1; give"),
        ([X], {"skip": ["d"]}, r"skip names \['d'\]"),
        ([], {}, "calibration is empty"),
        ([X * float("inf")], {}, "holds NaN or infinity during calibration"),
    ]
    for calibration, settings, message in refusals:
        with pytest.raises(ValueError, match=message):
            smooth_activations(model, calibration, **settings)
    with pytest.raises(ValueError, match="cannot be traced"):
        smooth_activations(Branching(), [X])
    with pytest.raises(TypeError, match="calibration is one tensor"):
        smooth_activations(model, X)
    with pytest.warns(UserWarning, match="nothing smoothed"):
        smooth_activations(nn.Sequential(nn.Conv1d(1, 1, 1)), [X[:, None]])
