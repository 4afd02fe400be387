"""Graph parallelism: branches of one network that do not need each other run at the same time.

A *fork* is a stretch of the graph, between two operations that all others wait for, that falls into
parts with no edge between them: its *branches*. `branches` lists them with their work;
`parallelize_branches` gives a model that runs them on threads, on CUDA streams, or one rank each,
forward and backward.

On threads and ranks a fork is a single node of the autograd graph. Its forward pass records the
operations of each branch in a graph of its own; its backward pass runs these graphs side by side.
Nothing may depend on which branch is first: branches that write to the same tensor, train the same
weight or draw random numbers are not run side by side, and the reason is given.
"""

import ctypes
import functools
import operator
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Literal, get_args

import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from workbench.parallel.forks import Seen, Stretch, divide, look_at, name_of, tensors_of

How = Literal["threads", "streams", "ranks"]


def branches(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    *,
    workers: int = 2,
    least_flops: float = 1e6,
) -> pd.DataFrame:
    """What of a model can run side by side, and how much work that is.

    Args:
        example: the inputs of one call. The model's own batch size should be used: it decides
            whether a branch is worth a worker.
        workers: how many run at a time. Each fork hands its branches out, the largest first, to
            the worker with the least work.
        least_flops: work that a fork must take off a single worker to be split: to hand a branch
            over and to wait for it takes time as well.

    Returns one row for each stretch of operations in sequence, and for each branch of a fork:
    ``stretch`` and ``branch`` (its place), ``first`` and ``last`` operation, ``operations``,
    ``parameters``, ``flops`` of a forward pass, ``worker``, ``starts_at``: the FLOPs that have to
    be done before, by the worker that has most of them, and ``left``: why the branches of this fork
    run one after another, "" where they do not. Operations that are no matrix products or
    convolutions count one FLOP for each value that they give.

    At best, all workers together are faster than one by the sum of ``flops`` divided by the
    largest ``starts_at + flops``.

    Raises:
        TypeError: not a module, or an example that is no tensors.
        ValueError: a setting out of range, a model that cannot be traced, or one that does not run
            on the example.

    Shown in notebook 11.
    """
    _check(model, workers, least_flops)
    seen = look_at(model, example)
    rows, start = [], 0
    for i, stretch in enumerate(divide(seen, seen.operations, workers, least_flops)):
        done = [start] * workers
        for j, part in enumerate(stretch.parts):
            names = [name_of(node) for node in part.nodes]
            weights = tensors_of(seen, part.nodes) & seen.parameters.keys()
            rows.append({
                "stretch": i, "branch": j, "first": names[0], "last": names[-1],
                "operations": len(names), "parameters": sum(map(seen.parameters.get, weights)),
                "flops": part.flops, "worker": part.worker, "starts_at": done[part.worker],
                "left": stretch.left,
            })  # fmt: skip
            done[part.worker] += part.flops
        start = max(done)
    return pd.DataFrame(rows)


