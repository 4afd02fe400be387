"""One model, several runtimes, behind one interface.

`prepare` lowers a model to a runtime and returns a `Predictor`: eager PyTorch, ``torch.compile``,
ONNX Runtime or OpenVINO. A model of `workbench.compress.quantization` keeps its scales and codes on
the way: each runtime replaces the rounding operators by its own int8 kernels, and ``simulated``
says, from the operations that the runtime really chose, when it did not. `load` makes a Predictor
of a file that `workbench.deploy.exporting` wrote.
"""

import importlib.util
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from workbench import data, models
from workbench.compress.computed import (
    MaskedWeight,
    Source,
    layer_type,
    make_dense,
    source_of,
    weight_names,
    weights,
)
from workbench.compress.layers import summary
from workbench.deploy.loading import (
    Loaded,
    OnnxModel,
    OpenVinoModel,
    load_bytes,
)
from workbench.deploy.lowering import int8_lowered, lower, onnx_bytes, openvino_model, openvino_zip

RUNTIMES = ("eager", "compiled", "onnxruntime", "openvino")
MANY_ZEROS = 0.1  # from this share on, zeros are taken for a technique's work


class Predictor:
    """A model that is ready to answer: ``predict(*inputs)`` gives its outputs, without gradients.

    Attributes:
        model: the module it was made of, None for a bare callable.
        runtime, device: where it runs.
        simulated: the model is compressed, but no kernel of this runtime computes with the
            compressed numbers: its speed says nothing about the technique.
        note: what there is to say about coverage and lowering, or "".
        int8_kernels: how many operations run on integers.
    """

    model: nn.Module | None = None
    runtime = "callable"
    suffix = ".safetensors"

    def __init__(self, device: str = "cpu"):
        self.device, self.simulated, self.note, self.int8_kernels = device, False, "", 0

    def predict(self, *inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.predict(*inputs)

    def save(self, path: str | os.PathLike) -> None:
        """Write the artifact that this runtime loads."""
        raise TypeError(f"a {self.runtime} predictor has no artifact; its size is not known")

    def _describe(self, lowering: str = "") -> None:
        """Fill in ``simulated`` and ``note`` once ``int8_kernels`` is known."""
        self.simulated, self.note = described(self.model, self.int8_kernels, lowering)


def described(model: nn.Module, int8_kernels: int, lowering: str = "") -> tuple[bool, str]:
    """Whether the speed of a lowered model is only simulated, and what there is to say about it."""
    zeros = _share_of_zeros(model)
    computed = any(
        isinstance(module, Source) and not isinstance(module, MaskedWeight)
        for module in model.modules()
    )
    many_zeros = zeros >= MANY_ZEROS
    dense = f"{zeros:.1%} of the weights are zero, and are multiplied like the others"
    notes = [summary(model), lowering, dense if many_zeros else ""]
    return (computed or many_zeros) and int8_kernels == 0, "; ".join(filter(None, notes))


def _share_of_zeros(model: nn.Module) -> float:
    """Zeros among the weights of two and more dimensions; biases start at zero without pruning."""
    matrices = [weight for _, weight in weights(model) if weight.dim() > 1]
    zeros = sum(weight.numel() - int(weight.count_nonzero()) for weight in matrices)
    return zeros / max(1, sum(weight.numel() for weight in matrices))


def installed() -> tuple[str, ...]:
    """Those of `RUNTIMES` that can be used here; OpenVINO is an extra."""
    found = importlib.util.find_spec("openvino") is not None
    return tuple(name for name in RUNTIMES if name != "openvino" or found)


def prepare(
    candidate: nn.Module | Callable[..., Tensor] | Predictor,
    runtime: str = "eager",
    *,
    example_input: tuple[Tensor, ...],
    device: str = "cpu",
    threads: int = 1,
) -> Predictor:
    """Make a `Predictor` of a module or callable; a Predictor is returned unchanged.

    Args:
        runtime: "eager", "compiled" (`torch.compile` with frozen weights), "onnxruntime" or
            "openvino".
        example_input: inputs of one example, each with a batch dimension.
        device: "cpu" or "cuda".
        threads: of ONNX Runtime and OpenVINO, and those that "compiled" is first compiled for;
            PyTorch runs with those of ``torch.set_num_threads``.

    Raises:
        ValueError: an unknown runtime, or a device that is not there.
        TypeError: ``candidate`` is none of these, or a callable is asked to run elsewhere.
        UnsupportedError: the runtime has no operation for a layer, which is named.
        ImportError: OpenVINO is not installed.
    """
    if isinstance(candidate, Predictor):
        return candidate
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime is {runtime!r}; choose from {RUNTIMES}")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but this machine has no CUDA device; use 'cpu'")
    if not isinstance(candidate, nn.Module):
        if not callable(candidate):
            raise TypeError(
                f"candidate is a {type(candidate).__name__}; give a module, a callable or a "
                "Predictor"
            )
        if runtime != "eager":
            raise TypeError(f"a bare callable cannot be lowered to {runtime}; give an nn.Module")
        return CallablePredictor(candidate, device)
    example_input = tuple(x.to(device) for x in example_input)
    if runtime == "eager":
        return EagerPredictor(candidate, device)
    if runtime == "compiled":
        return CompiledPredictor(candidate, device, example_input, threads)
    made = OnnxPredictor if runtime == "onnxruntime" else OpenVinoPredictor
    return made(candidate, device, example_input, threads)


