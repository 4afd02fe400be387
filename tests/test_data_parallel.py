"""Layouts of data-parallel training against one process that takes whole batches."""

import copy
import json
import math
import os
import re
import signal
from functools import partial

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from workbench import data, models, training
from workbench.data import Split
from workbench.parallel import RankError, run
from workbench.parallel.batch_norm import synchronize_batch_norm
from workbench.parallel.data_parallel import Replica, Share, average_gradients, batches, train

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAM = partial(torch.optim.AdamW, lr=0.01)
LAYOUTS = ("naive", "ddp", "zero", "fsdp")
EXAMPLES, BATCH = 22, 7  # the last batch has one example: of two or three ranks, some get none
limited = partial(run, timeout=120)


def images(count=EXAMPLES):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 12, 12, generator=generator)
    return data.task(train=(x, torch.arange(count) % 10), test=(x, x), validation=(x, x))


def text():
    codes = torch.randint(0, 11, (EXAMPLES, 17), generator=torch.Generator().manual_seed(0))
    pair = codes[:, :-1], codes[:, 1:]
    return data.task(train=pair, test=pair, validation=pair)


def net(name):
    torch.manual_seed(1)
    if name == "transformer":  # its output layer shares its weight with the embedding
        return models.CharTransformer(11, context=16, width=24, depth=2, heads=2)
    norm = [nn.BatchNorm2d(8)] if name == "batch norm" else []
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=not norm), *norm, nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10),
    )  # fmt: skip


def of_one_process(model, task, *, epochs=1, optimizer=SGD, batch_size=BATCH):
    """What one process makes of whole batches, written out: the weights, and the last gradients."""
    model = copy.deepcopy(model).train()
    stepper = optimizer(model.parameters())
    schedule = training.one_cycle(stepper, epochs * math.ceil(len(task.train) / batch_size))
    for epoch in range(1, epochs + 1):
        for inputs, target in task.train.batches(batch_size, shuffle=True, seed=epoch):
            stepper.zero_grad()
            task.loss(model(*inputs), target).backward()
            stepper.step()
            schedule.step()
    return model.state_dict(), {name: p.grad for name, p in model.named_parameters()}


