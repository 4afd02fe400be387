"""A model in, a cheaper model out. The model passed in is never changed."""

from workbench.compress.computed import steps, weights
from workbench.compress.grid import Grid
from workbench.compress.layers import coverage
from workbench.compress.quantization import (
    binarize,
    quantize_dynamic,
    quantize_static,
    quantize_weights,
)
from workbench.compress.quantization_aware import quantize_aware

__all__ = [
    "Grid",
    "binarize",
    "coverage",
    "quantize_aware",
    "quantize_dynamic",
    "quantize_static",
    "quantize_weights",
    "steps",
    "weights",
]
