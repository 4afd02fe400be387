"""Fewer bits for weights and activations.

`quantize_static` calibrates the range of every activation first; `quantize_dynamic` takes it from
each input as it comes; `quantize_weights` rounds the weights alone, to any number of bits;
`binarize` keeps their signs. Each returns a new model, and `workbench.compress.coverage` tells
layer by layer what was quantized and what was left, and why. See notebook 02.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from workbench.compress.bias_correction import biased_layers, mean_outputs, shift_biases
from workbench.compress.calibration import Calibration, batches, one_batch
from workbench.compress.computed import (
    CONVOLUTIONS,
    LINEAR,
    RECURRENT,
    TRANSPOSED,
    copy_of,
    layer_type,
)
from workbench.compress.equalization import ChannelClip
from workbench.compress.grid import Granularity, Grid, scale_and_zero_point
from workbench.compress.layers import (
    ROUNDED_INPUTS,
    check_model,
    finish,
    layers_of,
    per_layer,
    reasons_left,
    replace_weights,
    weight_count,
)
from workbench.compress.quantizers import (
    ACTIVATION_CODES,
    DynamicQuantizer,
    QuantizedWeight,
    StaticQuantizer,
)
from workbench.compress.tracing import Recorder, fold_batch_norms, trace

Method = Literal["minmax", "percentile", "mse"]
ROUND = "round_"  # how the names of static quantizers begin


def quantize_static(
    model: nn.Module,
    calibration: Calibration,
    *,
    granularity: Literal["tensor", "channel"] = "channel",
    method: Method = "minmax",
    samples: int = 512,
    correct_bias: bool = False,
    skip: Sequence[str] = (),
    seed: int = 0,
) -> nn.Module:
    """int8 weights and uint8 activations, with the activations' ranges fixed by calibration.

    Batch norms are folded into the layers before them. Every activation that enters a linear or
    convolution layer is rounded once, and so is what leaves a convolution (after its ReLU): the
    form that int8 kernels take.

    Args:
        calibration: a `Task` (``samples`` of its training examples are used), or batches of inputs.
        granularity: of the weights: one scale for each output "channel" or for the "tensor".
        method: range of an activation: "minmax" of all that was seen, the central 99.98
            "percentile", or the range with the least squared error ("mse").
        correct_bias: give the channels the means again that they had before the rounding, as
            `workbench.compress.correct_bias` does, from 128 of the examples.
        skip: names of layers to leave in float.

    Raises:
        ValueError: an empty calibration, NaN in weights or activations, an unknown name in
            ``skip``, a model without layers to quantize, or a forward pass that cannot be traced.

    Reference: Nagel et al. (2021), "A white paper on neural network quantization".
    """
    if method not in _RANGES:
        raise ValueError(f"method is {method!r}; choose from {sorted(_RANGES)}")
    grid = _int8(granularity)
    work = copy_of(model).eval()
    check_model(work, skip)
    graph, opaque = trace(work)
    fold_batch_norms(graph)
    layers = {
        name: layer
        for name, layer in layers_of(graph).items()
        if layer_type(layer) in (*LINEAR, *CONVOLUTIONS, *TRANSPOSED, nn.Embedding)
        and name not in skip
        and not any(name.startswith(f"{path}.") for path in opaque)
    }
    left = reasons_left(
        graph, layers, skip, "static quantization has no rule for this kind of layer"
    )
    for path, reason in opaque.items():
        inside = f"inside {path}, which cannot be traced ({reason})"
        left |= {name: inside for name in left if name.startswith(f"{path}.")}
    computing = {name for name, layer in layers.items() if layer_type(layer) is not nn.Embedding}
    points = _points_to_round(graph, computing)
    seen = batches(calibration, samples, seed)
    if correct_bias:
        seen = list(seen)  # read twice
        first, biased = one_batch(seen, 128, seed), biased_layers(graph)
        means = mean_outputs(graph, biased, first)
    ranges = _calibrate(graph, points, seen, method)
    round_activations(
        graph,
        {
            node: StaticQuantizer(
                *scale_and_zero_point(*ranges[node], ACTIVATION_CODES, symmetric=False)
            )
            for node in points
        },
    )
    _round_weights(layers, grid)
    setattr(graph.eval(), ROUNDED_INPUTS, frozenset(computing))
    step = f"int8 static per {granularity}"
    if correct_bias:
        shift_biases(graph, biased, means, first)
        step += ", biases corrected"
    return finish(graph, model, step, layers, left)


def round_activations(graph: fx.GraphModule, quantizers: dict[fx.Node, nn.Module]) -> None:
    """Put each quantizer behind its node, under the name ``round_`` and the node's; in place."""
    for node, quantizer in quantizers.items():
        name = f"{ROUND}{node.name}"
        graph.add_submodule(name, quantizer)
        with graph.graph.inserting_after(node):
            rounded = graph.graph.call_module(name, (node,))
        node.replace_all_uses_with(
            rounded, delete_user_cb=lambda user, new=rounded: user is not new
        )
    graph.recompile()


