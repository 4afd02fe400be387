"""Rounding that looks at the data: each weight makes up for the errors of those before it.

Rounding to nearest is best for each weight alone, but a layer answers with sums. Where its inputs
go together, the error of one weight can be undone by the next: GPTQ rounds the weights of a channel
one after the other, and after each one shifts those that are not yet rounded by what, on the
calibration examples, makes the channel's output right again.

Shapes: G groups of a layer (its channels, if depthwise; else 1), O output channels of a group, V
weights of a channel, N inputs seen, each of V values.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.compress.calibration import Calibration, observed, one_batch
from workbench.compress.computed import (
    CONVOLUTIONS,
    LINEAR,
    MaskedWeight,
    copy_of,
    layer_type,
    source_of,
)
from workbench.compress.grid import Granularity, Grid, from_rows, to_rows
from workbench.compress.layers import (
    check_model,
    finish,
    layers_of,
    per_layer,
    places,
    reasons_left,
    replace_weights,
)
from workbench.compress.quantizers import QuantizedWeight


def quantize_gptq(
    model: nn.Module,
    calibration: Calibration,
    *,
    bits: int | Mapping[str, int] = 4,
    granularity: Granularity = "channel",
    symmetric: bool = True,
    group_size: int = 64,
    samples: int = 128,
    skip: Sequence[str] = (),
    seed: int = 0,
) -> nn.Module:
    """Weights as `workbench.compress.quantize_weights` keeps them, rounded for the data.

    The scales are the same, and so are file and speed; only the choice between the codes differs.
    Linear and convolution layers are rounded in the order in which they run, each on what the
    rounded layers before it send. All others, and those that the examples do not reach, are rounded
    to nearest: for an embedding, whose inputs never go together, that is best. Pruned weights stay
    zero.

    Args:
        calibration: a `Task` (``samples`` of its training examples are used), or batches of inputs.
        bits, granularity, symmetric, group_size, skip: as in `workbench.compress.quantize_weights`.
        samples: most examples. They go through the model as one batch.

    Raises:
        ValueError: as `workbench.compress.quantize_weights`; an empty calibration, or one that
            gives NaN or infinity.

    Reference: Frantar et al. (2023), "GPTQ: accurate post-training quantization for generative
    pre-trained transformers".
    """
    work = copy_of(model)
    check_model(work, skip)
    layers = layers_of(work)
    grids = {
        name: Grid(width, granularity, symmetric, group_size)
        for name, width in per_layer(bits, layers, "bits").items()
    }
    layers = {name: layers[name] for name in grids if name not in skip}
    found = places(layers)
    inputs = one_batch(calibration, samples, seed)
    replace_weights(
        layers, lambda place: QuantizedWeight.of(place.dense, grids[place.layer], place.axis)
    )
    waiting = {
        place.layer: place
        for place in found.values()
        if layer_type(layers[place.layer]) in (*LINEAR, *CONVOLUTIONS)
    }

    def refine(name: str, x: Tensor) -> None:
        place = waiting.pop(name, None)
        if place is None:  # called before: its weight is rounded
            return
        layer = layers[name]
        weight = place.dense.float()
        moments = second_moments(layer, x.float())
        if not torch.isfinite(moments).all():
            raise ValueError(f"what enters {name} holds NaN or infinity during calibration")
        source = source_of(layer, "weight")
        pruned = weight == 0 if isinstance(place.original, MaskedWeight) else None
        codes = refined_codes(weight, moments, source, pruned)
        better = QuantizedWeight(codes, source.scale, source.zero_point, source.grid, source.axis)
        source.codes = better.codes  # in place: layers that share the weight share the source

    observed(work, {name: layers[name] for name in waiting}, inputs, before=refine)
    left = reasons_left(work, layers, skip, "not named in bits")
    kinds = sorted({grids[name] for name in layers}, key=lambda grid: grid.bits)
    step = ", ".join(map(Grid.describe, kinds))
    return finish(work, model, f"{step} weights, GPTQ", layers, left)


def refined_codes(
    weight: Tensor, moments: Tensor, nearest: QuantizedWeight, pruned: Tensor | None = None
) -> Tensor:
    """Codes in the shape of ``weight`` that lose no more than the ``nearest`` ones, channel by
    channel, measured by the second moments, (G, V, V), of what the weights are multiplied with.

    Where ``pruned`` the code is that of zero.
    """
    grid, shape = nearest.grid, weight.shape
    rows = to_rows(weight, nearest.axis, grid)  # where the scales belong to

    def of_each(value: Tensor) -> Tensor:  # scale or zero point -> (G, O, V)
        value = value[..., None].expand_as(rows)
        return from_rows(value, shape, nearest.axis).float().reshape(len(moments), -1, size)

    size = moments.shape[-1]
    exact = weight.reshape(len(moments), -1, size)
    scale, zero = of_each(nearest.scale), of_each(nearest.zero_point)
    gone = torch.zeros_like(exact, dtype=torch.bool) if pruned is None else pruned.view_as(exact)
    # The inputs that vary most come first: there are still many weights to make up for them.
    order = moments.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)  # (G, V)
    factor = _factor(_sorted(moments, order))
    by_row = order[:, None].expand_as(exact)
    left, codes = exact.gather(2, by_row), torch.empty_like(exact)
    scale_, zero_, gone_ = (x.gather(2, by_row) for x in (scale, zero, gone))
    for at in range(size):
        column = left[..., at]
        chosen = _round(column / scale_[..., at], zero_[..., at], grid)
        chosen = torch.where(gone_[..., at], zero_[..., at], chosen)
        codes[..., at] = chosen
        lost = column - (chosen - zero_[..., at]) * scale_[..., at]  # (G, O)
        share = factor[:, at, at:] / factor[:, at, at, None]  # (G, V - at)
        left[..., at:] -= lost[..., None] * share[:, None]
    codes = torch.empty_like(codes).scatter(2, by_row, codes)
    plain = nearest.integer_codes().reshape(exact.shape).float()
    worse = _loss(exact - (codes - zero) * scale, moments) > _loss(
        exact - (plain - zero) * scale, moments
    )  # (G, O)
    return torch.where(worse[..., None], plain, codes).long().reshape(shape)


def _round(value: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    if grid.binary:
        return torch.where(value < 0, -1.0, 1.0)
    return (value.round() + zero).clamp(*grid.codes)


def _sorted(moments: Tensor, order: Tensor) -> Tensor:
    rows = moments.gather(1, order[..., None].expand_as(moments))
    return rows.gather(2, order[:, None].expand_as(moments))


_DAMPING = 0.01  # of the mean variance; keeps inputs that are alike from giving huge corrections


def _factor(moments: Tensor) -> Tensor:
    """Upper triangular, (G, V, V): its row j tells how column j's error is shared by those after.

    It is the Cholesky factor of the inverse of the second moments.
    """
    moments = moments.double()
    diagonal = moments.diagonal(dim1=1, dim2=2)
    damping = _DAMPING * diagonal.mean(1, keepdim=True)
    damping = torch.where(damping > 0, damping, 1)  # inputs that are always zero
    moments = moments + torch.diag_embed(damping.expand_as(diagonal))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _loss(error: Tensor, moments: Tensor) -> Tensor:
    """Squared error of each channel's output, (G, O)."""
    return ((error @ moments) * error).sum(-1)


