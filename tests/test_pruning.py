import copy
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import two_inputs
from torch import nn
from torch.optim import SGD

from workbench import compress, models, training
from workbench.compress import pruning
from workbench.compress.computed import MaskedWeight, source_of


def zeros(model: nn.Module) -> dict[str, int]:
    """Number of zeros of each weight with two or more dimensions."""
    return {
        name: int((weight == 0).sum())
        for name, weight in compress.weights(model)
        if weight.dim() > 1
    }


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 3))
    model[2].weight.data *= 4  # both layers have weights of the same size
    return model


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=40),  # few values, so there are ties
    st.floats(0, 1),
)
def test_exactly_this_share_goes_and_the_smallest_go_first(values, sparsity):
    layer = nn.Linear(len(values), 1)
    layer.weight.data = torch.tensor([values], dtype=torch.float32)
    size = layer.weight.abs().flatten()
    small = compress.prune(layer, sparsity=sparsity)
    gone = ~source_of(small, "weight").keep.flatten()
    assert gone.sum() == round(sparsity * len(values))
    if gone.any() and (~gone).any():
        assert size[gone].max() <= size[~gone].min()
    assert torch.equal(small.weight.flatten()[~gone], layer.weight.flatten()[~gone])


def test_weights_compete_over_the_model_or_in_their_layer():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    model[0].weight.data.uniform_(0.5, 1)
    model[1].weight.data.uniform_(2, 3)
    with pytest.warns(UserWarning, match="0 has no weight left; prune it less"):
        together = zeros(compress.prune(model, sparsity=0.5, scope="global"))
    apart = zeros(compress.prune(model, sparsity=0.5, scope="layer"))
    assert together == {"0.weight": 100, "1.weight": 0}
    assert apart == {"0.weight": 50, "1.weight": 50}


def test_sparsity_by_layer_leaves_the_others():
    small = compress.prune(models.build("lenet-5"), sparsity={"7": 0.75, "3": 0.5})
    assert zeros(small) == {"0.weight": 0, "3.weight": 12_500, "7.weight": 300_000, "9.weight": 0}
    reasons = compress.coverage(small).set_index("layer").reason
    assert reasons["0"] == "not named in sparsity"
    assert reasons["7"] == ""


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize(
    "layer", [nn.Linear(16, 6), nn.Conv2d(8, 6, 3), nn.ConvTranspose1d(8, 6, 3)]
)
def test_n_of_m_neighbours_along_the_input_stay(layer, n, m):
    small = compress.prune(layer, granularity=f"{n}:{m}")
    inputs = 0 if isinstance(layer, nn.ConvTranspose1d) else 1
    groups = layer.weight.movedim(inputs, -1).unflatten(-1, (-1, m)).abs()
    kept = small.weight.movedim(inputs, -1).unflatten(-1, (-1, m)).abs()
    assert torch.equal((kept != 0).sum(-1), torch.full(kept.shape[:-1], n))
    torch.testing.assert_close(kept.sum(-1), groups.topk(n).values.sum(-1))


def test_n_of_m_leaves_what_does_not_divide():
    small = compress.prune(models.build("lenet-5"), granularity="2:4")
    table = compress.coverage(small).set_index("layer")
    assert table.reason["0"] == "its inputs are not a multiple of 4"
    assert table.stored_as["7"] == "float, 50.0% zeros"


def test_taylor_sums_the_squared_products_of_gradient_and_weight_over_batches(blobs):
    model = mlp()
    expected = torch.zeros(64)
    for inputs, target in blobs.train.subset(360, seed=0).batches(64):
        model.zero_grad()
        blobs.loss(model(*inputs), target).backward()
        expected += (model[0].weight.grad * model[0].weight).detach().square().flatten()
    model.zero_grad()
    for count in range(4, 64, 4):
        small = compress.prune(
            model, sparsity={"0": count / 64}, criterion="taylor", task=blobs, samples=360, seed=0
        )
        gone = ~source_of(small[0], "weight").keep.flatten()
        assert set(expected.argsort()[:count].tolist()) == set(gone.nonzero().flatten().tolist())


