"""Pipeline parallelism: each rank holds some layers, and a batch passes through as micro-batches.

`gpipe_step` is the whole idea by hand, with its sends and receives. `Pipeline` runs the schedules
of `torch.distributed.pipelining` behind one call. `split` cuts a model where the slowest stage
takes least. Each step leaves a trace, from which the `bubble` and the micro-batches `in_flight`
are counted; `ideal_trace` and `replay` say what they should be.

A trace is a frame with a row for each piece of work: ``rank``, ``stage``, ``kind`` ("forward",
"backward", or its halves "input gradient" and "weight gradient"), ``microbatch``, ``start_ms`` and
``end_ms``. p is the number of ranks, m of micro-batches, v of stages on a rank.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed import pipelining

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero-bubble"]
Loss = Callable[[Tensor, Tensor], Tensor]
_SCHEDULES = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved": pipelining.ScheduleInterleaved1F1B,
    "zero-bubble": pipelining.ScheduleInterleavedZeroBubble,
}


def gpipe_step(
    stage: nn.Module, inputs: Tensor, target: Tensor, *, loss: Loss, microbatches: int
) -> float | None:
    """Forward and backward of one batch through the stages of all ranks, written out.

    Every rank calls it with its stage and the same batch; gradients are added to ``.grad``. All
    micro-batches go forward, then all go backward.

    Args:
        inputs, target: (B, ...), where ``microbatches`` divides B.
        loss: the mean over the examples it is given.

    Returns:
        The loss of the batch on the last rank, None on the others.

    Reference: Huang et al. (2019), "GPipe: efficient training of giant neural networks using
    pipeline parallelism".
    """
    _check_microbatches(len(inputs), microbatches)
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    pairs = list(zip(inputs.chunk(microbatches), target.chunk(microbatches), strict=True))
    kept, total = [], 0.0
    for x, wanted in pairs:
        if rank > 0:
            x = _receive(rank - 1).requires_grad_()
        y = stage(x)
        if rank < last:
            _send(y.detach(), rank + 1)
        else:
            y = loss(y, wanted) / microbatches  # the mean of the batch is the mean of these means
            total += y.item()
        kept.append((x, y))  # with all that autograd needs between them: this is what costs memory
    for x, y in kept:
        y.backward(None if rank == last else _receive(rank + 1))
        if rank > 0:
            _send(x.grad, rank - 1)
    return total if rank == last else None


class Pipeline(nn.Module):
    """This rank's stages of a model, and a schedule that trains all ranks' stages together.

    Rank r of p holds the stages r, r + p, r + 2p and so on. Gradients of a parameter that several
    stages share, such as a tied embedding, are summed after each step. Batch normalisation sees
    micro-batches, as it would with gradients accumulated in one process.

    Args:
        stages: all stages of the model, in order, the same on every rank; from `split`, or any
            modules of one tensor in and one out. Each rank keeps copies of its own.
        example: the input of one micro-batch.
        loss: the mean over the examples it is given.
        microbatches: into how many parts `step` cuts a batch; for "1f1b" at least p, for
            "interleaved" and "zero-bubble" a multiple of p.
        schedule: "gpipe" and "1f1b" have one stage a rank, "interleaved" and "zero-bubble" one or
            more.

    Raises:
        ValueError: an unknown schedule, or stages or micro-batches that do not fit it.

    References: Narayanan et al. (2021), "Efficient large-scale language model training on GPU
    clusters using Megatron-LM"; Qi et al. (2024), "Zero bubble pipeline parallelism".
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        example: Tensor,
        *,
        loss: Loss,
        microbatches: int,
        schedule: Schedule = "1f1b",
    ):
        super().__init__()
        rank, ranks = dist.get_rank(), dist.get_world_size()
        _check_schedule(schedule, len(stages), ranks, microbatches)
        cuda = dist.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        own = {i: stages[i] for i in range(rank, len(stages), ranks)}
        own = dict(zip(own, copy.deepcopy(list(own.values())), strict=True))  # ties are kept
        self.stages = nn.ModuleDict({str(i): stage.to(device) for i, stage in own.items()})
        self._ties = _ties(stages, own, ranks)
        self._rows, self._microbatches, self._device = len(example), microbatches, device
        self._events: list[tuple] = []
        shapes = _shapes(stages, example)
        parts = [
            _TracedStage(
                stage, i, len(stages), device, self._events,
                input_args=shapes[i], output_args=shapes[i + 1],
            )
            for i, stage in own.items()
        ]  # fmt: skip
        many = schedule in ("interleaved", "zero-bubble")
        # torch would divide the gradients once for each stage, those of shared parameters twice.
        self._schedule = _SCHEDULES[schedule](
            parts if many else parts[0],
            microbatches,
            loss_fn=lambda output, target: loss(output, target) / microbatches,
            scale_grads=False,
        )

    def step(self, inputs: Tensor, target: Tensor) -> float:
        """Forward and backward of one batch; gradients are added to ``.grad`` of the parameters.

        Args:
            inputs, target: the same batch on every rank, m times the rows of the example.

        Returns:
            The loss of the batch, on every rank.
        """
        rows = self._rows * self._microbatches
        if len(inputs) != rows:
            raise ValueError(
                f"the batch has {len(inputs)} rows; {self._microbatches} micro-batches of "
                f"{self._rows} rows, as in the example, make {rows}"
            )
        before = [None if p.grad is None else p.grad.clone() for p, _ in self._ties]
        self._events.clear()
        first, last = "0" in self.stages, dist.get_rank() == dist.get_world_size() - 1
        losses: list[Tensor] = []
        arguments = (inputs.to(self._device),) if first else ()
        wanted = {"target": target.to(self._device), "losses": losses} if last else {}
        self._schedule.step(*arguments, **wanted, return_outputs=False)
        for (parameter, group), kept in zip(self._ties, before, strict=True):
            fresh = parameter.grad if kept is None else parameter.grad - kept
            dist.all_reduce(fresh, group=group)
            parameter.grad = fresh if kept is None else kept + fresh
        total = torch.stack(losses).sum() if last else torch.zeros((), device=self._device)
        dist.broadcast(total, dist.get_world_size() - 1)
        return total.item()

    def trace(self) -> pd.DataFrame:
        """What all ranks did in the last step; see the module. Every rank must call it.

        Times are of the system's clock: several machines must agree on it.
        """
        events: list[list[tuple]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(events, self._events)
        rows = [(rank, *event) for rank, own in enumerate(events) for event in own]
        frame = pd.DataFrame(rows, columns=_COLUMNS)
        times = ["start_ms", "end_ms"]
        frame[times] = (frame[times] - frame["start_ms"].min()) / 1e6
        return frame

    def gather(self, model: nn.Module) -> nn.Module:
        """A copy of the model that `split` cut, with what all ranks have learned. On every rank."""
        states: list[dict] = [{} for _ in range(dist.get_world_size())]
        own = [stage.state_dict().items() for stage in self.stages.values()]
        dist.all_gather_object(states, {k: v.cpu() for state in own for k, v in state})
        found = {name: value for state in states for name, value in state.items()}
        whole = copy.deepcopy(model)
        names = whole.state_dict().keys()
        if not names <= found.keys():
            raise ValueError(f"the stages have no {min(names - found.keys())}; split this model")
        whole.load_state_dict({name: found[name] for name in names})
        return whole


def split(
    model: nn.Module, example: Tensor, stages: int, *, costs: Sequence[float] | None = None
) -> list[nn.Module]:
    """Cut a model into stages so that the slowest takes as little as possible.

    A cut is possible wherever a single tensor passes: between the layers of a chain, around a
    residual block but not within. Stages keep the names of the model's state, and together they
    compute what the model does.

    Args:
        model: one tensor in, one out, traceable by ``torch.fx``. It is left as it is.
        example: the input of one micro-batch.
        costs: of the pieces that `piece_costs` lists, in any unit; measured if not given.

    Raises:
        ValueError: fewer pieces than stages, or not as many costs as pieces.
    """
    pieces = _pieces(model, example)
    if not 1 <= stages <= len(pieces):
        raise ValueError(f"stages is {stages}; the model can be cut into 1 to {len(pieces)} stages")
    if costs is None:
        costs = _measure(model, pieces, example)
    if len(costs) != len(pieces):
        raise ValueError(f"{len(costs)} costs for {len(pieces)} pieces; see piece_costs")
    model = copy.deepcopy(model)
    starts = balance(costs, stages)
    return [
        _module(model, [node for piece in pieces[start:end] for node in piece])
        for start, end in pairwise([*starts, len(pieces)])
    ]


def piece_costs(model: nn.Module, example: Tensor) -> pd.Series:
    """Milliseconds of forward and backward of each piece between cuts, by its last layer.

    Args:
        model, example: as for `split`.
    """
    pieces = _pieces(model, example)
    modules = [[node.target for node in piece if node.op == "call_module"] for piece in pieces]
    names = [
        (inside or [piece[-1].name])[-1] for inside, piece in zip(modules, pieces, strict=True)
    ]
    return pd.Series(_measure(model, pieces, example), index=names, name="milliseconds")


def balance(costs: Sequence[float], stages: int) -> list[int]:
    """Where each stage starts, for a contiguous split whose most expensive stage costs least.

    >>> balance([1, 1, 1, 3], 2)
    [0, 3]
    """
    if not 1 <= stages <= len(costs):
        raise ValueError(f"stages is {stages}; {len(costs)} pieces make 1 to {len(costs)} stages")
    total = np.append(0.0, np.asarray(costs, float).cumsum())
    # worst[k][n]: cost of the worst of k stages that hold the first n pieces.
    worst = np.full((stages + 1, len(costs) + 1), np.inf)
    worst[0, 0] = 0.0
    last = np.zeros(worst.shape, dtype=int)
    for k in range(1, stages + 1):
        for n in range(k, len(costs) + 1):
            options = np.maximum(worst[k - 1, :n], total[n] - total[:n])
            last[k, n] = options.argmin()
            worst[k, n] = options[last[k, n]]
    starts, end = [], len(costs)
    for k in range(stages, 0, -1):
        end = int(last[k, end])
        starts.append(end)
    return starts[::-1]


def bubble(trace: pd.DataFrame) -> float:
    """The share of all ranks' time, from first to last work, in which a rank had nothing to do.

    With equal stages, "gpipe" and "1f1b" have (p - 1) / (m + p - 1), "interleaved"
    (p - 1) / (v m + p - 1).
    """
    busy = (trace["end_ms"] - trace["start_ms"]).sum()
    span = trace["end_ms"].max() - trace["start_ms"].min()
    return 1 - busy / (trace["rank"].nunique() * span)


def in_flight(trace: pd.DataFrame) -> list[int]:
    """By rank, the most micro-batches at once that had gone forward and not yet all the way back.

    A rank keeps the activations of each: with one stage a rank, "gpipe" has m of them on every
    rank, "1f1b" p - r on rank r.
    """
    change = trace["kind"].map({"forward": 1, "input gradient": 0}).fillna(-1)
    ordered = trace.assign(change=change).sort_values("start_ms", kind="stable")
    return [int(rows["change"].cumsum().max()) for _, rows in ordered.groupby("rank")]


def ideal_trace(
    schedule: Literal["gpipe", "1f1b"],
    ranks: int,
    microbatches: int,
    *,
    forward_ms: float = 1.0,
    backward_ms: float = 2.0,
) -> pd.DataFrame:
    """The trace of a step with equal stages, one a rank, and communication that takes no time."""
    if schedule not in ("gpipe", "1f1b"):
        raise ValueError(f"schedule is {schedule!r}; choose 'gpipe' or '1f1b', or replay a trace")
    _check_schedule(schedule, ranks, ranks, microbatches)
    rows = []
    for rank in range(ranks):
        ahead = microbatches if schedule == "gpipe" else ranks - rank  # forwards before a backward
        order = [("forward", i) for i in range(ahead)]
        for i in range(microbatches):
            order.append(("backward", i))
            if ahead + i < microbatches:
                order.append(("forward", ahead + i))
        rows += [(rank, rank, *work, place, place) for place, work in enumerate(order)]
    frame = pd.DataFrame(rows, columns=_COLUMNS)
    return replay(frame, forward_ms=forward_ms, backward_ms=backward_ms)


def replay(
    trace: pd.DataFrame, *, forward_ms: float = 1.0, backward_ms: float = 2.0
) -> pd.DataFrame:
    """The same work in the same order, had all stages taken equally long and messages no time.

    Its `bubble` is what theory says of any schedule. Each half of a backward pass takes half of it.
    """
    lasts = {"forward": forward_ms, "backward": backward_ms}
    final = trace["stage"].max()
    ordered = trace.sort_values("start_ms", kind="stable")
    waiting = {r: list(rows.itertuples()) for r, rows in ordered.groupby("rank")}
    free = dict.fromkeys(waiting, 0.0)
    done: dict[tuple, float] = {}  # when a pass of a micro-batch left a stage
    times = pd.DataFrame(index=trace.index, columns=["start_ms", "end_ms"], dtype=float)
    while any(waiting.values()):
        rank = next(
            (r for r, rows in waiting.items() if rows and _needs(rows[0], final) <= done.keys()),
            None,
        )
        if rank is None:
            raise ValueError("the order of the trace cannot be: each rank waits for another")
        work = waiting[rank].pop(0)
        start = max([free[rank], *(done[need] for need in _needs(work, final))])
        free[rank] = end = start + lasts.get(work.kind, backward_ms / 2)
        if work.kind != "weight gradient":
            done[work.kind == "forward", work.stage, work.microbatch] = end
        times.loc[work.Index] = start, end
    return trace.assign(start_ms=times["start_ms"], end_ms=times["end_ms"])


class Pause(nn.Module):
    """A layer that takes time but no core: it stands for a stage on a device of its own.

    It passes its input on and has one parameter, which changes nothing. Half of its backward pass
    is for the gradient of the input, half for that of the parameter.
    """

    def __init__(self, forward_ms: float, backward_ms: float):
        super().__init__()
        self.forward_ms, self.backward_ms = forward_ms, backward_ms
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:  # as the first stage of many: it is to take as long as the others
            x = x.detach().requires_grad_()
        x = _Wait.apply(x, self.forward_ms, self.backward_ms / 2)
        return x + 0 * _Wait.apply(self.weight, 0.0, self.backward_ms / 2)


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, forward_ms: float, backward_ms: float) -> Tensor:
        ctx.backward_ms = backward_ms
        time.sleep(forward_ms / 1e3)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        time.sleep(ctx.backward_ms / 1e3)
        return gradient, None, None


