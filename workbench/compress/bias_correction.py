"""Biases that make up for what rounding does to the mean of each channel.

Rounding errors of weights do not only add noise. Those of a channel have a mean, and where the
inputs have one too (after a ReLU they always do) the channel's output is shifted. A channel of a
depthwise convolution, with its nine weights, is shifted most. The bias takes the shift back, and
costs nothing.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from workbench.compress.calibration import Calibration, Inputs, observed, one_batch
from workbench.compress.computed import (
    CONVOLUTIONS,
    LINEAR,
    TRANSPOSED,
    copy_of,
    inner_dims,
    layer_type,
)
from workbench.compress.layers import finish, layers_of, reasons_left
from workbench.compress.tracing import fold_batch_norms, trace


def correct_bias(
    model: nn.Module,
    teacher: nn.Module,
    calibration: Calibration,
    *,
    samples: int = 128,
    seed: int = 0,
) -> nn.Module:
    """Give each output channel the mean again that it had before the weights were rounded.

    Layers are corrected in the order in which they run, so that each one sees what the corrected
    layers before it send. `workbench.compress.quantize_static` does this itself with
    ``correct_bias=True``.

    Args:
        model: what a technique made of ``teacher``, with rounded weights.
        teacher: the model as that technique was given it: after an equalization, the equalized one.
        calibration: a `Task` (``samples`` of its training examples are used), or batches of inputs.
        samples: most examples. They go through the models as one batch.

    Raises:
        ValueError: an empty calibration, or models whose layers do not have the same names.

    Reference: Nagel et al. (2019), "Data-free quantization through weight equalization and bias
    correction", section 4.2 (empirical).
    """
    work, before = copy_of(model), copy_of(teacher).eval()
    if _has_norms(before) and not _has_norms(work):
        before, _ = trace(before)
        fold_batch_norms(before)
    layers = biased_layers(work)
    missing = sorted(set(layers) - set(biased_layers(before)))
    if missing:
        raise ValueError(
            f"teacher has no layer {missing[0]!r} with a bias, which the model has; give the model "
            "as it was before it was quantized"
        )
    inputs = one_batch(calibration, samples, seed)
    teachers = {name: before.get_submodule(name) for name in layers}
    shift_biases(work, layers, mean_outputs(before, teachers, inputs), inputs)
    left = reasons_left(work, layers, (), "has no bias to correct")
    return finish(work, model, "biases corrected", layers, left, "corrected")


def biased_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear and convolution layers of ``model`` that have a bias."""
    return {
        name: layer
        for name, layer in layers_of(model).items()
        if layer_type(layer) in (*LINEAR, *CONVOLUTIONS, *TRANSPOSED) and layer.bias is not None
    }


def mean_outputs(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Inputs
) -> dict[str, Tensor]:
    """The mean of each output channel, (O,), over all examples and places, at the first call."""
    means: dict[str, Tensor] = {}

    def note(name: str, output: Tensor) -> None:
        if name not in means:
            means[name] = _channel_means(layers[name], output)

    observed(model, layers, inputs, after=note)
    return means


def shift_biases(
    model: nn.Module, layers: Mapping[str, nn.Module], means: Mapping[str, Tensor], inputs: Inputs
) -> None:
    """Change the biases in place so that the channels have these means; one pass over ``model``."""
    waiting = dict(means)

    def shift(name: str, output: Tensor) -> Tensor | None:
        if name not in waiting:  # called before: its bias is right
            return None
        layer = layers[name]
        change = (waiting.pop(name) - _channel_means(layer, output)).to(layer.bias)
        layer.bias.data = layer.bias.data + change
        return output + change.view(-1, *[1] * inner_dims(layer))

    observed(model, layers, inputs, after=shift)


def _channel_means(layer: nn.Module, output: Tensor) -> Tensor:
    return output.float().movedim(-1 - inner_dims(layer), 0).flatten(1).mean(1)


def _has_norms(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
