import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import two_inputs
from torch import nn

from workbench import compress, data, measure, models, storage, training
from workbench.compress import low_rank
from workbench.compress.low_rank import factorize
from workbench.compress.weight_sharing import share_weights


def seeded(make, *args, **settings) -> nn.Module:
    torch.manual_seed(0)
    return make(*args, **settings)


def rebuilt(product: nn.Sequential) -> torch.Tensor:
    """The dense weight, (O, I, P), that a product of thin layers stands for."""
    dense = None
    for layer in product:
        weight = layer.weight.detach().double()
        weight = weight.flatten(2) if weight.dim() > 2 else weight[..., None]  # (O, I, P)
        # At most one of them has a kernel: the others have P = 1.
        dense = weight if dense is None else torch.einsum("omp,miq->oipq", weight, dense).flatten(2)
    return dense


def inexact(layer: nn.Module, product: nn.Sequential) -> float:
    """The share of the weight's energy that is lost."""
    weight = layer.weight.detach().double()
    dense = rebuilt(product).reshape(weight.shape)
    return ((dense - weight).square().sum() / weight.square().sum()).item()


def of_low_rank(layer: nn.Module, rank: int) -> nn.Module:
    """Give the layer a weight of this rank in both outputs and inputs."""
    weight = layer.weight.data
    outputs, inputs = weight.shape[:2]
    core = torch.randn(rank, rank, *weight.shape[2:])
    left, right = torch.randn(outputs, rank) / rank, torch.randn(inputs, rank) / rank
    layer.weight.data = torch.einsum("or,rs...,is->oi...", left, core, right).contiguous()
    return layer


LAYERS = [
    (nn.Linear(24, 30), (5, 3, 24)),
    (nn.Linear(30, 24, bias=False), (5, 30)),
    (nn.Conv1d(16, 20, 3, stride=2, padding=1), (2, 16, 9)),
    (nn.Conv2d(16, 20, (3, 5), padding=(1, 2), dilation=(2, 1)), (2, 16, 9, 8)),
    (nn.Conv2d(16, 20, 3, padding="same", padding_mode="circular", bias=False), (2, 16, 9, 8)),
    (nn.Conv2d(16, 20, 1, stride=2, padding=1), (2, 16, 9, 8)),
    (nn.Conv3d(16, 20, 2, padding=1, padding_mode="replicate"), (2, 16, 3, 4, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: str(v)[:24])
def test_a_weight_of_low_rank_is_kept_exactly(layer, shape):
    layer = of_low_rank(copy.deepcopy(layer), 3)
    x = seeded(torch.randn, shape)
    for settings in ({"rank": 3}, {"energy": 1 - 1e-12}):
        small = factorize(layer, **settings)
        assert isinstance(small, nn.Sequential)
        assert len(small) == (3 if layer.weight[0, 0].numel() > 1 else 2)
        torch.testing.assert_close(small(x), layer(x), rtol=1e-5, atol=1e-5)
        assert measure.macs(small, x) < measure.macs(layer, x)


@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 100))
def test_a_matrix_loses_what_it_drops(outputs, inputs, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs)
    values = torch.linalg.svdvals(layer.weight.detach().double())
    for rank in range(1, min(outputs, inputs) + 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            small = factorize(layer, rank=rank)
        if rank * (outputs + inputs) >= outputs * inputs:
            assert type(small) is nn.Linear
            continue
        lost = values[rank:].square().sum() / values.square().sum()  # Eckart and Young (1936)
        assert inexact(layer, small) == pytest.approx(lost.item(), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_the_energy_asked_for_is_kept(share):
    for layer in (seeded(nn.Conv2d, 32, 48, 3), seeded(nn.Linear, 64, 48)):
        layer.weight.data *= 0.7 ** torch.arange(layer.weight.shape[0]).view(
            -1, *[1] * (layer.weight.dim() - 1)
        )
        small = factorize(layer, energy=share)
        assert inexact(layer, small) <= 1 - share + 1e-6


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 40), (40, 4)])
def test_a_mode_of_full_rank_beside_a_thin_one_loses_only_what_is_dropped(inputs, outputs):
    layer = seeded(nn.Conv2d, inputs, outputs, 3)
    small = factorize(layer, rank=4)
    assert len(small) == 2
    mode = layer.weight.detach().double().movedim(0 if outputs == 40 else 1, 0).flatten(1)
    values = torch.linalg.svdvals(mode)
    lost = values[4:].square().sum() / values.square().sum()
    assert inexact(layer, small) == pytest.approx(lost.item(), rel=1e-4)


