"""One model, several runtimes, behind one interface.

`prepare` lowers a model to a runtime and returns a `Predictor`: eager PyTorch, ``torch.compile``,
or ONNX Runtime. A model of `workbench.compress.quantization` keeps its scales and codes on the way:
each runtime replaces the rounding operators by its own int8 kernels, and ``simulated`` says, from
the operations that the runtime really chose, when it did not.
"""

import contextlib
import io
import logging
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
    ComputedLSTM,
    MaskedWeight,
    Source,
    layer_type,
    make_dense,
    source_of,
    weight_names,
    weights,
)
from workbench.compress.layers import summary
from workbench.compress.quantizers import DynamicQuantizer, QuantizedWeight, StaticQuantizer
from workbench.training import evaluation_mode

RUNTIMES = ("eager", "compiled", "onnxruntime")
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
        zeros = _share_of_zeros(self.model)
        computed = any(
            isinstance(module, Source) and not isinstance(module, MaskedWeight)
            for module in self.model.modules()
        )
        many_zeros = zeros >= MANY_ZEROS
        self.simulated = (computed or many_zeros) and self.int8_kernels == 0
        dense = f"{zeros:.1%} of the weights are zero, and are multiplied like the others"
        notes = [summary(self.model), lowering, dense if many_zeros else ""]
        self.note = "; ".join(filter(None, notes))


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
        runtime: "eager", "compiled" (`torch.compile` with frozen weights) or "onnxruntime".
        example_input: inputs of one example, each with a batch dimension.
        device: "cpu" or "cuda".
        threads: of ONNX Runtime, and those that "compiled" is first compiled for; PyTorch runs
            with those of ``torch.set_num_threads``.

    Raises:
        ValueError: an unknown runtime, or a device that is not there.
        TypeError: ``candidate`` is none of these, or a callable is asked to run elsewhere.
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
    return OnnxPredictor(candidate, device, example_input, threads)


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
        lowered, note = _lower(model)
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

        before = _inductor_int8(counters)
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
        return _inductor_int8(counters) - before

    def save(self, path: str | os.PathLike) -> None:
        models.save(self.model, path)


class OnnxPredictor(Predictor):
    """ONNX Runtime on an exported graph; any batch size, the other dimensions as in the example."""

    runtime = "onnxruntime"
    suffix = ".onnx"

    def __init__(
        self, model: nn.Module, device: str, example_input: tuple[Tensor, ...], threads: int = 1
    ):
        import onnx
        import onnxruntime

        super().__init__(device)
        self.model, self.example_input = model, example_input
        provider = "CUDAExecutionProvider" if "cuda" in device else "CPUExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise ValueError(
                "this build of onnxruntime has no CUDA; install onnxruntime-gpu or use device='cpu'"
            )
        lowered, note = _lower(model)
        rounded_lstms = _make_lstms_dense(lowered)
        self.artifact = _export_onnx(lowered.to(device), example_input)
        if rounded_lstms:
            self.artifact = _round_lstms(self.artifact)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = os.path.join(folder, "optimized.onnx")
            # This pass would turn the MatMul of a dynamic layer into a Gemm, which has no int8
            # kernel for dynamic ranges.
            disabled = ["MatMulAddFusion"] if _is_dynamic(lowered) else []
            self.session = onnxruntime.InferenceSession(
                self.artifact, options, providers=[provider], disabled_optimizers=disabled
            )
            optimized = onnx.load(options.optimized_model_filepath)
        self.operations = Counter(node.op_type for node in optimized.graph.node)
        self.int8_kernels = sum(
            count for name, count in self.operations.items() if name in _ONNX_INT8
        )
        self.input_names = [entry.name for entry in self.session.get_inputs()]
        self._describe(note)

    def predict(self, *inputs: Tensor) -> Tensor:
        self._check(inputs)
        feed = {
            name: x.detach().cpu().numpy() for name, x in zip(self.input_names, inputs, strict=True)
        }
        return torch.from_numpy(self.session.run(None, feed)[0]).to(self.device)

    def save(self, path: str | os.PathLike) -> None:
        data.write_whole(path, lambda temporary: Path(temporary).write_bytes(self.artifact))

    def _check(self, inputs: tuple[Tensor, ...]) -> None:
        expected = [("batch", *x.shape[1:]) for x in self.example_input]
        given = [tuple(x.shape) for x in inputs]
        if [shape[1:] for shape in given] != [shape[1:] for shape in expected]:
            raise ValueError(f"inputs have shapes {given}; the exported model takes {expected}")