def parallelize_branches(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    *,
    how: How = "threads",
    workers: int = 2,
    least_flops: float = 1e6,
) -> "BranchedModel":
    """A copy of the model that runs its branches side by side, forward and backward.

    Outputs and gradients are those of the model to the last bit, if each operation of both uses as
    many threads. The names of the weights stay. What runs side by side is what `branches` gives
    with the same settings; all else is left as it is.

    Args:
        example: the inputs of one call.
        how: "threads" on a CPU: the caller's, and ``workers - 1`` more. ``torch.get_num_threads()``
            is shared out evenly among them while a fork runs. "streams" on a CUDA device. "ranks":
            call this, and then the model, in each rank of a process group (see `run`), with the
            same inputs. A rank computes its own branches and what lies outside of forks, and is
            sent the rest. It gets gradients for what it computed (see `gather_branches`), and
            starts with the weights of rank 0.
        workers: threads, streams or ranks.
        least_flops: see `branches`.

    Raises:
        TypeError: not a module, or an example that is no tensors.
        ValueError: nothing can run side by side, with the reasons: no branches, too little work in
            all but one, a weight or module in use elsewhere, a value changed in place, random
            numbers. Also a model that cannot be traced, a setting out of range, or ``how`` that
            does not suit the device. Called in training mode, the result raises it too where only
            that mode draws random numbers or writes to what is shared.

    Gradients of gradients are refused. A hook on a weight (`Tensor.register_hook`) is called twice.

    Reference: Szegedy et al. (2015), "Going deeper with convolutions", for the branches; Jia,
    Zaharia and Aiken (2019), "Beyond data and model parallelism for deep neural networks", for
    operations of one graph as a dimension of its own.
    """
    _check(model, workers, least_flops)
    _check_how(model, how, workers)
    seen = look_at(model, example)
    stretches = divide(seen, seen.operations, workers, least_flops)
    if how == "ranks" and seen.draws:
        raise ValueError(
            f"{name_of(seen.draws[0])} draws random numbers, which differ from rank to rank; put "
            "the model in evaluation mode, or use how='threads'"
        )
    if not any(stretch.split for stretch in stretches):
        raise ValueError(_nothing_to_split(type(model).__name__, seen, stretches))
    forks = [_replace(seen, stretch, how, workers) for stretch in stretches if stretch.split]
    result = BranchedModel(seen.model, seen.graph, forks, seen.mode)
    if how == "ranks":
        for tensor in result.state_dict().values():
            dist.broadcast(tensor, 0)
    return result


def gather_branches(model: "BranchedModel") -> None:
    """Send what each rank trained of its own branches to all others; call it on every rank.

    Before this, only the rank that runs a branch has its trained weights and its batch statistics.
    """
    state = model.state_dict()
    for fork in model._forks:
        for branch in fork.branches:
            for name in branch.state:
                if name in state:
                    dist.broadcast(state[name], branch.worker)


class BranchedModel(nn.Module):
    """Runs the forks of a model side by side. Its parameters and buffers are the model's, by name.

    Like any traced model it has one path: what its Python code decided for the example is fixed.
    """

    def __init__(
        self, model: nn.Module, graph: fx.Graph, forks: Sequence["_Fork"], mode: bool | None
    ):
        super().__init__()
        vars(self).update(vars(model))
        self._mode = mode
        self._forks = tuple(forks)
        self._main = _compiled(graph)

    def forward(self, *inputs, **named):
        if self._mode is not None and self.training != self._mode:
            raise ValueError(
                f"training is {self.training}, and was {self._mode} when the graph was made; the "
                "model's own code asks for it: call parallelize_branches once for each mode"
            )
        return self._main(self, self, *inputs, **named)

    def extra_repr(self) -> str:
        return "\n".join(fork.describe() for fork in self._forks)


@dataclass(frozen=True)
class _Branch:
    """``inputs`` are places among those of the fork; ``state`` names parameters and buffers."""

    run: Callable  # of the model and the inputs, gives a tuple
    inputs: tuple[int, ...]
    parameters: tuple[str, ...]
    state: tuple[str, ...]
    worker: int
    name: str


@dataclass(frozen=True)
class _Fork:
    how: How
    workers: int
    branches: tuple[_Branch, ...]
    modules: tuple[str, ...]
    refused_in_training: str  # why, or ""

    def describe(self) -> str:
        shares = [[b.name for b in self.branches if b.worker == w] for w in range(self.workers)]
        return f"{self.how}: " + " | ".join(", ".join(share) for share in shares)


def _check(model: nn.Module, workers: int, least_flops: float) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(workers, int) or workers < 2:
        raise ValueError(f"workers is {workers!r}; give a whole number from 2")
    if not least_flops >= 0:
        raise ValueError(f"least_flops is {least_flops!r}; give 0 or more")


