"""A perceptron in fixed point, as an FPGA computes it, and what it takes to hold it there.

An FPGA has no floats to save: every number has the bits one gives it, and every bit costs gates.
`fix` rounds a network to such numbers and computes with them exactly; `compile_emulator` has hls4ml
write the network as C++ for high-level synthesis and compiles that with ``g++``: the same bits.
Duarte et al. (2018), "Fast inference of deep neural networks in FPGAs for particle physics".

What a chip holds is *modelled* here. hls4ml's own report of resources and clock needs AMD's Vitis
or Vivado, which are not free to pass on.
"""

import contextlib
import io
import math
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from workbench.data import Task
from workbench.training import evaluate

BITS = (2, 18)  # sums of such products are exact in the float64 that stands in for integers
# Lookup tables of six inputs, multipliers and kilobits of block memory: AMD's product tables.
CHIPS = {
    "Artix-7 35T": (20_800, 90, 1_800),
    "Zynq-7020": (53_200, 220, 4_900),
    "Virtex UltraScale+ VU9P": (1_182_240, 6_840, 75_900),
}
_LUTS_PER_MULTIPLIER = 55


@dataclass(frozen=True)
class FixedPoint:
    """Numbers of ``bits`` bits, of which ``integer`` stand before the point, the sign among them.

    ``integer`` may be negative or above ``bits``: the point then lies outside. Rounds to the
    nearest, halves up, and what is too large becomes the largest: AP_RND and AP_SAT.

    >>> FixedPoint(4, 2).rounded(np.array([0.3, 0.375, 5, -5])).tolist()
    [0.25, 0.5, 1.75, -2.0]
    """

    bits: int
    integer: int
    signed: bool = True

    @classmethod
    def covering(cls, values: np.ndarray, bits: int) -> "FixedPoint":
        """The finest format of so many bits whose range holds all values."""
        low, high = min(0.0, float(values.min())), float(values.max())
        signed = low < 0
        largest = max(high, -low)
        integer = math.floor(math.log2(largest)) + 1 + signed if largest > 0 else 1
        if low == -(2.0 ** (integer - 2)) and high < -low:
            integer -= 1  # two's complement reaches one step further down than up
        return cls(bits, integer, signed)

    @property
    def step(self) -> float:
        return 2.0 ** (self.integer - self.bits)

    def codes(self, values: np.ndarray) -> np.ndarray:
        """Each value as a whole number of steps, (same shape)."""
        lowest = -(2 ** (self.bits - 1)) if self.signed else 0
        highest = lowest + 2**self.bits - 1
        return np.clip(np.floor(values / self.step + 0.5), lowest, highest)

    def rounded(self, values: np.ndarray) -> np.ndarray:
        return self.codes(values) * self.step

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}fixed<{self.bits},{self.integer},RND,SAT>"


@dataclass(frozen=True)
class FixedLayer:
    """A linear layer: weights (inputs, outputs) and biases (outputs,) on their grids, and the grid
    of what comes out after a ReLU, None after the last one, whose sums are kept whole."""

    name: str
    weight: np.ndarray
    weight_format: FixedPoint
    bias: np.ndarray
    bias_format: FixedPoint
    activation_format: FixedPoint | None


@dataclass(frozen=True)
class FixedPerceptron:
    """What `fix` returns: call it like the model. Simulated: its speed on a processor says
    nothing."""

    input_format: FixedPoint
    layers: tuple[FixedLayer, ...]

    def __call__(self, inputs: Tensor) -> Tensor:
        x = self.input_format.rounded(inputs.flatten(1).double().numpy())  # (batch, inputs)
        for layer in self.layers:
            x = x @ layer.weight + layer.bias
            if layer.activation_format is not None:
                x = layer.activation_format.rounded(np.maximum(x, 0))
        return torch.from_numpy(x).float()