def error(found, expected):
    """Of all tensors together, relative to their norm."""
    assert found.keys() == expected.keys()
    flat = [torch.cat([x[name].double().flatten() for name in expected]) for x in (found, expected)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


def trained(model, task, layouts=LAYOUTS, **settings):
    """Of one rank: the weights that `train` gives in each layout."""
    settings = {"batch_size": BATCH, "optimizer": SGD, "progress": False} | settings
    return [train(model, task, how=how, **settings).state_dict() for how in layouts]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", ["cnn", "transformer", "batch norm"])
def test_every_layout_computes_what_one_process_does(name, world_size):
    model, task = net(name), text() if name == "transformer" else images()
    weights, gradients = of_one_process(model, task)
    together = synchronize_batch_norm(model)

    def both():
        found = []
        for how in LAYOUTS:
            replica = Replica(together, task.loss, how=how, optimizer=SGD)
            steps = math.ceil(EXAMPLES / BATCH)
            schedule = training.one_cycle(replica.optimizer, steps)
            for share in batches(task.train, BATCH, epoch=1):
                replica.step(share)
                schedule.step()
            found.append((replica.whole().state_dict(), replica.gradients()))
        return found

    ranks = limited(both, world_size=world_size)
    for number in range(len(LAYOUTS)):
        for rank in ranks:
            assert error(rank[number][0], weights) <= 1e-6
            assert error(rank[number][1], gradients) <= 1e-6
            state = rank[number][0]
            assert all(torch.equal(x, ranks[0][number][0][key]) for key, x in state.items())


def test_pieces_of_a_batch_make_the_same_step():
    for name, task in (("cnn", images()), ("transformer", text())):
        expected, _ = of_one_process(net(name), task)
        for rank in limited(partial(trained, accumulate=3), net(name), task):
            assert all(error(state, expected) <= 1e-6 for state in rank)


def test_gradients_of_pieces_are_sent_once():
    model, task = net("cnn"), images()

    def sent():
        counts = []
        real = dist.all_reduce
        for accumulate in (1, 4):
            for how in ("naive", "ddp"):
                replica, calls = Replica(model, how=how), []

                def hook(calls, bucket):
                    calls.append(1)
                    future = torch.futures.Future()
                    future.set_result(bucket.buffer())
                    return future

                if how == "ddp":
                    replica.network.register_comm_hook(calls, hook)
                else:
                    dist.all_reduce = lambda x, calls=calls: (calls.append(1), real(x))
                replica.step(next(batches(task.train, BATCH)), accumulate=accumulate)
                dist.all_reduce = real
                counts.append(len(calls))
        return counts

    naive, ddp, *again = limited(sent)[0]
    assert (naive, ddp) == (6, 1)  # parameters; buckets
    assert again == [naive, ddp]


def test_fsdp_sends_gradients_once():
    model, task = net("cnn"), images()

    def sent():
        replica, counts = Replica(model, how="fsdp"), [0, 0]
        real = dist.reduce_scatter_single
        for number, accumulate in enumerate((1, 3)):

            def counted(*args, number=number, **settings):
                counts[number] += 1
                return real(*args, **settings)

            dist.reduce_scatter_single = counted
            replica.step(next(batches(task.train, BATCH)), accumulate=accumulate)
        return counts

    assert limited(sent)[0] == [3, 3]  # two convolutions and a linear layer


def test_fit_takes_the_same_batches():
    model, task = net("cnn"), images()
    task = data.task(train=task.train.source.tensors, test=task.train.source.tensors,
                     validation=task.train.source.tensors)  # fmt: skip
    expected = copy.deepcopy(model)
    history = training.fit(
        expected, task, batch_size=BATCH, optimizer=SGD, device="cpu", progress=False
    )
    assert history.best_epoch == 1
    for state in limited(trained, model, task)[0]:
        assert error(state, expected.state_dict()) <= 1e-6


def test_elements_of_a_sequence_that_share_a_weight():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(144, 10), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10)
    )
    model[4].weight = model[2].weight
    expected, _ = of_one_process(model, images())
    for rank in limited(trained, model, images()):
        assert all(error(state, expected) <= 1e-6 for state in rank)


