"""Fewer bits for weights and activations.

`quantize_static` calibrates the range of every activation first; `quantize_dynamic` takes it from
each input as it comes; `quantize_weights` rounds the weights alone, to any number of bits;
`binarize` keeps their signs. Each returns a new model, and `coverage` tells layer by layer what was
quantized and what was left, and why. See notebook 02.
"""

import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from workbench.compress.computed import (
    CONVOLUTIONS,
    LINEAR,
    RECORD,
    RECURRENT,
    TRANSPOSED,
    compute_weight,
    copy_of,
    layer_type,
    record_step,
    source_of,
    weight_names,
    weight_of,
    weights,
)
from workbench.compress.grid import Granularity, Grid, scale_and_zero_point
from workbench.compress.quantizers import (
    ACTIVATION_CODES,
    DynamicQuantizer,
    QuantizedWeight,
    StaticQuantizer,
)
from workbench.compress.tracing import Recorder, fold_batch_norms, trace
from workbench.data import Task

Method = Literal["minmax", "percentile", "mse"]
Calibration = Task | Iterable[Tensor | tuple[Tensor, ...]]
_LEFT, _ROUNDED_INPUTS = f"{RECORD}left", f"{RECORD}rounded_inputs"


def quantize_static(
    model: nn.Module,
    calibration: Calibration,
    *,
    granularity: Literal["tensor", "channel"] = "channel",
    method: Method = "minmax",
    samples: int = 512,
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
    ranges = _calibrate(graph, points, _batches(calibration, samples, seed), method)
    for node in points:
        scale, zero_point = scale_and_zero_point(*ranges[node], ACTIVATION_CODES, symmetric=False)
        name = f"round_{node.name}"
        graph.add_submodule(name, StaticQuantizer(scale, zero_point))
        with graph.graph.inserting_after(node):
            rounded = graph.graph.call_module(name, (node,))
        node.replace_all_uses_with(
            rounded, delete_user_cb=lambda user, new=rounded: user is not new
        )
    graph.recompile()
    _round_weights(layers, grid)
    setattr(graph.eval(), _ROUNDED_INPUTS, frozenset(computing))
    return finish(graph, model, f"int8 static per {granularity}", layers, left)


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
        and _size(layer) >= minimum_weights
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
    bits: int = 4,
    granularity: Granularity = "channel",
    symmetric: bool = True,
    group_size: int = 64,
    skip: Sequence[str] = (),
) -> nn.Module:
    """Weights of 1 to 8 bits, stored packed; activations and arithmetic stay in float.

    The file is smaller, the model is not faster: no kernel computes with these codes, so it is
    labelled simulated wherever its speed is shown.

    Raises:
        ValueError: ``bits``, ``granularity`` or ``group_size`` out of range, NaN in weights, or an
            unknown name in ``skip``.
    """
    grid = Grid(bits, granularity, symmetric, group_size)
    work = copy_of(model)
    check_model(work, skip)
    layers = {name: layer for name, layer in layers_of(work).items() if name not in skip}
    _round_weights(layers, grid)
    left = reasons_left(work, layers, skip, "")
    step = "binary weights" if grid.binary else f"{grid.describe()} weights"
    return finish(work, model, step, layers, left)


def binarize(model: nn.Module, *, skip: Sequence[str] = ()) -> nn.Module:
    """Keep the sign of each weight and one scale, the mean size, for each output channel.

    Without training this ruins most models; see `quantize_aware` with ``bits=1``. Reference:
    Rastegari et al. (2016), "XNOR-Net".
    """
    return quantize_weights(model, bits=1, skip=skip)


def coverage(model: nn.Module) -> pd.DataFrame:
    """One row per layer that has weights: how they are stored, and why if they were left.

    Columns: layer, type, weights (count), stored_as, activations, reason.
    """
    left = getattr(model, _LEFT, {})
    rounded_inputs = getattr(model, _ROUNDED_INPUTS, ())
    rows = []
    for name, layer in layers_of(model, every=True).items():
        sources = [source_of(layer, key) for key in weight_names(layer)]
        rounded = [source for source in sources if isinstance(source, QuantizedWeight)]
        activations = "float"
        if rounded and "input_quantizer" in layer._modules:
            activations = "uint8 dynamic"
        elif name in rounded_inputs:
            activations = "uint8 static"
        rows.append(
            {
                "layer": name,
                "type": (layer_type(layer) or type(layer)).__name__,
                "weights": _size(layer),
                "stored_as": rounded[0].grid.describe() if rounded else "float",
                "activations": activations,
                "reason": "" if rounded else left.get(name, ""),
            }
        )
    columns = ["layer", "type", "weights", "stored_as", "activations", "reason"]
    return pd.DataFrame(rows, columns=columns)