class _TracedStage(pipelining.PipelineStage):
    """A stage that notes when it did what."""

    def __init__(self, module, index, count, device, events: list[tuple], **shapes: Tensor):
        # With the shapes given, torch needs no trial run, which would feed noise to batch norms.
        super().__init__(module, index, count, device, **shapes)
        self._events = events

    def forward_one_chunk(self, chunk: int, *args, **kwargs):
        return self._timed("forward", chunk, super().forward_one_chunk, *args, **kwargs)

    def backward_one_chunk(self, chunk: int, *args, full_backward: bool = True, **kwargs):
        kind = "backward" if full_backward else "input gradient"
        kwargs["full_backward"] = full_backward
        return self._timed(kind, chunk, super().backward_one_chunk, *args, **kwargs)

    def backward_weight_one_chunk(self, chunk: int, *args, **kwargs):
        work = super().backward_weight_one_chunk
        return self._timed("weight gradient", chunk, work, *args, **kwargs)

    def _timed(self, kind: str, chunk: int, work: Callable, *args, **kwargs):
        start = time.time_ns()
        result = work(chunk, *args, **kwargs)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._events.append((self.stage_index, kind, chunk, start, time.time_ns()))
        return result


_COLUMNS = ["rank", "stage", "kind", "microbatch", "start_ms", "end_ms"]