def test_the_rank_by_energy_is_the_smallest_that_does():
    layer = nn.Linear(10, 10, bias=False)
    layer.weight.data = torch.diag(torch.tensor([8.0, 4, 2, 1, 1, 1, 1, 1, 1, 1]))  # energy 91
    for share, rank in ((64 / 91 - 1e-6, 1), (64 / 91 + 1e-6, 2), (80 / 91 + 1e-6, 3), (0.93, 4)):
        assert factorize(layer, energy=share)[0].out_features == rank
    assert compress.steps(factorize(layer)) == ("low rank (90% of the energy)",)
    assert factorize(layer)[0].out_features == 3


def test_iterations_improve_on_the_start(monkeypatch):
    layer = seeded(nn.Conv2d, 24, 32, 3)
    better = inexact(layer, factorize(layer, rank=6))
    monkeypatch.setattr(low_rank, "_ITERATIONS", 0)
    assert better < inexact(layer, factorize(layer, rank=6)) - 1e-4


def test_a_full_rank_needs_no_layer_of_its_own():
    first = factorize(seeded(nn.Conv2d, 1, 20, 5), rank=4)
    assert [tuple(layer.weight.shape) for layer in first] == [(4, 1, 5, 5), (20, 4, 1, 1)]
    last = factorize(seeded(nn.Conv2d, 20, 1, 5), rank=4)
    assert [tuple(layer.weight.shape) for layer in last] == [(4, 20, 1, 1), (1, 4, 5, 5)]
    assert last[1].bias is not None
    assert last[0].bias is None
    # Inputs of rank 4 take 5 * 4 + 4 * 4 * 9 parameters; left at 5, they would take 5 * 4 * 9.
    kept = factorize(seeded(nn.Conv2d, 5, 64, 3), rank={"": 4})
    shapes = [tuple(layer.weight.shape) for layer in kept]
    assert shapes == [(4, 5, 1, 1), (4, 4, 3, 3), (64, 4, 1, 1)]


@pytest.mark.parametrize("share", [0.15, 0.3, 0.5, 0.9])
def test_a_budget_is_kept_and_used(share):
    model = models.build("resnet-8")
    small = factorize(model, parameters=share)
    used = measure.parameters(small) / measure.parameters(model)
    assert share - 0.02 < used <= share
    x = torch.rand(2, 1, 28, 28)
    assert small(x).shape == (2, 10)


def test_a_budget_goes_where_energy_is():
    model = seeded(lambda: nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)))
    of_low_rank(model[2], 2)
    small = factorize(model, parameters=0.6)
    assert type(small[0]) is nn.Linear  # whole: its directions carry equal shares
    x = torch.randn(4, 32)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_budget_does_no_worse_than_one_rank_for_all():
    model = seeded(lambda: nn.Sequential(nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 40)))
    model[0].weight.data *= torch.logspace(0, -3, 20)

    def lost(small: nn.Module) -> float:
        return sum(inexact(model[at], small[at]) for at in (0, 2))

    uniform = factorize(model, rank=8)
    share = measure.parameters(uniform) / measure.parameters(model)
    assert lost(factorize(model, parameters=share)) < lost(uniform)


