"""Channels of one size: what a channel loses in one layer the next one gives back.

One scale for a whole tensor is set by its largest channel, and a channel a hundred times smaller
rounds to nothing. After a ReLU, multiplying a channel by a positive number commutes with the
activation: the layer before can be divided by it and the layer after multiplied, and the network
computes the same. Cross-layer equalization takes the numbers that make both sides equally large.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from workbench.compress.computed import (
    CONVOLUTIONS,
    LINEAR,
    copy_of,
    inner_dims,
    layer_type,
    make_dense,
)
from workbench.compress.layers import check_model, finish, layers_of, reasons_left
from workbench.compress.tracing import Whole, count_uses, fold_batch_norms, trace

EQUALIZED = "layers equalized"  # what the step is called
CLIP = "clip_"  # how the names of the clips begin that take the place of a ReLU6


def equalize_layers(
    model: nn.Module, *, iterations: int = 20, skip: Sequence[str] = ()
) -> nn.Module:
    """Rescale channels so that each is equally large in the layer that makes it and the one that
    reads it; the outputs stay the same.

    For `workbench.compress.quantize_static` and `quantize_weights` with one scale for a tensor,
    which gains most. Batch norms are folded into the layers before them. A pair of layers is
    equalized where nothing else reads what passes between them, and only a ReLU, a ReLU6, pooling
    or the like stands there. A ReLU6 becomes a clip at 6 divided by each channel's scale, which is
    exact; it costs one more operation where a kernel would have had the ReLU6 for nothing.

    Args:
        iterations: most rounds over all pairs; a layer may be in two of them.
        skip: names of layers whose weights stay.

    Raises:
        ValueError: NaN in weights, an unknown name in ``skip``, ``iterations`` below 1, or a
            forward pass that cannot be traced.

    Reference: Nagel et al. (2019), "Data-free quantization through weight equalization and bias
    correction".
    """
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise ValueError(f"iterations is {iterations!r}; give a whole number from 1")
    work = copy_of(model).eval()
    check_model(work, skip, "equalize")
    graph, _ = trace(work)
    make_dense(*layers_of(graph).values())
    fold_batch_norms(graph)
    pairs = _pairs(graph, skip)
    scales = [pair.before.weight.new_ones(len(pair.before.weight)) for pair in pairs]
    for _ in range(iterations):
        largest = 1.0
        for pair, scale in zip(pairs, scales, strict=True):
            change = pair.equalize()
            scale *= change
            largest = max(largest, change.max().item(), 1 / change.min().item())
        if largest < _CONVERGED:
            break
    clips = {
        node: ChannelClip((6 / scale).view(-1, *[1] * inner_dims(pair.before)))
        for pair, scale in zip(pairs, scales, strict=True)
        for node in pair.relu6
    }
    clip_channels(graph, clips)
    done = {name for pair in pairs for name in pair.names}
    left = reasons_left(graph, done, skip, "no layer that reads it alone could be rescaled with it")
    return finish(graph.eval(), model, EQUALIZED, done, left, "equalized")


class ChannelClip(Whole):
    """Clips each channel at 0 and at a largest value of its own, as ReLU6 clips all at 6."""

    high: Tensor

    def __init__(self, high: Tensor):
        super().__init__()
        self.register_buffer("high", high)  # (C,), and a 1 for each dimension after the channels

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().minimum(self.high)


def clip_channels(graph: fx.GraphModule, clips: Mapping[fx.Node, ChannelClip]) -> None:
    """Put each clip in the place of its node, under the name ``clip_`` and the node's; in place."""
    for node, clip in clips.items():
        name = f"{CLIP}{node.name}"
        graph.add_submodule(name, clip)
        with graph.graph.inserting_after(node):
            new = graph.graph.call_module(name, tuple(node.all_input_nodes[:1]))
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()


