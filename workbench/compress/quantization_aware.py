"""Training that knows about the rounding to come.

The weights stay in float while the forward pass sees them rounded; the gradient passes the rounding
as if it were not there (straight-through). See notebook 02.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from workbench.compress.computed import MaskedWeight, Source, copy_of
from workbench.compress.grid import Granularity, Grid, from_rows, to_rows
from workbench.compress.layers import (
    Place,
    check_model,
    finish,
    layers_of,
    reasons_left,
    replace_weights,
)
from workbench.compress.quantizers import QuantizedWeight
from workbench.data import Task
from workbench.training import ADAMW, fit


def quantize_aware(
    model: nn.Module,
    task: Task,
    *,
    bits: int = 4,
    granularity: Granularity = "channel",
    group_size: int = 64,
    epochs: int = 1,
    batch_size: int = 128,
    optimizer: Callable[..., torch.optim.Optimizer] = ADAMW,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    skip: Sequence[str] = (),
    device: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Weights of 1 to 8 bits, as `workbench.compress.quantize_weights`, after training for them.

    From 2 bits on, the scales are trained together with the weights (LSQ); 1 bit is the sign and
    the mean size of the weights of a channel (XNOR-Net). Pruned weights stay zero from 2 bits on.
    Activations stay in float: give the result to `workbench.compress.quantize_static` where they
    are to be rounded as well.

    Args:
        epochs, batch_size, optimizer, augment, device, seed, progress: as in
            `workbench.training.fit`.

    Raises:
        ValueError: as `workbench.compress.quantize_weights` and `workbench.training.fit`.

    References: Esser et al. (2020), "Learned step size quantization"; Rastegari et al. (2016),
    "XNOR-Net"; Bengio, Leonard and Courville (2013), "Estimating or propagating gradients through
    stochastic neurons".
    """
    grid = Grid(bits, granularity, group_size=group_size)
    work = copy_of(model)
    check_model(work, skip)
    layers = {name: layer for name, layer in layers_of(work).items() if name not in skip}
    replace_weights(layers, lambda place: _trained_grid(place, grid))
    fit(
        work,
        task,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        augment=augment,
        device=device,
        seed=seed,
        progress=progress,
    )
    replace_weights(layers, lambda place: place.original.rounded())
    left = reasons_left(work, layers, skip, "")
    step = "binary weights" if grid.binary else f"{grid.describe()} weights"
    return finish(work, model, f"{step}, trained", layers, left)


def _trained_grid(place: Place, grid: Grid) -> "TrainedGrid":
    keep = place.original.keep if isinstance(place.original, MaskedWeight) else None
    return TrainedGrid(place.dense, grid, place.axis, keep)


class TrainedGrid(Source):
    """The source of a weight that is trained in float and seen rounded."""

    keep: Tensor | None

    def __init__(self, weight: Tensor, grid: Grid, axis: int, keep: Tensor | None = None):
        super().__init__()
        self.grid, self.axis = grid, axis
        self.weight = nn.Parameter(weight.detach().clone())
        self.register_buffer("keep", keep, persistent=False)  # None, or where it is not pruned
        if not grid.binary:
            rows = to_rows(self.weight.detach().float(), self.axis, grid)
            mean = rows.abs().sum(-1) / rows.count_nonzero(-1).clamp(min=1)  # of what is not pruned
            scale = 2 * mean / math.sqrt(grid.codes[1])  # where LSQ starts
            scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
            # Trained as a logarithm: it stays positive, and a step changes it by a share of itself.
            self.log_scale = nn.Parameter(scale.log())

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def forward(self) -> Tensor:
        if self.grid.binary:
            dense = self.rounded()().to(self.weight.dtype)
            return self.weight + (dense - self.weight).detach()
        weight = self.weight if self.keep is None else self.weight * self.keep
        rows = to_rows(weight, self.axis, self.grid)  # (rows, groups, values)
        # LSQ scales the gradient of each scale by how many weights and levels it serves.
        share = 1 / math.sqrt(rows.shape[-1] * self.grid.codes[1])
        scale = (self.log_scale * share + (self.log_scale * (1 - share)).detach()).exp()[..., None]
        codes = (rows / scale).clamp(*self.grid.codes)
        codes = codes + (codes.round() - codes).detach()  # straight through the rounding
        return from_rows(codes * scale, self.weight.shape, self.axis).to(self.weight.dtype)

    @torch.no_grad()
    def rounded(self) -> QuantizedWeight:
        """The weight as it will be stored."""
        if self.grid.binary:
            return QuantizedWeight.of(self.weight, self.grid, self.axis)
        scale = self.log_scale.exp()
        rows = to_rows(self.weight.float(), self.axis, self.grid)
        codes = (rows / scale[..., None]).clamp(*self.grid.codes).round().long()
        codes = from_rows(codes, self.weight.shape, self.axis)
        zero_point = torch.zeros_like(scale)
        return QuantizedWeight(codes, scale.to(self.weight.dtype), zero_point, self.grid, self.axis)
