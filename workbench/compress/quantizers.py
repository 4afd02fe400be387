"""What stands in a quantized model: weights kept as integer codes, and rounded activations.

Every module here computes in float what an integer kernel would compute, so a quantized model runs
anywhere; that is called *simulated*. Weights and activations of 8 bits go through torch's
``quantized_decomposed`` operators, which runtimes recognise and replace by their int8 kernels.
"""

from typing import get_args

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn

from workbench.compress.computed import Source, Stored
from workbench.compress.grid import (
    Granularity,
    Grid,
    from_rows,
    pack,
    round_weight,
    to_rows,
    unpack,
)

_ops = torch.ops.quantized_decomposed
ACTIVATION_CODES = (0, 255)
_GRANULARITIES = get_args(Granularity)


class QuantizedWeight(Source):
    """The source of a weight of k bits: codes, scales and (affine) zero points.

    8-bit codes are one byte each in the weight's shape; fewer bits are packed without gaps.
    ``axis`` is the dimension of the output channels.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, axis: int):
        super().__init__()
        self.grid, self.axis, self.shape = grid, axis, codes.shape
        if grid.bits == 8:
            stored = codes.to(torch.int8 if grid.symmetric else torch.uint8)
        else:
            step = 2 if grid.binary else 1
            stored = pack((codes - grid.codes[0]) // step, grid.bits)
        self.register_buffer("codes", stored)
        self.register_buffer("scale", scale)  # (rows, groups)
        # Symmetric zero points are all 0: not worth a place in the file.
        self.register_buffer("zero_point", zero_point.int(), persistent=not grid.symmetric)

    @classmethod
    def of(cls, weight: Tensor, grid: Grid, axis: int = 0) -> "QuantizedWeight":
        """Round a weight to the grid. Raises ValueError where it holds NaN or infinity."""
        if not torch.isfinite(weight).all():
            raise ValueError("the weight holds NaN or infinity; repair or retrain it first")
        codes, scale, zero_point = round_weight(weight, grid, axis)
        return cls(codes, scale.to(weight.dtype), zero_point, grid, axis)

    @property
    def lowers_to_int8(self) -> bool:
        """Whether runtimes have kernels for this: signed 8 bits, one scale a tensor or channel."""
        return self.grid.bits == 8 and self.grid.symmetric and self.grid.granularity != "group"

    def integer_codes(self) -> Tensor:
        """The codes in the shape of the weight, as int64."""
        if self.grid.bits == 8:
            return self.codes.long()
        step = 2 if self.grid.binary else 1
        flat = unpack(self.codes, self.grid.bits, self.shape.numel())
        return flat.view(self.shape) * step + self.grid.codes[0]

    def forward(self) -> Tensor:
        if self.lowers_to_int8 and self.scale.dtype == torch.float32:
            channels = self.shape[self.axis]
            scale = self.scale.expand(channels, 1).reshape(channels)
            zero_point = self.zero_point.long().expand(channels, 1).reshape(channels)
            return _ops.dequantize_per_channel(
                self.codes, scale, zero_point, self.axis, *self.grid.codes, torch.int8
            )
        rows = to_rows(self.integer_codes(), self.axis, self.grid)  # (rows, groups, values)
        dense = (rows - self.zero_point[..., None]) * self.scale[..., None]
        return from_rows(dense, self.shape, self.axis)

    def describe(self) -> str:
        return self.grid.describe()

    def stored(self) -> Stored:
        if self.grid.bits == 8:
            codes = self.codes
        else:
            flat = unpack(self.codes, self.grid.bits, self.shape.numel())
            codes = flat.to(torch.uint8).view(self.shape)
        parts = {"scale": self.scale}
        if not self.grid.symmetric:
            parts["zero_point"] = self.zero_point.to(torch.uint8)
        parts["codes"] = codes.movedim(self.axis, 0).flatten(1)  # (O, V)
        grid = self.grid
        place = _GRANULARITIES.index(grid.granularity)
        settings = (grid.bits, place, int(grid.symmetric), grid.group_size, self.axis)
        return Stored(tuple(self.shape), settings, parts)

    @classmethod
    def restored(cls, stored: Stored) -> "QuantizedWeight":
        bits, place, symmetric, group_size, axis = stored.settings
        grid = Grid(bits, _GRANULARITIES[place], bool(symmetric), group_size)
        codes, scale = stored.parts["codes"], stored.parts["scale"]
        if bits < 8:  # packed codes are counted from 0
            codes = codes.to(torch.int8) * (2 if grid.binary else 1) + grid.codes[0]
        zero_point = stored.parts.get("zero_point", torch.zeros(scale.shape))
        codes = from_rows(codes, torch.Size(stored.shape), axis).contiguous()
        return cls(codes, scale, zero_point, grid, axis)

    def masked(self, keep: Tensor) -> "QuantizedWeight | None":
        if self.grid.binary:
            return None
        rows = to_rows(self.integer_codes(), self.axis, self.grid)
        zero = from_rows(self.zero_point[..., None].expand_as(rows), self.shape, self.axis)
        codes = torch.where(keep, self.integer_codes(), zero.long())
        return QuantizedWeight(codes, self.scale, self.zero_point, self.grid, self.axis)

    def extra_repr(self) -> str:
        return f"{self.describe()}, shape={tuple(self.shape)}"


class StaticQuantizer(nn.Module):
    """Rounds an activation to 8 bits on a range that was fixed by calibration."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor):
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point.int())
        self.constants: tuple[float, int] | None = None

    def stored(self) -> Stored:
        return Stored(parts={"scale": self.scale, "zero_point": self.zero_point})

    @classmethod
    def restored(cls, stored: Stored) -> "StaticQuantizer":
        return cls(**stored.parts)

    def make_constant(self) -> None:
        """Hold scale and zero point as numbers, which compilers and exporters need."""
        self.constants = (self.scale.item(), int(self.zero_point.item()))

    def forward(self, x: Tensor) -> Tensor:
        if self.constants is None:
            dtype = x.dtype
            grid = (self.scale, self.zero_point, *ACTIVATION_CODES, torch.uint8)
            codes = _ops.quantize_per_tensor.tensor(x.float(), *grid)
            return _ops.dequantize_per_tensor.tensor(codes, *grid).to(dtype)
        grid = (*self.constants, *ACTIVATION_CODES, torch.uint8)
        return _ops.dequantize_per_tensor(_ops.quantize_per_tensor(x, *grid), *grid)