def fix(model: nn.Module, inputs: Tensor, *, bits: int = 8) -> FixedPerceptron:
    """Round a perceptron's weights and activations to fixed point, ``bits`` bits for each number.

    Each tensor has its own point, where the largest value of the weights, or of the activations on
    ``inputs``, just fits.

    Args:
        model: an `nn.Sequential` of Flatten, Linear and ReLU, with a ReLU between any two Linear.
        inputs: examples that show how large the activations get, (examples, ...).

    Raises:
        ValueError: bits is out of range.
        TypeError: another kind of model or layer, by name.

    Shown in notebook 12.
    """
    if not BITS[0] <= bits <= BITS[1]:
        raise ValueError(f"bits is {bits}; give {BITS[0]} to {BITS[1]}")
    linear = _linear_layers(model)
    x = inputs.flatten(1).double().numpy()  # (examples, inputs), in floats all the way
    input_format = FixedPoint.covering(x, bits)
    layers = []
    for place, (name, layer) in enumerate(linear, start=1):
        weight, bias = _parameters(layer)
        x = np.maximum(x @ weight + bias, 0)
        formats = [FixedPoint.covering(values, bits) for values in (weight, bias)]
        activation = FixedPoint.covering(x, bits) if place < len(linear) else None
        layers.append(
            FixedLayer(
                name, formats[0].rounded(weight), formats[0],
                formats[1].rounded(bias), formats[1], activation,
            )
        )  # fmt: skip
    return FixedPerceptron(input_format, tuple(layers))


def resources(fixed: FixedPerceptron, *, reuse: int = 1) -> dict[str, object]:
    """What an FPGA needs for it, modelled.

    ``multipliers`` work at once, each on ``reuse`` products in turn (a weight of zero needs none);
    ``weight_bits`` are stored. With ``reuse`` 1 each product has wires of its own: ``ebops``, the
    sum of weight bits times activation bits between the first and the last that is not zero, is
    then about the lookup tables plus 55 for each multiplier (Sun et al., 2024, "Gradient-based
    automatic mixed precision quantization for neural networks on-chip"). ``chip`` is the smallest
    of ``CHIPS`` with so many, "none" where none has.

    Raises:
        ValueError: reuse is below 1.
    """
    if reuse < 1:
        raise ValueError(f"reuse is {reuse}; give 1 or more")
    arriving = [fixed.input_format, *(layer.activation_format for layer in fixed.layers[:-1])]
    ebops = multipliers = stored = 0
    for layer, activation in zip(fixed.layers, arriving, strict=True):
        codes = layer.weight_format.codes(layer.weight)
        ebops += int(_effective_bits(codes).sum()) * activation.bits
        multipliers += math.ceil(np.count_nonzero(codes) / reuse)
        stored += codes.size * layer.weight_format.bits + len(layer.bias) * layer.bias_format.bits
    fitting = [
        name
        for name, (luts, dsps, kilobits) in CHIPS.items()
        if (ebops <= luts + _LUTS_PER_MULTIPLIER * dsps if reuse == 1 else multipliers <= dsps)
        and (reuse == 1 or stored <= 1000 * kilobits)
    ]
    return {
        "weight_bits": stored,
        "multipliers": multipliers,
        "reuse": reuse,
        "ebops": ebops,
        "chip": fitting[0] if fitting else "none",
        "source": "modelled",
    }


def sweep(
    model: nn.Module, task: Task, *, bits: Iterable[int], split: str = "test", examples: int = 1000
) -> pd.DataFrame:
    """Score against bits: one row per width, with its `resources`.

    ``examples`` of the training split show how large the activations get.
    """
    (inputs,), _ = next(iter(task.train.batches(examples, shuffle=True, seed=0)))
    rows = []
    for width in bits:
        fixed = fix(model, inputs, bits=width)
        score = evaluate(fixed, task, split=split).value
        rows.append({"bits": width, "score": score, **resources(fixed)})
    return pd.DataFrame(rows)


