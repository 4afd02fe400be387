import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Branching, Tied, Transposed, Twice, two_inputs
from torch import nn

from workbench import compress, models, storage
from workbench.compress.computed import weight_of
from workbench.compress.grid import Grid
from workbench.compress.quantizers import QuantizedWeight
from workbench.compress.rounding import quantize_gptq, refined_codes, second_moments


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(count: int, values: int, seed: int = 0) -> torch.Tensor:
    return normal(count, values, seed=seed) @ normal(values, values, seed=seed + 1)


def losses(layer: nn.Module, grid: Grid, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of each output channel, (O,), refined and rounded to nearest, measured on the
    outputs themselves."""
    nearest = QuantizedWeight.of(layer.weight.detach(), grid)
    codes = refined_codes(layer.weight.detach(), second_moments(layer, x), nearest)
    refined = QuantizedWeight(codes, nearest.scale, nearest.zero_point, grid, 0)
    found = []
    for source in (refined, nearest):
        other = copy.deepcopy(layer)
        other.weight.data = source()
        error = (other(x) - layer(x)).detach().movedim(1, 0).flatten(1)
        found.append(error.square().sum(1))
    return tuple(found)


GRIDS = st.builds(
    Grid,
    bits=st.integers(1, 5),
    granularity=st.sampled_from(["tensor", "channel", "group"]),
    symmetric=st.booleans(),
    group_size=st.sampled_from([2, 3, 64]),
)
LAYERS = {
    "linear": (lambda: nn.Linear(12, 5), (40, 12)),
    "convolution": (lambda: nn.Conv2d(4, 5, 3, stride=2, padding=1), (3, 4, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (3, 4, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding="same"), (3, 4, 6, 6)),
    "reflecting": (lambda: nn.Conv1d(4, 5, 3, padding=1, padding_mode="reflect"), (3, 4, 9)),
    "three dimensions": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
@given(grid=GRIDS, seed=st.integers(0, 99))
def test_no_channel_loses_more_than_by_rounding_to_nearest(kind, grid, seed):
    make, shape = LAYERS[kind]
    torch.manual_seed(seed)
    refined, nearest = losses(make(), grid, normal(*shape, seed=seed).relu())
    assert (refined <= nearest * (1 + 1e-4) + 1e-8).all()


@pytest.mark.parametrize("kind", LAYERS)
def test_most_channels_lose_far_less(kind):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    x = normal(*shape) + 3  # inputs that go together
    pairs = [losses(make(), Grid(4), x) for _ in range(8)]
    assert sum(refined.sum() for refined, _ in pairs) < 0.5 * sum(near.sum() for _, near in pairs)


def test_the_inputs_are_those_that_the_layer_multiplies():
    for make, shape in LAYERS.values():
        torch.manual_seed(0)
        layer = make()
        layer.bias.data.zero_()
        x = normal(*shape)
        moments = second_moments(layer, x)  # (G, V, V)
        rows = layer.weight.detach().reshape(len(moments), -1, moments.shape[-1])
        energy = torch.einsum("gov,gvw,gow->go", rows, moments, rows).flatten()
        expected = layer(x).detach().movedim(1, 0).flatten(1).square().mean(1)
        torch.testing.assert_close(energy, expected, rtol=1e-4, atol=1e-5)


def test_moments_do_not_depend_on_the_pieces(monkeypatch):
    layer, x = nn.Conv2d(4, 5, 3, padding=1), normal(6, 4, 5, 5)
    whole = second_moments(layer, x)
    monkeypatch.setattr("workbench.compress.rounding._PIECE", 1)
    torch.testing.assert_close(second_moments(layer, x), whole)
    torch.testing.assert_close(second_moments(layer, x[:1]), second_moments(layer, x[0]))


def test_it_is_as_good_as_trying_all_where_that_can_be_done():
    found = []
    for seed in range(30):
        weight, x = normal(1, 3, seed=seed), correlated(50, 3, seed=seed)
        grid, moments = Grid(2), (x.T @ x / 50)[None]
        nearest = QuantizedWeight.of(weight, grid)
        codes = refined_codes(weight, moments, nearest)
        scale = nearest.scale.item()

        def loss(codes, weight=weight, moments=moments, scale=scale):
            error = weight - torch.tensor(codes).view(1, 3) * scale
            return (error @ moments[0] @ error.T).item()

        best = min(map(loss, itertools.product([-1.0, 0.0, 1.0], repeat=3)))
        reached = loss(codes.flatten().tolist())
        assert best * (1 - 1e-4) - 1e-7 <= reached <= loss(nearest.integer_codes().tolist()) + 1e-7
        found.append(reached <= best * 1.001 + 1e-7)
    assert sum(found) >= 24  # of 30; greedily, it cannot always be the best


def test_it_takes_the_steps_of_optimal_brain_quantization():
    """One weight after the other, the inverse of the second moments updated after each."""
    weight, x = normal(4, 10), correlated(60, 10) * torch.logspace(0, 1, 10)
    moments = x.T @ x / 60
    nearest = QuantizedWeight.of(weight, Grid(4))
    damped = moments.double() + 0.01 * moments.diagonal().mean() * torch.eye(10)
    inverse = torch.linalg.inv(damped)
    left, scale, codes = weight.double(), nearest.scale[:, 0].double(), torch.zeros(4, 10)
    for at in moments.diagonal().argsort(descending=True).tolist():
        codes[:, at] = (left[:, at] / scale).round().clamp(-7, 7)
        lost = left[:, at] - codes[:, at] * scale
        left = left - torch.outer(lost, inverse[at]) / inverse[at, at]
        inverse = inverse - torch.outer(inverse[at], inverse[at]) / inverse[at, at]

    def loss(codes):
        error = (weight - codes * nearest.scale).double()
        return torch.einsum("ov,vw,ow->o", error, moments.double(), error)

    plain = nearest.integer_codes()
    expected = torch.where((loss(codes) > loss(plain))[:, None], plain.float(), codes)
    assert torch.equal(refined_codes(weight, moments[None], nearest).float(), expected)
    assert (loss(codes) <= loss(plain)).any()


def test_inputs_that_do_not_go_together_give_rounding_to_nearest():
    weight = normal(6, 8)
    nearest = QuantizedWeight.of(weight, Grid(4))
    codes = refined_codes(weight, torch.diag_embed(torch.rand(1, 8) + 0.1), nearest)
    assert torch.equal(codes, nearest.integer_codes())
    zeros = refined_codes(weight, torch.zeros(1, 8, 8), nearest)
    assert torch.equal(zeros, nearest.integer_codes())


def test_file_scales_and_step_are_those_of_rounding_to_nearest(tmp_path):
    model, x = models.pretrained("lenet-5"), normal(32, 1, 28, 28).abs()
    settings = {"granularity": "group", "group_size": 25, "symmetric": False}
    small = quantize_gptq(model, [x], **settings)
    plain = compress.quantize_weights(model, **settings)
    for name in ("0", "3", "7", "9"):
        ours, theirs = (m.get_submodule(name).sources["weight"] for m in (small, plain))
        assert torch.equal(ours.scale, theirs.scale)
        assert torch.equal(ours.zero_point, theirs.zero_point)
        assert ours.codes.shape == theirs.codes.shape
        assert not torch.equal(ours.codes, theirs.codes)
    assert compress.steps(small) == ("4-bit per group of 25, affine weights, GPTQ",)
    assert (compress.coverage(small).stored_as == "4-bit per group of 25, affine").all()
    storage.save(small, tmp_path / "small.safetensors", progress=False)
    again = storage.load(tmp_path / "small.safetensors", into=models.build("lenet-5"))
    assert torch.equal(again(x), small(x))


@pytest.mark.parametrize("name", ["lenet-5", "resnet-8"])
def test_a_trained_network_answers_nearly_as_before(name):
    model, x = models.pretrained(name), torch.rand(64, 1, 28, 28)
    expected = model(x)
    errors = [
        (m(x) - expected).square().mean().item()
        for m in (
            quantize_gptq(model, [x[:32]], bits=3),
            compress.quantize_weights(model, bits=3),
        )
    ]
    assert errors[0] < 0.5 * errors[1]


def test_later_layers_see_what_rounded_ones_send():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), correlated(64, 8)
    small = quantize_gptq(model, [x], bits=2)
    sent = small[0](x).detach()
    nearest = QuantizedWeight.of(model[1].weight, Grid(2))
    codes = refined_codes(model[1].weight.detach(), second_moments(model[1], sent), nearest)
    assert torch.equal(small[1].sources["weight"].integer_codes(), codes)


def test_what_it_is_not_for_is_rounded_to_nearest():
    model = nn.ModuleDict({
        "embedding": nn.Embedding(9, 8), "lstm": nn.LSTM(8, 8, batch_first=True),
        "out": nn.Linear(8, 4), "unused": nn.Linear(8, 4),
    })  # fmt: skip
    model.forward = lambda codes: model.out(model.lstm(model.embedding(codes))[0])
    small = quantize_gptq(model, [torch.arange(9).view(3, 3)], bits=3)
    plain = compress.quantize_weights(model, bits=3)
    for name in ("embedding", "unused"):
        assert torch.equal(small[name].weight, plain[name].weight)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        assert torch.equal(weight_of(small.lstm, name), weight_of(plain.lstm, name))
    assert (compress.coverage(small).stored_as == "3-bit per channel").all()


@pytest.mark.parametrize("make", [Twice, Transposed], ids=["twice", "transposed"])
def test_modules_called_twice_and_transposed_ones(make):
    torch.manual_seed(0)
    model, x = make().eval(), normal(8, 3, 8, 8)
    small = quantize_gptq(model, [x])
    assert (small(x) - model(x)).square().mean() < 0.1 * model(x).var()
    if make is Twice:  # rounded for what enters at the first call
        nearest = QuantizedWeight.of(model.conv.weight.detach(), Grid(4))
        moments = second_moments(model.conv, small.stem(x).detach())
        codes = refined_codes(model.conv.weight.detach(), moments, nearest)
        assert torch.equal(small.conv.sources["weight"].integer_codes(), codes)


def test_tied_weights_stay_tied():
    model = Tied().eval()
    codes = torch.arange(4).view(2, 2)
    small = quantize_gptq(model, [codes])
    assert small.embedding.sources["weight"] is small.out.sources["weight"]
    model, inputs = two_inputs()
    small = quantize_gptq(model, [inputs])
    assert torch.equal(small.first.weight, small.second.weight)
    assert not torch.equal(small.first.weight, compress.quantize_weights(model).first.weight)


def test_a_model_that_cannot_be_traced():
    torch.manual_seed(0)
    model, x = Branching().eval(), correlated(32, 4)
    small = quantize_gptq(model, [x])
    assert not torch.equal(small.inner.weight, compress.quantize_weights(model).inner.weight)


def test_pruned_weights_stay_zero():
    model, x = nn.Sequential(nn.Linear(16, 8)), correlated(64, 16)
    pruned = compress.prune(model, sparsity=0.5)
    small = quantize_gptq(pruned, [x], bits=6)
    assert torch.equal((small[0].weight == 0) | (pruned[0].weight != 0), torch.ones(8, 16).bool())
    assert not torch.equal(small[0].weight, compress.quantize_weights(pruned, bits=6)[0].weight)


def test_bits_by_layer_and_skip():
    model, x = models.pretrained("lenet-5"), torch.rand(8, 1, 28, 28)
    small = quantize_gptq(model, [x], bits={"0": 8, "7": 3}, skip=["7"])
    table = compress.coverage(small).set_index("layer")
    assert list(table.stored_as) == ["8-bit per channel", "float", "float", "float"]
    assert list(table.reason) == ["", "not named in bits", "in skip", "not named in bits"]


def test_same_examples_same_bytes_and_the_model_is_left():
    model, x = models.pretrained("resnet-8"), torch.rand(8, 1, 28, 28)
    model.train()
    before = copy.deepcopy(model.state_dict())
    first, second = (quantize_gptq(model, [x[:4], x[4:]], samples=6) for _ in range(2))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training
    assert first.training
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert not any(module._forward_pre_hooks for module in first.modules())
    other = quantize_gptq(model, [x[:6]])
    assert torch.equal(other[0].weight, first[0].weight)


def test_a_task_gives_the_examples(blobs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3))
    step = compress.recipe.QuantizeGptq(bits=3, samples=64)
    recipe = compress.Recipe(step)
    assert compress.Recipe.from_json(recipe.to_json()) == recipe
    small = recipe(model, blobs, progress=False)
    assert torch.equal(small[2].weight, quantize_gptq(model, blobs, bits=3, samples=64)[2].weight)


def test_refusals_say_what_to_do():
    model, x = models.build("lenet-5"), torch.rand(2, 1, 28, 28)
    refusals = [
        ([x], {"bits": 9}, "bits is 9; give a whole number from 1 to 8"),
        ([x], {"bits": {"10": 2}}, r"bits names \['10'\]; layers are"),
        ([x], {"granularity": "row"}, "granularity is 'row'"),
        ([x], {"skip": ["10"]}, r"skip names \['10'\]"),
        ([x], {"samples": 0}, "samples is 0; give 1 or more"),
        ([], {}, "calibration is empty"),
        ([x * float("nan")], {}, "what enters 0 holds NaN or infinity"),
    ]
    for calibration, settings, message in refusals:
        with pytest.raises(ValueError, match=message):
            quantize_gptq(model, calibration, **settings)
    with pytest.raises(TypeError, match="calibration is one tensor"):
        quantize_gptq(model, x)
    with pytest.raises(TypeError, match="model is a str"):
        quantize_gptq("model", [x])
