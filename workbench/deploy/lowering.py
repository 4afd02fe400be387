"""A model in, a program of one runtime out.

`lower` makes the copy that all runtimes start from. A quantized model keeps its scales and codes on
the way: the exporters write them down, and each runtime puts its own int8 kernels in their place.
"""

import contextlib
import io
import logging
import os
import re
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from workbench.compress.computed import (
    ComputedLSTM,
    MaskedWeight,
    Source,
    layer_type,
    make_dense,
    source_of,
    weight_names,
)
from workbench.compress.quantizers import DynamicQuantizer, QuantizedWeight, StaticQuantizer
from workbench.deploy.loading import WEIGHTS, XML, import_openvino, openvino_core
from workbench.training import evaluation_mode

Inputs = tuple[Tensor, ...]


class UnsupportedError(ValueError):
    """A model that an exporter cannot take; the message names the operation and its layer."""


def lower(model: nn.Module) -> tuple[nn.Module, str]:
    """A copy that a runtime can take: constant scales, and no weights that it has no kernel for.

    Returns it and what there is to say about it, or "".
    """
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


def is_dynamic(model: nn.Module) -> bool:
    """Whether ranges of activations are found at each call."""
    return any(isinstance(module, DynamicQuantizer) for module in model.modules())


def torch_program(lowered: nn.Module, example_input: Inputs) -> torch.export.ExportedProgram:
    """The graph of ``torch.export``: any batch size, the other dimensions as in the example.

    Raises:
        UnsupportedError: the model cannot be traced; the message names the layer.
    """
    # A batch of two, for the exporter takes a dimension of one to be always one.
    example = tuple(torch.cat([x[:1], x[:1]]) for x in example_input)
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in example)
    running: list[str] = []  # names of the layers that were entered and not left
    hooks = []
    for name, module in lowered.named_modules():

        def enter(module, inputs, name=name):
            running.append(name)

        def leave(*_):
            running.pop()

        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with quiet(), evaluation_mode(lowered):
            return torch.export.export(lowered, example, dynamic_shapes=shapes)
    except Exception as error:
        name = running[-1] if running else ""
        raise UnsupportedError(
            f"torch.export cannot trace {_layer(name, lowered)}: {_first_line(error)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def onnx_bytes(lowered: nn.Module, example_input: Inputs, *, round_lstms: bool = True) -> bytes:
    """The model as ONNX.

    Args:
        round_lstms: put int8 LSTMs into the form that only ONNX Runtime has; in float otherwise.

    Raises:
        UnsupportedError: an operation that ONNX does not have; the message names its layer.
    """
    lstms = _make_lstms_dense(lowered)
    proto = _onnx_proto(lowered, example_input)
    # The exporter notes the source line of each operation, with its path on this machine, and the
    # shape of each value: a tenth of a small model's file, which no runtime reads.
    del proto.graph.value_info[:]
    for entry in (proto, proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output):
        entry.doc_string = ""
        del entry.metadata_props[:]
    artifact = proto.SerializeToString(deterministic=True)
    return _round_lstms(artifact) if lstms and round_lstms else artifact


def torch_bytes(lowered: nn.Module, example_input: Inputs) -> bytes:
    """The program of ``torch.export`` as the content of a ``.pt2`` file."""
    buffer = io.BytesIO()
    program = torch_program(lowered, example_input)
    program.example_inputs = None  # would be stored as a pickle
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes:
            node.meta.pop("stack_trace", None)  # lines of source, with their path on this machine
    with quiet():
        torch.export.save(program, buffer)
    return buffer.getvalue()


def aot_bytes(lowered: nn.Module, example_input: Inputs) -> tuple[bytes, int]:
    """The model compiled to machine code of this processor, as a ``.pt2`` file.

    Returns it and the number of its int8 kernels.

    Raises:
        UnsupportedError: inductor cannot compile it, or there is no C++ compiler.
    """
    from torch._dynamo.utils import counters
    from torch._inductor import config as inductor

    program = torch_program(lowered, example_input)
    before = int8_lowered(counters)
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = os.path.join(folder, "model.pt2")
        try:
            with torch.no_grad(), inductor.patch(freezing=True):
                torch._inductor.aoti_compile_and_package(program, package_path=path)
        except Exception as error:
            raise UnsupportedError(
                f"AOTInductor cannot compile the model: {_first_line(error)}"
            ) from error
        return Path(path).read_bytes(), int8_lowered(counters) - before


def int8_lowered(counters: dict) -> int:
    """How many int8 kernels inductor has put into all that it compiled so far."""
    return sum(
        count
        for name, count in counters["inductor"].items()
        if name.startswith(("qconv", "qlinear")) and name.endswith("lower_count")
    )


def openvino_model(lowered: nn.Module, example_input: Inputs):
    """The model as an ``openvino.Model``: it reads the int8 form of ONNX and has kernels for it.

    Raises:
        UnsupportedError: an operation that ONNX or OpenVINO does not have, with its layer.
        ImportError: OpenVINO is not installed.
    """
    try:
        return openvino_core().read_model(onnx_bytes(lowered, example_input, round_lstms=False))
    except RuntimeError as error:
        text = str(error)
        places = [
            f"{node.op_type} of {_layer(_scope(node), lowered)}"
            for node in _onnx_proto(lowered, example_input).graph.node
            if re.search(rf"\b{node.op_type}\b", text)
        ]
        where = ", ".join(dict.fromkeys(places)) or _first_line(error)
        raise UnsupportedError(f"OpenVINO has no operation for {where}") from error


def openvino_zip(model, *, half: bool = False) -> bytes:
    """The one file that `workbench.deploy.loading` reads, of the two that OpenVINO writes.

    With ``half``, float weights are stored in 16 bits.
    """
    openvino = import_openvino()
    for number, operation in enumerate(model.get_ordered_ops()):
        if operation.get_type_name() not in ("Parameter", "Result"):
            # OpenVINO numbers all that a process makes; the same model is to be the same file.
            operation.set_friendly_name(f"{operation.get_type_name()}_{number}")
    buffer = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(buffer, "w") as archive:
        openvino.save_model(model, os.path.join(folder, XML), compress_to_fp16=half)
        # The graph is text, and shrinks. Without dates, the same files make the same bytes.
        for name, method in {XML: zipfile.ZIP_DEFLATED, WEIGHTS: zipfile.ZIP_STORED}.items():
            archive.writestr(zipfile.ZipInfo(name), Path(folder, name).read_bytes(), method)
    return buffer.getvalue()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters log and warn about their own internals; exceptions still come through."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


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


def _onnx_proto(lowered: nn.Module, example_input: Inputs):
    """The ``onnx.ModelProto`` of torch's exporter, with all that it notes."""
    program = torch_program(lowered, example_input)
    with quiet():
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                custom_translation_table=_translations() if is_dynamic(lowered) else {},
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise UnsupportedError(_describe_unsupported(error, lowered)) from error
    return exported.model_proto


def _translations() -> dict:
    """How the operations of a dynamic int8 model are written in ONNX."""
    from onnxscript import opset18 as op

    def quantize(x):
        return op.DynamicQuantizeLinear(x)

    def dequantize(codes, scale, zero_point):
        return op.DequantizeLinear(codes, scale, zero_point)

    def linear(x, weight, bias=None):
        product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
        return product if bias is None else op.Add(product, bias)

    return {
        torch.ops.workbench.quantize_dynamically.default: quantize,
        torch.ops.workbench.dequantize_dynamically.default: dequantize,
        # The int8 kernel for dynamic ranges is a MatMul; the exporter would write a Gemm.
        torch.ops.aten.linear.default: linear,
    }


def _describe_unsupported(error: BaseException, lowered: nn.Module) -> str:
    """Name the operation that the exporter stumbled over, and the layer that it is part of."""
    causes = []
    while error is not None:
        causes.append(error)
        error = error.__cause__
    for cause in reversed(causes):
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            # The exporter keeps the node only in its local variables.
            for value in frame.f_locals.values():
                if isinstance(value, fx.Node) and value.op == "call_function":
                    stack = value.meta.get("nn_module_stack") or {}
                    name = [path for path, _ in stack.values()][-1] if stack else ""
                    layer = _layer(name, lowered)
                    return f"ONNX has no operation for {value.target} of {layer}"
    return f"the model cannot be written as ONNX: {_first_line(causes[-1])}"


def _layer(name: str, model: nn.Module) -> str:
    kind = type(dict(model.named_modules()).get(name, model)).__name__
    return f"layer {name} ({kind})" if name else kind


def _scope(node) -> str:
    """Name of the layer that a node of ONNX came from, as the exporter notes it."""
    notes = {entry.key: entry.value for entry in node.metadata_props}
    scopes = re.findall(r"'([^']*)'", notes.get("pkg.torch.onnx.name_scopes", ""))
    return scopes[-2] if len(scopes) > 1 else ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _round_lstms(artifact: bytes) -> bytes:
    """Let ONNX Runtime's quantizer put the weights of each LSTM back into int8.

    They lie on the int8 grid of their channel already, so it finds the same codes.
    """
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, quiet():
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
