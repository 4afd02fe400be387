"""Where the graph of a model forks, and whether its branches get in each other's way.

`look_at` traces a model and watches each operation on an example: its work, and what it does beside
giving a value. `divide` cuts the graph into stretches: operations in sequence, and forks, whose
branches are groups of operations with no edge between them.
"""

import copy
import functools
import operator
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

LEAST_GAIN = 1.1  # a fork that could at best be this much faster is not worth splitting


@dataclass(frozen=True)
class Seen:
    """A copy of a model, its graph, and what each operation did on the example.

    A tensor of the model has one name here, however many modules share it.
    """

    model: nn.Module
    graph: fx.Graph
    opaque: dict[str, str]  # submodules that are one operation, and why they could not be traced
    uses: dict[fx.Node, set[str]]  # parameters and buffers
    parameters: dict[str, int]  # values of each
    mode: bool | None  # training or not, where the model's own code asks for it: its trace is fixed
    flops: dict[fx.Node, int]
    now: "Effects"
    in_training: "Effects | str"  # or why it cannot be told

    @property
    def operations(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op.startswith("call")]

    @property
    def draws(self) -> list[fx.Node]:
        return [node for node in self.operations if node in self.now.draws]


@dataclass(frozen=True)
class Effects:
    draws: set[fx.Node]  # operations that draw random numbers
    changes: dict[fx.Node, set[fx.Node]]  # earlier values that an operation writes to
    writes: dict[fx.Node, set[str]]  # tensors of the model that it writes to


@dataclass(frozen=True)
class Part:
    nodes: list[fx.Node]
    flops: int
    worker: int = 0


@dataclass(frozen=True)
class Stretch:
    """One part in sequence, or the parts of a fork; ``left`` says why they are not split."""

    parts: list[Part]
    left: str = ""
    refused_in_training: str = ""

    @property
    def split(self) -> bool:
        return len(self.parts) > 1 and not self.left


