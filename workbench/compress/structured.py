"""Fewer channels, neurons and heads: a smaller model of the same kind, faster in every runtime.

`prune_structured` takes whole channels out of convolutions and linear layers, and whole heads out
of attention. Whatever a channel runs through (the norm after a layer, the layers that read it, all
layers of a residual stage) loses it together.

A *slice* is one index of one dimension of a parameter or buffer. A *channel* is the set of slices
that can only go together, and a *group* holds the channels that run through the same layers.
"""

import bisect
import copy
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from workbench.compress.computed import (
    CONVOLUTIONS,
    LINEAR,
    TRANSPOSED,
    copy_of,
    layer_type,
    make_dense,
    weight_names,
)
from workbench.compress.layers import check_model, finish, layers_of, reasons_left
from workbench.data import Task

Importance = Literal["l1", "l2", "taylor"]
Scope = Literal["global", "layer"]
Side = Literal["out", "in"]  # whether a layer makes a channel or takes it
Inputs = tuple[Tensor, ...]
Slice = tuple[str, int, int]  # name of a parameter or buffer, dimension, index
Channel = frozenset[Slice]
Group = list[Channel]


def prune_structured(
    model: nn.Module,
    task: Task,
    *,
    sparsity: float | None = None,
    macs: float | None = None,
    parameters: float | None = None,
    heads: float = 0.0,
    importance: Importance = "taylor",
    scope: Scope = "global",
    round_to: int = 8,
    samples: int = 1024,
    skip: Sequence[str] = (),
    seed: int = 0,
) -> nn.Module:
    """Remove the least important channels and heads; the layers that stay are plain dense ones.

    Give one target at most; without any, half of the channels go. Train the result for an epoch or
    two with `workbench.training.fit`: it starts with a worse accuracy than the model.

    A group of channels is pruned only where it was seen, on an example, that the rest computes the
    same without them as it does when nothing reads them. So the outputs of the model stay, and so
    does what is normalised together: a transformer keeps the width of its residual stream. Heads go
    from attention modules like `workbench.models.Attention`: with ``heads`` (a number),
    ``query_key_value``, a linear layer to (3, heads, size of a head), and ``out``, the linear layer
    after it.

    Args:
        sparsity: share of the channels to remove, of those that can go; 0 leaves all. Channels that
            can only go together count once.
        macs: share of the multiply-accumulates to stay at or below.
        parameters: share of the parameters to stay at or below.
        heads: share of all heads to remove; each attention keeps at least one.
        importance: of a channel: "taylor", the squared change of the loss, to first order, if
            nothing read it, from batches of 128 of ``samples`` training examples; or the "l1" or
            "l2" norm of the weights that make it, relative to the mean in its group, which needs
            no examples.
        scope: rank all channels of the model together ("global"), or remove the same share of each
            group ("layer").
        round_to: keep a multiple of this many channels, for which kernels are fast, wherever that
            many are kept at all.
        skip: names of layers whose own channels all stay. They may still lose inputs.
        seed: of the examples that are drawn.

    Raises:
        TypeError: ``task`` is not a `Task`, or ``skip`` is a string.
        ValueError: more than one target, a setting out of range, a target that cannot be reached,
            NaN in weights, an unknown name in ``skip``, or a loss that is not finite.

    References: Fang et al. (2023), "DepGraph: towards any structural pruning"; Li et al. (2017),
    "Pruning filters for efficient ConvNets"; Molchanov et al. (2019), "Importance estimation for
    neural network pruning"; Michel, Levy and Neubig (2019), "Are sixteen heads really better than
    one?".
    """
    what, share = _target(sparsity, macs, parameters)
    _check_settings(task, heads, importance, scope, round_to, samples)
    work = copy_of(model)
    check_model(work, skip, "prune")
    _make_dense(work)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)  # for loaders that shuffle and networks that draw
        probe = _probe(work, task.example_input)
        inputs = _plain(probe, task.example_input)
        found = _find(probe, inputs, skip)
        if importance == "taylor":
            scores = _taylor(probe, task, found, samples, seed)
        else:
            scores = _norms(probe, found, 1 if importance == "l1" else 2)
        lost_heads = _heads_to_remove(found, scores, heads, scope)
        ranked, order = _rank(found.groups, scores, scope)

        def channels(kept: list[int]) -> list[Channel]:
            """All that goes when each group keeps so many."""
            pairs = zip(ranked, kept, strict=True)
            return [c for group, count in pairs for c in group[: len(group) - count]]

        def cost(kept: list[int], heads: list[Channel] = lost_heads) -> int:
            if what == "channels":
                return sum(kept)
            smaller = copy.deepcopy(probe)
            _remove(smaller, heads + channels(kept))
            return _macs(smaller, inputs) if what == "MACs" else _parameters(smaller)

        widths = [len(group) for group in ranked]
        dense, lowest = cost(widths, heads=[]), cost([1] * len(ranked))
        allowed = share * dense * (1 + 1e-9)  # as 1 - 0.9 is a little less than 0.1
        if lowest > allowed:
            raise ValueError(
                f"{share:.1%} of the {what} is out of reach: {lowest / dense:.1%} would be left "
                f"with one channel in each layer that can lose any ({_examples(found.reasons)})"
            )
        kept = _fit(widths, order, round_to, lambda kept: cost(kept) <= allowed)
    gone = lost_heads + channels(kept)
    _remove(work, gone)
    cut = {name for channel in gone for name, _, _ in channel}
    done = [
        name
        for name, layer in layers_of(probe).items()
        if any(found.tensors[_join(name, key)] in cut for key in weight_names(layer))
    ]
    left = reasons_left(work, done, skip, "its channels matter more than those that went")
    left |= {name: found.reasons[name] for name in left if name in found.reasons}
    amount = f"to {share:.0%} of {what}" + (f", {heads:.0%} of heads" if heads else "")
    return finish(work, model, f"channels removed ({amount})", done, left, "pruned")


