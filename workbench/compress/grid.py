"""The grid of a quantizer: which numbers k bits can stand for.

A weight or activation ``x`` is stored as an integer code ``q`` with

    q = clamp(round(x / scale) + zero_point, low, high),    x ~ (q - zero_point) * scale

Symmetric grids have ``zero_point = 0``. One scale covers a tensor, an output channel, or a group
of neighbouring weights of one channel. Reference: Jacob et al. (2018), "Quantization and training
of neural networks for efficient integer-arithmetic-only inference".
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Granularity = Literal["tensor", "channel", "group"]


@dataclass(frozen=True)
class Grid:
    """How weights are rounded.

    granularity  shape of the scale, for a weight of (out, ...) with n values a channel
    -----------  ----------------------------------------------------------------------
    "tensor"     (1, 1)
    "channel"    (out, 1)
    "group"      (out, ceil(n / group_size))
    """

    bits: int = 8
    granularity: Granularity = "channel"
    symmetric: bool = True
    group_size: int = 64

    def __post_init__(self):
        if not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits!r}; give a whole number from 1 to 8")
        if self.granularity not in ("tensor", "channel", "group"):
            raise ValueError(
                f"granularity is {self.granularity!r}; choose 'tensor', 'channel' or 'group'"
            )
        if not isinstance(self.group_size, int) or self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size!r}; give a whole number from 1")

    @property
    def codes(self) -> tuple[int, int]:
        """Smallest and largest code. A symmetric grid gives up one code, so that 0 is in the
        middle: -127..127 for 8 bits. One symmetric bit is binary: the codes -1 and 1, no 0."""
        if self.binary:
            return -1, 1
        if self.symmetric:
            high = 2 ** (self.bits - 1) - 1
            return -high, high
        return 0, 2**self.bits - 1

    @property
    def binary(self) -> bool:
        return self.symmetric and self.bits == 1

    def describe(self) -> str:
        per = f"group of {self.group_size}" if self.granularity == "group" else self.granularity
        return f"{self.bits}-bit per {per}" + ("" if self.symmetric else ", affine")


def scale_and_zero_point(
    low: Tensor, high: Tensor, codes: tuple[int, int], symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that covers ``low`` to ``high`` and holds 0 exactly.

    ``low`` and ``high`` have any one shape, and so have the two results; the zero point is integer.

    >>> scale_and_zero_point(torch.tensor(-1.0), torch.tensor(3.0), (0, 255), symmetric=False)
    (tensor(0.0157), tensor(64))
    """
    low, high = low.clamp(max=0), high.clamp(min=0)  # zero padding and ReLU need an exact 0
    smallest = torch.finfo(torch.float32).tiny
    if symmetric:
        scale = (torch.maximum(-low, high) / codes[1]).clamp(min=smallest)
        return scale, torch.zeros_like(scale, dtype=torch.int64)
    scale = ((high - low) / (codes[1] - codes[0])).clamp(min=smallest)
    zero_point = (codes[0] - low / scale).round().clamp(*codes)
    return scale, zero_point.long()


def to_rows(weight: Tensor, axis: int, grid: Grid) -> Tensor:
    """Arrange a weight as (rows, groups, values) so that each [row, group] has one scale.

    Rows are output channels (one row for "tensor"); the last group is filled up with zeros, which
    change no range, since every grid holds 0.
    """
    rows = weight.movedim(axis, 0)
    rows = rows.reshape(1, -1) if grid.granularity == "tensor" else rows.flatten(1)
    size = grid.group_size if grid.granularity == "group" else rows.shape[1]
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % size))
    return rows.unflatten(1, (-1, size))


def from_rows(rows: Tensor, shape: torch.Size, axis: int) -> Tensor:
    """The inverse of `to_rows`, for a weight of ``shape``."""
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    channels = rows.flatten(1).reshape(rows.shape[0], -1)
    values = shape.numel() // rows.shape[0]
    return channels[:, :values].reshape(moved).movedim(0, axis)


def round_weight(weight: Tensor, grid: Grid, axis: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (in the shape of ``weight``), scales and zero points (rows, groups) of a weight.

    A binary grid keeps the sign and the mean size of the weights: Rastegari et al. (2016),
    "XNOR-Net".
    """
    weight = weight.detach().float()
    rows = to_rows(weight, axis, grid)  # (rows, groups, values)
    if grid.binary:
        counts = to_rows(torch.ones_like(weight), axis, grid).sum(-1)
        scale = rows.abs().sum(-1) / counts
        codes = torch.where(rows < 0, -1, 1)
        return from_rows(codes, weight.shape, axis), scale, torch.zeros_like(scale).long()
    low, high = rows.amin(-1), rows.amax(-1)
    scale, zero_point = scale_and_zero_point(low, high, grid.codes, grid.symmetric)
    codes = (rows / scale[..., None]).round() + zero_point[..., None]
    return from_rows(codes.clamp(*grid.codes), weight.shape, axis).long(), scale, zero_point


_PIECE = 2**16  # codes packed at a time, as each bit takes 8 bytes then; ends on a whole byte


def pack(codes: Tensor, bits: int) -> Tensor:
    """Write non-negative integers below ``2 ** bits`` one after the other into a uint8 vector.

    >>> pack(torch.tensor([1, 0, 3, 2]), bits=2)
    tensor([177], dtype=torch.uint8)
    """
    packed = []
    for piece in codes.flatten().split(_PIECE):
        stream = (piece[:, None] >> torch.arange(bits)) & 1  # (codes, bits), low bit first
        stream = torch.nn.functional.pad(stream.flatten(), (0, -stream.numel() % 8)).view(-1, 8)
        packed.append((stream << torch.arange(8)).sum(-1).to(torch.uint8))
    return torch.cat(packed)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: ``count`` integers as int64."""
    device = packed.device
    stream = (packed.long()[:, None] >> torch.arange(8, device=device)) & 1
    stream = stream.flatten()[: count * bits].view(count, bits)
    return (stream << torch.arange(bits, device=device)).sum(-1)