def test_what_is_left_is_named():
    model, _ = two_inputs()
    reasons = compress.coverage(factorize(model, rank=2, skip=["side"])).set_index("layer").reason
    assert reasons["depthwise"] == "a convolution of 16 groups"
    assert reasons["first"] == "its weight is also that of second"
    assert reasons["second"] == "its weight is also that of first"
    assert reasons["side"] == "in skip"
    assert reasons["out.0"] == ""
    model = nn.ModuleDict({
        "embedding": nn.Embedding(9, 8), "lstm": nn.LSTM(8, 8), "up": nn.ConvTranspose1d(8, 8, 3),
        "attention": nn.MultiheadAttention(8, 2), "a": nn.Linear(16, 16), "b": nn.Linear(16, 16),
        "c": nn.Linear(3, 3),
    })  # fmt: skip
    table = compress.coverage(factorize(model, rank={"a": 2, "c": 2, "lstm": 2}))
    reasons = table.set_index("layer").reason
    assert reasons["embedding"] == "not named in rank"
    assert reasons["lstm"] == "low rank has no rule for LSTM"
    assert "not handled" in reasons["attention"]
    assert reasons["b"] == "not named in rank"
    assert reasons["c"] == "rank 2 would not make it smaller"


def test_nothing_to_do_is_said():
    with pytest.warns(UserWarning, match="nothing factorized"):
        small = factorize(nn.Linear(3, 3), energy=1.0)
    assert compress.steps(small) == ("low rank (100% of the energy): nothing factorized",)


def test_a_tied_head_stays_tied():
    model = models.build("char-transformer")
    small = factorize(model, rank=8)
    assert small.head.weight is small.embedding.weight


def test_a_weight_used_outside_layers_counts_as_tied():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model.own = model[0].weight
    small = factorize(model, rank=2)
    assert type(small[0]) is nn.Linear
    assert isinstance(small[1], nn.Sequential)


def test_a_module_used_twice_stays_one():
    layer = nn.Linear(16, 16)
    small = factorize(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)}), rank=2)
    assert isinstance(small["a"], nn.Sequential)
    assert small["a"] is small["b"][0]


def test_an_encoder_layer_goes_on_running_in_its_fast_path():
    model = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True).eval()
    with pytest.warns(UserWarning, match="nothing factorized"):
        small = factorize(model, rank=2)
    with torch.no_grad():
        assert small(torch.randn(2, 3, 16)).shape == (2, 3, 16)


def test_modes_hooks_gradients_and_random_state_are_kept():
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Linear(16, 16))
    model[0].weight.requires_grad_(False)
    model[1].eval()
    model[0].bias.requires_grad_(False)
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    state = torch.get_rng_state()
    small = factorize(model, rank=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not p.requires_grad for p in small[0].parameters())
    assert all(p.requires_grad for p in small[1].parameters())
    assert all(m.training for m in small[0].modules())
    assert not any(m.training for m in small[1].modules())
    small[0](torch.randn(1, 16, 5, 5))
    assert seen == [(1, 16, 3, 3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_type_is_kept(dtype):
    layer = of_low_rank(nn.Linear(32, 32), 2).to(dtype)
    small = factorize(layer, rank=2)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert inexact(layer, small) < (1e-4 if dtype == torch.bfloat16 else 1e-12)


def test_zero_weights_and_weights_that_are_not_contiguous():
    layer = nn.Linear(16, 16)
    layer.weight.data.zero_()
    assert torch.equal(factorize(layer)(torch.ones(2, 16)), layer(torch.ones(2, 16)))
    assert factorize(nn.Sequential(layer), parameters=0.5)[0][0].out_features == 3
    layer.weight.data = torch.randn(16, 16).T
    assert inexact(layer, factorize(layer, rank=7)) < 0.2


def test_computed_weights_are_made_dense_first():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    for before in (compress.quantize_weights(model, bits=8), share_weights(model, clusters=8)):
        small = factorize(before, rank=2)
        assert all("sources" not in name for name in small.state_dict())
        weight = before[0].weight.detach()
        u, s, v = torch.linalg.svd(weight)
        expected = u[:, :2] * s[:2] @ v[:2]
        dense = small[0][1].weight @ small[0][0].weight
        torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-5)
    rounded = compress.quantize_dynamic(model, minimum_weights=0)
    with pytest.warns(UserWarning, match="its input is rounded"):
        factorize(rounded, rank=2)
    with pytest.warns(UserWarning, match="its input is rounded"):
        factorize(compress.quantize_static(model, [torch.randn(8, 32)]), rank=2)


def test_the_result_can_be_trained(blobs):
    torch.manual_seed(0)
    wide = nn.Linear(32, 32)
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), wide, nn.ReLU(), nn.Linear(32, 3))
    training.fit(model, blobs, epochs=3, progress=False)
    small = factorize(model, rank={"2": 2})
    before = training.evaluate(small, blobs, split="train").loss
    training.fit(small, blobs, epochs=3, progress=False)
    assert training.evaluate(small, blobs, split="train").loss < before


