"""Pipelines compute what one process does, and their traces are what the schedules promise."""

import copy
import itertools

import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from workbench import models
from workbench.explore import plots
from workbench.parallel import run
from workbench.parallel.pipeline_parallel import (
    Pause,
    Pipeline,
    balance,
    bubble,
    gpipe_step,
    ideal_trace,
    in_flight,
    piece_costs,
    replay,
    split,
)

SYMBOLS, POSITIONS = 19, 8
TIMEOUT = 120.0


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return models.CharTransformer(SYMBOLS, POSITIONS, width=16, depth=3, heads=2)


def character_loss(logits, target):
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def characters(rows: int, seed: int = 1):
    codes = torch.randint(SYMBOLS, (rows, POSITIONS + 1), generator=seeded(seed))
    return codes[:, :-1], codes[:, 1:]


def images(rows: int, seed: int = 1):
    generator = seeded(seed)
    return torch.rand(rows, 1, 28, 28, generator=generator), torch.randint(
        10, (rows,), generator=generator
    )


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CASES = {
    "tied transformer": (transformer, characters, character_loss),
    "batch norm": (lambda: models.resnet((4, 8), blocks=1), images, F.cross_entropy),
    "CNN": (lambda: models.build("lenet-5"), images, F.cross_entropy),
}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def alone(model, batches, loss, microbatches):
    """One process that adds up the gradients of micro-batches; its losses and weights."""
    model = copy.deepcopy(model)
    optimizer, losses = sgd(model.parameters()), []
    for x, target in batches:
        optimizer.zero_grad()
        total = 0.0
        for a, b in zip(x.chunk(microbatches), target.chunk(microbatches), strict=True):
            part = loss(model(a), b) / microbatches
            part.backward()
            total += part.item()
        losses.append(total)
        optimizer.step()
    gradients = {n: p.grad for n, p in model.named_parameters(remove_duplicate=False)}
    return losses, gradients, model.state_dict()