def _check_microbatches(rows: int, microbatches: int) -> None:
    if microbatches < 1 or rows % microbatches:
        raise ValueError(
            f"{rows} rows do not divide into {microbatches} micro-batches; choose a divisor"
        )


def _send(tensor: Tensor, rank: int) -> None:
    dist.send_object_list([tensor.shape, tensor.dtype], rank)
    dist.send(tensor.contiguous(), rank)


def _receive(rank: int) -> Tensor:
    what: list = [None, None]
    dist.recv_object_list(what, rank)
    tensor = torch.empty(what[0], dtype=what[1])
    dist.recv(tensor, rank)
    return tensor


def _check_schedule(schedule: str, stages: int, ranks: int, microbatches: int) -> None:
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule is {schedule!r}; choose from {list(get_args(Schedule))}")
    if schedule in ("gpipe", "1f1b") and stages != ranks:
        raise ValueError(f"{schedule} has one stage a rank; there are {stages} for {ranks} ranks")
    if stages < 1 or stages % ranks:
        raise ValueError(f"{stages} stages do not divide among {ranks} ranks; give a multiple")
    least = ranks if schedule == "1f1b" else 1
    if microbatches < least:
        raise ValueError(f"microbatches is {microbatches}; {schedule} needs at least {least}")
    if schedule in ("interleaved", "zero-bubble") and microbatches % ranks:
        raise ValueError(f"microbatches is {microbatches}; {schedule} needs a multiple of {ranks}")