def test_refusals_say_what_to_do():
    model = models.build("lenet-5")
    refusals = [
        ({"energy": 0.9, "rank": 2}, "energy and rank are given; give one of"),
        ({"energy": 0}, "energy is 0; give a share above 0 and up to 1"),
        ({"energy": float("nan")}, "energy is nan; give a share"),
        ({"parameters": 1.5}, "parameters is 1.5; give a share"),
        ({"parameters": True}, "parameters is True; give a share"),
        ({"parameters": 0.001}, r"parameters is 0.001, but with rank 1 .* give 0\.00\d or more"),
        ({"rank": 0}, "rank is 0; give a whole number from 1"),
        ({"rank": {"0": 2.5}}, "rank is 2.5; give a whole number"),
        ({"rank": {"10": 2}}, r"rank names \['10'\]; layers are"),
        ({"skip": ["10"]}, r"skip names \['10'\]"),
    ]
    for settings, message in refusals:
        with pytest.raises(ValueError, match=message):
            factorize(model, **settings)
    model[0].weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"weight 0\.weight holds NaN"):
        factorize(model)
    with pytest.raises(TypeError, match="expected a torch"):
        factorize("model")


def test_the_smallest_budget_named_is_enough():
    model = models.build("lenet-5")
    with pytest.raises(ValueError, match="or more") as refusal:
        factorize(model, parameters=1e-6)
    least = float(str(refusal.value).split("give ")[1].split(" ")[0])
    assert measure.parameters(factorize(model, parameters=least)) <= least * 431_080


def test_the_callers_model_is_unchanged():
    model, inputs = two_inputs()
    before = copy.deepcopy(model.state_dict())
    small = factorize(model, rank=2)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    ours, theirs = ({p.data_ptr() for p in m.parameters()} for m in (small, model))
    assert not ours & theirs
    target = torch.randint(0, 4, (16,), generator=torch.Generator().manual_seed(0))
    task = data.task((*inputs, target), (*inputs, target), (*inputs, target))
    assert small(*task.example_input).shape == (1, 4)


def test_an_embedding_becomes_a_narrow_one_and_a_linear_layer(tmp_path):
    torch.manual_seed(0)
    table = torch.randn(50, 4) @ torch.randn(4, 16)  # of rank 4
    table[2] = 0
    model = nn.Sequential(nn.Embedding(50, 16, padding_idx=2), nn.Linear(16, 3))
    model[0].weight.data = table
    small = factorize(model, rank={"0": 4})
    codes = torch.arange(50).view(5, 10)
    torch.testing.assert_close(small(codes), model(codes), rtol=1e-4, atol=1e-4)
    narrow, wide = small[0]
    assert (tuple(narrow.weight.shape), tuple(wide.weight.shape)) == ((50, 4), (16, 4))
    assert (narrow.padding_idx, wide.bias) == (2, None)
    assert torch.equal(small[0](torch.tensor([2])), torch.zeros(1, 16))
    fewer = factorize(model, rank={"0": 2})[0](codes)
    u, s, v = torch.linalg.svd(table)
    best = u[:, :2] * s[:2] @ v[:2]
    torch.testing.assert_close(fewer.flatten(0, 1), best, rtol=1e-4, atol=1e-4)
    storage.save(small, tmp_path / "small.safetensors", progress=False)
    again = storage.load(tmp_path / "small.safetensors", into=model)
    assert torch.equal(again(codes), small(codes))


def test_an_embedding_that_changes_when_it_is_read_is_left():
    model = nn.Sequential(nn.Embedding(50, 16, max_norm=1.0), nn.Linear(16, 16))
    small = factorize(model, rank=2)
    assert "max_norm" in compress.coverage(small).set_index("layer").reason["0"]
