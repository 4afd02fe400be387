"""Outliers moved from activations, which have one scale, into weights, which have many.

In a transformer a few channels are tens of times larger than the others, for every token. One
scale for all of an activation is set by them, and what the other channels say is lost. SmoothQuant
divides each channel by a number and multiplies the weights that read it by the same.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from workbench.compress.calibration import Calibration, batches
from workbench.compress.computed import LINEAR, copy_of, layer_type, make_dense
from workbench.compress.layers import check_model, finish, layers_of, reasons_left
from workbench.compress.tracing import Recorder, Whole, count_uses, fold_batch_norms, trace

SMOOTHED = "activations smoothed"  # what the step is called
SCALE = "smooth_"  # how the names of the modules begin that divide an activation


def smooth_activations(
    model: nn.Module,
    calibration: Calibration,
    *,
    strength: float = 0.5,
    samples: int = 512,
    skip: Sequence[str] = (),
    seed: int = 0,
) -> nn.Module:
    """Rescale what linear layers read so that its channels differ less; the outputs stay the same.

    For `workbench.compress.quantize_static` and `quantize_dynamic`. Where a layer norm feeds linear
    layers alone, its own weights do the division. Elsewhere (with a residual connection beside
    them) it is one multiplication more. Batch norms are folded into the layers before them.

    Args:
        calibration: a `Task` (``samples`` of its training examples are used), or batches of inputs.
        strength: how much of the outliers moves into the weights, 0 to 1.
        skip: names of layers whose weights stay, as then do those that read the same.

    Raises:
        ValueError: ``strength`` out of range, an empty calibration, NaN in weights or activations,
            an unknown name in ``skip``, or a forward pass that cannot be traced.

    Reference: Xiao et al. (2023), "SmoothQuant: accurate and efficient post-training quantization
    for large language models".
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; give a number from 0 to 1")
    work = copy_of(model).eval()
    check_model(work, skip, "smooth")
    graph, _ = trace(work)
    make_dense(*layers_of(graph).values())
    fold_batch_norms(graph)
    readers = _readers(graph, skip)
    largest = _largest(graph, list(readers), batches(calibration, samples, seed))
    scales = {}
    for node, names in readers.items():
        layers = [graph.get_submodule(name) for name in names]
        read = torch.stack([layer.weight.detach().abs().amax(0) for layer in layers]).amax(0)
        scale = largest[node].to(read) ** strength / read ** (1 - strength)  # (C,)
        scale = torch.where((largest[node].to(read) > 0) & (read > 0), scale, 1)
        for layer in layers:
            layer.weight.data = layer.weight.data * scale
        norm = _own_norm(graph, node, names)
        if norm is None:
            scales[node] = ChannelScale(1 / scale)
        else:
            norm.weight.data = norm.weight.data / scale
            if norm.bias is not None:
                norm.bias.data = norm.bias.data / scale
    scale_channels(graph, scales, {name for names in readers.values() for name in names})
    done = [name for names in readers.values() for name in names]
    left = reasons_left(graph, done, skip, "smoothing has no rule for it")
    return finish(graph.eval(), model, SMOOTHED, done, left, "smoothed")


class ChannelScale(Whole):
    """Multiplies each channel, the last dimension, by a factor of its own."""

    factor: Tensor

    def __init__(self, factor: Tensor):
        super().__init__()
        self.register_buffer("factor", factor)  # (C,)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def scale_channels(
    graph: fx.GraphModule, scales: Mapping[fx.Node, ChannelScale], readers: Collection[str]
) -> None:
    """Put each module between its node and those of the layers ``readers`` that read it, under the
    name ``smooth_`` and the node's; in place."""
    for node, scale in scales.items():
        name = f"{SCALE}{node.name}"
        graph.add_submodule(name, scale)
        with graph.graph.inserting_after(node):
            scaled = graph.graph.call_module(name, (node,))
        node.replace_all_uses_with(
            scaled, delete_user_cb=lambda user: user.op == "call_module" and user.target in readers
        )
    graph.recompile()


def _readers(graph: fx.GraphModule, skip: Sequence[str]) -> dict[fx.Node, list[str]]:
    """The linear layers that read a node, where all of them can be rescaled."""
    owners = Counter(id(p) for layer in layers_of(graph).values() for p in layer.parameters())
    found: dict[fx.Node, list[str]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and layer_type(graph.get_submodule(node.target)) in LINEAR:
            found.setdefault(node.all_input_nodes[0], []).append(node.target)
    return {
        node: names
        for node, names in found.items()
        if all(
            name not in skip
            and owners[id(graph.get_submodule(name).weight)] == 1
            and count_uses(graph, name) == 1
            for name in names
        )
    }


def _largest(graph: fx.GraphModule, nodes: list[fx.Node], inputs: Iterable) -> dict:
    """The largest size of each channel, (C,), of what leaves these nodes."""
    seen: dict[fx.Node, Tensor] = {}

    def record(node: fx.Node, value: Tensor) -> None:
        if not torch.isfinite(value).all():
            raise ValueError(f"activation {node.name} holds NaN or infinity during calibration")
        size = value.detach().abs().flatten(0, -2).amax(0)
        seen[node] = torch.maximum(seen[node], size) if node in seen else size

    with torch.no_grad():
        for some in inputs:
            Recorder(graph, nodes, record).run(*some)
    if nodes and not seen:
        raise ValueError("calibration is empty; give at least one batch of inputs")
    return seen


def _own_norm(graph: fx.GraphModule, node: fx.Node, names: list[str]) -> nn.LayerNorm | None:
    """The layer norm at ``node``, if it has weights and nothing but these layers reads it."""
    if node.op != "call_module" or count_uses(graph, node.target) > 1:
        return None
    norm = graph.get_submodule(node.target)
    alone = all(user.target in names or _reads_shape(user) for user in node.users)
    whole = isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.weight.dim() == 1
    return norm if alone and whole else None


def _reads_shape(node: fx.Node) -> bool:
    asks = node.op == "call_function" and node.target is getattr and node.args[1] == "shape"
    return asks or (node.op == "call_method" and node.target == "size")