def _ties(
    stages: Sequence[nn.Module], own: Mapping[int, nn.Module], ranks: int
) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
    """This rank's parameters that other ranks have too, each with the group of these ranks."""
    places: dict[nn.Parameter, list[tuple[int, str]]] = {}
    for i, stage in enumerate(stages):
        for name, parameter in stage.named_parameters():
            places.setdefault(parameter, []).append((i, name))
    found = []
    for shared, where in places.items():
        holders = sorted({i % ranks for i, _ in where})
        if len(holders) > 1 and shared.requires_grad:
            group = dist.new_group(holders)  # every rank must take part in making it
            mine = [own[i].get_parameter(name) for i, name in where if i in own]
            found += [(parameter, group) for parameter in mine[:1]]
    return found


@torch.no_grad()
def _shapes(stages: Sequence[nn.Module], example: Tensor) -> list[Tensor]:
    """The tensor before each stage and after the last, without data."""
    passed = [example.to("meta")]
    with torch.random.fork_rng(devices=[]):
        for stage in stages:
            after = copy.deepcopy(stage).to("meta")(passed[-1])
            passed.append(after.requires_grad_())  # torch infers from it what goes back
    return passed


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # a slice of a buffer may depend on the input

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, Pause) or super().is_leaf_module(module, name)