@dataclass(frozen=True)
class _Found:
    """What can be removed from a model, and why the rest cannot.

    ``writes`` and ``reads`` are the (tensor, dimension) of weights in which a layer makes its
    channels, and takes those of others. ``tensors`` gives each parameter and buffer, by each of its
    names, the one name under which its slices stand here.
    """

    groups: list[Group]
    heads: list[Group]  # one group for each attention
    writes: set[tuple[str, int]]
    reads: set[tuple[str, int]]
    reasons: dict[str, str]
    tensors: dict[str, str]


def _target(
    sparsity: float | None, macs: float | None, parameters: float | None
) -> tuple[Literal["channels", "MACs", "parameters"], float]:
    """What is counted, and the share of it that may stay."""
    given = {"sparsity": sparsity, "macs": macs, "parameters": parameters}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are both given; give one target")
    ((name, value),) = (given or {"sparsity": 0.5}).items()
    if name == "sparsity":
        if not 0 <= value < 1:
            raise ValueError(f"sparsity is {value}; give the share to remove, 0 <= sparsity < 1")
        return "channels", 1 - value
    if not 0 < value <= 1:
        raise ValueError(f"{name} is {value}; give the share that may stay, 0 < {name} <= 1")
    return {"macs": "MACs", "parameters": "parameters"}[name], value


def _check_settings(
    task: Task, heads: float, importance: str, scope: str, round_to: int, samples: int
) -> None:
    if not isinstance(task, Task):
        raise TypeError(
            f"task is a {type(task).__name__}; give a workbench.data.Task, whose examples are run "
            "through the model to see how its layers depend on each other"
        )
    if not 0 <= heads < 1:
        raise ValueError(f"heads is {heads}; give the share to remove, 0 <= heads < 1")
    if importance not in get_args(Importance):
        raise ValueError(f"importance is {importance!r}; choose from {get_args(Importance)}")
    if scope not in get_args(Scope):
        raise ValueError(f"scope is {scope!r}; choose from {get_args(Scope)}")
    for name, value in {"round_to": round_to, "samples": samples}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value}; give an integer of 1 or more")


