"""A model in, a cheaper model out. The model passed in is never changed.

module                what it does
--------------------  -----------------------------------------------------------------------------
`quantization`        fewer bits for weights and activations, without training
`quantization_aware`  with training
`rounding`            GPTQ: rounding that looks at the data
`smoothing`           SmoothQuant: outliers moved from activations into weights
`equalization`        channels of one size across layers
`bias_correction`     what rounding does to the means, taken back
`pruning`             zeros in place of weights
`structured`          fewer channels, neurons and heads
`weight_sharing`      few distinct weights
`low_rank`            products of thinner layers
`distillation`        a small model learns from a large one
`recipe`              several of these in a row
`planning`            which layer bears how much, and a budget of bytes divided
`layers`              what a technique did with each layer, and why it left some alone
"""

from workbench.compress.bias_correction import correct_bias
from workbench.compress.computed import steps, weights
from workbench.compress.distillation import distill
from workbench.compress.equalization import equalize_layers
from workbench.compress.grid import Grid
from workbench.compress.layers import coverage
from workbench.compress.low_rank import factorize
from workbench.compress.planning import Plan, plan, sensitivity
from workbench.compress.pruning import (
    clip_weights,
    make_permanent,
    prune,
    prune_gradually,
    prune_threshold,
    rewind,
)
from workbench.compress.quantization import (
    binarize,
    quantize_dynamic,
    quantize_static,
    quantize_weights,
)
from workbench.compress.quantization_aware import quantize_aware
from workbench.compress.recipe import (
    Binarize,
    ClipWeights,
    Distill,
    EqualizeLayers,
    Factorize,
    FineTune,
    Prune,
    PruneGradually,
    PruneStructured,
    PruneThreshold,
    QuantizeAware,
    QuantizeDynamic,
    QuantizeGptq,
    QuantizeStatic,
    QuantizeWeights,
    Recipe,
    Run,
    ShareWeights,
    SmoothActivations,
    Step,
)
from workbench.compress.rounding import quantize_gptq
from workbench.compress.smoothing import smooth_activations
from workbench.compress.structured import prune_structured
from workbench.compress.weight_sharing import share_weights

__all__ = [
    "Binarize",
    "ClipWeights",
    "Distill",
    "EqualizeLayers",
    "Factorize",
    "FineTune",
    "Grid",
    "Plan",
    "Prune",
    "PruneGradually",
    "PruneStructured",
    "PruneThreshold",
    "QuantizeAware",
    "QuantizeDynamic",
    "QuantizeGptq",
    "QuantizeStatic",
    "QuantizeWeights",
    "Recipe",
    "Run",
    "ShareWeights",
    "SmoothActivations",
    "Step",
    "binarize",
    "clip_weights",
    "correct_bias",
    "coverage",
    "distill",
    "equalize_layers",
    "factorize",
    "make_permanent",
    "plan",
    "prune",
    "prune_gradually",
    "prune_structured",
    "prune_threshold",
    "quantize_aware",
    "quantize_dynamic",
    "quantize_gptq",
    "quantize_static",
    "quantize_weights",
    "rewind",
    "sensitivity",
    "share_weights",
    "smooth_activations",
    "steps",
    "weights",
]