def load(
    source: str | os.PathLike | bytes, *, threads: int = 1, trusted: bool = False
) -> "FilePredictor":
    """Make a `Predictor` of an exported file, or of its bytes; see `loading.load_bytes`."""
    artifact = source if isinstance(source, bytes) else Path(source).read_bytes()
    predictor = FilePredictor(artifact, load_bytes(artifact, threads=threads, trusted=trusted))
    for name in ("simulated", "note", "int8_kernels"):
        setattr(predictor, name, predictor.loaded.record.get(name, getattr(predictor, name)))
    return predictor


class CallablePredictor(Predictor):
    """Any function of the inputs; nothing is known of it but its answers and its speed."""

    def __init__(self, function: Callable[..., Tensor], device: str):
        super().__init__(device)
        self.function = function

    def predict(self, *inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.as_tensor(self.function(*(x.to(self.device) for x in inputs)))


class EagerPredictor(Predictor):
    """PyTorch as it is: one kernel after the other, called from Python."""

    runtime = "eager"

    def __init__(self, model: nn.Module, device: str):
        super().__init__(device)
        self.model = model
        self.running = deepcopy(model).to(device).eval()
        _make_masks_permanent(self.running)
        self._describe()

    def predict(self, *inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return self.running(*(x.to(self.device) for x in inputs))

    def save(self, path: str | os.PathLike) -> None:
        models.save(self.model, path)


def _make_masks_permanent(running: nn.Module) -> None:
    """Masks serve training; answers need not multiply by them again and again."""
    masked = [
        layer
        for layer in running.modules()
        if layer_type(layer) is not None
        and any(isinstance(source_of(layer, name), MaskedWeight) for name in weight_names(layer))
    ]
    make_dense(*masked)


class CompiledPredictor(Predictor):
    """`torch.compile` with the weights frozen into the graph.

    Compiles for each new input shape and number of threads, which takes seconds; the first time is
    here.
    """

    runtime = "compiled"

    def __init__(
        self, model: nn.Module, device: str, example_input: tuple[Tensor, ...], threads: int = 1
    ):
        super().__init__(device)
        self.model = model
        lowered, note = lower(model)
        self.running = torch.compile(lowered.to(device), dynamic=False)
        self.compiled_for: set[tuple] = set()
        threads_before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            self.int8_kernels = self._compile(*example_input)
        finally:
            torch.set_num_threads(threads_before)
        self._describe(note)

    def predict(self, *inputs: Tensor) -> Tensor:
        if self._key(*inputs) not in self.compiled_for:
            self._compile(*inputs)
        with torch.no_grad():
            return self.running(*(x.to(self.device) for x in inputs))

    def _key(self, *inputs: Tensor) -> tuple:
        """What compiled code is made for; dynamo compiles again when any of it changes."""
        return (torch.get_num_threads(), *(x.shape for x in inputs))

    def _compile(self, *inputs: Tensor) -> int:
        """Compile for these inputs; returns the number of int8 kernels in the result."""
        from torch._dynamo import config as dynamo
        from torch._dynamo.utils import counters
        from torch._inductor import config as inductor

        before = int8_lowered(counters)
        # The int8 kernels need the weights as constants, and freezing must be on for the whole of
        # the compilation, tracing included: as an option of torch.compile it comes too late.
        # Models of one class share a limit of eight compilations, and go on in eager mode past it.
        with (
            torch.no_grad(),
            inductor.patch(freezing=True),
            dynamo.patch(recompile_limit=256, fail_on_recompile_limit_hit=True),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            self.running(*(x.to(self.device) for x in inputs))
        self.compiled_for.add(self._key(*inputs))
        return int8_lowered(counters) - before

    def save(self, path: str | os.PathLike) -> None:
        models.save(self.model, path)


class FilePredictor(Predictor):
    """A model file and what runs it; any batch size, the other dimensions as in the file."""

    def __init__(self, artifact: bytes, loaded: Loaded, device: str = "cpu"):
        super().__init__(device)
        self.artifact, self.loaded = artifact, loaded
        self.runtime, self.suffix = loaded.runtime, loaded.suffix

    def predict(self, *inputs: Tensor) -> Tensor:
        arrays = [x.detach().cpu().numpy() for x in inputs]
        return torch.from_numpy(self.loaded.at(arrays).run(arrays)[0]).to(self.device)

    def save(self, path: str | os.PathLike) -> None:
        data.write_whole(path, lambda temporary: Path(temporary).write_bytes(self.artifact))


class OnnxPredictor(FilePredictor):
    """ONNX Runtime on an exported graph."""

    def __init__(
        self, model: nn.Module, device: str, example_input: tuple[Tensor, ...], threads: int = 1
    ):
        import onnx
        import onnxruntime

        provider = "CUDAExecutionProvider" if "cuda" in device else "CPUExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise ValueError(
                "this build of onnxruntime has no CUDA; install onnxruntime-gpu or use device='cpu'"
            )
        lowered, note = lower(model)
        artifact = onnx_bytes(lowered.to(device), example_input)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "optimized.onnx")
            loaded = OnnxModel(artifact, threads, provider=provider, optimized_path=path)
            optimized = onnx.load(path)
        super().__init__(artifact, loaded, device)
        self.model, self.session = model, loaded.session
        self.operations = Counter(node.op_type for node in optimized.graph.node)
        self.int8_kernels = sum(
            count for name, count in self.operations.items() if name in _ONNX_INT8
        )
        self._describe(note)


_ONNX_INT8 = {
    "QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger",
    "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM",
}  # fmt: skip


class OpenVinoPredictor(FilePredictor):
    """OpenVINO on the same graph."""

    def __init__(
        self, model: nn.Module, device: str, example_input: tuple[Tensor, ...], threads: int = 1
    ):
        if device != "cpu":
            raise ValueError(f"device is {device!r}; OpenVINO runs on 'cpu' here")
        lowered, note = lower(model)
        self.graph = openvino_model(lowered, example_input)
        loaded = OpenVinoModel.of(self.graph, threads)
        super().__init__(openvino_zip(self.graph), loaded, device)
        self.model = model
        fixed = loaded.at([x.numpy() for x in example_input])
        self.operations = _openvino_operations(fixed)
        self.int8_kernels = openvino_int8_kernels(fixed)
        self._describe(note)


def openvino_int8_kernels(loaded: OpenVinoModel) -> int:
    """How many operations of a compiled model run on integers."""
    kinds = ("Convolution", "Deconvolution", "FullyConnected", "MatMul", "RNNSeq", "RNNCell")
    found = _openvino_operations(loaded)
    return sum(found[f"{kind} {code}"] for kind in kinds for code in ("i8", "u8"))


def _openvino_operations(loaded: OpenVinoModel) -> Counter:
    """How often each kind of operation runs, with the numbers that it computes with."""
    notes = [node.get_rt_info() for node in loaded.compiled.get_runtime_model().get_ops()]
    return Counter(
        f"{note['layerType'].astype(str)} {note['runtimePrecision'].astype(str)}" for note in notes
    )