def summary(model: nn.Module) -> str:
    """One line: how much of a quantized model is quantized; empty for any other model."""
    if not hasattr(model, _LEFT):
        return ""
    table = coverage(model)
    done = table[table.stored_as != "float"]
    if done.empty:
        counts = table.reason.value_counts()
        reasons = "; ".join(f"{count} layers: {reason}" for reason, count in counts.items())
        return f"nothing quantized ({reasons or 'no layer has weights'})"
    share = done.weights.sum() / table.weights.sum()
    return f"{len(done)} of {len(table)} layers quantized, {share:.1%} of the weights"


def _int8(granularity: str) -> Grid:
    if granularity not in ("tensor", "channel"):
        raise ValueError(f"granularity is {granularity!r}; choose 'tensor' or 'channel'")
    return Grid(8, granularity)


def layers_of(model: nn.Module, every: bool = False) -> dict[str, nn.Module]:
    """Layers that can be quantized; with ``every``, also all others that hold weights."""
    return {
        name: module
        for name, module in model.named_modules()
        if layer_type(module) is not None
        or (every and any(p is not None and p.dim() > 1 for p in module._parameters.values()))
    }


def _size(layer: nn.Module) -> int:
    if layer_type(layer) is None:
        return sum(p.numel() for p in layer._parameters.values() if p is not None and p.dim() > 1)
    return sum(weight_of(layer, name).numel() for name in weight_names(layer))


def check_model(model: nn.Module, skip: Sequence[str]) -> None:
    """Everything that can be refused is refused here, before any work."""
    if isinstance(skip, str):
        raise TypeError(f"skip is the string {skip!r}; give a list of layer names")
    if not layers_of(model, every=True):
        raise ValueError(f"{type(model).__name__} has no layer with weights; nothing to quantize")
    unknown = set(skip) - set(layers_of(model))
    if unknown:
        raise ValueError(f"skip names {sorted(unknown)}; layers are {sorted(layers_of(model))}")
    for name, weight in weights(model):
        if not torch.isfinite(weight).all():
            raise ValueError(f"weight {name} holds NaN or infinity; repair or retrain it first")


def replace_weights(
    layers: dict[str, nn.Module], make: Callable[[Tensor | nn.Module, Tensor, int], nn.Module]
) -> None:
    """Put ``make(original, weight, axis)`` in the place of every weight of the layers.

    ``original`` is the parameter or source that was there, ``weight`` its dense value and ``axis``
    the dimension of its output channels. A weight that layers share is made, and stored, once.
    """
    made: dict[object, nn.Module] = {}
    for layer in layers.values():
        for name in weight_names(layer):
            original = source_of(layer, name) or layer._parameters[name]
            if original not in made:
                axis = 1 if layer_type(layer) in TRANSPOSED else 0
                made[original] = make(original, weight_of(layer, name), axis)
            compute_weight(layer, name, made[original])


def _round_weights(layers: dict[str, nn.Module], grid: Grid) -> None:
    replace_weights(layers, lambda _, weight, axis: QuantizedWeight.of(weight, grid, axis))


def reasons_left(
    model: nn.Module, done: dict[str, nn.Module], skip: Sequence[str], otherwise: str
) -> dict[str, str]:
    return {
        name: "in skip" if name in skip
        else f"{type(layer).__name__} is of a kind that is not handled" if layer_type(layer) is None
        else otherwise
        for name, layer in layers_of(model, every=True).items()
        if name not in done
    }  # fmt: skip


def finish(
    work: nn.Module, model: nn.Module, step: str, done: dict[str, nn.Module], left: dict[str, str]
) -> nn.Module:
    setattr(work, _LEFT, left)
    record_step(work, step if done else f"{step}: nothing quantized", previous=model)
    if not done:
        warnings.warn(f"{step}: {summary(work)}", stacklevel=3)
    return work


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
        relu = len(users) == 1 and is_a(users[0], (nn.ReLU, nn.ReLU6), _RELU_CALLS)
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


def _batches(calibration: Calibration, samples: int, seed: int) -> Iterable[tuple[Tensor, ...]]:
    if isinstance(calibration, Task):
        if samples < 1:
            raise ValueError(f"samples is {samples}; give 1 or more")
        split = calibration.train
        split = split.subset(min(samples, len(split)), seed=seed)
        return (inputs for inputs, _ in split.batches(128))
    if torch.is_tensor(calibration):
        raise TypeError("calibration is one tensor; give a Task or a list of batches, [tensor]")
    return (batch if isinstance(batch, tuple) else (batch,) for batch in calibration)


def _calibrate(
    graph: fx.GraphModule, points: list[fx.Node], batches: Iterable, method: Method
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
        for batch in batches:
            Recorder(graph, points, record).run(*batch)
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