def _make_dense(model: nn.Module) -> None:
    layers = layers_of(model).values()
    make_dense(*layers)
    for layer in layers:
        layer._modules.pop("input_quantizer", None)


def _probe(model: nn.Module, inputs: Inputs) -> nn.Module:
    """A copy to run and to take gradients of: in float32, unless the model casts values itself."""
    probe = copy.deepcopy(model).cpu().eval().requires_grad_(True)
    wide = copy.deepcopy(probe).float()
    try:
        _outputs(wide, _plain(wide, inputs))
    except RuntimeError:
        return probe
    return wide


def _plain(probe: nn.Module, inputs: Inputs) -> Inputs:
    """On the CPU, and in float32 if the parameters of ``probe`` are."""
    wide = all(parameter.dtype == torch.float32 for parameter in probe.parameters())
    return tuple(x.cpu().float() if wide and x.is_floating_point() else x.cpu() for x in inputs)


def _find(probe: nn.Module, inputs: Inputs, skip: Sequence[str]) -> _Found:
    """The channels and heads that can be removed from ``probe``, which is left as it is."""
    first: dict[int, str] = {}
    both = (probe.named_parameters, probe.named_buffers)
    every = itertools.chain(*(named(remove_duplicate=False) for named in both))
    tensors = {name: first.setdefault(id(tensor), name) for name, tensor in every}
    modules = dict(probe.named_modules())
    expected = _outputs(probe, inputs)
    found = _Found([], [], set(), set(), {}, tensors)

    def slices(path: str, local: Iterable[Slice]) -> Channel:
        return frozenset((tensors[_join(path, name)], dim, index) for name, dim, index in local)

    parts = _Partition()
    blocked: dict[Slice, str] = {}  # why a slice cannot go; the first reason is kept
    own: dict[str, list[Channel]] = {}  # of each layer: the slices of each channel that it makes
    for name, layer in layers_of(probe).items():
        if layer_type(layer) not in _MAKERS or _slices(layer, "out", 0) is None:
            found.reasons[name] = f"no channel can be removed from this {type(layer).__name__}"
            continue
        own[name] = [slices(name, _slices(layer, "out", i)) for i in range(_width(layer))]
        for pieces in own[name]:
            parts.join(pieces)
            found.writes.update((tensor, dim) for tensor, dim, _ in pieces)
        if layer_type(layer) in LINEAR or not _is_depthwise(layer):
            taken = slices(name, _slices(layer, "in", 0))
            found.reads.update((tensor, dim) for tensor, dim, _ in taken)
        if name in skip:
            blocked |= dict.fromkeys(itertools.chain(*own[name]), "in skip")
    attentions = {
        path: [slices(path, head) for head in _heads(module)]
        for path, module in modules.items()
        if _is_attention(module)
    }
    for path, heads in attentions.items():
        for piece in itertools.chain(*heads):
            blocked.setdefault(piece, f"inside attention {path}, which loses whole heads only")
    for root, name, side, pairs in _dependencies(probe, inputs, list(own)):
        if name in modules and side is not None and _slices(modules[name], side, 0) is not None:
            for index, channel in pairs:
                parts.join(own[root][channel] | slices(name, _slices(modules[name], side, index)))
            continue
        reason = "its channels are outputs of the model"
        if name is not None:
            kind = type(modules[name]).__name__ if name in modules else "bare parameter"
            reason = f"its channels reach {name} ({kind}), which takes them all together"
        for _, channel in pairs:
            blocked.setdefault(min(own[root][channel]), reason)

    why = {parts.root(piece): reason for piece, reason in reversed(blocked.items())}
    together: dict[frozenset, dict[Channel, None]] = {}  # a dictionary, which keeps the order
    makers: dict[frozenset, list[str]] = defaultdict(list)
    for name, channels in own.items():
        for pieces in channels:
            part = parts.root(min(pieces))
            if part in why:
                found.reasons.setdefault(name, why[part])
                continue
            channel = parts.members(part)
            cuts = frozenset((tensor, dim) for tensor, dim, _ in channel)
            together.setdefault(cuts, {})[channel] = None
            makers[cuts].append(name)
    for cuts, channels in together.items():
        group = list(channels)
        if len(group) > 1 and _separable(probe, inputs, group, found.reads, expected):
            found.groups.append(group)
        else:
            found.reasons.update(dict.fromkeys(makers[cuts], _INSEPARABLE))
    for path, heads in attentions.items():
        skipped = any(blocked[piece] == "in skip" for piece in itertools.chain(*heads))
        if not skipped and len(heads) > 1:
            if _separable(probe, inputs, heads, found.reads, expected):
                found.heads.append(heads)
            else:
                reason = f"{path} is not laid out as (3, heads, size of a head)"
                found.reasons[f"{path}.query_key_value"] = reason
    return found