def test_random_depends_on_the_seed_alone():
    model = mlp()
    same, again, other = (
        compress.prune(model, criterion="random", seed=seed)[0].weight for seed in (1, 1, 2)
    )
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_what_is_pruned_stays_pruned_when_more_goes(criterion):
    half = compress.prune(mlp(), sparsity=0.5, criterion=criterion, seed=0)
    most = compress.prune(half, sparsity=0.8, criterion=criterion, seed=1)
    for layer in (0, 2):
        assert not (source_of(most[layer], "weight").keep & (half[layer].weight == 0)).any()
    assert sum(zeros(most).values()) == round(0.8 * 160)


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
        partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
        partial(torch.optim.RMSprop, lr=0.1, momentum=0.9),
    ],
)
def test_zeros_survive_training_and_the_rest_learns(blobs, optimizer):
    small = compress.prune(mlp(), sparsity=0.7)
    before = [copy.deepcopy(small[i].weight.detach()) for i in (0, 2)]
    training.fit(small, blobs, epochs=2, optimizer=optimizer, progress=False)
    for i, weight in zip((0, 2), before, strict=True):
        assert torch.equal(small[i].weight == 0, weight == 0)
        assert not torch.equal(small[i].weight, weight)


def test_a_state_brings_its_zeros_along():
    first, second = compress.prune(mlp(1)), compress.prune(mlp(2))
    second.load_state_dict(first.state_dict())
    assert torch.equal(source_of(first[0], "weight").keep, source_of(second[0], "weight").keep)


def test_threshold_goes_by_size_not_by_sign():
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[-0.5, -0.1, 0.1, 0.5]])
    small = compress.prune_threshold(layer, threshold=0.1)
    assert small.weight.tolist() == [[-0.5, pytest.approx(-0.1), pytest.approx(0.1), 0.5]]
    small = compress.prune_threshold(layer, threshold=0.2)
    assert small.weight.tolist() == [[-0.5, 0, 0, 0.5]]


def test_clipping_is_soft_thresholding():
    layer = nn.Linear(64, 8)
    small = compress.clip_weights(layer, alpha=0.05)
    torch.testing.assert_close(small.weight, nn.functional.softshrink(layer.weight, 0.05))
    assert torch.equal(compress.clip_weights(layer, alpha=0).weight, layer.weight)


def test_gradual_pruning_ends_at_the_sparsity_by_the_cubic_schedule(blobs, monkeypatch):
    seen = []
    monkeypatch.setattr(
        pruning, "fit", lambda model, *_, **__: seen.append(sum(zeros(model).values()) / 160)
    )
    small = compress.prune_gradually(mlp(), blobs, sparsity=0.8, rounds=4, progress=False)
    assert seen == pytest.approx([0.8 * (1 - (1 - i / 4) ** 3) for i in (1, 2, 3, 4)], abs=1 / 160)
    assert compress.steps(small) == ("pruned gradually (0.8, 4 rounds)",)


def test_gradual_pruning_trains(blobs):
    model = mlp()
    at_once = compress.prune(model, sparsity=0.8)
    gradual = compress.prune_gradually(
        model, blobs, sparsity=0.8, epochs=5, optimizer=partial(SGD, lr=0.1), progress=False
    )
    assert sum(zeros(gradual).values()) == sum(zeros(at_once).values())
    assert training.evaluate(gradual, blobs).value > training.evaluate(at_once, blobs).value + 0.2


def test_a_lottery_ticket_has_the_first_values_and_the_last_zeros(blobs):
    start = mlp()
    trained = copy.deepcopy(start)
    training.fit(trained, blobs, progress=False)
    ticket = compress.rewind(compress.prune(trained, sparsity=0.6), start)
    keep = source_of(ticket[0], "weight").keep
    assert torch.equal(ticket[0].weight, start[0].weight * keep)
    assert not ticket.state_dict()["0.sources.weight.weight"][~keep].any()
    assert torch.equal(ticket[2].bias, start[2].bias)
    assert torch.equal(keep, source_of(compress.prune(trained, sparsity=0.6)[0], "weight").keep)


def test_rounds_of_a_lottery_each_start_from_the_first_values(blobs, monkeypatch):
    start, seen = mlp(), []

    def fit(model, *_, **__):
        keep = source_of(model[0], "weight").keep
        seen.append(torch.equal(model[0].weight, start[0].weight * keep))
        training.fit(model, blobs, progress=False)

    monkeypatch.setattr(pruning, "fit", fit)
    compress.prune_gradually(mlp(5), blobs, rounds=2, rewind_to=start, progress=False)
    assert seen == [True, True]


def test_permanent_zeros_are_ordinary_and_may_change(blobs):
    pruned = compress.prune(mlp(), sparsity=0.5)
    plain = compress.make_permanent(pruned)
    assert type(plain[0]) is nn.Linear
    assert torch.equal(plain[0].weight, pruned[0].weight)
    assert compress.steps(plain) == compress.steps(pruned)
    training.fit(plain, blobs, progress=False)
    assert sum(zeros(plain).values()) < sum(zeros(pruned).values())