def look_at(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> Seen:
    """Trace a copy of a model, and run it on an example: as it is, and in training mode.

    Raises:
        TypeError: the example is no tensors.
        ValueError: the model cannot be traced, or does not run on the example.
    """
    inputs = (example,) if isinstance(example, Tensor) else example
    if not isinstance(inputs, tuple) or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(f"example is {type(example).__name__}; give a tensor or a tuple of tensors")
    work = copy.deepcopy(model)
    graph, opaque = _trace(work)
    other, _ = _trace(copy.deepcopy(work).train(not work.training))
    mode = None if str(other) == str(graph) else work.training
    uses = {node: {name for name, _ in _state(work, node)} for node in graph.nodes}
    devices = {tensor.device.index for tensor in (*work.parameters(), *inputs) if tensor.is_cuda}
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            watcher = _Watcher(copy.deepcopy(work), graph)
            watcher.run(*(x.detach().clone() for x in inputs))
        except Exception as error:  # the model is the user's, and may fail in any way
            raise ValueError(
                f"{type(model).__name__} does not run on the example: {_in_a_line(error)}"
            ) from error
        in_training: Effects | str = watcher.effects
        if not all(module.training for module in work.modules()):
            try:
                trained = _Watcher(copy.deepcopy(work).train(), graph)
                trained.run(*(x.detach().clone() for x in inputs))
                in_training = trained.effects
            except Exception as error:
                in_training = f"on the example, training mode fails: {_in_a_line(error)}"
    sizes = {name: tensor.numel() for name, tensor in work.named_parameters()}
    watched = (watcher.flops, watcher.effects, in_training)
    return Seen(work, graph, opaque, uses, sizes, mode, *watched)


class _Tracer(fx.Tracer):
    """Enters containers and the user's own modules; layers stay whole."""

    proxy_buffer_attributes = True

    def __init__(self, opaque: Iterable[str] = ()):
        super().__init__()
        self.opaque, self.path = frozenset(opaque), []

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        bases = set(type(module).__mro__) - {nn.Module, nn.Sequential, object}
        layer = any(base.__module__.startswith("torch.nn.") for base in bases)
        return name in self.opaque or layer

    def call_module(self, module, forward, args, kwargs):
        self.path.append(self.path_of_module(module))
        output = super().call_module(module, forward, args, kwargs)
        self.path.pop()  # not reached when tracing fails: then the path tells where
        return output


def _trace(model: nn.Module) -> tuple[fx.Graph, dict[str, str]]:
    """The graph, and the submodules that stay one operation since they cannot be traced."""
    opaque: dict[str, str] = {}
    while True:
        tracer = _Tracer(opaque)
        try:
            graph = tracer.trace(model)
        except Exception as error:  # tracing runs the user's code, which may fail in any way
            if not tracer.path:
                raise ValueError(
                    f"the forward pass of {type(model).__name__} cannot be traced "
                    f"({_in_a_line(error)}); move what depends on values into a submodule"
                ) from error
            opaque[tracer.path[-1]] = _in_a_line(error)
        else:
            break
    for node in reversed(graph.nodes):  # parts of a shape that nothing reads would join no branch
        if not node.users and node.target in _READERS:
            graph.erase_node(node)
    return graph, opaque


_READERS = {getattr, operator.getitem, "size", "dim"}


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _state(model: nn.Module, node: fx.Node) -> list[tuple[str, Tensor]]:
    """Parameters and buffers that an operation uses, each under the first of its names."""
    used = {}
    if node.op == "call_module":
        module = model.get_submodule(node.target)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            used[f"{node.target}.{name}"] = tensor
    for read in (*node.all_input_nodes, node):
        if read.op == "get_attr":
            used[read.target] = functools.reduce(getattr, read.target.split("."), model)
    every = (*model.named_parameters(), *model.named_buffers())
    first = {id(tensor): name for name, tensor in every}
    return [
        (first.get(id(tensor), name), tensor)
        for name, tensor in used.items()
        if isinstance(tensor, Tensor)
    ]


class _Watcher(fx.Interpreter):
    """Runs a graph once and notes what each operation costs and does besides giving a value."""

    def __init__(self, model: nn.Module, graph: fx.Graph):
        super().__init__(model, graph=graph)
        self.flops: dict[fx.Node, int] = {}
        self.effects = Effects(set(), {}, {})
        self.counter = FlopCounterMode(display=False)
        self.values: list[tuple[fx.Node, Tensor]] = []
        self.versions: list[int] = []

    def run(self, *inputs):
        with self.counter:
            return super().run(*inputs)

    def run_node(self, node: fx.Node):
        state = _state(self.module, node)
        before = [(tensor._version, tensor.clone()) for _, tensor in state]
        random, flops = _random_state(), self.counter.get_total_flops()
        result = super().run_node(node)
        tensors = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        counted = self.counter.get_total_flops() - flops
        self.flops[node] = counted or sum(tensor.numel() for tensor in tensors)
        if any(not torch.equal(old, new) for old, new in zip(random, _random_state(), strict=True)):
            self.effects.draws.add(node)
        self.effects.writes[node] = {
            name
            for (name, tensor), (version, old) in zip(state, before, strict=True)
            if tensor._version != version or not torch.equal(tensor, old)
        }
        versions = [tensor._version for _, tensor in self.values]
        self.effects.changes[node] = {
            changed
            for (changed, _), old, new in zip(self.values, self.versions, versions, strict=True)
            if old != new
        }
        if node.op != "get_attr":
            self.values += [(node, tensor) for tensor in tensors]
            versions += [tensor._version for tensor in tensors]
        self.versions = versions
        return result


def _random_state() -> list[Tensor]:
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if on_cuda else [])]


def divide(
    seen: Seen, operations: list[fx.Node], workers: int, least_flops: float
) -> list[Stretch]:
    """Stretches of operations in the order of the graph, of which some are forks.

    Args:
        operations: of the graph of ``seen``: all, or those of one branch.
        workers, least_flops: see `workbench.parallel.branches`.
    """
    found: list[Stretch] = []

    def in_sequence(nodes: list[fx.Node]) -> None:
        if found and len(found[-1].parts) == 1:
            nodes = found.pop().parts[0].nodes + nodes
        found.append(Stretch([_part(seen, nodes)]))

    for groups in _forks(operations):
        if len(groups) == 1:
            in_sequence(groups[0])
            continue
        parts = [_part(seen, group) for group in groups]
        parts, left = _shared_out(parts, workers, least_flops)
        entangled = _entangled(seen, groups, seen.now)
        if not (left or entangled):
            late = seen.in_training
            refused = late if isinstance(late, str) else _entangled(seen, groups, late)
            found.append(Stretch(parts, "", refused))
            continue
        # Inside of a branch there may be forks that can be split, but not if it hands values over
        # by writing to them: then the order of all operations has to stay.
        inner = []
        if not _writers(seen.now, groups):
            inner = [divide(seen, group, workers, least_flops) for group in groups]
        if any(stretch.split for stretches in inner for stretch in stretches):
            for stretches in inner:
                found += stretches
        else:
            parts = [Part(part.nodes, part.flops) for part in parts]
            found.append(Stretch(parts, left or entangled))
    return found


def _part(seen: Seen, nodes: list[fx.Node]) -> Part:
    return Part(nodes, sum(seen.flops[node] for node in nodes))