def _check_how(model: nn.Module, how: How, workers: int) -> None:
    if how not in get_args(How):
        raise ValueError(f"how is {how!r}; choose from {get_args(How)}")
    devices = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    if how == "threads" and devices - {"cpu"}:
        raise ValueError(f"how='threads' is for a CPU, the model is on {devices}; use 'streams'")
    if how == "streams" and devices != {"cuda"}:
        raise ValueError(f"how='streams' is for CUDA, the model is on {devices}; use 'threads'")
    if how == "ranks":
        size = dist.get_world_size() if dist.is_initialized() else 0
        if size < workers:
            raise ValueError(
                f"how='ranks' with {workers} workers needs as many ranks, and there are {size}; "
                "call it in a function that workbench.parallel.run runs"
            )


def _nothing_to_split(model: str, seen: Seen, stretches: list[Stretch]) -> str:
    unseen = [f"{name} could not be looked into ({why})" for name, why in seen.opaque.items()]
    forks = [
        f"the {len(stretch.parts)} from {name_of(stretch.parts[0].nodes[0])}: {stretch.left}"
        for stretch in stretches
        if len(stretch.parts) > 1
    ]
    if not forks:
        chain = f"its {len(seen.operations)} operations wait for one another"
        return f"{model} has no branches: " + "; ".join([chain, *unseen])
    more = [f"and {len(forks) - 3} more forks"] if len(forks) > 3 else []
    reasons = "; ".join([*forks[:3], *more, *unseen])
    return f"{model} has no branches that can run side by side: {reasons}"


# How forks become operations.


def _replace(seen: Seen, stretch: Stretch, how: How, workers: int) -> _Fork:
    """Put one operation into the graph in place of a fork, which it runs."""
    graph, order = seen.graph, {node: i for i, node in enumerate(seen.graph.nodes)}
    inside = {node for part in stretch.parts for node in part.nodes}
    # A value has its own place for each operation that reads it. Autograd adds up its gradients in
    # the order of these places: the reverse of that of the operations, as in the model.
    places = [
        (read, node)
        for node in sorted(inside, key=order.__getitem__, reverse=True)
        for read in node.all_input_nodes
        if read not in inside and read.op != "get_attr"
    ]
    outputs, made = [], []
    for part in stretch.parts:
        given = [node for node in part.nodes if set(node.users) - inside]
        mine = tuple(i for i, (_, node) in enumerate(places) if node in set(part.nodes))
        run = _compiled(_graph_of(part.nodes, [places[i] for i in mine], given))
        state = sorted(tensors_of(seen, part.nodes))
        weights = tuple(name for name in state if name in seen.parameters)
        name = f"{name_of(part.nodes[0])}..{name_of(part.nodes[-1])}"
        made.append(_Branch(run, mine, weights, tuple(state), part.worker, name))
        outputs += given
    fork_number = sum(node.target is _run_fork for node in graph.nodes)
    if not fork_number:
        with graph.inserting_before(next(iter(graph.nodes))):
            graph.placeholder("model")
    itself = next(iter(graph.nodes))
    last = max(inside, key=order.__getitem__)
    with graph.inserting_after(last):
        fork = graph.call_function(_run_fork, (itself, fork_number, *(v for v, _ in places)))
    with graph.inserting_before(fork.next):
        for i, node in enumerate(outputs):
            taken = graph.call_function(operator.getitem, (fork, i))
            node.replace_all_uses_with(taken, delete_user_cb=lambda user: user not in inside)
    for node in sorted(inside, key=order.__getitem__, reverse=True):
        graph.erase_node(node)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    modules = {node.target for node in inside if node.op == "call_module"}
    return _Fork(how, workers, tuple(made), tuple(sorted(modules)), stretch.refused_in_training)


def _graph_of(
    nodes: list[fx.Node], places: list[tuple[fx.Node, fx.Node]], given: list[fx.Node]
) -> fx.Graph:
    """A branch as a graph of its own, with an input for each place."""
    graph = fx.Graph()
    inputs = {place: graph.placeholder(f"input_{i}") for i, place in enumerate(places)}
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for read in node.all_input_nodes:
            if read.op == "get_attr" and read not in copies:
                copies[read] = graph.node_copy(read)

        def copied(read: fx.Node, node: fx.Node = node) -> fx.Node:
            return copies[read] if read in copies else inputs[read, node]

        copies[node] = graph.node_copy(node, copied)
    graph.output(tuple(copies[node] for node in given))
    return graph


