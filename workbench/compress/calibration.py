"""Examples that show a technique what a model's activations are like; their targets are not read.

`observed` runs a model over them and hands what enters or leaves each layer to a function.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from workbench.data import Task

Calibration = Task | Iterable[Tensor | tuple[Tensor, ...]]
Inputs = tuple[Tensor, ...]


def batches(calibration: Calibration, samples: int, seed: int) -> Iterable[Inputs]:
    """Batches of inputs: of ``samples`` training examples of a task, or those that were given."""
    if isinstance(calibration, Task):
        if samples < 1:
            raise ValueError(f"samples is {samples}; give 1 or more")
        split = calibration.train
        split = split.subset(min(samples, len(split)), seed=seed)
        return (inputs for inputs, _ in split.batches(128))
    if torch.is_tensor(calibration):
        raise TypeError("calibration is one tensor; give a Task or a list of batches, [tensor]")
    return (batch if isinstance(batch, tuple) else (batch,) for batch in calibration)


def one_batch(calibration: Calibration, samples: int, seed: int) -> Inputs:
    """At most ``samples`` examples in one batch, so that layers can be changed on their way.

    Raises:
        ValueError: ``samples`` below 1, or no examples.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; give 1 or more")
    taken, count = [], 0
    for inputs in batches(calibration, samples, seed):
        taken.append(tuple(x[: samples - count] for x in inputs))
        count += len(taken[-1][0])
        if count >= samples:
            break
    if count == 0:
        raise ValueError("calibration is empty; give at least one batch of inputs")
    return tuple(map(torch.cat, zip(*taken, strict=True)))


@torch.no_grad()
def observed(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Inputs,
    *,
    before: Callable[[str, Tensor], None] | None = None,
    after: Callable[[str, Tensor], Tensor | None] | None = None,
) -> None:
    """Run ``model`` once in evaluation mode; ``before(name, input)`` sees what enters each layer,
    ``after(name, output)`` what leaves it, and may return another output in its place."""
    handles = []
    for name, layer in layers.items():
        if before:
            handles.append(
                layer.register_forward_pre_hook(_pre_hook(before, name), with_kwargs=True)
            )
        if after:
            handles.append(layer.register_forward_hook(_hook(after, name)))
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()(*inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _pre_hook(function: Callable, name: str) -> Callable:
    def hook(layer: nn.Module, args: tuple, named: dict) -> None:
        function(name, args[0] if args else next(iter(named.values())))

    return hook


def _hook(function: Callable, name: str) -> Callable:
    def hook(layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return function(name, output)

    return hook