@torch.library.custom_op("workbench::quantize_dynamically", mutates_args=())
def quantize_dynamically(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes of ``x``, scale and zero point on the range that ``x`` has now.

    The same as the ONNX operator DynamicQuantizeLinear.
    """
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    zero_point = (-low / scale).round().clamp(0, 255)
    codes = ((x / scale).round() + zero_point).clamp(0, 255)
    return codes.to(torch.uint8), scale, zero_point.to(torch.uint8)


@quantize_dynamically.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.uint8),
        x.new_empty(()),
        x.new_empty((), dtype=torch.uint8),
    )


class DynamicQuantizer(nn.Module):
    """Rounds an activation to 8 bits on the range that it has at this very call."""

    def stored(self) -> Stored:
        return Stored()

    @classmethod
    def restored(cls, stored: Stored) -> "DynamicQuantizer":
        return cls()

    def forward(self, x: Tensor) -> Tensor:
        codes, scale, zero_point = quantize_dynamically(x.float())
        return dequantize_dynamically(codes, scale, zero_point).to(x.dtype)


@torch.library.custom_op("workbench::dequantize_dynamically", mutates_args=())
def dequantize_dynamically(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The inverse of `quantize_dynamically`."""
    return (codes.float() - zero_point) * scale


@dequantize_dynamically.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return scale.new_empty(codes.shape)
