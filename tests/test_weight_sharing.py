import copy
import pickle
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from networks import two_inputs
from torch import nn

from workbench import compress, measure, models, training
from workbench.compress.computed import MaskedWeight, compute_weight
from workbench.compress.weight_sharing import Clustering, SharedWeight, share_weights

DEFAULTS = {
    "clusters": 32, "initialization": "linear", "block": 1, "group_channels": None,
    "iterations": 300, "seed": 0,
}  # fmt: skip


def shared(weight: torch.Tensor, axis: int = 0, **settings) -> SharedWeight:
    settings = DEFAULTS | settings
    if settings["block"] > 1:
        settings["initialization"] = "random"
    return SharedWeight.of(weight, Clustering(**settings), axis)


def error(weight: torch.Tensor, **settings) -> float:
    return (shared(weight, **settings)() - weight).square().sum().item()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lloyd(values: np.ndarray, means: np.ndarray, iterations: int) -> np.ndarray:
    """k-means without any trick, for means of which none becomes empty."""
    for _ in range(iterations):
        nearest = np.abs(values[:, None] - means).argmin(1)
        means = np.array([values[nearest == k].mean() for k in range(len(means))])
    return means


@pytest.mark.parametrize("iterations", [1, 2, 5, 40])
def test_shared_values_are_those_of_lloyd(iterations):
    weight = torch.rand(30, 20, generator=torch.Generator().manual_seed(0)) + 0.1
    values = weight.flatten().double().numpy()
    means = lloyd(values, np.linspace(values.min(), values.max(), 7), iterations)
    source = shared(weight, clusters=7, iterations=iterations)
    np.testing.assert_allclose(source.codebook[0].detach().numpy(), means, rtol=1e-6)


@given(hnp.arrays(np.float32, 40, elements=st.floats(-9, 9, width=32)), st.integers(1, 9))
def test_each_weight_gets_the_nearest_value_and_zeros_stay(values, clusters):
    weight = torch.from_numpy(values).view(8, 5)
    source = shared(weight, clusters=clusters)
    dense = source().detach()
    assert torch.equal(dense[weight == 0], weight[weight == 0].abs())
    distances = (weight[weight != 0][:, None] - source.codebook.detach()[0]).abs()
    found = (weight - dense)[weight != 0].abs()
    torch.testing.assert_close(found, distances.amin(1), rtol=0, atol=1e-5)
    assert len(dense.unique()) <= clusters + 1


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=6),
    st.sampled_from([1, 2]),
)
def test_few_distinct_values_are_kept_exactly(values, block):
    chosen = torch.randint(len(values), (10, 4), generator=torch.Generator().manual_seed(0))
    weight = torch.tensor(values)[chosen]
    if block == 2:  # distances of blocks are squared, and squares this small or large are 0 or inf
        weight = torch.where(weight.abs() < 1e-15, 0, weight).clamp(-1e15, 1e15)
    source = shared(weight, clusters=6 if block == 1 else 36, block=block)
    assert torch.equal(source(), weight)


def test_a_weight_in_the_middle_goes_to_the_lower_value():
    source = shared(torch.tensor([[1.0, 2, 3]]), clusters=2, iterations=1)
    assert source.codebook[0].tolist() == [1.5, 3]
    assert shared(torch.tensor([[1.0, 2, 3, 3]]), clusters=2, iterations=1).codes()[1] == 0


def test_neighbours_among_the_numbers_are_told_apart():
    weight = 1 + torch.arange(8.0).view(2, 4) * torch.finfo(torch.float32).eps
    assert torch.equal(shared(weight, clusters=8)(), weight)


@pytest.mark.parametrize("initialization", ["linear", "density", "random"])
def test_every_start_ends_near_the_best(initialization):
    weight = normal(100, 100)
    # Max (1960): the least error of 16 levels for a normal distribution is 0.01154.
    loss = error(weight, clusters=16, initialization=initialization) / weight.numel()
    assert loss == pytest.approx(0.01154, rel=0.15)