def second_moments(layer: nn.Module, x: Tensor) -> Tensor:
    """The mean product of each two inputs that a linear or convolution layer ``layer`` multiplies
    with the weights of one output channel: (G, V, V)."""
    total, count = 0.0, 0
    for columns in _columns(layer, x):  # (G, N, V)
        total = total + columns.mT @ columns
        count += columns.shape[1]
    return total / max(count, 1)


_PIECE = 2**24  # values unfolded at a time


def _columns(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """What is multiplied with the weights of one channel, in the order of these: (G, N, V)."""
    if layer_type(layer) in LINEAR:
        yield x.reshape(1, -1, x.shape[-1])
        return
    dims = len(layer.kernel_size)
    x = x if x.dim() == dims + 2 else x[None]
    grown = math.prod(layer.kernel_size)
    for piece in x.split(max(1, _PIECE // (x[0].numel() * grown))):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        piece = F.pad(piece, layer._reversed_padding_repeated_twice, mode=mode)
        for dim, (size, stride, dilation) in enumerate(
            zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), 2
        ):
            piece = piece.unfold(dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
        # (B, C, places..., kernel...) -> (G, B, places, C / G, kernel)
        batch, channels = piece.shape[:2]
        piece = piece.reshape(batch, layer.groups, channels // layer.groups, -1, grown)
        yield piece.permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)