def _forks(operations: list[fx.Node]) -> Iterator[list[list[fx.Node]]]:
    """Groups of operations with no edge from one to another, in the order of the graph."""
    for nodes in _between_cuts(operations):
        groups = _connected(nodes)
        if len(groups) > 1 or len(nodes) == 1:
            yield groups
        else:  # its branches join, but not all in one place: they are apart until the first do
            first = _first_join(nodes)
            yield _connected(nodes[:first])
            yield from _forks(nodes[first:])


def _between_cuts(operations: list[fx.Node]) -> list[list[fx.Node]]:
    """The operations in groups: each *cut* by itself, and what lies between two of them.

    A cut comes before or after every other operation: all wait for it, or it waits for them.
    """
    place = {node: 1 << i for i, node in enumerate(operations)}
    before = dict.fromkeys(operations, 0)  # sets of operations, as bits
    after = dict.fromkeys(operations, 0)
    for node in operations:
        for read in node.all_input_nodes:
            if read in place:
                before[node] |= before[read] | place[read]
    for node in reversed(operations):
        for user in node.users:
            if user in place:
                after[node] |= after[user] | place[user]
    groups: list[list[fx.Node]] = [[]]
    for node in operations:
        if (before[node] | after[node]).bit_count() == len(operations) - 1:
            groups += [[node], []]
        else:
            groups[-1].append(node)
    return [group for group in groups if group]


def _connected(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """The groups of operations with no edge from one to another, in the order of the graph."""
    group_of: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        joined = {id(group_of[r]): group_of[r] for r in node.all_input_nodes if r in group_of}
        members = [node for group in joined.values() for node in group] + [node]
        group_of |= dict.fromkeys(members, members)
    groups = {id(group): group for group in (group_of[node] for node in nodes)}
    order = {node: i for i, node in enumerate(nodes)}
    return [sorted(group, key=order.__getitem__) for group in groups.values()]


def _first_join(nodes: list[fx.Node]) -> int:
    """Place of the first operation that reads from two groups that were apart before."""
    group_of: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        groups = {group_of[read] for read in node.all_input_nodes if read in group_of}
        if len(groups) > 1:
            return i
        group_of[node] = groups.pop() if groups else i
    raise AssertionError("connected, but nothing joins")


def _shared_out(parts: list[Part], workers: int, least_flops: float) -> tuple[list[Part], str]:
    """The parts with their workers, and why it is not worth it, or ""."""
    work, owner = [0] * workers, {}
    for i in sorted(range(len(parts)), key=lambda i: -parts[i].flops):
        owner[i] = work.index(min(work))
        work[owner[i]] += parts[i].flops
    total = sum(work)
    saved = total - max(work)
    left = ""
    if saved < least_flops or total < LEAST_GAIN * max(work):
        left = f"too little to share: {saved:,} of {total:,} FLOPs"
    return [Part(part.nodes, part.flops, owner[i]) for i, part in enumerate(parts)], left


def _entangled(seen: Seen, groups: list[list[fx.Node]], effects: Effects) -> str:
    """Why the result would depend on which branch is first, or ""."""
    inside = [node for group in groups for node in group]
    drawing = [name_of(node) for node in inside if node in effects.draws]
    if drawing:
        return f"{drawing[0]} draws random numbers, and the order of the draws would be open"
    written = {name for node in seen.operations for name in effects.writes[node]}
    trained = {name for name, tensor in seen.model.named_parameters() if tensor.requires_grad}
    users = Counter(name for group in groups for name in tensors_of(seen, group))
    elsewhere = tensors_of(seen, set(seen.operations) - set(inside))
    for name, count in sorted(users.items()):
        what = "written to" if name in written else "trained"
        if name in written | trained and count > 1:
            return f"{name} is {what} in {count} branches"
        if name in written | trained and name in elsewhere:
            return f"{name} is {what}, and used outside of its branch as well"
    writers = _writers(effects, groups)
    if writers:
        return f"{writers[0]} changes in place what was given to its branch"
    modules = Counter(
        name for group in groups for name in {n.target for n in group if n.op == "call_module"}
    )
    for name, count in sorted(modules.items()):
        ours = not type(seen.model.get_submodule(name)).__module__.startswith("torch.nn.")
        if count > 1 and ours:
            return f"{name} is called in {count} branches, and it cannot be seen what it keeps"
    return ""


def _writers(effects: Effects, groups: list[list[fx.Node]]) -> list[str]:
    """Operations that write to values that were made outside of their group."""
    return [
        name_of(node) for group in groups for node in group if effects.changes[node] - set(group)
    ]


def tensors_of(seen: Seen, nodes: Iterable[fx.Node]) -> set[str]:
    """Names of the parameters and buffers that some operations use."""
    return {name for node in nodes for name in seen.uses[node]}


def name_of(node: fx.Node) -> str:
    """An operation as a reader knows it: by its module, if it has one."""
    return node.target if node.op == "call_module" else node.name
