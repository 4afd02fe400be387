"""Structured pruning: what goes, what stays, and that the rest computes the same."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import Branching, two_inputs
from torch import Tensor, nn

from workbench import compress, data, deploy, measure, models
from workbench.compress import prune_structured, structured


def task_of(inputs: tuple[Tensor, ...] | Tensor, classes: int = 4) -> data.Task:
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, classes, (len(inputs[0]),), generator=generator)
    split = (*inputs, target)
    return data.task(split, split, split)


def mlp(width: int = 24, depth: int = 1, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), *hidden, nn.Linear(width, 4)).eval()


def vectors(count: int = 32, size: int = 6) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(1))


def images(channels: int = 3, count: int = 8) -> Tensor:
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(1))


def reasons(model: nn.Module) -> dict[str, str]:
    return dict(compress.coverage(model)[["layer", "reason"]].itertuples(index=False))


class Convolutions(nn.Module):
    """Grouped, depthwise, transposed, concatenated and flattened, with norms of three kinds."""

    def __init__(self, groups: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.InstanceNorm2d(16, affine=True)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=groups)
        self.activation = nn.PReLU(24)
        self.bare_norm = nn.BatchNorm2d(24, affine=False)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.transposed = nn.ConvTranspose2d(24, 16, 2, stride=2, groups=groups)
        self.last = nn.Conv2d(32, 8, 3, stride=4)
        self.out = nn.Linear(8 * 4 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.norm(self.conv(x)).relu()
        x = self.bare_norm(self.activation(self.grouped(first)))
        x = self.transposed(torch.sigmoid(self.depthwise(x)))
        x = torch.cat([x, F.interpolate(first, scale_factor=2)], 1)
        return self.out(self.last(x).flatten(1))


class Line(nn.Module):
    """Conv1d or Conv3d, with bias, then the mean over all places."""

    def __init__(self, dims: int):
        super().__init__()
        conv, norm = {1: (nn.Conv1d, nn.BatchNorm1d), 3: (nn.Conv3d, nn.BatchNorm3d)}[dims]
        self.first, self.norm = conv(3, 12, 3, padding=1), norm(12)
        self.second, self.out = conv(12, 10, 3, padding=1), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.norm(self.first(x)).relu()).flatten(2).mean(2))


class Twice(nn.Module):
    """The same layer twice in a row: its inputs and outputs are the same channels."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.out = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.again(self.again(self.first(x)).relu()).relu())