def compile_emulator(
    fixed: FixedPerceptron, folder: str | os.PathLike, *, reuse: int = 1
) -> Callable[[Tensor], Tensor]:
    """Let hls4ml write the network as C++ for synthesis into ``folder``, and compile it here.

    Returns a function of inputs (batch, ...) that runs the C++, bit by bit as the chip would. What
    lies in the folder is a project for Vitis HLS.

    Raises:
        ImportError: hls4ml is not installed.
        RuntimeError: there is no C++ compiler, or it failed.
    """
    try:
        with _silence():
            import hls4ml
    except ImportError as error:
        raise ImportError(
            'the emulation needs hls4ml, which is not installed: pip install -e ".[fpga]"'
        ) from error
    if shutil.which("g++") is None:
        raise RuntimeError("the emulation is C++, and there is no g++; install it first")
    model, names = _as_module(fixed)
    width = len(fixed.layers[0].weight)
    with _silence():
        config = hls4ml.utils.config_from_pytorch_model(
            model,
            (width,),
            granularity="name",
            backend="Vitis",
            default_reuse_factor=reuse,
        )
        config["Model"]["Strategy"] = "Latency" if reuse == 1 else "Resource"
        for name, precision in _precisions(fixed, names).items():
            config["LayerName"][name]["Precision"].update(precision)
        project = hls4ml.converters.convert_from_pytorch_model(
            model, hls_config=config, output_dir=str(Path(folder)), backend="Vitis"
        )
        project.compile()

    def emulate(inputs: Tensor) -> Tensor:
        x = np.ascontiguousarray(inputs.flatten(1).numpy(), dtype=np.float32)
        with _silence():
            return torch.from_numpy(project.predict(x)).reshape(len(x), -1)

    return emulate


def _linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"model is a {type(model).__name__}; give an nn.Sequential perceptron")
    linear, relu_since = [], True
    for name, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            if not relu_since:
                raise TypeError(f"layer {name} follows a Linear; put a ReLU between them")
            linear.append((name, layer))
            relu_since = False
        elif isinstance(layer, nn.ReLU):
            relu_since = True
        elif not isinstance(layer, (nn.Flatten, nn.Identity, nn.Dropout)):
            raise TypeError(
                f"layer {name} is a {type(layer).__name__}; here are Flatten, Linear and ReLU only"
            )
    if not linear or relu_since:
        raise TypeError("the model must end with a Linear layer")
    return linear


def _parameters(layer: nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    weight = layer.weight.detach().double().numpy().T  # (inputs, outputs)
    bias = np.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().numpy()
    return weight, bias.astype(np.float64)


def _effective_bits(codes: np.ndarray) -> np.ndarray:
    """Bits of each whole number between its first and its last one, the sign left out."""
    whole = np.abs(codes).astype(np.int64)
    odd = whole // np.maximum(whole & -whole, 1)  # without the zeros at its end
    return np.ceil(np.log2(odd + 1)).astype(np.int64)


def _as_module(fixed: FixedPerceptron) -> tuple[nn.Sequential, list[str]]:
    """The rounded weights as a module that hls4ml reads, and what it calls the Linear layers."""
    parts = []
    for layer in fixed.layers:
        linear = nn.Linear(*layer.weight.shape)
        linear.weight.data = torch.from_numpy(layer.weight.T).float()
        linear.bias.data = torch.from_numpy(layer.bias).float()
        parts += [linear, nn.ReLU()]
    module = nn.Sequential(*parts[:-1]).eval()
    return module, [f"_{place}" for place in range(0, len(module), 2)]


def _precisions(fixed: FixedPerceptron, names: list[str]) -> dict[str, dict[str, str]]:
    """hls4ml's types by layer; what is not named it makes wide enough for exact sums."""
    precisions = {"input_1": {"result": str(fixed.input_format)}}
    for place, (name, layer) in enumerate(zip(names, fixed.layers, strict=True)):
        precisions[name] = {"weight": str(layer.weight_format), "bias": str(layer.bias_format)}
        if layer.activation_format is not None:
            precisions[f"_{2 * place + 1}"] = {"result": str(layer.activation_format)}
    return precisions


@contextlib.contextmanager
def _silence():
    """hls4ml tells its progress by printing."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
