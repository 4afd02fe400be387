"""The evidence: bytes, counts, latency and accuracy, each with how sure one can be of it."""

from workbench.measure.accuracy import interval, over_seeds, paired_p_value, several_seeds
from workbench.measure.agreement import agreement
from workbench.measure.comparison import compare
from workbench.measure.hardware import Hardware, hardware
from workbench.measure.latency import Latency, measure_latency, verdict
from workbench.measure.selection import Best, best
from workbench.measure.size import (
    artifact_bytes,
    compression_ratio,
    density,
    macs,
    nonzeros,
    parameters,
    peak_memory_bytes,
    sparsity,
)

__all__ = [
    "Best",
    "Hardware",
    "Latency",
    "agreement",
    "artifact_bytes",
    "best",
    "compare",
    "compression_ratio",
    "density",
    "hardware",
    "interval",
    "macs",
    "measure_latency",
    "nonzeros",
    "over_seeds",
    "paired_p_value",
    "parameters",
    "peak_memory_bytes",
    "several_seeds",
    "sparsity",
    "verdict",
]
