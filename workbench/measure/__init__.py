"""The evidence: bytes, counts, latency and accuracy, each with how sure one can be of it.

module          what it does
--------------  -----------------------------------------------------------------------------------
`comparison`    `compare`: several models in one frame
`selection`     `best`: the fastest model and runtime within a loss and a size
`size`          bytes, parameters, multiplications, memory
`latency`       how long a call takes, and whether one model is faster than another
`accuracy`      intervals, and tests of a difference
`agreement`     the same answers as before, where there are no labels
`hardware`      the machine that it was measured on
`peaks`         what that machine can do at best
`roofline`      each operation of a model under the roofs of the machine
`sweeps`        latency over batch sizes and threads
`energy`        counted, or modelled and so called
`load`          a service under load
`queueing`      batching and waiting, modelled
`robustness`    attacks on a classifier
"""

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