_ONNX_INT8 = {
    "QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger",
    "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM",
}  # fmt: skip


def _share_of_zeros(model: nn.Module) -> float:
    """Zeros among the weights of two and more dimensions; biases start at zero without pruning."""
    matrices = [weight for _, weight in weights(model) if weight.dim() > 1]
    zeros = sum(weight.numel() - int(weight.count_nonzero()) for weight in matrices)
    return zeros / max(1, sum(weight.numel() for weight in matrices))


def _is_dynamic(model: nn.Module) -> bool:
    return any(isinstance(module, DynamicQuantizer) for module in model.modules())


def _lower(model: nn.Module) -> tuple[nn.Module, str]:
    """A copy that a runtime can take: constant scales, and no weights that it has no kernel for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lowered = deepcopy(model).eval()
    note = ""
    for module in lowered.modules():
        if isinstance(module, StaticQuantizer):
            module.make_constant()
    for module in list(lowered.modules()):
        if layer_type(module) is None:
            continue
        for name in weight_names(module):
            source = source_of(module, name)
            if isinstance(source, Source) and not source.lowers_to_int8:
                if not isinstance(source, MaskedWeight):
                    note = f"{source.describe()} weights become float here: there is no kernel"
                make_dense(module)
                break
    return lowered, note


def _make_lstms_dense(lowered: nn.Module) -> bool:
    """Give quantized LSTMs plain weights: ONNX Runtime's kernel takes an int8 layout of its own."""
    found = [
        module
        for module in lowered.modules()
        if isinstance(module, ComputedLSTM)
        and all(isinstance(source, QuantizedWeight) for source in module.sources.values())
    ]
    for module in found:
        make_dense(module)
    return bool(found)


def _round_lstms(artifact: bytes) -> bytes:
    """Let ONNX Runtime's quantizer put the weights of each LSTM back into int8.

    They lie on the int8 grid of their channel already, so it finds the same codes.
    """
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, _quiet(""):
        folded, rounded = os.path.join(folder, "folded.onnx"), os.path.join(folder, "int8.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # The quantizer takes constants only; the exporter writes the weights in slices.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = folded
        onnxruntime.InferenceSession(artifact, options, providers=["CPUExecutionProvider"])
        quantize_dynamic(
            folded,
            rounded,
            op_types_to_quantize=["LSTM"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
        return Path(rounded).read_bytes()


def _export_onnx(model: nn.Module, example_input: tuple[Tensor, ...]) -> bytes:
    from onnxscript import opset18 as op

    def quantize(x):
        return op.DynamicQuantizeLinear(x)

    def dequantize(codes, scale, zero_point):
        return op.DequantizeLinear(codes, scale, zero_point)

    def linear(x, weight, bias=None):
        product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
        return product if bias is None else op.Add(product, bias)

    translations = {}
    if _is_dynamic(model):
        # The int8 kernel for dynamic ranges is a MatMul; the exporter would write a Gemm.
        translations = {
            torch.ops.workbench.quantize_dynamically.default: quantize,
            torch.ops.workbench.dequantize_dynamically.default: dequantize,
            torch.ops.aten.linear.default: linear,
        }

    # A batch of two, for the exporter takes a dimension of one to be always one.
    example = tuple(torch.cat([x[:1], x[:1]]) for x in example_input)
    with _quiet(), evaluation_mode(model):
        program = torch.onnx.export(
            model,
            example,
            dynamo=True,
            verbose=False,
            dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in example),
            custom_translation_table=translations,
        )
    proto = program.model_proto
    # The exporter notes the source line of each operation, with its path on this machine, and the
    # shape of each value: a tenth of a small model's file, which no runtime reads.
    del proto.graph.value_info[:]
    for entry in (proto, proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output):
        entry.doc_string = ""
        del entry.metadata_props[:]
    return proto.SerializeToString(deterministic=True)


@contextlib.contextmanager
def _quiet(name: str = "torch.onnx"):
    """Exporters log and warn about their own internals; errors still come through."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _inductor_int8(counters: dict) -> int:
    return sum(
        count
        for name, count in counters["inductor"].items()
        if name.startswith(("qconv", "qlinear")) and name.endswith("lower_count")
    )