def quantize_dynamic(
    model: nn.Module,
    *,
    granularity: Literal["tensor", "channel"] = "channel",
    minimum_weights: int = 4096,
    skip: Sequence[str] = (),
) -> nn.Module:
    """int8 weights in linear, recurrent and embedding layers; no calibration.

    The input of a linear layer is rounded to uint8 on the range that it has at each call. Layers
    of fewer than ``minimum_weights`` weights stay as they are: finding the range costs more there
    than the small product saves. Convolutions need `quantize_static`.

    Raises:
        ValueError: NaN in weights or an unknown name in ``skip``.
    """
    grid = _int8(granularity)
    work = copy_of(model)
    check_model(work, skip)
    layers = {
        name: layer
        for name, layer in layers_of(work).items()
        if layer_type(layer) in (*LINEAR, *RECURRENT, nn.Embedding)
        and name not in skip
        and weight_count(layer) >= minimum_weights
    }
    _round_weights(layers, grid)
    for layer in layers.values():
        if layer_type(layer) in LINEAR:
            layer.input_quantizer = DynamicQuantizer()
    left = reasons_left(
        work, layers, skip, f"fewer than minimum_weights={minimum_weights:,} weights"
    )
    for name, layer in layers_of(work).items():
        if name in left and name not in skip and layer_type(layer) in (*CONVOLUTIONS, *TRANSPOSED):
            left[name] = "a convolution needs calibration: use quantize_static"
    return finish(work, model, f"int8 dynamic per {granularity}", layers, left)


def quantize_weights(
    model: nn.Module,
    *,
    bits: int | Mapping[str, int] = 4,
    granularity: Granularity = "channel",
    symmetric: bool = True,
    group_size: int = 64,
    skip: Sequence[str] = (),
) -> nn.Module:
    """Weights of 1 to 8 bits, stored packed; activations and arithmetic stay in float.

    The file is smaller, the model is not faster: no kernel computes with these codes, so it is
    labelled simulated wherever its speed is shown.

    Args:
        bits: of all layers, or by layer name; a layer that is not named is left.

    Raises:
        ValueError: ``bits``, ``granularity`` or ``group_size`` out of range, NaN in weights, or an
            unknown name in ``skip``.
    """
    work = copy_of(model)
    check_model(work, skip)
    layers = layers_of(work)
    grids = {
        name: Grid(width, granularity, symmetric, group_size)
        for name, width in per_layer(bits, layers, "bits").items()
    }
    layers = {name: layers[name] for name in grids if name not in skip}
    replace_weights(
        layers, lambda place: QuantizedWeight.of(place.dense, grids[place.layer], place.axis)
    )
    left = reasons_left(work, layers, skip, "not named in bits")
    kinds = sorted({grids[name] for name in layers}, key=lambda grid: grid.bits)
    step = "binary" if len(kinds) == 1 and kinds[0].binary else ", ".join(map(Grid.describe, kinds))
    return finish(work, model, f"{step} weights", layers, left)


def binarize(model: nn.Module, *, skip: Sequence[str] = ()) -> nn.Module:
    """Keep the sign of each weight and one scale, the mean size, for each output channel.

    Without training this ruins most models; see `quantize_aware` with ``bits=1``. Reference:
    Rastegari et al. (2016), "XNOR-Net".
    """
    return quantize_weights(model, bits=1, skip=skip)


def _int8(granularity: str) -> Grid:
    if granularity not in ("tensor", "channel"):
        raise ValueError(f"granularity is {granularity!r}; choose 'tensor' or 'channel'")
    return Grid(8, granularity)


def _round_weights(layers: dict[str, nn.Module], grid: Grid) -> None:
    replace_weights(layers, lambda place: QuantizedWeight.of(place.dense, grid, place.axis))


# Operations that pass values on unchanged (or drop some): rounding before them serves after them.
_KEEP_MODULES = (nn.Flatten, nn.Identity, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Unflatten,
                 nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.ZeroPad2d)  # fmt: skip