def test_the_starts_are_those_of_the_paper():
    weight = torch.arange(1.0, 101).view(10, 10).square()
    starts = {
        name: shared(weight, clusters=4, initialization=name, iterations=1).codebook[0]
        for name in ("linear", "density")
    }
    squares = np.arange(1.0, 101) ** 2
    linear = lloyd(squares, np.linspace(1, 10_000, 4), 1)
    density = lloyd(squares, squares[[12, 37, 62, 87]], 1)
    np.testing.assert_allclose(starts["linear"].detach().numpy(), linear)
    np.testing.assert_allclose(starts["density"].detach().numpy(), density)


def test_random_starts_follow_the_seed_and_leave_the_random_state():
    weight = normal(20, 20)
    state = torch.get_rng_state()
    first, same, other = (
        shared(weight, initialization="random", iterations=1, seed=seed).codebook
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_an_empty_cluster_moves_to_the_furthest_value():
    # From 0, 33, 67 and 100, the two in the middle start empty.
    weight = torch.tensor([[-0.1, 1, 2, 3], [4, 5, 6, 100]])
    assert error(weight, clusters=4) < 4
    source = shared(weight, clusters=4, iterations=1)
    assert sorted(source.codebook[0].tolist())[-1] == 100
    outliers = torch.cat([normal(1000), torch.tensor([1e4, -1e4])]).view(1, -1)
    assert len(shared(outliers)().unique()) == 32


def test_a_mean_is_among_its_weights_where_sums_lose_all_digits():
    weight = torch.cat([torch.full((50,), -1e30), torch.linspace(1, 2, 100)]).view(10, 15)
    dense = shared(weight, clusters=2)()
    assert (dense[weight < 0] == weight[weight < 0]).all()
    assert (dense[weight > 0] - 1.5).abs().max() <= 0.5


def test_more_clusters_lose_less():
    weight = normal(40, 40)
    losses = [error(weight, clusters=count) for count in (1, 2, 4, 8, 16, 32, 64)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(weight.var(correction=0).item() * 1600, rel=1e-5)


def test_groups_have_codebooks_of_their_own():
    weight = normal(10, 30) * torch.arange(1, 11)[:, None]
    source = shared(weight, clusters=4, group_channels=4)  # the last group has 2 channels
    assert source.codebook.shape == (3, 4)
    for first in (0, 4, 8):
        alone = shared(weight[first : first + 4], clusters=4)
        assert torch.equal(source()[first : first + 4], alone())
    assert shared(weight, group_channels=99).codebook.shape == (1, 32)


def test_groups_follow_the_channels_of_transposed_layers():
    weight = normal(6, 8, 3)
    turned = shared(weight, axis=1, clusters=4, group_channels=2)
    straight = shared(weight.transpose(0, 1), clusters=4, group_channels=2)
    assert turned.codebook.shape == (4, 4)
    assert torch.equal(turned(), straight().transpose(0, 1))


def test_blocks_are_neighbours_within_a_channel():
    weight = normal(64, 2, 3, 4)
    source = shared(weight, clusters=16, block=4)
    assert source.codebook.shape == (1, 16, 4)
    assert source().shape == weight.shape
    blocks = source().detach().reshape(-1, 4)
    assert len(blocks.unique(dim=0)) == 16
    distances = torch.cdist(weight.reshape(-1, 4), source.codebook.detach()[0])
    torch.testing.assert_close((weight.reshape(-1, 4) - blocks).norm(dim=1), distances.amin(1))


def test_blocks_lose_less_than_single_values_of_the_same_bits():
    weight = normal(64, 1).expand(64, 64) + 0.1 * normal(64, 64, seed=1)  # neighbours are alike
    assert error(weight, clusters=16, block=4) < error(weight, clusters=2)  # 1 bit a weight each


def test_an_empty_block_cluster_moves_to_the_furthest_block():
    weight = torch.zeros(200, 2) + 1
    weight[:3] = torch.tensor([[5.0, 5], [9, 9], [-9, 9]])
    source = shared(weight, clusters=3, block=2, iterations=20)
    assert len(source().unique(dim=0)) == 3
    assert (source() - weight).square().sum() < 40


def test_only_whole_blocks_stay_zero():
    weight = normal(8, 8)
    weight[:, :2] = 0
    weight[0, 4] = 0
    dense = shared(weight, clusters=2, block=2)()
    assert (dense[:, :2] == 0).all()
    assert (dense[:, 2:] != 0).all()


def test_a_weight_of_zeros_stays_zero():
    for block in (1, 2):
        source = shared(torch.zeros(4, 6), block=block)
        assert torch.equal(source(), torch.zeros(4, 6))
        assert source.zeros


def test_zero_has_a_code_but_no_entry():
    weight = normal(40, 40)
    dense = shared(weight, clusters=32)
    assert (dense.bits, dense.describe()) == (5, "32 shared values, 5 bits")
    weight[:20] = 0
    pruned = shared(weight, clusters=32)
    assert (pruned.bits, pruned.describe()) == (6, "32 shared values and zero, 6 bits")
    assert shared(weight, clusters=31).bits == 5
    assert (pruned.codebook != 0).all()
    assert shared(weight, clusters=8, group_channels=4).describe() == (
        "8 shared values per 4 channels and zero, 4 bits"
    )
    assert shared(normal(4, 4), clusters=1).describe() == "1 shared value, 1 bit"
    assert shared(normal(90, 8), clusters=64, block=4).describe() == "64 shared blocks of 4, 6 bits"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_type_is_kept(dtype):
    weight = normal(30, 30).to(dtype)
    source = shared(weight, clusters=16)
    assert source.codebook.dtype == source().dtype == dtype
    nearest = (weight.flatten()[:, None].double() - source.codebook.double()).abs().amin(1)
    torch.testing.assert_close((weight.double() - source().double()).abs().flatten(), nearest)


def test_16_bit_gradients_are_summed_in_32():
    source = shared(torch.ones(64, 64, dtype=torch.bfloat16), clusters=2)
    source().float().sum().backward()
    assert source.codebook.grad.item() == 4096  # in bfloat16 1 + 256 is 256


@pytest.mark.parametrize("clusters", [1, 2, 31, 32, 33, 300])
def test_codes_are_packed_without_gaps(clusters, monkeypatch):
    monkeypatch.setattr("workbench.compress.weight_sharing._PIECE", 64)
    weight = torch.arange(1.0, 701).view(7, 100)  # not a whole number of pieces
    source = shared(weight, clusters=clusters)
    bits = max(1, (clusters - 1).bit_length())
    assert len(source.packed) == -(-700 * bits // 8)
    assert source.nbytes == len(source.packed) + 4 * clusters
    expected = (weight.flatten()[:, None] - source.codebook.detach()[0]).abs().argmin(1)
    assert torch.equal(source.codes().long(), expected)


@pytest.mark.parametrize("block", [1, 4])
def test_the_gradient_of_a_value_is_the_sum_over_its_weights(block):
    weight = normal(12, 8)
    weight[:, :4] = 0
    source = shared(weight, clusters=3, block=block)
    upstream = normal(12, 8, seed=1)
    codes = source.codes()
    for _ in range(2):  # twice in a row
        source.codebook.grad = None
        (source() * upstream).sum().backward()
        for entry in range(3):
            expected = upstream.reshape(-1, block)[codes == entry + 1].sum(0)
            found = source.codebook.grad[0, entry].reshape(-1)
            torch.testing.assert_close(found, expected)


def test_training_keeps_the_sharing_and_the_zeros(blobs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 3))
    keep = torch.rand(3, 64) < 0.5
    compute_weight(model[2], "weight", MaskedWeight(model[2].weight, keep))
    small = share_weights(model, clusters=4)
    before = [copy.deepcopy(small[at].sources["weight"]) for at in (0, 2)]
    loss = training.evaluate(small, blobs).loss
    # Adam moves each parameter by its rate, and these are few: they take a larger one.
    fast = partial(torch.optim.AdamW, lr=0.03)
    training.fit(small, blobs, epochs=10, optimizer=fast, progress=False)
    for at, old in zip((0, 2), before, strict=True):
        source = small[at].sources["weight"]
        assert torch.equal(source.codes(), old.codes())
        assert not torch.equal(source.codebook, old.codebook)
        codes, dense = source.codes(), source().detach().flatten()
        assert all(len(dense[codes == code].unique()) == 1 for code in codes.unique())
    assert torch.equal(small[2].weight != 0, keep)
    assert training.evaluate(small, blobs).loss < loss / 2


def test_codes_that_change_are_noticed():
    first, second = shared(normal(9, 8)), shared(normal(9, 8, seed=1))
    dense = first(), second()
    state = copy.deepcopy(second.state_dict())
    other = copy.deepcopy(first)
    assert torch.equal(other(), dense[0])
    other.load_state_dict(state)  # writes into the buffer
    assert torch.equal(other(), dense[1])
    other.load_state_dict(first.state_dict(), assign=True)  # puts another one there
    assert torch.equal(other(), dense[0])
    other.packed.zero_()
    assert torch.equal(other(), other.codebook[0, 0].expand(9, 8))
    other.packed = second.packed
    other.codebook.data = second.codebook.data
    assert torch.equal(other(), dense[1])


def test_the_index_is_unpacked_once_and_is_not_saved():
    source = shared(normal(90, 80))
    source()
    index = source._index()
    source()
    assert source._index() is index
    for twin in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert twin._unpacked is None
        assert torch.equal(twin(), source())
    assert len(pickle.dumps(source)) < 90 * 80
    assert set(source.state_dict()) == {"codebook", "packed"}


def test_inference_mode_first_then_training():
    source = shared(normal(9, 8))
    with torch.inference_mode():
        source()
        twin = copy.deepcopy(source)
        assert torch.equal(twin(), source())
    source().sum().backward()
    assert source.codebook.grad.sum() == 72


def test_masked_gives_zeros():
    weight = normal(10, 8)
    keep = normal(10, 8, seed=1) > 0
    source = shared(weight, clusters=8)
    source.codebook.requires_grad_(False)
    once = source.masked(keep)
    assert torch.equal(once(), source() * keep)
    assert not once.codebook.requires_grad
    other = normal(10, 8, seed=2) > 0
    assert torch.equal(once.masked(other)(), source() * keep * other)
    assert source.masked(torch.ones(10, 8, dtype=torch.bool)).bits == source.bits
    turned = shared(weight, axis=1, clusters=8, group_channels=3)
    assert torch.equal(turned.masked(keep)(), turned() * keep)


def test_masked_blocks_are_zero_as_a_whole_or_not_at_all():
    source = shared(normal(10, 8), clusters=8, block=4)
    keep = torch.ones(10, 8, dtype=torch.bool)
    keep[3, 4:] = False
    assert torch.equal(source.masked(keep)(), source() * keep)
    keep[3, 4] = True
    assert source.masked(keep) is None


@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_that_is_not_contiguous(axis):
    weight = normal(6, 8, 4).permute(2, 0, 1)
    torch.testing.assert_close(shared(weight, axis, clusters=192)(), weight)


def test_the_file_has_the_real_size():
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    small = share_weights(model)
    assert sum(value.nbytes for value in small.state_dict().values()) == 256 * 256 * 5 // 8 + 128
    assert measure.artifact_bytes(model) / measure.artifact_bytes(small) > 6


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv1d(8, 12, 3), normal(4, 8, 9)),
        (nn.Conv2d(8, 12, 3, groups=2), normal(4, 8, 9, 9)),
        (nn.Conv3d(8, 12, 3), normal(4, 8, 5, 5, 5)),
        (nn.ConvTranspose2d(8, 12, 3, groups=2), normal(4, 8, 9, 9)),
        (nn.Linear(32, 12), normal(4, 32)),
        (nn.GRU(8, 16, num_layers=2), normal(4, 3, 8)),
        (nn.LSTM(8, 16, bidirectional=True), normal(4, 3, 8)),
        (nn.Embedding(50, 12, padding_idx=3), torch.arange(20)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_layer(layer, x):
    small = share_weights(layer, group_channels=16)
    whole, part = layer(x), small(x)
    if isinstance(whole, tuple):
        whole, part = whole[0], part[0]
    assert 0 < ((whole - part).square().mean() / whole.var()).item() < 0.05
    assert "shared values" in compress.coverage(small).stored_as[0]


def test_tied_weights_a_module_used_twice_and_two_inputs():
    model, inputs = two_inputs()
    model.again = model.out
    small = share_weights(model)
    assert small.first.sources["weight"] is small.second.sources["weight"]
    assert small.again is small.out
    assert small(*inputs).shape == (16, 4)
    assert compress.steps(small) == ("shared weights (32 values)",)


def test_modes_and_frozen_parts_are_kept():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    model[0].weight.requires_grad_(False)
    model[1].train()
    small = share_weights(model)
    assert [p.requires_grad for p in small.parameters()] == [True, False, True, True]
    assert [small[0].training, small[1].training] == [False, True]
    again = share_weights(small, clusters=4)
    assert not again[0].sources["weight"].codebook.requires_grad
    eight = share_weights(compress.quantize_weights(nn.Linear(16, 16), bits=8))
    assert eight.sources["weight"].codebook.requires_grad


def test_sharing_what_is_quantized_to_few_values_loses_nothing():
    four = compress.quantize_weights(nn.Linear(64, 64), bits=4, granularity="tensor")
    small = share_weights(four)
    assert torch.equal(small.weight, four.weight)
    assert compress.steps(small) == ("4-bit per tensor weights", "shared weights (32 values)")


def test_what_is_left_is_named():
    model = nn.ModuleDict({
        "a": nn.Linear(64, 8), "b": nn.Linear(64, 8), "odd": nn.Linear(63, 8),
        "tiny": nn.Linear(4, 2), "lstm": nn.LSTM(6, 8), "attention": nn.MultiheadAttention(8, 2),
    })  # fmt: skip
    small = share_weights(model, block=4, clusters=16, skip=["b"])
    table = compress.coverage(small).set_index("layer")
    assert table.stored_as["a"] == "16 shared blocks of 4, 4 bits"
    assert table.reason["b"] == "in skip"
    assert table.reason["odd"] == "63 weights of a channel do not divide into blocks of 4"
    assert table.reason["tiny"] == "codes and codebook would take no less than the weights"
    assert table.reason["lstm"] == "6 weights of a channel do not divide into blocks of 4"
    assert "not handled" in table.reason["attention"]
    named = compress.coverage(share_weights(model, clusters={"a": 4})).set_index("layer")
    assert named.stored_as["a"] == "4 shared values, 2 bits"
    assert named.reason["b"] == "not named in clusters"
    with pytest.warns(UserWarning, match="nothing shared"):
        share_weights(nn.Linear(2, 2))


def test_steps_are_named():
    model = models.build("lenet-5")
    names = {
        "32 values": {},
        "1 value": {"clusters": 1},
        "16 blocks of 4": {"clusters": 16, "block": 4},
        "4 values per 8 channels": {"clusters": 4, "group_channels": 8},
        "by layer": {"clusters": {"0": 4, "3": 8}},
        "8 values": {"clusters": {"0": 8, "3": 8}},
    }
    for name, settings in names.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            small = share_weights(model, iterations=1, **settings)
        assert compress.steps(small) == (f"shared weights ({name})",)
        assert small(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_state_loads_into_another_model_of_the_same_form():
    first, second = (share_weights(models.build("lenet-5", seed=seed)) for seed in (1, 2))
    x = torch.rand(2, 1, 28, 28)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_refusals_say_what_to_do():
    model = models.build("lenet-5")
    refusals = [
        ({"clusters": 0}, "clusters is 0; give a whole number from 1 to 65,536"),
        ({"clusters": 65_537}, "clusters is 65537; give"),
        ({"clusters": {"0": 2.5}}, r"clusters is 2\.5; give"),
        ({"clusters": True}, "clusters is True; give"),
        ({"clusters": {"10": 2}}, r"clusters names \['10'\]; layers are"),
        ({"block": 0}, "block is 0; give a whole number from 1"),
        ({"group_channels": 0}, "group_channels is 0; give a whole number from 1"),
        ({"iterations": 0}, "iterations is 0; give a whole number from 1"),
        ({"initialization": "even"}, "initialization is 'even'; choose 'linear', 'density' or"),
        ({"initialization": "linear", "block": 2}, "blocks have no order; choose 'random'"),
        ({"skip": ["10"]}, r"skip names \['10'\]"),
    ]
    for settings, message in refusals:
        with pytest.raises(ValueError, match=message):
            share_weights(model, **settings)
    model[0].weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"weight 0\.weight holds NaN"):
        share_weights(model)
    with pytest.raises(TypeError, match="expected a torch"):
        share_weights("model")


def test_the_callers_model_is_unchanged():
    model, inputs = two_inputs()
    before = copy.deepcopy(model.state_dict())
    small = share_weights(model)
    for tensor in small.state_dict().values():
        tensor.zero_()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert isinstance(model.out.weight, nn.Parameter)
    assert model(*inputs).shape == (16, 4)
