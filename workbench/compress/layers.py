"""What all techniques do with the layers of a model: find, refuse, replace, and report them."""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pandas as pd
import torch
from torch import Tensor, nn

from workbench.compress.computed import (
    RECORD,
    TRANSPOSED,
    Source,
    compute_weight,
    layer_type,
    record_step,
    source_of,
    weight_names,
    weight_of,
    weights,
)

_LEFT, _VERB = f"{RECORD}left", f"{RECORD}verb"
ROUNDED_INPUTS = f"{RECORD}rounded_inputs"  # names of layers whose inputs are rounded before them
Value = TypeVar("Value")


def coverage(model: nn.Module) -> pd.DataFrame:
    """One row per layer that has weights: how they are stored, and why the last step left it.

    Columns: layer, type, weights (count), stored_as, activations, reason.
    """
    left = getattr(model, _LEFT, {})
    rounded_inputs = getattr(model, ROUNDED_INPUTS, ())
    rows = []
    for name, layer in layers_of(model, every=True).items():
        sources = [source for key in weight_names(layer) if (source := source_of(layer, key))]
        activations = "float"
        if sources and "input_quantizer" in layer._modules:
            activations = "uint8 dynamic"
        elif name in rounded_inputs:
            activations = "uint8 static"
        rows.append(
            {
                "layer": name,
                "type": (layer_type(layer) or type(layer)).__name__,
                "weights": weight_count(layer),
                "stored_as": sources[0].describe() if sources else "float",
                "activations": activations,
                "reason": left.get(name, ""),
            }
        )
    columns = ["layer", "type", "weights", "stored_as", "activations", "reason"]
    return pd.DataFrame(rows, columns=columns)


def summary(model: nn.Module) -> str:
    """One line: how much of a model the last technique reached; empty for an untouched one."""
    if not hasattr(model, _LEFT):
        return ""
    verb, left = getattr(model, _VERB), getattr(model, _LEFT)
    table = coverage(model)
    done = table[~table.layer.isin(list(left))]
    if done.empty:
        counts = pd.Series(left, dtype=str).value_counts()
        reasons = "; ".join(f"{count} layers: {reason}" for reason, count in counts.items())
        return f"nothing {verb} ({reasons or 'no layer has weights'})"
    share = done.weights.sum() / table.weights.sum()
    return f"{len(done)} of {len(table)} layers {verb}, {share:.1%} of the weights"


def layers_of(model: nn.Module, every: bool = False) -> dict[str, nn.Module]:
    """Layers whose weights can be computed; with ``every``, also all others that hold weights."""
    return {
        name: module
        for name, module in model.named_modules()
        if layer_type(module) is not None
        or (
            (every and any(p is not None and p.dim() > 1 for p in module._parameters.values()))
            and not isinstance(module, Source)
        )
    }


def weight_count(layer: nn.Module) -> int:
    """Number of weights of a layer, biases left out."""
    if layer_type(layer) is None:
        return sum(p.numel() for p in layer._parameters.values() if p is not None and p.dim() > 1)
    return sum(weight_of(layer, name).numel() for name in weight_names(layer))


def check_model(model: nn.Module, skip: Sequence[str], verb: str = "quantize") -> None:
    """Everything that can be refused is refused here, before any work."""
    if isinstance(skip, str):
        raise TypeError(f"skip is the string {skip!r}; give a list of layer names")
    if not layers_of(model, every=True):
        raise ValueError(f"{type(model).__name__} has no layer with weights; nothing to {verb}")
    unknown = set(skip) - set(layers_of(model))
    if unknown:
        raise ValueError(f"skip names {sorted(unknown)}; layers are {sorted(layers_of(model))}")
    for name, weight in weights(model):
        if not torch.isfinite(weight).all():
            raise ValueError(f"weight {name} holds NaN or infinity; repair or retrain it first")


def per_layer(
    value: Value | Mapping[str, Value], layers: dict[str, nn.Module], what: str
) -> dict[str, Value]:
    """``value`` for each layer; a mapping gives it for some, and leaves the others out.

    Raises:
        ValueError: the mapping, which the caller knows as ``what``, names a layer that is not
            there.
    """
    if not isinstance(value, Mapping):
        return dict.fromkeys(layers, value)
    unknown = set(value) - set(layers)
    if unknown:
        raise ValueError(f"{what} names {sorted(unknown)}; layers are {sorted(layers)}")
    return dict(value)


@dataclass(frozen=True)
class Place:
    """Where a weight is found: ``original`` is the parameter or source there, ``dense`` its value,
    ``axis`` the dimension of its output channels. A weight that layers share has one place, in the
    first of them."""

    layer: str
    name: str
    original: nn.Parameter | Source
    dense: Tensor
    axis: int


def places(layers: dict[str, nn.Module]) -> dict[object, Place]:
    """Every weight of the layers once, by its parameter or source."""
    found: dict[object, Place] = {}
    for layer_name, layer in layers.items():
        for name in weight_names(layer):
            original = source_of(layer, name) or layer._parameters[name]
            if original not in found:
                axis = 1 if layer_type(layer) in TRANSPOSED else 0
                dense = weight_of(layer, name).detach()
                found[original] = Place(layer_name, name, original, dense, axis)
    return found


def replace_weights(layers: dict[str, nn.Module], make: Callable[[Place], nn.Module]) -> None:
    """Put ``make(place)`` where each weight is. A shared weight is made, and stored, once."""
    made = {original: make(place) for original, place in places(layers).items()}
    for layer in layers.values():
        for name in weight_names(layer):
            original = source_of(layer, name) or layer._parameters[name]
            compute_weight(layer, name, made[original])


def reasons_left(
    model: nn.Module, done: Collection[str], skip: Collection[str], otherwise: str
) -> dict[str, str]:
    """Why each layer that is not in ``done`` was left, by name."""
    return {
        name: "in skip" if name in skip
        else f"{type(layer).__name__} is of a kind that is not handled" if layer_type(layer) is None
        else otherwise
        for name, layer in layers_of(model, every=True).items()
        if name not in done
    }  # fmt: skip


def finish(
    work: nn.Module,
    model: nn.Module,
    step: str,
    done: Iterable[str],
    left: dict[str, str],
    verb: str = "quantized",
) -> nn.Module:
    """Note on ``work`` what was done and what was left, warn if it was nothing, and return it.

    ``verb`` is the participle of the technique, for `summary`.
    """
    setattr(work, _LEFT, left)
    setattr(work, _VERB, verb)
    done = list(done)
    record_step(work, step if done else f"{step}: nothing {verb}", previous=model)
    if not done:
        warnings.warn(f"{step}: {summary(work)}", stacklevel=3)
    return work