_MAKERS = (*LINEAR, *CONVOLUTIONS, *TRANSPOSED)
_INSEPARABLE = "without some of its channels the others do not compute the same"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


class _Partition:
    """Slices in parts that can only go together (union-find; the larger part takes in others)."""

    def __init__(self):
        self._root: dict[Slice, Slice] = {}
        self._members: dict[Slice, list[Slice]] = {}

    def root(self, piece: Slice) -> Slice:
        if piece not in self._root:
            self._root[piece], self._members[piece] = piece, [piece]
        return self._root[piece]

    def members(self, root: Slice) -> Channel:
        return frozenset(self._members[root])

    def join(self, pieces: Iterable[Slice]) -> None:
        roots = {self.root(piece) for piece in pieces}
        largest = max(roots, key=lambda root: (len(self._members[root]), root))
        for root in roots - {largest}:
            for piece in self._members[root]:
                self._root[piece] = largest
            self._members[largest] += self._members.pop(root)


def _width(layer: nn.Module) -> int:
    """Number of channels that a linear or convolution layer makes."""
    return layer.out_features if layer_type(layer) in LINEAR else layer.out_channels


def _is_depthwise(layer: nn.Module) -> bool:
    return 1 < layer.groups == layer.in_channels == layer.out_channels


def _slices(module: nn.Module, side: Side, index: int) -> set[Slice] | None:
    """What goes with one channel that ``module`` makes or takes; None where it cannot lose one.

    Names are those within the module. The groups of a grouped convolution stay of one size: each
    loses the channel of the same place in it.
    """
    kind, own = layer_type(module), {k: v for k, v in module._parameters.items() if v is not None}
    if kind in LINEAR and "weight" in own:
        out = {(name, 0, index) for name in own}
        return out if side == "out" else {("weight", 1, index)}
    if kind in (*CONVOLUTIONS, *TRANSPOSED) and "weight" in own:
        if _is_depthwise(module):  # what it takes is what it makes
            return {(name, 0, index) for name in own}
        if module.groups == module.out_channels > 1:
            return None  # torch-pruning takes it for depthwise, but it takes more than it makes
        channels = module.out_channels if side == "out" else module.in_channels
        size = channels // module.groups
        places = range(index % size, channels, size)
        # Dimension 0 of the weight counts all channels, dimension 1 those of one group.
        whole = (side == "out") != (kind in TRANSPOSED)
        pieces = {("weight", 0, i) for i in places} if whole else {("weight", 1, index % size)}
        bias = {("bias", 0, i) for i in places} if side == "out" and "bias" in own else set()
        return pieces | bias
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        statistics = ("running_mean", "running_var")
        own |= {name: True for name in statistics if getattr(module, name) is not None}
        return {(name, 0, index) for name in own}
    if isinstance(module, nn.PReLU):
        return {("weight", 0, index)} if module.num_parameters > 1 else set()
    return None