_KEEP_CALLS = {
    torch.flatten, torch.reshape, torch.transpose, torch.permute, F.max_pool2d, F.dropout,
    "flatten", "reshape", "view", "transpose", "permute", "contiguous",
}  # fmt: skip
_RELU_CALLS = {F.relu, F.relu6, torch.relu, "relu", "relu_"}
_ADD_CALLS = {operator.add, operator.iadd, torch.add, "add", "add_"}


def _points_to_round(graph: fx.GraphModule, layers: set[str]) -> list[fx.Node]:
    """The operations whose output is to be rounded to 8 bits, in graph order."""
    modules = dict(graph.named_modules())

    def is_a(node: fx.Node, types: tuple, calls: set) -> bool:
        if node.op == "call_module":
            return isinstance(modules[node.target], types)
        return node.op in ("call_function", "call_method") and node.target in calls

    def origin(node: fx.Node) -> fx.Node:
        """Where the values of ``node`` were computed."""
        while is_a(node, _KEEP_MODULES, _KEEP_CALLS):
            node = node.args[0]
        return node

    def after_relu(node: fx.Node) -> fx.Node:
        """The ReLU that is the only reader of ``node``: kernels apply it before they round."""
        users = list(node.users)
        relu = len(users) == 1 and is_a(users[0], (nn.ReLU, nn.ReLU6, ChannelClip), _RELU_CALLS)
        return users[0] if relu else node

    points = set()
    for node in graph.graph.nodes:
        if node.op == "call_module" and node.target in layers:
            points.add(origin(node.args[0] if node.args else next(iter(node.kwargs.values()))))
            if layer_type(modules[node.target]) not in LINEAR:
                points.add(after_relu(node))
    for node in graph.graph.nodes:  # in order, so that a sum of sums is seen too
        if is_a(node, (), _ADD_CALLS) and all(
            isinstance(arg, fx.Node) and origin(arg) in points for arg in node.args[:2]
        ):
            points.add(after_relu(node))
    return [node for node in graph.graph.nodes if node in points]


def _calibrate(
    graph: fx.GraphModule, points: list[fx.Node], seen_inputs: Iterable, method: Method
) -> dict[fx.Node, tuple[Tensor, Tensor]]:
    seen: dict[fx.Node, list[Tensor]] = {node: [] for node in points}
    low, high = {}, {}

    def record(node: fx.Node, value: Tensor) -> None:
        if not value.is_floating_point():
            raise ValueError(
                f"{node.name} holds {value.dtype}, which cannot be rounded; put the layer that "
                "reads it in skip"
            )
        value = value.detach().float().flatten()
        if not torch.isfinite(value).all():
            raise ValueError(f"activation {node.name} holds NaN or infinity during calibration")
        low[node] = torch.minimum(low.get(node, value.min()), value.min())
        high[node] = torch.maximum(high.get(node, value.max()), value.max())
        if method != "minmax":
            seen[node].append(value[:: max(1, len(value) // 10_000)])

    with torch.no_grad():
        for inputs in seen_inputs:
            Recorder(graph, points, record).run(*inputs)
    if points and not low:
        raise ValueError("calibration is empty; give at least one batch of inputs")
    choose = _RANGES[method]
    return {node: choose(low[node], high[node], seen[node]) for node in points}


def _minmax(low: Tensor, high: Tensor, seen: list[Tensor]) -> tuple[Tensor, Tensor]:
    return low, high


def _percentile(low: Tensor, high: Tensor, seen: list[Tensor]) -> tuple[Tensor, Tensor]:
    values, _ = torch.cat(seen).sort()
    cut = round(1e-4 * (len(values) - 1))
    return values[cut], values[len(values) - 1 - cut]


def _least_squares(low: Tensor, high: Tensor, seen: list[Tensor]) -> tuple[Tensor, Tensor]:
    values = torch.cat(seen)

    def error(shrink: float) -> float:
        ends = low * shrink, high * shrink
        scale, zero_point = scale_and_zero_point(*ends, ACTIVATION_CODES, symmetric=False)
        codes = ((values / scale).round() + zero_point).clamp(*ACTIVATION_CODES)
        return ((codes - zero_point) * scale - values).square().mean().item()

    best = min((step / 50 for step in range(5, 51)), key=error)
    return low * best, high * best


_RANGES: dict[str, Callable] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "mse": _least_squares,
}