@dataclass(frozen=True)
class _Pair:
    """Two layers, and the ReLU6 (or none) between them."""

    names: tuple[str, str]
    before: nn.Module
    after: nn.Module
    relu6: tuple[fx.Node, ...]

    def equalize(self) -> Tensor:
        """Make both sides of each channel equally large, in place; returns what the layer before
        was divided by, (C,)."""
        weight, read_by = self.before.weight.data, self.after.weight.data
        channels, groups = len(weight), getattr(self.after, "groups", 1)
        # (groups, outputs, channels of a group, the rest): after a flatten, each channel has
        # several columns of a linear layer.
        columns = read_by.reshape(groups, len(read_by) // groups, channels // groups, -1)
        made, read = weight.flatten(1).abs().amax(1), columns.abs().amax((1, 3)).flatten()
        scale = torch.where((made > 0) & (read > 0), (made / read).sqrt(), 1)
        self.before.weight.data = weight / scale.view(-1, *[1] * (weight.dim() - 1))
        if self.before.bias is not None:
            self.before.bias.data = self.before.bias.data / scale
        self.after.weight.data = (columns * scale.view(groups, 1, -1, 1)).view_as(read_by)
        return scale


_CONVERGED = 1.001  # no scale changes by more

# What a positive factor on a channel passes unchanged: everywhere, and where it has the channel's
# dimensions (max_pool3d on the output of a two-dimensional convolution would mix channels).
_MODULES = (nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
_CALLS = {F.relu, torch.relu, F.leaky_relu, F.dropout, "relu", "relu_"}
_PLACES = ("ZeroPad", "MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool")
_PLACE_CALLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")


def _pairs(graph: fx.GraphModule, skip: Sequence[str]) -> list[_Pair]:
    modules = dict(graph.named_modules())
    owners = Counter(id(p) for layer in layers_of(graph).values() for p in layer.parameters())

    def equalizable(node: fx.Node) -> bool:
        return (
            node.op == "call_module"
            and node.target not in skip
            and layer_type(modules[node.target]) in (*LINEAR, *CONVOLUTIONS)
            and owners[id(modules[node.target].weight)] == 1
            and count_uses(graph, node.target) == 1
        )

    return [pair for node in graph.graph.nodes if equalizable(node)
            and (pair := _pair_from(node, modules, equalizable))]  # fmt: skip


def _pair_from(
    node: fx.Node, modules: Mapping[str, nn.Module], equalizable: Callable[[fx.Node], bool]
) -> _Pair | None:
    """The pair whose first layer is at ``node``, if what it sends reaches one layer alone."""
    before = modules[node.target]
    inner = inner_dims(before)
    at, relu6, flat = node, [], False
    while len(at.users) == 1:
        (at,) = at.users
        what = modules[at.target] if at.op == "call_module" else at.target
        if equalizable(at):
            after = modules[at.target]
            fits = inner_dims(after) == (0 if flat else inner)
            return _Pair((node.target, at.target), before, after, tuple(relu6)) if fits else None
        if isinstance(what, nn.ReLU6) or what is F.relu6:
            if flat:
                return None
            relu6.append(at)
        elif inner and not flat and _flattens(at, what):
            flat = True
        elif not _passes(what, 0 if flat else inner):
            return None
    return None


def _flattens(node: fx.Node, what: object) -> bool:
    """Whether all dimensions but the first become one."""
    if isinstance(what, nn.Flatten):
        return (what.start_dim, what.end_dim) == (1, -1)
    return what in (torch.flatten, "flatten") and node.args[1:] == (1,) and not node.kwargs


def _passes(what: object, inner: int) -> bool:
    if isinstance(what, nn.Module):
        name, places = type(what).__name__, _PLACES
        everywhere = isinstance(what, _MODULES)
    else:
        name, places = getattr(what, "__name__", ""), _PLACE_CALLS
        everywhere = what in _CALLS
    return everywhere or (inner > 0 and name in {f"{place}{inner}d" for place in places})