def test_random_numbers_differ_by_rank_and_step():
    class Noise(nn.Linear):
        def forward(self, x):
            seen.append(torch.rand(1).item())
            return super().forward(x.flatten(1))

    seen, model = [], Noise(144, 10)

    def drawn():
        torch.manual_seed(5)
        before = torch.get_rng_state()
        train(model, images(), batch_size=BATCH, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        return seen

    zero, one = limited(drawn)
    assert len({*zero, *one}) == 2 * math.ceil(EXAMPLES / BATCH)


def test_the_model_of_the_caller_is_left_alone():
    model, task = net("batch norm"), images()

    def check():
        before = copy.deepcopy(model.state_dict())
        trained(model, task)
        return all(torch.equal(x, before[name]) for name, x in model.state_dict().items())

    assert limited(check) == [True, True]


def test_all_ranks_start_from_the_weights_of_rank_0():
    task = images()

    def start():
        torch.manual_seed(dist.get_rank())
        model = nn.Sequential(nn.Flatten(), nn.Linear(144, 10), nn.BatchNorm1d(10))
        model[2].running_mean += dist.get_rank()
        model.register_buffer("mask", torch.tensor([True, dist.get_rank() == 0]))
        return [Replica(model, task.loss, how=how).whole().state_dict() for how in LAYOUTS]

    zero, one = limited(start)
    for how in range(len(LAYOUTS)):
        assert all(torch.equal(x, one[how][name]) for name, x in zero[how].items())
        assert zero[how]["2.running_mean"].sum() == 0
        assert zero[how]["mask"].all()


def test_a_rank_keeps_its_part():
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    x = torch.randn(6, 64)
    share = Share((x,), torch.zeros(6, dtype=torch.long), 0.5)
    whole = 4 * 64 * 64 * 4

    def kept():
        rows = []
        for how in LAYOUTS:
            replica = Replica(model, how=how, optimizer=partial(torch.optim.SGD, momentum=0.9))
            assert replica.memory()["gradient_bytes"] == 0
            replica.step(share)
            rows.append(tuple(replica.memory().values()))
        return rows

    for rank in limited(kept):
        assert rank == [
            (whole, whole, whole),
            (whole, whole, whole),
            (whole, whole, whole // 2),
            (whole // 2, whole // 2, whole // 2),
        ]


def test_the_mean_of_gradients():
    def mean():
        model = nn.Linear(2, 1, bias=False)
        frozen = nn.Linear(2, 1).requires_grad_(False)
        model.weight.grad = torch.tensor([[1.0, 2.0]]) * dist.get_rank()
        if dist.get_rank() == 0:
            model.weight.grad = None  # not used on this rank
        average_gradients(nn.ModuleList([model, frozen]))
        return model.weight.grad.tolist(), frozen.weight.grad

    assert limited(mean, world_size=3) == [([[1.0, 2.0]], None)] * 3


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 40), batch_size=st.integers(1, 45), world_size=st.integers(1, 5),
    epoch=st.integers(0, 2),
)  # fmt: skip
def test_every_example_goes_to_one_rank(count, batch_size, world_size, epoch):
    split = Split(TensorDataset(torch.arange(count), torch.arange(count)))
    ranks = [
        [*batches(split, batch_size, epoch=epoch, rank=rank, world_size=world_size)]
        for rank in range(world_size)
    ]
    assert len({len(shares) for shares in ranks}) == 1
    seen = [share.target[: None if share.weight else 0] for rank in ranks for share in rank]
    assert sorted(torch.cat(seen).tolist()) == list(range(count))
    whole = split.batches(batch_size, shuffle=True, seed=epoch)
    for shares, (_, target) in zip(zip(*ranks, strict=True), whole, strict=True):
        own = [share for share in shares if share.weight]
        assert torch.equal(torch.cat([share.target for share in own]), target)
        assert all(math.isclose(share.weight, len(share.target) / len(target)) for share in own)
        sizes = [len(share.target) for share in own]
        assert max(sizes) - min(sizes) <= 1
        assert all(len(share.target) == 1 for share in shares if not share.weight)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 12), pieces=st.integers(1, 14), weight=st.sampled_from([0.0, 0.25, 1.0])
)
def test_the_pieces_of_a_share(count, pieces, weight):
    share = Share((torch.arange(count), torch.arange(count) + 1), torch.arange(count), weight)
    parts = share.split(pieces)
    assert len(parts) == pieces
    assert math.isclose(sum(part.weight for part in parts), weight)
    if weight:
        own = [part for part in parts if part.weight]
        assert torch.equal(torch.cat([part.target for part in own]), share.target)
        assert torch.equal(torch.cat([part.inputs[1] for part in own]), share.inputs[1])


def test_torchs_own_sampler_repeats_or_drops():
    split = TensorDataset(torch.arange(7))
    for drop_last, expected in ((False, 8), (True, 6)):
        parts = [DistributedSampler(split, 2, rank, drop_last=drop_last) for rank in range(2)]
        assert sum(len([*part]) for part in parts) == expected