def train(model, stages, batches, loss, microbatches, schedule):
    example = batches[0][0][: len(batches[0][0]) // microbatches]
    pipeline = Pipeline(stages, example, loss=loss, microbatches=microbatches, schedule=schedule)
    optimizer, losses = sgd(pipeline.parameters()), []
    for x, target in batches:
        optimizer.zero_grad()
        losses.append(pipeline.step(x, target))
        optimizer.step()
    gradients = {
        name: p.grad for stage in pipeline.stages.values() for name, p in stage.named_parameters()
    }
    count = sum(p.numel() for p in pipeline.parameters())
    return losses, gradients, pipeline.gather(model).state_dict(), pipeline.trace(), count


def distance(found, expected) -> float:
    """Relative, over all tensors of floating point together; whole numbers must be equal."""
    far, size = 0.0, 0.0
    for name, value in expected.items():
        if not value.is_floating_point():
            assert torch.equal(found[name], value), name
            continue
        far += (found[name].double() - value.double()).square().sum().item()
        size += value.double().square().sum().item()
    return (far / size) ** 0.5


@pytest.mark.parametrize(
    ("schedule", "case", "ranks", "stages", "microbatches"),
    [
        ("gpipe", "tied transformer", 3, 3, 4),
        ("1f1b", "tied transformer", 3, 3, 4),
        ("interleaved", "tied transformer", 2, 4, 4),
        ("zero-bubble", "tied transformer", 2, 4, 4),
        ("gpipe", "batch norm", 2, 2, 3),
        ("1f1b", "batch norm", 3, 3, 3),
        ("1f1b", "CNN", 2, 2, 2),
        ("zero-bubble", "CNN", 2, 2, 2),
    ],
)
def test_training_is_that_of_one_process(schedule, case, ranks, stages, microbatches):
    build, draw, loss = CASES[case]
    model = build()
    batches = [draw(4 * microbatches, seed) for seed in range(4)]
    parts = split(model, batches[0][0][:4], stages, costs=even(model, batches[0][0]))
    before = copy.deepcopy(parts[0].state_dict())
    losses, gradients, state = alone(model, batches, loss, microbatches)
    arguments = (model, parts, batches, loss, microbatches, schedule)
    ran = run(train, *arguments, world_size=ranks, timeout=TIMEOUT)
    for rank, (rank_losses, found, whole, trace, _) in enumerate(ran):
        assert rank_losses == pytest.approx(losses, rel=1e-6)
        assert distance(found, {name: gradients[name] for name in found}) < 1e-6
        assert distance(whole, state) < 1e-6
        pd.testing.assert_frame_equal(trace, ran[0][3])
        assert set(trace[trace["rank"] == rank]["stage"]) == set(range(rank, stages, ranks))
    counted = sum(count for *_, count in ran)
    tied = model.head.weight.numel() if case == "tied transformer" else 0
    assert counted == sum(p.numel() for p in model.parameters()) + tied
    torch.testing.assert_close(parts[0].state_dict(), before, rtol=0, atol=0)
    check_trace(ran[0][3], schedule, ranks, stages, microbatches)


def check_trace(trace, schedule, ranks, stages, microbatches):
    """Every piece of work is there once, and in the order that the schedule promises."""
    once = trace.groupby(["stage", "kind", "microbatch"]).size()
    assert (once == 1).all()
    kinds = {"forward", "input gradient", "weight gradient"} if schedule == "zero-bubble" else {
        "forward", "backward"
    }  # fmt: skip
    whole = trace[trace["stage"] == stages - 1]
    assert kinds == set(whole["kind"]) | ({"forward"} & kinds)
    assert len(trace[trace["kind"] == "forward"]) == stages * microbatches
    assert trace["start_ms"].min() == 0
    assert (trace["end_ms"] >= trace["start_ms"]).all()
    if schedule in ("gpipe", "1f1b"):
        ideal = ideal_trace(schedule, ranks, microbatches)
        assert work_by_rank(trace) == work_by_rank(ideal)
        assert in_flight(trace) == in_flight(ideal)
    if schedule != "zero-bubble":
        rounds = stages // ranks * microbatches
        assert bubble(replay(trace)) == pytest.approx((ranks - 1) / (rounds + ranks - 1))
    assert 0 <= bubble(replay(trace)) <= bubble(ideal_trace("gpipe", ranks, microbatches)) + 1e-9


def work_by_rank(trace) -> dict:
    ordered = trace.sort_values("start_ms", kind="stable")
    columns = ["stage", "kind", "microbatch"]
    return {rank: rows[columns].to_numpy().tolist() for rank, rows in ordered.groupby("rank")}


def even(model, example) -> list[float]:
    return [1.0] * len(piece_costs(model, example[:2]))


def test_gradients_are_added_to_those_that_are_there():
    """Also those of a tied weight, which are summed over ranks: only the new part may be."""
    model, (x, target) = transformer(), characters(4)

    def twice(parts):
        pipeline = Pipeline(parts, x[:2], loss=character_loss, microbatches=2, schedule="gpipe")
        for _ in range(2):
            pipeline.step(x, target)
        return {n: p.grad for s in pipeline.stages.values() for n, p in s.named_parameters()}

    gradients = alone(model, [(x, target)], character_loss, 2)[1]
    for found in run(twice, split(model, x[:2], 2, costs=even(model, x)), timeout=TIMEOUT):
        assert distance(found, {name: 2 * gradients[name] for name in found}) < 1e-6


def test_gpipe_by_hand():
    model, (x, target) = models.build("lenet-5"), images(6)
    parts = split(model, x[:2], 3, costs=even(model, x))

    def step():
        stage = parts[dist.get_rank()]
        loss = gpipe_step(stage, x, target, loss=F.cross_entropy, microbatches=3)
        return loss, {name: p.grad for name, p in stage.named_parameters()}

    losses, gradients, _ = alone(model, [(x, target)], F.cross_entropy, 3)
    ran = run(step, world_size=3, timeout=TIMEOUT)
    assert [loss for loss, _ in ran[:2]] == [None, None]
    assert ran[2][0] == pytest.approx(losses[0], rel=1e-6)
    together = {name: gradient for _, own in ran for name, gradient in own.items()}
    assert together.keys() == gradients.keys()
    assert distance(together, gradients) < 1e-6


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
def test_balance_is_the_best_of_all_splits(costs, data):
    stages = data.draw(st.integers(1, len(costs)))

    def worst(starts) -> float:
        ends = [*starts[1:], len(costs)]
        return max(sum(costs[a:b]) for a, b in zip(starts, ends, strict=True))

    starts = balance(costs, stages)
    assert starts[0] == 0
    assert sorted(set(starts)) == starts
    every = itertools.combinations(range(1, len(costs)), stages - 1)
    assert worst(starts) == min(worst([0, *inner]) for inner in every)


def two_branches() -> nn.Module:
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.left = nn.Linear(4, 4), nn.Linear(4, 4)
            self.right, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
            self.register_buffer("shift", torch.arange(4.0), persistent=False)

        def forward(self, x):
            x = self.first(x)
            x = self.left(x).relu() * self.right(x) + self.shift[: x.shape[1]]
            return self.last(x + self.first(x))

    return Branches()


@pytest.mark.parametrize(
    ("model", "example", "count"),
    [
        (transformer(), characters(2)[0], 9),  # two pieces a block; embeddings, norm, output
        (models.build("resnet-8").eval(), images(2)[0], 12),
        (models.build("lenet-5"), images(2)[0], 10),
        (two_branches(), torch.randn(3, 4), 4),
    ],
    ids=["transformer", "resnet", "lenet", "branches"],
)
def test_stages_together_are_the_model(model, example, count):
    costs = piece_costs(model, example)
    assert len(costs) == count
    assert (costs > 0).all()
    before = copy.deepcopy(model.state_dict())
    expected = model(example)
    for stages in (1, 2, 3, count):
        if stages > count:
            continue
        parts = split(model, example, stages, costs=list(range(1, count + 1)))
        assert len(parts) == stages
        y = example
        for part in parts:
            assert sum(p.numel() for p in part.parameters()) or stages == count
            y = part(y)
        assert torch.equal(y, expected)
        names = {name for part in parts for name, _ in part.named_parameters()}
        tied = {"head.weight"} if "head.weight" in before else set()
        assert names | tied == {name for name, _ in model.named_parameters()} | tied
    assert not {id(p) for p in parts[0].parameters()} & {id(p) for p in model.parameters()}
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_cut_follows_the_measured_cost():
    slow = nn.Sequential(nn.Linear(2, 2), Pause(0, 0), nn.ReLU(), nn.Linear(2, 2), Pause(30, 60))
    costs = piece_costs(slow, torch.randn(1, 2))
    assert costs.index.tolist()[0] == "0"
    assert costs.iloc[-1] >= 90  # what sleeps, sleeps at least so long
    assert [len(list(p.parameters())) for p in split(slow, torch.randn(1, 2), 2)] == [5, 1]


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 5), st.integers(0, 8), st.floats(0.5, 5), st.floats(0.5, 5),
    st.sampled_from(["gpipe", "1f1b"]),
)  # fmt: skip
def test_theory(ranks, more, forward_ms, backward_ms, schedule):
    count = ranks + more
    trace = ideal_trace(schedule, ranks, count, forward_ms=forward_ms, backward_ms=backward_ms)
    assert bubble(trace) == pytest.approx((ranks - 1) / (count + ranks - 1))
    flying = [count] * ranks if schedule == "gpipe" else list(range(ranks, 0, -1))
    assert in_flight(trace) == flying
    pd.testing.assert_frame_equal(
        replay(trace, forward_ms=forward_ms, backward_ms=backward_ms), trace
    )
    for _, rows in trace.sort_values("start_ms", kind="stable").groupby("rank"):
        assert (rows["start_ms"].to_numpy()[1:] >= rows["end_ms"].to_numpy()[:-1] - 1e-9).all()