def test_tied_weights_stay_tied():
    model, inputs = two_inputs()
    small = compress.prune(model, sparsity=0.5)
    assert small.first.sources["weight"] is small.second.sources["weight"]
    plain = compress.make_permanent(small)
    assert plain.first.weight is plain.second.weight
    torch.testing.assert_close(plain(*inputs), small(*inputs))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_pruned_and_learn(kind):
    model = kind(4, 8, num_layers=2)
    small = compress.prune(model, sparsity=0.5)
    before = zeros(small)
    output, _ = small(torch.randn(3, 2, 4))
    output.sum().backward()
    gradient = small.sources["weight_ih_l0"].weight.grad
    assert torch.equal(gradient[~small.sources["weight_ih_l0"].keep], torch.zeros(()).expand(
        int((~small.sources["weight_ih_l0"].keep).sum())))  # fmt: skip
    assert sum(before.values()) == round(0.5 * sum(w.numel() for n, w in compress.weights(model)
                                                   if "weight" in n))  # fmt: skip


def test_frozen_and_bfloat16_stay_so():
    model = mlp().bfloat16()
    model[0].weight.requires_grad_(False)
    small = compress.prune(model)
    assert small[0].weight.dtype == torch.bfloat16
    assert not small[0].sources["weight"].weight.requires_grad
    assert small[2].sources["weight"].weight.requires_grad
    plain = compress.make_permanent(small)
    assert [p.requires_grad for p in plain.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


@pytest.mark.parametrize("first", [
    lambda model: compress.quantize_weights(model, bits=4),
    lambda model: compress.quantize_weights(model, bits=4, symmetric=False),
    compress.prune,
])  # fmt: skip
def test_pruning_keeps_how_a_weight_is_stored(first):
    before = first(nn.Linear(64, 64))
    after = compress.prune(before, sparsity=0.75)
    assert type(source_of(after, "weight")) is type(source_of(before, "weight"))
    assert int((after.weight == 0).sum()) == 3072
    kept = after.weight != 0
    assert torch.equal(after.weight[kept], before.weight[kept])


def test_a_binary_weight_cannot_hold_zeros_so_it_becomes_float():
    after = compress.prune(compress.binarize(nn.Linear(64, 64)), sparsity=0.5)
    assert isinstance(source_of(after, "weight"), MaskedWeight)
    assert int((after.weight == 0).sum()) == 2048


def test_pruned_weights_stay_zero_when_trained_for_few_bits(blobs):
    pruned = compress.prune(mlp(), sparsity=0.5)
    trained = compress.quantize_aware(pruned, blobs, bits=3, progress=False)
    assert not trained[0].weight[pruned[0].weight == 0].any()


def test_refusals_say_what_to_do(blobs):
    model = mlp()
    broken = mlp()
    broken[2].weight.data[0, 0] = float("nan")
    refusals = [
        (lambda: compress.prune(model, sparsity=1.1), "sparsity is 1.1; give a share from 0 to 1"),
        (lambda: compress.prune(model, sparsity=float("nan")), "sparsity is nan"),
        (lambda: compress.prune(model, sparsity={"0": -1}), "sparsity is -1"),
        (lambda: compress.prune(model, sparsity={"5": 0.5}), r"sparsity names \['5'\]; layers are"),
        (lambda: compress.prune(model, sparsity=0.9, granularity="2:4"), "fixes it; leave it out"),
        (lambda: compress.prune(model, granularity="4:2"), "0 < N < M"),
        (lambda: compress.prune(model, granularity="channel"), "choose 'weight', or 'N:M'"),
        (lambda: compress.prune(model, scope="all"), "choose 'global' or 'layer'"),
        (lambda: compress.prune(model, criterion="size"), "choose from"),
        (lambda: compress.prune(model, criterion="taylor"), "pass task="),
        (lambda: compress.prune(model, skip=["7"]), "skip names"),
        (lambda: compress.prune(broken), r"weight 2\.weight holds NaN"),
        (lambda: compress.prune_threshold(model, threshold=-1), "give 0 or more"),
        (lambda: compress.clip_weights(model, alpha=float("nan")), "give 0 or more"),
        (lambda: compress.prune_gradually(model, blobs, rounds=0), "rounds is 0; give 1 or more"),
        (lambda: compress.prune_gradually(model, blobs, schedule="sudden"), "choose from"),
        (lambda: compress.rewind(compress.prune(model), nn.Linear(2, 3)), "another shape"),
        (lambda: compress.rewind(compress.binarize(model), model), "rewind before that step"),
    ]
    for call, message in refusals:
        with pytest.raises(ValueError, match=message):
            call()
