"""Ranks that hold parts of the weights compute what one process does, with few collectives."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from workbench import models
from workbench.parallel import run
from workbench.parallel.tensor_parallel import (
    ColumnParallel,
    RowParallel,
    count_collectives,
    gather_tensors,
    plan_for,
    rank_bytes,
    shard_tensors,
)

TIMEOUT = 120.0
SYMBOLS, POSITIONS, WIDTH, DEPTH = 21, 8, 16, 2  # 21 does not divide among the ranks


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return models.CharTransformer(SYMBOLS, POSITIONS, width=WIDTH, depth=DEPTH, heads=2)


def with_batch_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 32), nn.Tanh(), nn.Linear(32, 10),
    )  # fmt: skip


def characters(seed: int):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(SYMBOLS, (4, POSITIONS + 1), generator=generator)
    return codes[:, :-1], codes[:, 1:]


def images(seed: int):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(4, 1, 28, 28, generator=generator)
    return x, torch.randint(10, (4,), generator=generator)


def loss_of(model, x, target):
    return F.cross_entropy(model(x).flatten(0, -2), target.flatten())


# name -> (model, batch, shape of the mesh, sequence)
CASES = {
    "transformer": (transformer, characters, (2,), False),
    "transformer, by positions": (transformer, characters, (2,), True),
    "CNN": (lambda: models.build("lenet-5"), images, (2,), False),
    "MLP": (lambda: models.build("lenet-300-100"), images, (2,), False),
    "batch norm": (with_batch_norm, images, (2,), False),
    "transformer, 2-D": (transformer, characters, (2, 2), False),
    "transformer, 2-D, by positions": (transformer, characters, (2, 2), True),
    "MLP, 2-D": (lambda: models.build("lenet-300-100"), images, (2, 2), False),
}


def alone(model, batches):
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, *batch).backward()
        optimizer.step()
    return model


def together(cases):
    """Each case trained on all ranks: the whole model, its gradients, counts and bytes."""
    results = {}
    for name, (model, batches, shape, sequence) in cases.items():
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor")[-len(shape) :])
        sharded = shard_tensors(model, mesh, sequence=sequence)
        optimizer = torch.optim.SGD(sharded.parameters(), lr=0.05, momentum=0.9)
        part, parts = (mesh.get_local_rank("data"), shape[0]) if len(shape) == 2 else (0, 1)

        def step(batch, model=sharded, optimizer=optimizer, part=part, parts=parts):
            optimizer.zero_grad()
            loss_of(model, *(tensor.chunk(parts)[part] for tensor in batch)).backward()
            optimizer.step()

        for batch in batches[:-1]:
            step(batch)
        counts = count_collectives(step, batches[-1])
        weights = gather_tensors(sharded, model).state_dict()
        size = rank_bytes(sharded, optimizer)
        with torch.no_grad():
            for parameter in sharded.parameters():  # what is gathered below is the gradient
                parameter.copy_(parameter.grad)
        results[name] = (
            weights,
            dict(gather_tensors(sharded, model).named_parameters()),
            counts,
            size,
        )
    return results


def ready(ranks: int) -> dict:
    return {
        name: (build(), [draw(seed) for seed in range(4)], shape, sequence)
        for name, (build, draw, shape, sequence) in CASES.items()
        if ranks == 2 ** len(shape)
    }


@pytest.fixture(scope="module")
def ran() -> dict:
    """By case: the model and what each rank returned."""
    found = {}
    for ranks in (2, 4):
        cases = ready(ranks)
        results = run(together, cases, world_size=ranks, timeout=TIMEOUT)
        found |= {name: (*case[:2], [r[name] for r in results]) for name, case in cases.items()}
    return found


def distance(found: dict, expected: dict) -> float:
    """Relative, over all tensors together."""
    far = sum(
        (found[name].double() - value.double()).square().sum() for name, value in expected.items()
    )
    return (far / sum(value.double().square().sum() for value in expected.values())).sqrt().item()


@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_one_process(ran, case):
    model, batches, results = ran[case]
    before = model.state_dict()
    expected = alone(model, batches)
    state = expected.state_dict()
    for weights, gradients, _, _ in results:
        assert weights.keys() == state.keys()
        assert distance(weights, state) < 1e-6
        moved = {name: value - before[name] for name, value in state.items()}
        moves = {name: weights[name] - before[name] for name in state}
        assert distance(moves, moved) < 1e-5  # only rounding is lost of what was learned
        wanted = {name: p.grad for name, p in expected.named_parameters()}
        assert distance(gradients, wanted) < 1e-6


def test_layers_by_hand():
    torch.manual_seed(0)
    first, second, x = nn.Linear(6, 8), nn.Linear(8, 5), torch.randn(3, 4, 6)
    upstream = torch.randn(3, 4, 5)

    def compute():
        column, row = ColumnParallel(first), RowParallel(second)
        own = x.clone().requires_grad_()

        def step():
            (row(column(own).relu()) * upstream).sum().backward()

        counts = count_collectives(step)
        return row(column(own).relu()).detach(), own.grad, counts, [
            p.grad for p in (column.weight, column.bias, row.weight, row.bias)
        ]  # fmt: skip

    own = x.clone().requires_grad_()
    y = second(first(own).relu())
    (y * upstream).sum().backward()
    for ranks in (1, 2, 4):
        results = run(compute, world_size=ranks, timeout=TIMEOUT)
        for rank, (output, gradient, counts, (w1, b1, w2, b2)) in enumerate(results):
            torch.testing.assert_close(output, y.detach())
            torch.testing.assert_close(gradient, own.grad)
            assert counts == {"all_reduce": 2}  # one forward, one backward
            torch.testing.assert_close(w1, first.weight.grad.chunk(ranks)[rank])
            torch.testing.assert_close(b1, first.bias.grad.chunk(ranks)[rank])
            torch.testing.assert_close(w2, second.weight.grad.chunk(ranks, 1)[rank])
            torch.testing.assert_close(b2, second.bias.grad)


def test_collectives_are_as_many_as_the_paper_says(ran):
    for *_, counts, _ in ran["transformer"][2]:
        # 2 forward and 2 backward in a block; the embedding forward, the output layer backward,
        # and its parts of the logits put together.
        assert counts == {"all_gather": 1, "all_reduce": 4 * DEPTH + 2}
    for case in ("CNN", "MLP"):
        # The input of the MLP needs no gradient; that of the head of the CNN does.
        assert ran[case][2][0][2] == {"all_reduce": 1 + (case == "CNN")}
    by_positions = ran["transformer, by positions"][2][0][2]
    assert by_positions["reduce_scatter"] >= 4 * DEPTH - 2


def test_bytes_of_each_rank(ran):
    model, _, results = ran["transformer"]
    cut = {"embedding", "query_key_value.weight", "query_key_value.bias", "attention.out.weight"}
    cut |= {"mlp.0.weight", "mlp.0.bias", "mlp.2.weight"}
    for rank, (*_, size) in enumerate(results):
        expected = 0
        for name, parameter in model.named_parameters():
            if name == "embedding.weight":
                expected += [11, 10][rank] * WIDTH * 4
            else:
                whole = not any(part in name for part in cut)
                expected += parameter.nbytes if whole else parameter.nbytes // 2
        assert size == {"parameters": expected, "gradients": expected, "optimizer": expected}
    model, _, results = ran["MLP, 2-D"]
    total = sum(size["parameters"] for *_, size in results)
    whole = sum(p.nbytes for p in model.parameters())
    replicated = sum(model[i].bias.nbytes for i in (3,)) + sum(
        p.nbytes for p in model[5].parameters()
    )
    assert total == whole + replicated  # one copy of each part, two of what no rank cuts


def test_bytes_without_gradients_or_optimizer():
    layer = nn.Linear(4, 2)
    layer.again = layer  # shared parameters count once
    assert rank_bytes(layer) == {"parameters": 40, "gradients": 0, "optimizer": 0}
    layer(torch.ones(1, 4)).sum().backward()
    adam = torch.optim.Adam(layer.parameters())
    adam.step()
    assert rank_bytes(layer, adam) == {"parameters": 40, "gradients": 40, "optimizer": 80 + 2 * 4}


def test_tied_weights_stay_tied_and_the_model_unchanged():
    model = transformer()
    before = copy.deepcopy(model.state_dict())

    def shard():
        sharded = shard_tensors(model, init_device_mesh("cpu", (2,)))
        same = sharded.head.weight is sharded.embedding.weight
        heads = [block.attention.heads for block in sharded.blocks]
        kinds = isinstance(sharded.head.weight, DTensor), isinstance(sharded.norm.weight, DTensor)
        unchanged = all(torch.equal(value, before[k]) for k, value in model.state_dict().items())
        return same, heads, kinds, unchanged and model.blocks[0].attention.heads == 2

    assert run(shard, timeout=TIMEOUT) == [(True, [1, 1], (True, False), True)] * 2


def test_plans():
    names = list(plan_for(models.build("mlp-wide")))
    assert names == ["1", "3"]  # the third layer is left: it has no partner
    chain = nn.Sequential(
        nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4),
        nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 4),
    )  # fmt: skip
    assert list(plan_for(chain)) == ["1", "3"]
    names = set(plan_for(transformer()))
    block = {"attention.query_key_value", "attention.out", "mlp.0", "mlp.2"}
    blocks = {f"blocks.{i}.{name}" for i in range(DEPTH) for name in block}
    assert names == blocks | {"embedding", "head"}
    more = set(plan_for(transformer(), sequence=True)) - names
    norms = {f"blocks.{i}.{name}" for i in range(DEPTH) for name in ("norm1", "norm2", "attention")}
    assert more == norms | {"norm", "blocks"}


def test_refusals_say_what_to_do():
    with pytest.raises(ValueError, match="Linear has no pair of linear layers with an activation"):
        plan_for(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="sequence is for CharTransformer; Sequential has no"):
        plan_for(models.build("mlp-wide"), sequence=True)

    def refuse():
        def message(function, *args, **kwargs):
            try:
                function(*args, **kwargs)
            except ValueError as error:
                return str(error)
            return "not refused"

        mesh = init_device_mesh("cpu", (3,))
        model = models.CharTransformer(SYMBOLS, 9, width=12, depth=1, heads=3)
        sharded = shard_tensors(model, mesh, sequence=True)
        odd = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        return [
            message(shard_tensors, transformer(), mesh),
            message(shard_tensors, odd, mesh),
            message(sharded, torch.zeros(1, 8, dtype=torch.long)),
            message(shard_tensors, odd, init_device_mesh("cpu", (3, 1))),
            message(shard_tensors, odd, init_device_mesh("cpu", (3, 1, 1))),
            message(ColumnParallel, nn.Linear(3, 4)),
            message(RowParallel, nn.Linear(4, 3)),
        ]

    expected = [
        "blocks.0.attention has 2 heads, which do not divide among 3 ranks; use as many ranks as",
        "2 has 8 inputs, which do not divide among 3 ranks; use as many",
        "8 positions do not divide among 3 ranks; pad the input, or use sequence=False",
        "the mesh has no names; give mesh_dim_names=('data', 'tensor')",
        "the mesh has 3 dimensions; give (tensor) or (data, tensor)",
        "4 outputs do not divide among 3 ranks",
        "4 inputs do not divide among 3 ranks",
    ]
    for messages in run(refuse, world_size=3, timeout=TIMEOUT):
        for message, start in zip(messages, expected, strict=True):
            assert message.startswith(start)