def _is_attention(module: nn.Module) -> bool:
    query_key_value, out = (getattr(module, name, None) for name in ("query_key_value", "out"))
    return (
        isinstance(getattr(module, "heads", None), int)
        and layer_type(query_key_value) in LINEAR
        and layer_type(out) in LINEAR
        and query_key_value.out_features == 3 * out.in_features
        and out.in_features % module.heads == 0
    )


def _heads(attention: nn.Module) -> list[set[Slice]]:
    """The slices of each head, named within the attention."""
    size, total = attention.out.in_features // attention.heads, attention.out.in_features
    made = [name for name, p in attention.query_key_value.named_parameters() if p is not None]
    heads = []
    for start in range(0, total, size):
        places = range(start, start + size)
        heads.append(
            {("out.weight", 1, place) for place in places}
            | {
                (f"query_key_value.{name}", 0, part * total + place)
                for name, part, place in itertools.product(made, range(3), places)
            }
        )
    return heads


def _dependencies(
    probe: nn.Module, inputs: Inputs, roots: list[str]
) -> Iterator[tuple[str, str | None, Side | None, list[tuple[int, int]]]]:
    """What the channels of each layer in ``roots`` run through, as torch-pruning follows them.

    Yields the layer, the name of a module or parameter (None for an output of the model), how the
    channels stand in it (None where they cannot be told apart) and its index for each channel.
    """
    import torch_pruning

    def ends(output: object) -> list[Tensor]:
        # Multiplied, so that each output is an operation of its own, apart from the last layer.
        tensors = [x for x in pytree.tree_leaves(output) if torch.is_tensor(x) and x.requires_grad]
        if not tensors:
            raise ValueError(
                f"no output of {type(probe).__name__} has a gradient, by which its layers are "
                "followed; take detach(), argmax() and no_grad() out of its forward pass"
            )
        return [x * 1 for x in tensors]

    names = {module: name for name, module in probe.named_modules()}
    names |= {parameter: name for name, parameter in probe.named_parameters()}
    graph = torch_pruning.DependencyGraph().build_dependency(
        probe, inputs, output_transform=ends, verbose=False
    )
    for root in roots:
        layer = probe.get_submodule(root)
        whole = [(index, index) for index in range(_width(layer))]
        if layer not in graph.module2node:
            yield root, root, None, whole
            continue
        function = graph.get_pruner_of_module(layer).prune_out_channels
        for item in graph.get_pruning_group(layer, function, range(_width(layer))).items:
            module = item.dep.target.module
            if isinstance(module, torch_pruning.ops._OutputOp):
                yield root, None, None, whole
            elif module in names:
                side = "in" if item.dep.handler.__name__ == "prune_in_channels" else "out"
                lost = None in item.root_idxs
                pairs = whole if lost else list(zip(item.idxs, item.root_idxs, strict=True))
                yield root, names[module], None if lost else side, pairs


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return [x for x in pytree.tree_leaves(model(*inputs)) if torch.is_tensor(x)]