def _compiled(graph: fx.Graph) -> Callable:
    """The graph as a function of the model and its inputs."""
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(code.src, namespace)
    return namespace["forward"]


# How a fork runs.


def _run_fork(model: BranchedModel, number: int, *values: object) -> list:
    fork = model._forks[number]
    if fork.refused_in_training and any(model.get_submodule(m).training for m in fork.modules):
        raise ValueError(
            f"in training mode this fork cannot run side by side: {fork.refused_in_training}; "
            "give parallelize_branches the model in training mode to see what can"
        )
    if fork.how == "streams":
        return _on_streams(fork, model, values)
    inputs, layout = pytree.tree_flatten(values)
    call = _Call(fork, model, layout)
    tensors = [x for x in (*inputs, *call.weights) if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        outputs = _SideBySide.apply(call, *inputs, *call.weights)
    else:
        outputs = call.received(call.computed(inputs), inputs)
    return call.in_shape(outputs)


class _SideBySide(torch.autograd.Function):
    """All branches of a fork as one operation, in both directions.

    The forward pass cuts the graph: each branch starts from detached inputs and records a graph of
    its own, down to its weights. The backward pass lets each of these graphs give its gradients.
    """

    @staticmethod
    def forward(ctx, call: "_Call", *tensors):
        inputs = [
            x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
            for x in tensors[: len(tensors) - len(call.weights)]
        ]
        with torch.enable_grad():
            outputs = call.computed(inputs)
        ctx.call, ctx.inputs, ctx.outputs = call, inputs, outputs
        ctx.set_materialize_grads(False)
        flat = call.received(outputs, inputs)
        ctx.mark_non_differentiable(
            *(x for x, trained in zip(flat, call.trained, strict=True) if not trained)
        )
        return tuple(flat)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        if ctx.outputs is None:
            raise RuntimeError("the branches of a fork can go backward once; call forward again")
        call, inputs, outputs = ctx.call, ctx.inputs, ctx.outputs
        ctx.inputs = ctx.outputs = None  # what was kept for this is free after it
        result = [None] * len(inputs)
        tasks, places, start = [], [], 0
        for branch, weights, leaves, shape in zip(
            call.fork.branches, call.weights_of, outputs, call.shapes, strict=True
        ):
            arrived = gradients[start : start + shape.num_leaves]
            start += shape.num_leaves
            numbers = call.given_to(branch, range(len(inputs)))
            places.append([i for i in numbers if _is_trained(inputs[i])])
            wanted = [inputs[i] for i in places[-1]] + weights
            tasks.append(functools.partial(_gradients, leaves, arrived, wanted))
        for branch, found, mine in zip(
            call.fork.branches, _side_by_side(call.fork, tasks), places, strict=True
        ):
            found = list(found or [None] * (len(mine) + len(branch.parameters)))
            if call.fork.how == "ranks":
                found[: len(mine)] = _gradients_of_rank(branch, found, [inputs[i] for i in mine])
            for i, gradient in zip(mine, found, strict=False):
                result[i] = gradient
            result += found[len(mine) :]
        return None, *result


def _is_trained(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _gradients(
    outputs: list, arrived: Sequence[Tensor | None], wanted: list[Tensor]
) -> Sequence[Tensor | None]:
    """Gradients of what is trained; None for the rest, and for what was not reached."""
    reached = [(y, g) for y, g in zip(outputs, arrived, strict=True) if g is not None]
    trained = [x for x in wanted if x.requires_grad]
    if not reached or not trained:
        return [None] * len(wanted)
    found = iter(
        torch.autograd.grad(
            [y for y, _ in reached], trained, [g for _, g in reached], allow_unused=True
        )
    )
    return [next(found) if x.requires_grad else None for x in wanted]


class _Call:
    """One pass through a fork: its inputs and outputs are flat lists, in the order of branches."""

    def __init__(self, fork: _Fork, model: BranchedModel, layout: pytree.TreeSpec):
        self.fork, self.model, self.layout = fork, model, layout
        self.shapes: list[pytree.TreeSpec] = []  # of what each branch gives
        self.trained: list[bool] = []  # whether each output depends on something that is trained
        self.weights_of = [
            [operator.attrgetter(name)(model) for name in b.parameters] for b in fork.branches
        ]
        self.weights = [weight for weights in self.weights_of for weight in weights]

    def given_to(self, branch: _Branch, inputs: Sequence) -> list:
        """The inputs of a branch, flat."""
        values = pytree.tree_unflatten(inputs, self.layout)
        return pytree.tree_leaves([values[i] for i in branch.inputs])

    def computed(self, inputs: list) -> list[list | None]:
        """The outputs of each branch, or None for those of other ranks."""
        values = pytree.tree_unflatten(inputs, self.layout)
        tasks = [
            functools.partial(b.run, self.model, *(values[i] for i in b.inputs))
            for b in self.fork.branches
        ]
        results = _side_by_side(self.fork, tasks)
        flat = [result and pytree.tree_flatten(result) for result in results]
        self.shapes = [result and result[1] for result in flat]
        return [result and result[0] for result in flat]

    def received(self, outputs: list[list | None], inputs: list) -> list:
        """All outputs, cut off from the graphs of the branches; those of other ranks arrive."""
        if self.fork.how == "ranks":
            device = next(x.device for x in (*inputs, *self.weights) if isinstance(x, Tensor))
            self.shapes, self.trained, flat = _outputs_of_ranks(
                self.fork, outputs, self.shapes, device
            )
            return flat
        flat = [x for leaves in outputs for x in leaves]
        self.trained = [_is_trained(x) for x in flat]
        return [x.detach() if isinstance(x, Tensor) else x for x in flat]

    def in_shape(self, outputs: Sequence) -> list:
        """The outputs of all branches as they were before they were made flat."""
        shaped, start = [], 0
        for shape in self.shapes:
            shaped += pytree.tree_unflatten(outputs[start : start + shape.num_leaves], shape)
            start += shape.num_leaves
        return shaped


def _side_by_side(fork: _Fork, tasks: list[Callable]) -> list:
    """What each branch's task returns; on ranks, None for those of the others."""
    if fork.how == "ranks":
        rank = dist.get_rank()
        return [
            task() if b.worker == rank else None
            for b, task in zip(fork.branches, tasks, strict=True)
        ]
    if getattr(_here, "is_a_worker", False):  # a branch holds forks of its own: no thread is free
        return [task() for task in tasks]
    threads = torch.get_num_threads()
    _end_idle_threads()
    call = _with_settings_of_caller(max(1, threads // fork.workers))

    def work(worker: int) -> dict[int, object]:
        return {i: tasks[i]() for i, b in enumerate(fork.branches) if b.worker == worker}

    pool = _pool(fork.workers - 1, os.getpid())
    others = [pool.submit(call, work, worker) for worker in range(1, fork.workers)]
    try:
        done = call(work, 0)
    finally:
        wait(others)  # nothing runs on behind a caller that goes on, or fails
        torch.set_num_threads(threads)
    for other in others:
        done |= other.result()
    return [done[i] for i in range(len(tasks))]


_here = threading.local()


@functools.cache
def _pool(size: int, process: int) -> ThreadPoolExecutor:
    """Threads that stay. A forked process has none of its parent's, and needs its own."""
    return ThreadPoolExecutor(size, "branch", lambda: setattr(_here, "is_a_worker", True))


def _end_idle_threads() -> None:
    """End the threads among which OpenMP splits single operations; it starts new ones when needed.

    After an operation they look for the next one in a loop, for milliseconds, and each keeps a core
    busy that a branch needs.
    """
    if os.getpid() == _PROCESS:  # a forked one would wait for its parent's threads for ever
        _pause_of_openmp()(1)  # "soft": all settings stay


_PROCESS = os.getpid()


@functools.cache
def _pause_of_openmp() -> Callable[[int], int]:
    known = None if os.name == "nt" else ctypes.CDLL(None)  # what is loaded for everyone to use
    return getattr(known, "omp_pause_resource_all", lambda how: 0)  # since OpenMP 5.0


def _with_settings_of_caller(threads: int) -> Callable:
    """Calls a function with what torch keeps for each thread as it is now, and so many threads.

    A new thread would start with gradients on, and with the number of threads last set anywhere.
    """
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    mixed, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def call(function: Callable, *arguments: object) -> object:
        torch.set_num_threads(threads)
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(gradients),
            torch.autocast("cpu", dtype, enabled=mixed),
        ):
            return function(*arguments)

    return call


def _on_streams(fork: _Fork, model: BranchedModel, values: Sequence) -> list:
    """Branches queued on several streams. Autograd goes backward on the stream it came by."""
    current = torch.cuda.current_stream(next(model.parameters()).device)
    streams = [current, *_streams(current.device_index, fork.workers - 1)]
    for stream in streams[1:]:
        stream.wait_stream(current)
    results = []
    for branch in fork.branches:
        given = [values[i] for i in branch.inputs]
        with torch.cuda.stream(streams[branch.worker]):
            output = branch.run(model, *given)
        # Memory may be given to others once its own stream is done: name the other one that reads.
        for stream, used in ((streams[branch.worker], given), (current, output)):
            for x in pytree.tree_leaves(used):
                if isinstance(x, Tensor):
                    x.record_stream(stream)
        results += output
    for stream in streams[1:]:
        current.wait_stream(stream)
    return results


@functools.cache
def _streams(device: int, count: int) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(count)]


@dataclass(frozen=True)
class _Form:
    """What another rank has to know of an output: size and type of a tensor, or the value."""

    size: torch.Size | None = None
    dtype: torch.dtype | None = None
    trained: bool = False
    value: object = None

    @classmethod
    def of(cls, value: object) -> "_Form":
        if isinstance(value, Tensor):
            return cls(value.shape, value.dtype, value.requires_grad)
        return cls(value=value)


def _outputs_of_ranks(
    fork: _Fork, outputs: list[list | None], shapes: list, device: torch.device
) -> tuple[list[pytree.TreeSpec], list[bool], list]:
    """Send the outputs of this rank's branches to all others, which go on with them as well."""
    mine = {
        i: pytree.tree_unflatten(map(_Form.of, leaves), shapes[i])
        for i, leaves in enumerate(outputs)
        if leaves is not None
    }
    told: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    forms = {i: tree for each in told for i, tree in each.items()}
    flat, trained, shapes = [], [], []
    for i, branch in enumerate(fork.branches):
        leaves, shape = pytree.tree_flatten(forms[i])
        shapes.append(shape)
        for j, form in enumerate(leaves):
            value = form.value
            if form.size is not None:
                # All ranks, the sender too, go on with the same values in the same memory layout.
                value = torch.empty(form.size, dtype=form.dtype, device=device)
                if outputs[i] is not None:
                    value.copy_(outputs[i][j].detach())
                dist.broadcast(value, branch.worker)
            flat.append(value)
            trained.append(form.trained)
    return shapes, trained, flat


def _gradients_of_rank(
    branch: _Branch, found: list[Tensor | None], inputs: list[Tensor]
) -> list[Tensor]:
    """Send the gradients of a branch's inputs from its rank to all; zeros for what is not used."""
    gradients = []
    for x, gradient in zip(inputs, found, strict=False):
        sent = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        if gradient is not None:
            sent.copy_(gradient)
        dist.broadcast(sent, branch.worker)
        gradients.append(sent)
    return gradients