def test_a_micro_batch_is_kept_until_the_gradient_of_the_weights():
    order = [("forward", 0), ("input gradient", 0), ("forward", 1), ("weight gradient", 0)]
    order += [("input gradient", 1), ("weight gradient", 1)]
    rows = [(0, 0, kind, i, at, at + 1) for at, (kind, i) in enumerate(order)]
    columns = ["rank", "stage", "kind", "microbatch", "start_ms", "end_ms"]
    trace = pd.DataFrame(rows, columns=columns).sample(frac=1, random_state=0)
    assert in_flight(trace) == [2]
    ideal = replay(trace, forward_ms=3, backward_ms=4).sort_index()
    assert ideal["end_ms"].tolist() == [3, 5, 8, 10, 12, 14]


def test_timeline_draws_each_piece_of_work():
    traces = {name: ideal_trace(name, 3, 4) for name in ("gpipe", "1f1b")}
    picture = plots.timeline(traces)
    assert [axes.get_title(loc="left") for axes in picture.axes] == ["gpipe", "1f1b"]
    for axes, trace in zip(picture.axes, traces.values(), strict=True):
        bars = axes.patches[3:]  # after the grey ones, one a rank
        drawn = sorted((round(b.get_center()[1]), b.get_x(), b.get_width()) for b in bars)
        wanted = zip(trace["rank"], trace["start_ms"], trace["end_ms"], strict=True)
        assert drawn == sorted((rank, start, end - start) for rank, start, end in wanted)
        assert [b.get_width() for b in axes.patches[:3]] == [trace["end_ms"].max()] * 3
        assert [t.get_text() for t in axes.texts] == [str(i) for i in trace["microbatch"]]
    names = [text.get_text() for text in picture.legends[0].get_texts()]
    assert names == ["forward", "backward", "waiting"]