class Mixed(nn.Module):
    """Layers that no channel can be taken from, between some that can lose them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.hidden, self.out = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:  # (batch, positions, 6)
        x = self.second(self.first(x).relu())
        x, _ = self.attention(x, x, x)
        x, _ = self.lstm(x)
        return self.out(self.hidden(x[:, -1]).relu())


class Together(nn.Module):
    """Channels that a function takes together: torch-pruning follows them as if they were not."""

    def __init__(self, function):
        super().__init__()
        self.first, self.middle = nn.Linear(6, 16), nn.Linear(16, 16)
        self.out, self.function = nn.Linear(16, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.middle(self.function(self.first(x))).relu())


NETWORKS = {
    "mlp": lambda: (mlp(depth=2), vectors()),
    "two inputs, tied, depthwise": two_inputs,
    "convolutions": lambda: (Convolutions(), images()),
    "residual": lambda: (models.resnet((16, 32), blocks=1, classes=4), images(1)),
    "lenet-5": lambda: (models.lenet_5(), torch.rand(4, 1, 28, 28)),
    "1d": lambda: (Line(1), torch.randn(4, 3, 9)),
    "3d": lambda: (Line(3), torch.randn(4, 3, 4, 4, 4)),
    "a layer twice": lambda: (Twice(), vectors()),
    "transformer": lambda: (
        models.CharTransformer(symbols=9, context=8, width=24, depth=2, heads=3),
        torch.randint(0, 9, (8, 8)),
    ),
    "lstm and torch's attention": lambda: (Mixed(), torch.randn(4, 5, 6)),
}


def network(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(seed)
    model, inputs = NETWORKS[name]()
    with torch.no_grad():  # statistics and biases that are not all the same
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor += 0.1 * torch.rand_like(tensor)
    return model.eval(), inputs if isinstance(inputs, tuple) else (inputs,)


@pytest.mark.parametrize("importance", ["l1", "l2", "taylor"])
@pytest.mark.parametrize("name", NETWORKS)
def test_fewer_channels_run_train_and_keep_the_shape_of_the_output(name, importance):
    model, inputs = network(name)
    language = name == "transformer"
    task = data.task((*inputs, inputs[0]), (*inputs, inputs[0]), (*inputs, inputs[0]))
    task = task if language else task_of(inputs, 10 if name == "lenet-5" else 4)
    share = 0.9 if name == "lstm and torch's attention" else 0.7  # of which little can go
    small = prune_structured(model, task, macs=share, importance=importance, round_to=1)
    before, after = (measure.macs(m, task.example_input) for m in (model, small))
    assert 0.5 * before < after <= share * before
    assert measure.parameters(small) < measure.parameters(model)
    output = small(*inputs)
    assert output.shape == model(*inputs).shape
    output.sum().backward()
    assert small(*(x[:1] for x in inputs)).shape[0] == 1


@pytest.mark.parametrize(
    ("name", "widths"),
    {
        "mlp": [24, 24, 24],
        "two inputs, tied, depthwise": [16],
        "convolutions": [4, 6, 4, 8],  # of four groups each, but for the last
        "residual": [16, 16, 32, 32],
        "lenet-5": [20, 50, 500],
        "1d": [12, 10],
        "3d": [12, 10],
        "a layer twice": [16],
        "transformer": [96, 96],
        "lstm and torch's attention": [16, 16],
    }.items(),
)
def test_every_channel_that_can_go_is_found(name, widths):
    model, inputs = network(name)
    found = structured._find(model, tuple(x[:1] for x in inputs), [])
    assert [len(group) for group in found.groups] == widths
    assert [len(group) for group in found.heads] == ([3, 3] if name == "transformer" else [])


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_left_computes_the_same_as_if_nothing_read_what_went(name):
    """The oracle: each group, every channel alone, on other inputs than the search saw."""
    model, inputs = network(name)
    found = structured._find(model, tuple(x[:1] for x in inputs), [])
    assert found.groups
    for group in [*found.groups, *found.heads]:
        for channel in group[:: max(1, len(group) // 4)]:
            silent, small = copy.deepcopy(model), copy.deepcopy(model)
            tensors = dict(silent.named_parameters())
            for tensor, dim, index in channel:
                if (tensor, dim) in found.reads:
                    tensors[tensor].data.select(dim, index).zero_()
            structured._remove(small, [channel])
            torch.testing.assert_close(small(*inputs), silent(*inputs), rtol=1e-4, atol=1e-5)


def test_the_neurons_of_a_plain_network_that_go_are_those_of_the_smallest_norm():
    """A brute force, for each norm: sort the rows and index the weights."""
    for importance, power in (("l1", 1), ("l2", 2)):
        model = mlp(depth=0)
        small = prune_structured(
            model, task_of(vectors()), sparsity=0.5, importance=importance, round_to=1
        )
        kept = model[0].weight.norm(p=power, dim=1).argsort()[12:].sort().values
        assert torch.equal(small[0].weight, model[0].weight[kept])
        assert torch.equal(small[0].bias, model[0].bias[kept])
        assert torch.equal(small[2].weight, model[2].weight[:, kept])
        assert torch.equal(small[2].bias, model[2].bias)


def test_taylor_is_the_gradient_at_a_gate_on_each_channel():
    """The oracle: autograd on factors of one that multiply what is read."""
    model, task = mlp(depth=0), task_of(vectors(200))
    found = structured._find(model, task.example_input, [])
    scores = structured._taylor(model, task, found, samples=180, seed=0)
    expected = torch.zeros(24)
    for (x,), y in task.train.subset(180, seed=0).batches(128):
        gate = torch.ones(24, requires_grad=True)
        loss = F.cross_entropy(model[2](model[1](model[0](x)) * gate), y)
        expected += torch.autograd.grad(loss, gate)[0] ** 2
    got = torch.tensor([scores[channel] for channel in found.groups[0]])
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-9)


def test_the_least_read_channel_goes_first_under_taylor():
    model = mlp(depth=0)
    model[2].weight.data[:, 5] = 0  # large weights make it, but nothing reads it
    model[0].weight.data[5] *= 10
    small = prune_structured(
        model, task_of(vectors()), sparsity=1 / 24, importance="taylor", round_to=1
    )
    kept = [i for i in range(24) if i != 5]
    assert torch.equal(small[0].weight, model[0].weight[kept])


@given(
    width=st.integers(1, 40),
    depth=st.integers(0, 2),
    sparsity=st.floats(0, 0.9),
    round_to=st.sampled_from([1, 4, 8]),
    scope=st.sampled_from(["global", "layer"]),
)
def test_a_share_of_channels_goes(width, depth, sparsity, round_to, scope):
    model, groups = mlp(width, depth), depth + 1
    total = width * groups if width > 1 else 0  # a single channel always stays
    settings = {"sparsity": sparsity, "round_to": round_to, "scope": scope}
    task = task_of(vectors(4))
    if total - math.ceil(sparsity * total - 1e-6) < (groups if total else 0):
        with pytest.raises(ValueError, match="out of reach"):
            prune_structured(model, task, **settings)
        return
    if sparsity * total < 1e-6 or total == 0:
        return
    small = prune_structured(model, task, **settings)
    kept = [layer.out_features for layer in small if isinstance(layer, nn.Linear)][:-1]
    assert min(kept) >= 1
    assert sum(kept) <= (1 - sparsity) * total + 1e-6
    assert sum(kept) > (1 - sparsity) * total - round_to
    assert all(n % round_to == 0 for n in kept if round_to < n < width)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("target", ["macs", "parameters"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
def test_the_target_is_kept_and_nearly_reached(target, share, scope):
    model, inputs = network("residual")
    task = task_of(inputs)
    settings = {target: share, "scope": scope, "round_to": 1}
    if share == 1:
        with pytest.warns(UserWarning, match="nothing pruned"):
            small = prune_structured(model, task, **settings)
        assert torch.equal(small(*inputs), model(*inputs))
        return
    small = prune_structured(model, task, **settings)
    count = {
        "macs": lambda m: measure.macs(m, task.example_input),
        "parameters": measure.parameters,
    }[target]
    assert 0.95 * share <= count(small) / count(model) <= share


def test_what_rounding_took_too_much_of_is_given_back():
    """Of 20 and 50 channels in eights: without giving back, the MACs fall from 0.5 to 0.31."""
    task = task_of(torch.rand(4, 1, 28, 28), 10)
    model = models.build("lenet-5")
    small = prune_structured(model, task, macs=0.5, scope="layer")
    before, after = (measure.macs(m, task.example_input) for m in (model, small))
    assert 0.45 * before < after <= 0.5 * before


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_are_counted_as_the_measurements_count_them(name):
    model, inputs = network(name)
    one = tuple(x[:1] for x in inputs)
    assert structured._macs(model, one) == measure.macs(model, one)
    assert torch.backends.mkldnn.enabled


def test_layer_scope_takes_the_same_share_everywhere_and_global_does_not():
    model = mlp(depth=1)
    model[0].weight.data[:12] /= 100  # half of the first layer hardly matters
    task = task_of(vectors())
    settings = {"sparsity": 0.25, "importance": "l1", "round_to": 1}
    assert [prune_structured(model, task, **settings, scope="layer")[i].out_features
            for i in (0, 2)] == [18, 18]  # fmt: skip
    assert [prune_structured(model, task, **settings)[i].out_features for i in (0, 2)] == [12, 24]


@pytest.mark.parametrize("importance", ["l1", "l2"])
def test_the_size_of_all_weights_of_a_layer_does_not_matter(importance):
    model, scaled = mlp(depth=1), mlp(depth=1)
    scaled[0].weight.data /= 128  # a power of two, so that rounding is the same
    settings = {"sparsity": 0.5, "importance": importance, "round_to": 1}
    one, other = (prune_structured(m, task_of(vectors()), **settings) for m in (model, scaled))
    assert [one[i].out_features for i in (0, 2)] == [other[i].out_features for i in (0, 2)]
    assert torch.equal(one[0].weight / 128, other[0].weight)


def test_counts_are_multiples_where_a_layer_is_wide_enough():
    model = mlp(40, depth=1)
    for sparsity in (0.3, 0.5, 0.7):
        small = prune_structured(model, task_of(vectors()), sparsity=sparsity)
        assert all(small[i].out_features % 8 == 0 for i in (0, 2))
    tiny = prune_structured(mlp(10, depth=0), task_of(vectors()), sparsity=0.5)
    assert tiny[0].out_features == 5


@pytest.fixture(scope="module")
def transformer() -> tuple[nn.Module, data.Task]:
    torch.manual_seed(0)
    model = models.CharTransformer(symbols=9, context=8, width=48, depth=3, heads=4).eval()
    codes = torch.randint(0, 9, (16, 8))
    return model, data.task((codes, codes), (codes, codes), (codes, codes))


@pytest.mark.parametrize("importance", ["l1", "l2", "taylor"])
def test_heads_and_neurons_of_a_transformer_go_in_one_call(transformer, importance):
    model, task = transformer
    small = prune_structured(model, task, sparsity=0.5, heads=0.25, importance=importance)
    assert sum(block.attention.heads for block in small.blocks) == 9  # of 12
    assert sum(block.mlp[0].out_features for block in small.blocks) == 3 * 192 / 2
    for block in small.blocks:
        heads = block.attention.heads
        assert heads >= 1
        assert block.attention.query_key_value.weight.shape == (3 * heads * 12, 48)
        assert block.attention.out.weight.shape == (48, heads * 12)
        assert block.attention.scale == model.blocks[0].attention.scale
    assert small.head.weight is small.embedding.weight
    assert small.embedding.weight.shape == (9, 48)
    assert small(*task.example_input).shape == (1, 8, 9)
    assert "25% of heads" in compress.steps(small)[0]


def test_a_removed_head_is_one_whose_output_was_zeroed(transformer):
    model, task = transformer
    model = copy.deepcopy(model)
    attention = model.blocks[1].attention
    rows = torch.arange(144).view(3, 4, 12)
    attention.query_key_value.weight.data[rows[:, 2].flatten()] *= 1e-3
    small = prune_structured(model, task, sparsity=0, heads=1 / 12)
    assert [block.attention.heads for block in small.blocks] == [4, 3, 4]
    attention.out.weight.data[:, 24:36] = 0
    torch.testing.assert_close(small(*task.example_input), model(*task.example_input))


def test_one_head_stays_in_each_attention(transformer):
    model, task = transformer
    small = prune_structured(model, task, sparsity=0, heads=0.75)
    assert [block.attention.heads for block in small.blocks] == [1, 1, 1]
    with pytest.raises(ValueError, match=r"each attention keeps one; give 0\.75 or less"):
        prune_structured(model, task, sparsity=0, heads=0.9)


def test_an_attention_of_another_layout_keeps_its_heads(transformer):
    class Interleaved(models.Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.query_key_value(x).unflatten(-1, (self.heads, 3, -1)).unbind(-2)
            scores = q.transpose(1, 2) @ k.transpose(1, 2).mT * self.scale
            return self.out((scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).flatten(2))

    model, task = copy.deepcopy(transformer[0]), transformer[1]
    for block in model.blocks:
        block.attention.__class__ = Interleaved
    with pytest.raises(ValueError, match="no attention was found"):
        prune_structured(model, task, heads=0.25)
    assert (
        "is not laid out"
        in reasons(prune_structured(model, task))["blocks.0.attention.query_key_value"]
    )


def test_what_is_left_says_why():
    model, inputs = network("lstm and torch's attention")
    small = prune_structured(model, task_of(inputs), round_to=1)
    why = reasons(small)
    assert small.first.out_features + small.hidden.out_features == 16
    assert why["first"] == why["second"] == why["hidden"] == why["out"] == ""
    assert small.second.out_features == 16
    assert why["lstm"] == "no channel can be removed from this LSTM"
    assert why["attention"] == "MultiheadAttention is of a kind that is not handled"
    why = reasons(prune_structured(model, task_of(inputs), skip=["first", "hidden"], sparsity=0))
    assert why["first"] == why["hidden"] == "in skip"
    assert "reach attention (MultiheadAttention), which takes them all" in why["second"]
    assert why["out"] == "its channels are outputs of the model"


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.softmax(-1),
        lambda x: x - x.mean(-1, keepdim=True),
        lambda x: x.flip(-1),
        lambda x: x.unflatten(-1, (2, 8)).transpose(1, 2).flatten(1),
        lambda x: F.normalize(x, dim=-1),
    ],
    ids=["softmax", "mean", "flip", "shuffle", "normalize"],
)
def test_channels_that_are_taken_together_stay(function):
    torch.manual_seed(0)
    small = prune_structured(Together(function), task_of(vectors()), round_to=1)
    assert small.first.out_features == 16
    assert small.middle.out_features == 8
    assert "do not compute the same" in reasons(small)["first"]


def test_skip_keeps_the_channels_of_a_layer():
    model = mlp(depth=1)
    small = prune_structured(model, task_of(vectors()), skip=["0"], sparsity=0.5)
    assert small[0].out_features == 24
    assert small[2].weight.shape == (8, 24) or small[2].out_features <= 12
    assert reasons(small)["0"] == "in skip"


def test_tied_weights_stay_tied_and_frozen_ones_frozen():
    model, inputs = network("two inputs, tied, depthwise")
    for parameter in [*model.conv.parameters(), *model.norm.parameters()]:
        parameter.requires_grad_(False)
    model.norm2.train()
    small = prune_structured(model, task_of(inputs), sparsity=0.5)
    assert small.first.weight is small.second.weight
    assert small.first.weight.shape == (8, 8)
    assert {name: p.requires_grad for name, p in small.named_parameters()} == {
        name: p.requires_grad for name, p in model.named_parameters()
    }
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]


def test_bfloat16_stays_bfloat16():
    model = mlp().bfloat16()
    small = prune_structured(model, task_of(vectors().bfloat16()), importance="taylor")
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert small(vectors().bfloat16()).dtype == torch.bfloat16


def test_equal_channels_go_in_a_fixed_order_and_nan_is_refused():
    model = mlp()
    for parameter in model.parameters():
        parameter.data.fill_(1)
    task = task_of(vectors())
    first, second = (prune_structured(model, task, sparsity=0.5) for _ in range(2))
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    model[0].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="holds NaN"):
        prune_structured(model, task)


def test_the_seed_draws_the_examples():
    model, task = mlp(), task_of(vectors(300))
    settings = {"importance": "taylor", "samples": 16, "round_to": 1}
    one, same, other = (prune_structured(model, task, **settings, seed=s) for s in (0, 0, 1))
    torch.testing.assert_close(one.state_dict(), same.state_dict(), rtol=0, atol=0)
    assert any(
        a.shape != b.shape or not torch.equal(a, b)
        for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "technique", [compress.quantize_weights, partial(compress.quantize_dynamic, minimum_weights=0)]
)
def test_computed_weights_become_dense_first(technique):
    model, inputs = network("two inputs, tied, depthwise")
    small = prune_structured(technique(model), task_of(inputs))
    assert set(compress.coverage(small).stored_as) == {"float"}
    assert set(compress.coverage(small).activations) == {"float"}
    assert small.first.weight is small.second.weight
    assert len(compress.steps(small)) == 2


def test_pruned_channels_go_first():
    model = mlp(depth=0)
    keep = torch.ones(24, 6, dtype=torch.bool)
    keep[[3, 7, 11]] = False
    masked = copy.deepcopy(model)
    compress.computed.compute_weight(
        masked[0], "weight", compress.computed.MaskedWeight(masked[0].weight, keep)
    )
    small = prune_structured(masked, task_of(vectors()), sparsity=3 / 24, round_to=1)
    kept = [i for i in range(24) if i not in (3, 7, 11)]
    assert type(small[0]) is nn.Linear
    assert torch.equal(small[0].weight, model[0].weight[kept])


def test_int8_and_onnx_take_the_result(transformer):
    model, inputs = network("residual")
    task = task_of(inputs)
    small = prune_structured(model, task, macs=0.5)
    assert measure.artifact_bytes(small) < measure.artifact_bytes(model)
    expected = small(*task.example_input)
    session = deploy.prepare(small, runtime="onnxruntime", example_input=task.example_input)
    torch.testing.assert_close(session.predict(*task.example_input), expected, rtol=1e-3, atol=1e-4)
    int8 = compress.quantize_static(small, task)
    assert measure.artifact_bytes(int8) < measure.artifact_bytes(small)
    text, text_task = transformer
    small = prune_structured(text, text_task, sparsity=0.5, heads=0.25)
    session = deploy.prepare(small, runtime="onnxruntime", example_input=text_task.example_input)
    expected = small(*text_task.example_input)
    got = session.predict(*text_task.example_input)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_a_branch_on_values_is_followed_as_the_example_takes_it():
    model = Branching()
    with pytest.warns(UserWarning, match="nothing pruned"):
        small = prune_structured(model, task_of(torch.randn(4, 4)))
    assert reasons(small)["inner"] == "its channels are outputs of the model"


def test_a_model_of_one_layer_has_only_outputs():
    with pytest.warns(UserWarning, match="1 layers: its channels are outputs of the model"):
        prune_structured(nn.Linear(6, 4), task_of(vectors()))


ERRORS = {
    "two targets": ({"macs": 0.5, "sparsity": 0.5}, "sparsity and macs are both given"),
    "sparsity 1": ({"sparsity": 1.0}, r"sparsity is 1\.0; .* 0 <= sparsity < 1"),
    "sparsity nan": ({"sparsity": math.nan}, "sparsity is nan"),
    "macs 0": ({"macs": 0}, "macs is 0; .* 0 < macs <= 1"),
    "parameters 2": ({"parameters": 2}, "parameters is 2; .* 0 < parameters <= 1"),
    "heads 1": ({"heads": 1}, "heads is 1; .* 0 <= heads < 1"),
    "no heads": ({"heads": 0.5}, "no attention was found whose heads can be removed"),
    "importance": ({"importance": "size"}, "importance is 'size'; choose from"),
    "scope": ({"scope": "model"}, "scope is 'model'; choose from"),
    "round_to": ({"round_to": 0}, "round_to is 0; give an integer of 1 or more"),
    "samples": ({"samples": 0}, "samples is 0; give an integer of 1 or more"),
    "skip": ({"skip": ["nothing"]}, r"skip names \['nothing'\]"),
    "out of reach": ({"macs": 0.001}, r"0\.1% of the MACs is out of reach: .* would be left"),
}


@pytest.mark.parametrize(("settings", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        prune_structured(mlp(), task_of(vectors()), **settings)


def test_other_bad_input_is_refused():
    with pytest.raises(TypeError, match="task is a Tensor"):
        prune_structured(mlp(), vectors())
    with pytest.raises(TypeError, match="skip is the string"):
        prune_structured(mlp(), task_of(vectors()), skip="0")
    with pytest.raises(TypeError, match="model is a int"):
        prune_structured(3, task_of(vectors()))
    broken = vectors()
    broken[:] = math.nan
    with pytest.raises(ValueError, match="the loss on examples is nan"):
        prune_structured(mlp(), task_of(broken), importance="taylor")
    answers = nn.Sequential(mlp(), nn.Flatten())
    answers[1].forward = lambda x: x.argmax(-1)
    with pytest.raises(ValueError, match="no output of Sequential has a gradient"):
        prune_structured(answers, task_of(vectors()))