def _separable(
    probe: nn.Module,
    inputs: Inputs,
    group: Group,
    reads: set[tuple[str, int]],
    expected: list[Tensor],
) -> bool:
    """Whether half of the channels can go: the others must compute the same as if nothing read the
    half. That is not so where channels are normalised, averaged or shuffled together."""
    order = torch.randperm(len(group), generator=torch.Generator().manual_seed(0))
    half = [group[i] for i in order[: len(group) // 2]]
    silent, smaller = copy.deepcopy(probe), copy.deepcopy(probe)
    parameters = dict(silent.named_parameters())
    try:
        with torch.no_grad():
            for name, dim, index in itertools.chain(*half):
                if (name, dim) in reads:
                    parameters[name].select(dim, index).zero_()
        _remove(smaller, half)
        pairs = zip(_outputs(silent, inputs), _outputs(smaller, inputs), expected, strict=True)
        coarsest = max(torch.finfo(p.dtype).eps for p in probe.parameters())
        return all(_same(*three, noise=max(1e-5, 4 * coarsest)) for three in pairs)
    except (RuntimeError, IndexError, ValueError):  # shapes that no longer fit each other
        return False


def _same(silent: Tensor, smaller: Tensor, before: Tensor, noise: float) -> bool:
    """Equal, but for rounding: up to a small share of what the change was and of the output."""
    if silent.shape != smaller.shape:
        return False
    silent, smaller, before = silent.double(), smaller.double(), before.double()
    allowed = 1e-3 * (silent - before).abs().max() + noise * before.abs().max()
    return bool((silent - smaller).abs().max() <= allowed)


def _remove(model: nn.Module, channels: Iterable[Channel]) -> None:
    """Take the slices of the channels out of ``model``, in place."""
    gone: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for name, dim, index in itertools.chain(*channels):
        gone[name][dim].add(index)
    tensors = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    smaller = {}
    for name, dims in gone.items():
        old, new = tensors[name], tensors[name].detach()
        for dim, lost in dims.items():
            kept = [index for index in range(new.shape[dim]) if index not in lost]
            new = new.index_select(dim, torch.tensor(kept, device=new.device, dtype=torch.long))
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        smaller[id(old)] = new
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own.update({key: smaller[id(t)] for key, t in own.items() if id(t) in smaller})
    for module in model.modules():  # an attention comes before the layers in it
        set_sizes(module)


def set_sizes(module: nn.Module) -> None:
    """Let the attributes of a module say what the shapes of its tensors now are."""
    if _is_attention(module):
        size = module.out.in_features // module.heads
        module.heads = module.out.weight.shape[1] // size
    elif layer_type(module) in LINEAR:
        module.out_features, module.in_features = module.weight.shape
    elif layer_type(module) in (*CONVOLUTIONS, *TRANSPOSED):
        whole, part = module.weight.shape[:2]
        if _is_depthwise(module):
            module.groups = module.in_channels = module.out_channels = whole
        elif layer_type(module) in TRANSPOSED:
            module.in_channels, module.out_channels = whole, part * module.groups
        else:
            module.out_channels, module.in_channels = whole, part * module.groups
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif hasattr(module, "num_features") and _slices(module, "out", 0):
        name, _, _ = min(_slices(module, "out", 0))
        module.num_features = len(getattr(module, name))


def _norms(probe: nn.Module, found: _Found, power: int) -> dict[Channel, float]:
    """The norm of the weights that make each channel, relative to the mean in its group, and
    averaged over the layers that make it."""
    parameters = dict(probe.named_parameters())
    sums = {}  # (weight, dimension) -> for each index, the sum of |w| ** power
    for name, dim in found.writes:
        if parameters[name].dim() > 1:
            values = parameters[name].detach().float().abs() ** power
            sums[name, dim] = values.movedim(dim, 0).flatten(1).sum(1).tolist()
    scores = {}
    for group in (*found.groups, *found.heads):
        norms = []  # one dictionary for each channel: by weight and dimension
        for channel in group:
            total = defaultdict(float)
            for name, dim, index in channel:
                if (name, dim) in sums:
                    total[name, dim] += sums[name, dim][index]
            norms.append({cut: value ** (1 / power) for cut, value in total.items()})
        means = {cut: sum(norm[cut] for norm in norms) / len(norms) or 1 for cut in norms[0]}
        for channel, norm in zip(group, norms, strict=True):
            scores[channel] = sum(norm[cut] / means[cut] for cut in sorted(norm)) / len(norm)
    return scores


def _taylor(
    probe: nn.Module, task: Task, found: _Found, samples: int, seed: int
) -> dict[Channel, float]:
    """The squared change of the loss if nothing read a channel, to first order: mean over batches.

    The weights that read it would all become zero, so the change is the sum of weight * gradient.
    """
    scores = dict.fromkeys(itertools.chain(*found.groups, *found.heads), 0.0)
    parameters = dict(probe.named_parameters())
    split = task.train.subset(min(samples, len(task.train)), seed=seed)
    for inputs, target in split.batches(128):
        probe.zero_grad()
        loss = task.loss(probe(*_plain(probe, inputs)), *_plain(probe, (target,)))
        if not torch.isfinite(loss):
            raise ValueError(f"the loss on examples is {loss.item()}; look for NaN in the task")
        loss.backward()
        changes = {}
        for name, dim in found.reads:
            weight = parameters[name]
            if weight.grad is not None:
                product = (weight.detach() * weight.grad).float().movedim(dim, 0)
                changes[name, dim] = product.flatten(1).sum(1).tolist()
        for channel in scores:
            change = sum(
                changes[name, dim][index]
                for name, dim, index in sorted(channel)
                if (name, dim) in changes
            )
            scores[channel] += change**2
    probe.zero_grad()
    return scores


def _rank(
    groups: list[Group], scores: dict[Channel, float], scope: Scope
) -> tuple[list[Group], list[int]]:
    """Each group from its least important channel on; and the number of the group that loses the
    next channel, in order, until each has one left."""
    ranked = [sorted(group, key=scores.__getitem__) for group in groups]
    queue = []
    for number, group in enumerate(ranked):
        for place, channel in enumerate(group[:-1]):
            value = scores[channel] if scope == "global" else (place + 1) / len(group)
            queue.append((value, number, place))
    return ranked, [number for _, number, _ in sorted(queue)]


def _heads_to_remove(
    found: _Found, scores: dict[Channel, float], heads: float, scope: Scope
) -> list[Channel]:
    ranked, order = _rank(found.heads, scores, scope)
    total = sum(map(len, ranked))
    count = round(heads * total)
    if heads and not ranked:
        raise ValueError(
            f"heads is {heads}, but no attention was found whose heads can be removed; set "
            "heads=0, or name the parts of it as workbench.models.Attention does"
        )
    if count > len(order):
        raise ValueError(
            f"heads is {heads}, {count} of {total}, but each attention keeps one; give "
            f"{len(order) / total:.3g} or less"
        )
    lost = Counter(order[:count])
    return [c for number, group in enumerate(ranked) for c in group[: lost[number]]]


def _fit(
    widths: list[int], order: list[int], round_to: int, fits: Callable[[list[int]], bool]
) -> list[int]:
    """How many channels each group keeps: as many as fit, lost in ``order``, then rounded."""

    def rounded(count: int) -> list[int]:
        lost = Counter(order[:count])
        kept = [width - lost[number] for number, width in enumerate(widths)]
        return [
            count - count % round_to if round_to < count < width else count
            for count, width in zip(kept, widths, strict=True)
        ]

    # More channels lost never cost more, so halving the range finds the fewest that fit.
    count = bisect.bisect_left(range(len(order)), True, key=lambda count: fits(rounded(count)))
    kept = rounded(count)
    # Rounding can take more than was needed: give back where it fits, the most important first.
    for number in dict.fromkeys(reversed(order[:count])):
        while kept[number] < widths[number]:
            larger = list(kept)
            larger[number] = min(widths[number], kept[number] // round_to * round_to + round_to)
            if not fits(larger):
                break
            kept = larger
    return kept


def _macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-accumulates for one example, as `workbench.measure.macs` counts them."""
    counter = FlopCounterMode(display=False)
    enabled = torch.backends.mkldnn.enabled
    # Fused kernels hide their products from the counter; those of torch's own encoder layers are
    # not used while gradients are on.
    torch.backends.mkldnn.enabled = False
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(*inputs)
    finally:
        torch.backends.mkldnn.enabled = enabled
    return counter.get_total_flops() // 2


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _examples(reasons: dict[str, str]) -> str:
    """A few of the layers that cannot lose channels, in words."""
    some = [f"{name}: {reason}" for name, reason in itertools.islice(reasons.items(), 3)]
    return "; ".join(some) or "no layer was left"