def test_timeline_starts_at_zero_and_leaves_out_numbers_without_room():
    trace = ideal_trace("1f1b", 2, 300)
    trace[["start_ms", "end_ms"]] += 1000.0
    axes = plots.timeline(trace).axes[0]
    assert axes.get_xlim() == (0, pytest.approx(301 * 3))
    assert min(bar.get_x() for bar in axes.patches) == 0
    assert not axes.texts
    assert axes.get_title(loc="left") == ""


def test_what_timeline_cannot_draw():
    trace = ideal_trace("gpipe", 2, 2)
    for nothing in ({}, trace[:0], {"a": trace, "b": trace[:0]}):
        with pytest.raises(ValueError, match="there is nothing to draw; give traces with"):
            plots.timeline(nothing)
    with pytest.raises(ValueError, match="the frame has no column stage"):
        plots.timeline(trace.drop(columns="stage"))


def test_replay_refuses_what_cannot_be():
    trace = ideal_trace("gpipe", 2, 2)
    order = {"forward": 2, "backward": 1}  # backward before forward
    trace["start_ms"] = trace["kind"].map(order)
    with pytest.raises(ValueError, match="the order of the trace cannot be"):
        replay(trace)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Deciding(nn.Module):
    def forward(self, x):
        return x.argmax(-1)


def test_refusals_say_what_to_do():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    x = torch.randn(2, 2)
    refusals = [
        (lambda: split(model, x, 3), "stages is 3; the model can be cut into 1 to 2 stages"),
        (lambda: split(model, x, 0), "stages is 0; the model can be cut"),
        (lambda: split(model, x, 2, costs=[1]), "1 costs for 2 pieces; see piece_costs"),
        (lambda: split(Branching(), x, 1), "Branching cannot be cut by torch.fx .TraceError"),
        (lambda: split(Deciding(), x, 1), "the model does not end in one tensor of floating point"),
        (lambda: balance([1, 2], 3), "stages is 3; 2 pieces make 1 to 2 stages"),
        (lambda: ideal_trace("interleaved", 2, 2), "schedule is 'interleaved'; choose 'gpipe' or"),
        (lambda: ideal_trace("1f1b", 4, 2), "microbatches is 2; 1f1b needs at least 4"),
        (lambda: gpipe_step(model, x, x, loss=F.mse_loss, microbatches=3),
         "2 rows do not divide into 3 micro-batches; choose a divisor"),
    ]  # fmt: skip
    for call, message in refusals:
        with pytest.raises(ValueError, match=message):
            call()

    def refuse():
        def message(count, microbatches, schedule, rows=None):
            stages = [nn.Linear(2, 2) for _ in range(count)]
            options = {"loss": F.mse_loss, "microbatches": microbatches, "schedule": schedule}
            try:
                pipeline = Pipeline(stages, x[:1], **options)
                pipeline.step(torch.zeros(rows, 2), torch.zeros(rows, 2))
            except ValueError as error:
                return str(error)
            return "not refused"

        def foreign():
            pipeline = Pipeline([nn.Linear(2, 2)] * 2, x, loss=F.mse_loss, microbatches=2)
            try:
                pipeline.gather(model)
            except ValueError as error:
                return str(error)
            return "not refused"

        return [
            message(2, 2, "naive"),
            message(4, 2, "gpipe"),
            message(3, 2, "interleaved"),
            message(2, 1, "1f1b"),
            message(2, 0, "gpipe"),
            message(2, 3, "zero-bubble"),
            message(2, 2, "1f1b", rows=3),
            foreign(),
        ]

    expected = [
        "schedule is 'naive'; choose from ['gpipe', '1f1b', 'interleaved', 'zero-bubble']",
        "gpipe has one stage a rank; there are 4 for 2 ranks",
        "3 stages do not divide among 2 ranks; give a multiple",
        "microbatches is 1; 1f1b needs at least 2",
        "microbatches is 0; gpipe needs at least 1",
        "microbatches is 3; zero-bubble needs a multiple of 2",
        "the batch has 3 rows; 2 micro-batches of 1 rows, as in the example, make 2",
        "the stages have no 0.bias; split this model",
    ]
    assert run(refuse, timeout=TIMEOUT) == [expected, expected]