def _pieces(model: nn.Module, example: Tensor) -> list[list[fx.Node]]:
    """The nodes of the traced model between the places where only one tensor passes."""
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # tracing runs the user's code, which may fail in any way
        raise ValueError(
            f"{type(model).__name__} cannot be cut by torch.fx ({type(error).__name__}: {error}); "
            "write its stages as modules of their own"
        ) from error
    traced = fx.GraphModule(copy.deepcopy(model), graph)
    traced.graph.eliminate_dead_code()
    graph = traced.graph
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    flows = _floats(traced, example)
    place = {node: i for i, node in enumerate(nodes)}
    last_use = {
        node: max((place.get(user, len(nodes)) for user in node.users), default=-1)
        for node in graph.nodes
        if node.op != "get_attr"  # parameters and buffers lie where they are used
    }
    pieces, current = [], []
    for i, node in enumerate(nodes):
        current.append(node)
        alive = [n for n, used in last_use.items() if place.get(n, -1) <= i < used]
        if alive == [node] and node in flows:
            pieces.append(current)
            current = []
    if current:
        raise ValueError("the model does not end in one tensor of floating point; return one")
    return pieces


def _floats(traced: fx.GraphModule, example: Tensor) -> set[fx.Node]:
    """The nodes whose value is a tensor that a gradient can pass."""
    found = set()

    class Look(fx.Interpreter):
        def run_node(self, node: fx.Node):
            value = super().run_node(node)
            if isinstance(value, Tensor) and value.is_floating_point():
                found.add(node)
            return value

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        Look(traced).run(example)
    return found


def _module(model: nn.Module, nodes: Sequence[fx.Node]) -> fx.GraphModule:
    """A stage of these nodes, with the parameters of ``model`` and their names."""
    graph, made = fx.Graph(tracer_cls=_Tracer), {}  # a stage that is sent is traced again
    inside = set(nodes)

    def here(node: fx.Node) -> fx.Node:
        if node not in made:
            if node in inside or node.op == "get_attr":
                made[node] = graph.node_copy(node, here)
            else:
                raise AssertionError(f"{node} is of another stage")
        return made[node]

    entering = [n for node in nodes for n in node.all_input_nodes]
    entering = [n for n in entering if n not in inside and n.op != "get_attr"]
    made[entering[0]] = graph.placeholder("x")
    for node in nodes:
        here(node)
    graph.output(made[nodes[-1]])
    return fx.GraphModule(model, graph)


def _measure(
    model: nn.Module, pieces: Sequence[Sequence[fx.Node]], example: Tensor, repeats: int = 5
) -> list[float]:
    """Milliseconds of forward and backward of each piece, the least of some tries."""
    model = copy.deepcopy(model)
    x, costs = example, []
    with torch.random.fork_rng(devices=[]):
        for piece in pieces:
            module = _module(model, piece)
            x = x.detach().requires_grad_(x.is_floating_point())
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                y = module(x)
                if y.requires_grad:
                    y.backward(torch.ones_like(y))
                times.append(1e3 * (time.perf_counter() - start))
            costs.append(min(times))
            x = y
    return costs


def _needs(work, final: int) -> set[tuple]:
    """Which passes of other stages, as (forward, stage, micro-batch), a piece of work waits for."""
    if work.kind == "forward":
        return {(True, work.stage - 1, work.microbatch)} if work.stage else set()
    if work.kind == "weight gradient":
        return set()
    if work.stage == final:
        return {(True, work.stage, work.microbatch)}
    return {(False, work.stage + 1, work.microbatch)}
