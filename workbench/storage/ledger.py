"""Where the bytes of a model file are: one row for each tensor, one column for each kind."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Tensor

from workbench.storage import symbols
from workbench.storage.streams import KINDS, Section

KIND_COLUMNS = {kind: f"{kind.replace(' ', '_')}_bytes" for kind in KINDS}
COLUMNS = (
    "tensor", "stored_as", "codec", "dtype", "shape", "count", *KIND_COLUMNS.values(),
    "size_bytes", "bits_per_weight", "entropy_bits", "above_entropy_bits",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Ledger:
    """The account of a model file, to the byte: the sizes of all rows add up to that of the file.

    ``frame`` has one row for each tensor, and one for each file's own header (``count`` 0):

    - ``tensor``, its name; ``stored_as``: "plain", or how it is computed ("shared", "k-bit",
      "masked"; "rounding" is the quantizer of an activation); ``codec``, "" for none; ``dtype``,
      ``shape`` and ``count`` of its values;
    - ``values_bytes``, ``positions_bytes``, ``codebook_bytes``, ``code_table_bytes``,
      ``scales_bytes`` and ``header_bytes``, which add up to ``size_bytes``;
    - ``bits_per_weight``, all these bytes counted; ``entropy_bits``, the zeroth-order entropy of
      its values, of shared and k-bit weights that of the codes: what no code for one value at a
      time can beat; ``above_entropy_bits``, the difference. NaN where it is not known.
    """

    frame: pd.DataFrame

    @property
    def size_bytes(self) -> int:
        """Bytes of the file, or of all files."""
        return int(self.frame["size_bytes"].sum())

    @property
    def count(self) -> int:
        """Values of all tensors; shared ones once."""
        return int(self.frame["count"].sum())

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file for each value."""
        return 8 * self.size_bytes / self.count if self.count else math.nan

    @property
    def entropy_bits(self) -> float:
        """Zeroth-order entropy of a value on average, each tensor for itself; NaN if not known."""
        rows = self.frame[self.frame["count"] > 0]
        total = (rows["entropy_bits"] * rows["count"]).sum(skipna=False)
        return float(total / self.count) if self.count else math.nan

    def by_kind(self) -> pd.Series:
        """Bytes of each kind."""
        totals = self.frame[list(KIND_COLUMNS.values())].sum().astype(int)
        return totals.set_axis(list(KIND_COLUMNS)).rename("bytes")

    def table(self) -> pd.DataFrame:
        """The rows to read: rounded texts, kinds without bytes left out, the total at the end."""
        rows = self.frame
        shown = pd.DataFrame(index=pd.Index([*rows["tensor"], "total"], name="tensor"))
        for name in ("stored_as", "codec", "shape"):
            texts = [" x ".join(map(str, x)) if isinstance(x, tuple) else x for x in rows[name]]
            shown[name.replace("_", " ")] = [*texts, ""]
        shown["values"] = [f"{n:,}" if n else "" for n in [*rows["count"], self.count]]
        for kind, total in self.by_kind().items():
            if total:
                column = [*rows[KIND_COLUMNS[kind]], total]
                shown[f"{kind} (B)"] = [f"{n:,}" if n else "" for n in column]
        shown["all (B)"] = [f"{n:,}" for n in [*rows["size_bytes"], self.size_bytes]]
        totals = {"bits_per_weight": self.bits_per_weight, "entropy_bits": self.entropy_bits}
        for name, title in (("bits_per_weight", "bits a weight"), ("entropy_bits", "entropy")):
            if rows[name].notna().any():
                column = [*rows[name], totals[name]]
                shown[title] = ["" if pd.isna(bits) else f"{bits:.3f}" for bits in column]
        return shown

    def __repr__(self) -> str:
        return f"{self._summary()}\n{self.table().to_string()}"

    def _repr_html_(self) -> str:
        return f"<p>{self._summary()}</p>{self.table().to_html()}"

    def _summary(self) -> str:
        text = f"{self.size_bytes:,} bytes, {self.bits_per_weight:.3f} bits a weight"
        known = not math.isnan(self.entropy_bits)
        return text + (f", entropy {self.entropy_bits:.3f}" if known else "")


def row(
    tensor: str,
    sections: Iterable[Section],
    *,
    stored_as: str = "",
    codec: str = "",
    dtype: str = "",
    shape: tuple[int, ...] | None = None,
    entropy_bits: float = math.nan,
) -> dict:
    """A row of the frame, from the sections of a tensor; without a shape, of what has no values."""
    sizes: Counter[str] = Counter()
    for kind, data in sections:
        sizes[kind] += len(data)
    count = 0 if shape is None else math.prod(shape)
    bits = 8 * sizes.total() / count if count else math.nan
    return {
        "tensor": tensor, "stored_as": stored_as, "codec": codec, "dtype": dtype,
        "shape": shape or (), "count": count,
        **{column: sizes[kind] for kind, column in KIND_COLUMNS.items()},
        "size_bytes": sizes.total(), "bits_per_weight": bits, "entropy_bits": entropy_bits,
        "above_entropy_bits": bits - entropy_bits,
    }  # fmt: skip


def entropy(tensor: Tensor) -> float:
    """Zeroth-order entropy of the elements, in bits: of how often each occurs, and nothing else.

    >>> import torch
    >>> entropy(torch.tensor([0.0, 0.0, 1.0, 2.0]))
    1.5
    """
    bits = symbols.bits_of(tensor)
    if tensor.dtype.is_complex:
        bits = bits.view([("real", bits.dtype), ("imaginary", bits.dtype)])
    if bits.size == 0:
        return 0.0
    if bits.dtype.itemsize <= 2:
        counts = np.bincount(bits)
    else:
        counts = np.unique(bits, return_counts=True)[1]
    shares = counts[counts > 0] / bits.size
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # no -0.0