class Pairs(Dataset):
    """Examples of two inputs, one by one."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return (torch.full((2,), index), index * 1.5), index


def test_data_sets_and_epochs_from_the_middle():
    split = Split(Pairs())
    share = next(batches(split, 4, rank=1, world_size=2))
    assert [x.shape for x in share.inputs] == [(2, 2), (2,)]
    assert torch.equal(share.inputs[1], share.target * 1.5)
    both = [[*batches(split, 2, start=start, rank=0, world_size=1)] for start in (0, 1)]
    assert [x.target.tolist() for x in both[0][1:]] == [x.target.tolist() for x in both[1]]
    orders = [next(batches(split, 5, epoch=e, rank=0, world_size=1)).target for e in (1, 2)]
    assert not torch.equal(*orders)


def interrupted(model, task, folder, how, after, **settings):
    """Of one rank: train until rank 0 is killed in a step, or to the end if ``after`` is None."""
    steps = 0

    class Fatal(torch.optim.AdamW):
        def step(self):
            nonlocal steps
            steps += 1
            if steps == after and dist.get_rank() == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().step()

    settings = {"batch_size": BATCH, "epochs": 2, "every": 2, "progress": False} | settings
    optimizer = partial(Fatal, lr=0.01)
    result = train(model, task, how=how, optimizer=optimizer, folder=folder, **settings)
    return result.state_dict(), steps


@pytest.mark.parametrize("how", ["ddp", "zero", "fsdp"])
def test_a_killed_run_goes_on_to_the_same_weights(how, tmp_path):
    model, task = net("batch norm").insert(2, nn.Dropout(0.3)), images()
    whole, _ = limited(interrupted, model, task, tmp_path / "whole", how, None)[0]
    with pytest.raises(RankError, match="SIGKILL"):
        limited(interrupted, model, task, tmp_path / "killed", how, 6)
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["step-00000004"]
    state, steps = limited(interrupted, model, task, tmp_path / "killed", how, None)[0]
    assert steps == 8 - 4
    assert all(torch.equal(x, state[name]) for name, x in whole.items())
    if how == "ddp":  # once more, when all is done
        state, steps = limited(interrupted, model, task, tmp_path / "killed", how, None)[0]
        assert steps == 0
        assert all(torch.equal(x, state[name]) for name, x in whole.items())


def test_a_checkpoint_loads_on_other_numbers_of_ranks_and_in_other_layouts(tmp_path):
    model, task = net("cnn"), images()
    expected, _ = of_one_process(model, task, epochs=2, optimizer=ADAM)
    for how, others in {"fsdp": ("ddp", "fsdp"), "zero": ("zero", "fsdp")}.items():
        for world_size, other in zip((1, 3), others, strict=True):
            folder = tmp_path / f"{how}-{world_size}"
            with pytest.raises(RankError, match="SIGKILL"):
                limited(interrupted, model, task, folder, how, 6)
            call = partial(limited, world_size=world_size)
            state, steps = call(interrupted, model, task, folder, other, None)[0]
            assert steps == 4
            assert error(state, expected) <= 1e-6


def test_the_older_checkpoint_is_whole_until_the_new_one_is(tmp_path):
    model, task = net("cnn"), images()

    def killed_while_saving():
        import workbench.parallel.data_parallel as module

        replica = Replica(model, how="fsdp")
        replica.save(tmp_path, 1)
        real = module.save

        def fatal(*args, **settings):
            real(*args, **settings)
            if dist.get_rank() == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        module.save = fatal
        replica.step(next(batches(task.train, BATCH)))
        replica.save(tmp_path, 2)

    with pytest.raises(RankError, match="SIGKILL"):
        limited(killed_while_saving)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000002.part"}

    def again():
        replica = Replica(model, how="ddp")
        step = replica.load(tmp_path)
        weights = replica.whole().state_dict()
        replica.save(tmp_path, 2)
        return step, weights

    step, weights = limited(again)[1]
    assert step == 1
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_checkpoint_holds_no_pickle(tmp_path):
    from safetensors import safe_open

    def saved():
        replica = Replica(net("transformer"), how="fsdp", optimizer=ADAM)
        replica.step(next(batches(text().train, BATCH)))
        replica.save(tmp_path, 1, {"seed": 3})

    limited(saved)
    files = sorted((tmp_path / "step-00000001").iterdir())
    assert [file.suffix for file in files] == [".json", ".safetensors", ".safetensors"]
    assert json.loads(files[0].read_text()) == {"step": 1, "run": {"seed": 3}}
    names = {*safe_open(files[1], "pt").keys()}
    assert "embedding.weight" in names
    assert "optimizer: embedding.weight.exp_avg" in names
    assert "head.weight" not in names  # it is the embedding's


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    model, task = net("cnn"), images()

    def refused():
        Replica(model).save(tmp_path, 1, {"seed": 0})
        message = r"another model: they differ in \['0.bias', '0.weight', '3.bias'\]"
        with pytest.raises(ValueError, match=message):
            Replica(net("transformer")).load(tmp_path)
        with pytest.raises(ValueError, match="seed 0, and this one has 1; give another folder"):
            Replica(model).load(tmp_path, {"seed": 1})

    limited(refused)
    assert limited(lambda: Replica(model).load(tmp_path / "empty")) == [0, 0]
    with pytest.raises(RankError, match="run with examples None, and this one has 22"):
        limited(partial(trained, folder=tmp_path, layouts=["ddp"]), model, task)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 4, 2)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_over_all_ranks(shape, momentum):
    layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](
        3, momentum=momentum
    )
    torch.manual_seed(0)
    x, upstream = torch.randn(shape) + 100, torch.randn(shape)  # a mean that is large

    def computed(layer, x, upstream):
        x = x.clone().requires_grad_()
        for _ in range(2):
            y = layer(x)
        (y * upstream).sum().backward()
        state = layer.state_dict()
        return y.detach(), x.grad, layer.weight.grad, layer.bias.grad, state

    def shared():
        mine = torch.arange(6).split([4, 2])[dist.get_rank()]
        return computed(synchronize_batch_norm(layer), x[mine], upstream[mine])

    expected = computed(copy.deepcopy(layer).double(), x.double(), upstream.double())
    zero, one = limited(shared)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4, check_dtype=False)
    for number in (0, 1):
        close(torch.cat([zero[number], one[number]]), expected[number])
    for number in (2, 3):  # each rank has its own examples' part
        close(zero[number] + one[number], expected[number])
    for found in (zero[4], one[4]):
        close(found, expected[4])


def test_batch_norm_of_pieces_that_no_rank_has():
    model = synchronize_batch_norm(nn.Sequential(nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(6, 2)))
    x = torch.randn(1, 3, 2)

    def statistics():
        share = Share((x,), torch.tensor([1]), float(dist.get_rank() == 0))
        replica = Replica(model, optimizer=SGD)
        replica.step(share, accumulate=3)
        return replica.whole()[0].running_mean, replica.gradients()["2.weight"]

    for mean, gradient in limited(statistics):
        torch.testing.assert_close(mean, 0.1 * x.mean((0, 2)))
        assert 0 < gradient.norm() < 10


def test_batch_norm_alone_is_batch_norm():
    layer = nn.BatchNorm2d(3)
    together = synchronize_batch_norm(nn.Sequential(layer, layer))
    assert together[0] is together[1]
    assert type(layer) is nn.BatchNorm2d
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(together[0](x), layer(x))
    assert together.state_dict().keys() == nn.Sequential(layer, layer).state_dict().keys()
    with pytest.raises(ValueError, match=r"shape \(4,\); expected \(batch, channels"):
        together(x[:, 0, 0, 0])


def test_without_synchronization_batch_norm_is_another_computation():
    model, task = net("batch norm"), images(8)
    expected, _ = of_one_process(model, task, batch_size=8)
    zero, one = limited(partial(trained, batch_size=8), model, task)
    for state, other in zip(zero, one, strict=True):
        assert error(state, expected) > 1e-4
        assert all(torch.equal(x, other[name]) for name, x in state.items())


def test_settings_are_checked():
    model, task = net("cnn"), images()
    with pytest.raises(ValueError, match=r"no process group; call this in a function that workb"):
        train(model, task)
    with pytest.raises(ValueError, match="no process group"):
        average_gradients(model)
    with pytest.raises(ValueError, match="rank is 2 of 2; give 0 to 1"):
        next(batches(task.train, 2, rank=2, world_size=2))
    loader = Split(DataLoader(task.train.source))
    with pytest.raises(TypeError, match="source is a DataLoader, which gives batches of its own"):
        next(batches(loader, 2, rank=0, world_size=2))

    def refused():
        calls = {
            "how is 'DDP'; choose one of ['naive', 'ddp', 'zero', 'fsdp']": {"how": "DDP"},
            "epochs is 0; give a whole number from 1": {"epochs": 0},
            "batch_size is 2.5; give": {"batch_size": 2.5},
            "accumulate is 0; give": {"accumulate": 0},
            "every is True; give": {"every": True},
            "training loss of epoch 2 is nan; lower": {
                "optimizer": partial(torch.optim.SGD, lr=1e30),
                "epochs": 2,
            },
        }
        for message, setting in calls.items():
            with pytest.raises(ValueError, match=re.escape(message)):
                train(model, task, progress=False, **setting)
        with pytest.raises(ValueError, match="no parameter to train; set requires_grad"):
            Replica(copy.deepcopy(model).requires_grad_(False))
        with pytest.raises(TypeError, match="model is a str; expected a torch module"):
            Replica("model")

    limited(refused)
