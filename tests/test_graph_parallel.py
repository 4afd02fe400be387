"""Branches run side by side must give the bits of the sequential model, or be refused by name."""

import copy
import ctypes
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from workbench import models
from workbench.explore import plots
from workbench.parallel import graph_parallel, run
from workbench.parallel.graph_parallel import branches, gather_branches, parallelize_branches


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(make, *args):
    torch.manual_seed(0)
    return make(*args)


def tower(width: int, *last: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), *last)


class Towers(nn.Module):
    """A stem, two towers, and a head."""

    def __init__(self, first: nn.Module | None = None, second: nn.Module | None = None):
        super().__init__()
        self.stem = nn.Linear(32, 32)
        self.first = first or tower(32)
        self.second = second or tower(32)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.cat([self.first(x), self.second(x)], 1))


class Inception(nn.Module):
    """The module of Szegedy et al. (2015), with batch norms and relus that work in place."""

    def __init__(self, channels: int = 16):
        super().__init__()

        def conv(before: int, after: int, size: int) -> nn.Sequential:
            layer = nn.Conv2d(before, after, size, padding=size // 2)
            return nn.Sequential(layer, nn.BatchNorm2d(after), nn.ReLU(inplace=True))

        self.one = conv(channels, 16, 1)
        self.three = nn.Sequential(conv(channels, 12, 1), conv(12, 24, 3))
        self.five = nn.Sequential(conv(channels, 8, 1), conv(8, 12, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(channels, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class TwoInputs(nn.Module):
    """Codes and numbers; a recurrent branch that also gives its last state, and two outputs."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 24)
        self.read = nn.GRU(24, 24, batch_first=True)
        self.numbers = tower(24)

    def forward(self, codes: Tensor, numbers: Tensor, scale: float = 2.0) -> dict[str, Tensor]:
        hidden, last = self.read(self.words(codes))
        numbers = self.numbers(numbers) * scale
        return {"sum": hidden.mean(1) + last[0] + numbers, "best": numbers.argmax(1)}


SMALL = dict(least_flops=0)


def gradients(model: nn.Module, inputs: tuple[Tensor, ...], seed: int = 1) -> tuple[list, list]:
    """Outputs, and gradients of inputs and weights, of a sum with random factors."""
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = model(*inputs)
    outputs = list(outputs.values()) if isinstance(outputs, dict) else [outputs]
    generator = torch.Generator().manual_seed(seed)
    total = sum(
        (y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum()
        for y in outputs
        if y.requires_grad
    )
    model.zero_grad()
    total.backward()
    weights = dict(model.named_parameters())
    return outputs, [x.grad for x in inputs] + [weights[name].grad for name in sorted(weights)]


def same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


CASES = {
    "towers": (Towers, (torch.randn(8, 32),)),
    "inception": (Inception, (torch.randn(2, 16, 8, 8),)),
    "two inputs": (TwoInputs, (torch.arange(24).view(4, 6), torch.randn(4, 24))),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_gradients_and_buffers_are_the_same_bits(name, workers, training):
    make, inputs = CASES[name]
    model = seeded(make).train(training)
    side = parallelize_branches(model, inputs, workers=workers, **SMALL)
    assert list(side.state_dict()) == list(model.state_dict())
    for seed in range(3):
        outputs, grads = gradients(model, inputs, seed)
        side_outputs, side_grads = gradients(side, inputs, seed)
        assert same(outputs, side_outputs)
        assert same(grads, side_grads)
    assert same(list(model.state_dict().values()), list(side.state_dict().values()))
    with torch.no_grad():
        assert same(outputs, gradient_free(side, inputs))
    with torch.inference_mode():
        assert same(outputs, gradient_free(side, inputs))


def gradient_free(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    outputs = model(*inputs)
    outputs = list(outputs.values()) if isinstance(outputs, dict) else [outputs]
    assert not any(y.requires_grad for y in outputs)
    return outputs


class Random(nn.Module):
    """Branches of random depths, of which each reads the stem several times; some read others."""

    def __init__(self, depths: list[int], reads: list[int]):
        super().__init__()
        self.depths, self.reads = depths, reads
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(sum(depths) + 1))

    def forward(self, x: Tensor) -> Tensor:
        layers = iter(self.layers)
        stem = next(layers)(x).tanh()
        ends = []
        for depth, reads in zip(self.depths, self.reads, strict=True):
            y = stem
            for _ in range(depth):
                y = next(layers)(y).sigmoid()
            for i in range(reads):
                y = y * stem + i
            ends.append(y + ends[-1] if reads == 2 and ends else y)
        return sum(ends) + stem.cos() * stem


def split(frame) -> bool:
    """Whether any fork is split."""
    forks = frame[frame["left"] == ""].groupby("stretch")["branch"].max()
    return bool((forks > 0).any())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2)), min_size=2, max_size=5))
def test_any_number_of_branches_and_readers(shape):
    depths, reads = zip(*shape, strict=True)
    model = seeded(Random, depths, reads)
    x = seeded(torch.randn, 3, 6)
    frame = branches(model, x, **SMALL)
    nodes = torch.fx.symbolic_trace(model).graph.nodes
    assert frame["operations"].sum() == sum(node.op.startswith("call") for node in nodes)
    assert frame["parameters"].sum() == sum(p.numel() for p in model.parameters())
    assert split(frame)
    side = parallelize_branches(model, x, workers=3, **SMALL)
    found, wanted = gradients(side, (x,)), gradients(model, (x,))
    assert same(found[0], wanted[0])
    assert same(found[1], wanted[1])


def test_the_table_of_two_towers():
    frame = branches(Towers(), torch.randn(8, 32), **SMALL)
    layer = 2 * 8 * 32 * 32
    assert frame.to_dict("records") == [
        dict(stretch=0, branch=0, first="stem", last="stem", operations=1, parameters=1056,
             flops=layer, worker=0, starts_at=0, left=""),
        dict(stretch=1, branch=0, first="first.0", last="first.2", operations=3, parameters=2112,
             flops=2 * layer + 256, worker=0, starts_at=layer, left=""),
        dict(stretch=1, branch=1, first="second.0", last="second.2", operations=3, parameters=2112,
             flops=2 * layer + 256, worker=1, starts_at=layer, left=""),
        dict(stretch=2, branch=0, first="cat", last="head", operations=2, parameters=325,
             flops=2 * 8 * 64 * 5 + 8 * 64, worker=0, starts_at=3 * layer + 256, left=""),
    ]  # fmt: skip


def test_branches_go_to_the_worker_with_the_least_work():
    frame = branches(Inception(), torch.randn(2, 16, 8, 8), **SMALL)
    fork = frame[frame["stretch"] == 0].set_index("first")
    assert len(fork) == 4
    work = fork.groupby("worker")["flops"].sum()
    assert fork["flops"].idxmax() == "three.0.0"
    assert fork["worker"]["three.0.0"] == 0
    assert work.max() / work.sum() < 0.6
    for _, mine in fork.groupby("worker"):
        assert list(mine["starts_at"]) == [0, *mine["flops"].cumsum()][:-1]
    assert set(branches(Inception(), torch.randn(2, 16, 8, 8), workers=4, **SMALL)["worker"]) == {
        0, 1, 2, 3,
    }  # fmt: skip


def test_a_shortcut_is_too_little_to_share():
    frame = branches(models.build("resnet-8"), torch.randn(64, 1, 28, 28))
    forks = frame[frame.groupby("stretch")["branch"].transform("max") > 0]
    assert set(forks["first"]) >= {"4.conv1", "4.shortcut.0"}
    assert forks["left"].str.contains("too little to share").all()
    assert (forks["worker"] == 0).all()
    assert (frame["starts_at"] + frame["flops"]).max() == frame["flops"].sum()
    for name in ("lenet-5", "char-transformer"):
        example = torch.zeros(1, 16, dtype=torch.int64) if name[0] == "c" else frame_of(28)
        assert not split(branches(models.build(name), example))


def frame_of(size: int) -> Tensor:
    return torch.zeros(1, 1, size, size)


def test_least_flops_decides_what_is_shared():
    frame = branches(Towers(), torch.randn(8, 32), least_flops=33_024)
    assert split(frame)
    assert not split(branches(Towers(), torch.randn(8, 32), least_flops=33_025))
    assert not split(branches(Towers(), torch.randn(8, 32)))


def test_inside_of_a_branch_that_stays_whole_there_may_be_a_fork():
    inner = Towers()
    inner.head = nn.Linear(64, 32)
    model = Towers(nn.Sequential(inner), nn.Identity())
    frame = branches(model, torch.randn(8, 32), **SMALL)
    forks = frame[frame["worker"] == 1]
    assert list(forks["first"]) == ["first.0.second.0"]
    x = torch.randn(8, 32)
    side = parallelize_branches(model, x, **SMALL)
    assert same(gradients(side, (x,))[1], gradients(model, (x,))[1])


def test_branches_that_do_not_join_in_one_place_are_found_before_and_behind_it():
    class Late(Towers):
        def __init__(self):
            super().__init__()
            self.third, self.fourth = tower(32), tower(32)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            first, second = self.first(x), self.second(x)
            both = first + second
            return self.third(both) * self.fourth(both), second.cos()

    frame = branches(Late(), torch.randn(8, 32), **SMALL)
    assert list(frame[frame["worker"] == 1]["first"]) == ["second.0", "fourth.0"]


class Shared(Towers):
    """Siamese towers; ``once`` shares them also with a third use behind the join."""

    def __init__(self, *more: nn.Module):
        super().__init__(nn.Sequential(nn.Linear(32, 32), *more), nn.Identity())
        self.second = self.first


class Again(Towers):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.first(x))


class OwnCode(nn.Module):
    """A user's module without weights, which could keep anything."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class SameModule(Towers):
    def __init__(self):
        super().__init__()
        self.ours = OwnCode()

    def forward(self, x: Tensor) -> Tensor:
        return self.ours(self.first(x)) + self.ours(self.second(x))


class Counts(Towers):
    """Both branches count in one buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x) + self.calls.add_(1)
        return first + self.second(x) * self.calls.add_(1)


class InPlace(Towers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.first(x.relu_()) + self.second(x)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


REFUSED = {
    "first.0.bias is trained in 2 branches": Shared,
    "first.0.bias is trained, and used outside": Again,
    "ours is called in 2 branches, and it cannot be seen what it keeps": SameModule,
    "calls is written to in 2 branches": Counts,
    "relu_ changes in place what was given": InPlace,
    "first.0 draws random numbers": lambda: Towers(nn.Sequential(nn.Dropout(0.5), tower(32))),
    "too little to share: 256 of 33,280 FLOPs": lambda: Towers(nn.Identity(), tower(32)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_order_would_change_is_refused(message):
    model = REFUSED[message]()
    x = torch.randn(8, 32)
    with pytest.raises(ValueError, match=message):
        parallelize_branches(model, x, **SMALL)
    assert branches(model, x, **SMALL)["left"].str.contains(message).any()


def test_batch_norm_in_both_branches_is_refused_in_training():
    model = Shared(nn.BatchNorm1d(32, affine=False)).requires_grad_(False)
    x = torch.randn(8, 32)
    with pytest.raises(
        ValueError, match=r"first\.1\.num_batches_tracked is written to in 2 branches"
    ):
        parallelize_branches(model, x, **SMALL)
    side = parallelize_branches(model.eval(), x, **SMALL)
    assert torch.equal(side(x), model(x))
    with pytest.raises(ValueError, match=r"in training mode this fork cannot .* is written to"):
        side.train()(x)


def test_dropout_is_refused_only_where_it_draws():
    model = Towers(tower(32, nn.Dropout(0.5))).eval()
    x = torch.randn(8, 32)
    state = torch.get_rng_state()
    side = parallelize_branches(model, x, **SMALL)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(side(x), model(x))
    with pytest.raises(ValueError, match=r"in training mode .* first\.3 draws random numbers"):
        side.train()(x)
    assert torch.equal(side.eval()(x), model(x))


def test_a_model_that_asks_for_its_mode_is_bound_to_it():
    class Asks(Towers):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.5, self.training)

    side = parallelize_branches(Asks().eval(), torch.randn(8, 32), **SMALL)
    with pytest.raises(ValueError, match="training is True, and was False when the graph was made"):
        side.train()(torch.randn(8, 32))


def test_errors_say_what_to_do():
    x = torch.randn(8, 32)
    chain = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    for call in (branches, parallelize_branches):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got str"):
            call("model", x)
        with pytest.raises(TypeError, match="example is list; give a tensor or a tuple"):
            call(Towers(), [x])
        with pytest.raises(ValueError, match="workers is 1; give a whole number from 2"):
            call(Towers(), x, workers=1)
        with pytest.raises(ValueError, match="least_flops is -1; give 0 or more"):
            call(Towers(), x, least_flops=-1)
        with pytest.raises(ValueError, match="Towers does not run on the example: RuntimeError"):
            call(Towers(), torch.randn(8, 31))
        with pytest.raises(ValueError, match="forward pass of Branching cannot be traced"):
            call(Branching(), x)
    with pytest.raises(ValueError, match="how is 'processes'; choose from"):
        parallelize_branches(Towers(), x, how="processes")
    with pytest.raises(ValueError, match="how='streams' is for CUDA"):
        parallelize_branches(Towers(), x, how="streams")
    with pytest.raises(ValueError, match="needs as many ranks, and there are 0; call it in a"):
        parallelize_branches(Towers(), x, how="ranks")
    with pytest.raises(ValueError, match="Sequential has no branches: its 2 operations wait"):
        parallelize_branches(chain, x)
    with pytest.raises(ValueError, match=r"1\.0 could not be looked into \(TraceError"):
        parallelize_branches(nn.Sequential(chain, nn.Sequential(Branching())), x)


def test_a_submodule_that_cannot_be_traced_is_one_operation():
    model = Towers(tower(32, Branching()), tower(32, Branching()))
    x = torch.randn(8, 32)
    frame = branches(model, x, **SMALL)
    assert list(frame["last"]) == ["stem", "first.3", "second.3", "head"]
    side = parallelize_branches(model, x, **SMALL)
    assert same(gradients(side, (x,))[1], gradients(model, (x,))[1])


def test_the_callers_model_is_unchanged():
    model = seeded(Inception)
    before = copy.deepcopy(model.state_dict())
    side = parallelize_branches(model, torch.randn(2, 16, 8, 8), **SMALL)
    with torch.no_grad():
        for tensor in side.state_dict().values():
            tensor.zero_()
    side(torch.randn(2, 16, 8, 8))
    assert same(list(before.values()), list(model.state_dict().values()))


def test_weights_move_over_copies_are_whole_and_types_change():
    x = torch.randn(8, 32)
    model, other = Towers(), Towers()
    side = parallelize_branches(model, x, **SMALL)
    twin = copy.deepcopy(side)
    side.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(side(x), other(x))
    assert torch.equal(twin(x), model(x))
    assert torch.equal(side.double()(x.double()), other.double()(x.double()))


def test_frozen_weights_get_no_gradient():
    x = torch.randn(8, 32)
    model = Towers().requires_grad_(False)
    model.second.requires_grad_(True)
    side = parallelize_branches(model, x, **SMALL)
    assert same(gradients(side, (x,))[1], gradients(model, (x,))[1])
    assert side.first[0].weight.grad is None
    model.second.requires_grad_(False)
    assert not parallelize_branches(model, x, **SMALL)(x).requires_grad


def test_an_output_of_frozen_weights_needs_no_gradient():
    class Both(Towers):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.first(x), self.second(x)

    model = Both()
    model.first.requires_grad_(False)
    outputs = parallelize_branches(model, x := torch.randn(8, 32), **SMALL)(x)
    assert [y.requires_grad for y in outputs] == [False, True]


def test_what_the_caller_set_for_its_thread_holds_in_the_others():
    x = torch.randn(8, 32)
    model = Towers()
    side = parallelize_branches(model, x, **SMALL)
    for setting in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu")):
        with setting:
            assert same([side(x)], [model(x)])
    with torch.autocast("cpu"):
        loss, wanted = side(x).sum(), model(x).sum()
    loss.backward()
    wanted.backward()
    assert all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(side.parameters(), model.parameters(), strict=True)
    )


class Where(nn.Module):
    """Notes in which thread it runs, and with how many threads for each operation."""

    def __init__(self, notes: dict, name: str):
        super().__init__()
        self.notes, self.name = notes, name

    def __deepcopy__(self, memo):
        return Where(self.notes, self.name)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() == x.sum():  # not to be traced
            self.notes[self.name] = (threading.get_ident(), torch.get_num_threads())
        return x


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads_are_shared_out_and_given_back(threads):
    notes = {}
    model = Towers(tower(32, Where(notes, "first")), tower(32, Where(notes, "second")))
    x = torch.randn(8, 32)
    side = parallelize_branches(model, x, **SMALL)
    notes.clear()
    torch.set_num_threads(threads)
    side(x).sum().backward()
    assert torch.get_num_threads() == threads
    assert notes["first"][0] == threading.get_ident() != notes["second"][0]
    assert notes["first"][1] == notes["second"][1] == max(1, threads // 2)


def test_threads_that_wait_for_operations_leave_their_cores_to_branches():
    tasks = Path("/proc/self/task")
    if not tasks.exists() or not hasattr(ctypes.CDLL(None), "omp_pause_resource_all"):
        pytest.skip("needs the list of threads of Linux, and OpenMP 5")
    side = parallelize_branches(Towers(), x := torch.randn(8, 32), **SMALL)
    side(x)
    torch.set_num_threads(2)
    before = set(tasks.iterdir())
    torch.zeros(1_000_000).relu()
    (waiting,) = set(tasks.iterdir()) - before
    side(x)
    stop_at = time.monotonic() + 10
    while waiting.exists() and time.monotonic() < stop_at:
        time.sleep(0.01)
    assert not waiting.exists()
    assert torch.ones(1_000_000).relu().sum() == 1_000_000  # new ones are there when needed


def test_backward_runs_on_the_threads_as_well():
    x = torch.randn(8, 32)
    side = parallelize_branches(Towers(), x, **SMALL)
    seen = {}
    for name in ("first", "second"):
        layer = getattr(side, name)[1]
        layer.register_full_backward_hook(
            lambda *_, name=name: seen.update({name: threading.get_ident()})
        )
    side(x).sum().backward()
    assert seen["first"] != seen["second"]


def test_a_branch_that_fails_raises_here_and_leaves_the_threads_as_they_were():
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.isnan().any():
                raise RuntimeError("not a number")
            return x

    side = parallelize_branches(
        Towers(tower(32), tower(32, Fails())), x := torch.randn(8, 32), **SMALL
    )
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="not a number"):
        side(x * torch.nan)
    assert torch.get_num_threads() == 2
    assert torch.isfinite(side(x)).all()


def test_backward_once():
    x = torch.randn(8, 32, requires_grad=True)
    side = parallelize_branches(Towers(), x, **SMALL)
    loss = side(x).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can go backward once; call forward again"):
        loss.backward()
    (first,) = torch.autograd.grad(side(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_join_that_works_in_place():
    class Adds(Towers):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.first(x).add_(self.second(x)).relu_()

    model, x = Adds(), torch.randn(8, 32)
    side = parallelize_branches(model, x, **SMALL)
    assert same(gradients(side, (x,))[1], gradients(model, (x,))[1])


def test_a_parallel_model_within_a_branch():
    x = torch.randn(8, 32)
    inner = Towers()
    inner.head = nn.Linear(64, 32)
    model = Towers(parallelize_branches(inner, x, **SMALL), parallelize_branches(inner, x, **SMALL))
    side = parallelize_branches(model, x, **SMALL)
    assert same(gradients(side, (x,))[1], gradients(model, (x,))[1])


def test_training_gives_the_same_weights():
    model = seeded(Inception)
    side = parallelize_branches(model, torch.randn(4, 16, 8, 8), **SMALL)
    for network in (model, side):
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            optimizer.zero_grad()
            network(torch.randn(4, 16, 8, 8, generator=generator)).square().mean().backward()
            optimizer.step()
    assert same(list(model.state_dict().values()), list(side.state_dict().values()))


def on_ranks(workers: int) -> tuple:
    """Train on ranks and alone, from different weights on each rank."""
    torch.manual_seed(dist.get_rank())
    model = Inception()
    side = parallelize_branches(
        model, torch.randn(4, 16, 8, 8), how="ranks", workers=workers, least_flops=0
    )
    torch.manual_seed(0)
    alone = Inception()
    x = torch.randn(4, 16, 8, 8)
    for network in (side, alone):
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            inputs = x.clone().requires_grad_()
            network(inputs).square().mean().backward()
            optimizer.step()
            network.input_gradient = inputs.grad
    with torch.no_grad():
        assert torch.equal(side.eval()(x), alone.eval()(x))
    owned = [name for name, p in side.named_parameters() if p.grad is not None]
    gather_branches(side)
    states = zip(side.state_dict().values(), alone.state_dict().values(), strict=True)
    error = max((a - b).abs().max().item() for a, b in states)
    gradient_error = (side.input_gradient - alone.input_gradient).abs().max().item()
    return owned, error, gradient_error


def test_one_rank_for_each_branch():
    results = run(on_ranks, 2, world_size=2, timeout=120)
    owned = [set(result[0]) for result in results]
    assert owned[0] | owned[1] == {name for name, _ in Inception().named_parameters()}
    assert not owned[0] & owned[1]
    assert all(owned)
    for _, error, gradient_error in results:
        assert error == gradient_error == 0


def refused_on_ranks() -> str:
    try:
        parallelize_branches(Towers(tower(32), nn.Dropout()), torch.randn(8, 32), how="ranks")
    except ValueError as error:
        return str(error)


def test_ranks_may_not_draw():
    for message in run(refused_on_ranks, timeout=60):
        assert message.startswith("second draws random numbers, which differ from rank to rank")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_streams_give_the_same_values():
    torch.backends.cudnn.deterministic = True
    model = seeded(Inception).cuda()
    x = torch.randn(2, 16, 8, 8, device="cuda")
    side = parallelize_branches(model, x, how="streams", **SMALL)
    for _ in range(3):
        found, wanted = gradients(side, (x,)), gradients(model, (x,))
        assert same(found[0], wanted[0])
        assert same(found[1], wanted[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_gets_threads_of_its_own():
    assert graph_parallel._pool(1, os.getpid()) is graph_parallel._pool(1, os.getpid())
    assert graph_parallel._pool(1, os.getpid()) is not graph_parallel._pool(1, -1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_does_not_wait_for_its_parents_threads():
    side = parallelize_branches(Towers(), x := torch.randn(8, 32), **SMALL)
    torch.set_num_threads(2)
    torch.zeros(1_000_000).relu()
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # an operation on two would wait for ever in any program
            side(x)
            os._exit(0)
        finally:
            os._exit(1)
    stop_at = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < stop_at:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)


def test_the_picture_shows_who_does_what():
    model = Inception()
    frame = branches(model, torch.randn(2, 16, 8, 8), **SMALL)
    picture = plots.branches(frame)
    axes = picture.axes[0]
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    rows = [(row.starts_at / 1e6, row.flops / 1e6) for row in frame.itertuples()]
    assert bars == [pytest.approx(row) for row in rows]
    assert axes.get_xlabel() == "work done before (million FLOPs)"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["worker 0", "worker 1"]
    left = plots.branches(branches(Towers(), torch.randn(8, 32)))
    assert "too little to share" in left.axes[0].get_legend().get_texts()[0].get_text()
    with pytest.raises(ValueError, match="starts_at"):
        plots.branches(frame.drop(columns="starts_at"))
