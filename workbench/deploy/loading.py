"""Run an exported model from its bytes, with nothing but the runtime that it was made for.

No ``nn.Module`` is needed and, for ONNX and OpenVINO files, no torch: this module is what a serving
process imports. The bytes may come from a file, or from a decrypted one that never was a file.
`workbench.deploy.exporting` makes such files; a plain ``.onnx`` file from anywhere loads too.
"""

import functools
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RECORD = "workbench"  # where in a file's own metadata the record of its making stands, as JSON
XML, WEIGHTS = "model.xml", "model.bin"  # what an OpenVINO file is a zip of
ANY = -1  # a dimension that may have any length


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: ``dtype`` is numpy's name, a dimension of any length is -1."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def fits(self, array: np.ndarray) -> bool:
        return (
            array.dtype == self.dtype
            and array.ndim == len(self.shape)
            and all(
                length in (ANY, given)
                for length, given in zip(self.shape, array.shape, strict=True)
            )
        )


def check(inputs: Sequence[TensorSpec], arrays: Sequence[np.ndarray]) -> None:
    """Refuse arrays that a model does not take. Raises ValueError."""
    if len(arrays) != len(inputs):
        raise ValueError(f"{len(arrays)} inputs were given; the model takes {len(inputs)}")
    for spec, array in zip(inputs, arrays, strict=True):
        if not spec.fits(array):
            raise ValueError(
                f"input {spec.name!r} is {array.dtype} of shape {array.shape}; the model takes "
                f"{spec.dtype} of shape {spec.shape}, where {ANY} is any length"
            )


def load_bytes(data: bytes, *, threads: int = 1, trusted: bool = False) -> "Loaded":
    """Make a model ready to run: ONNX (``.onnx``), OpenVINO (``.zip``) or torch (``.pt2``).

    Args:
        data: the whole file.
        threads: of one call.
        trusted: load ``.pt2`` files too. They hold pickles, expressions that are evaluated, or
            machine code, so whoever wrote the file runs code of theirs here.

    Raises:
        ValueError: none of these formats, a damaged file, one that needs trust, or types that
            numpy does not have.
        ImportError: the runtime of this format is not installed.
    """
    if threads < 1:
        raise ValueError(f"threads is {threads}; give 1 or more")
    if not data.startswith(b"PK\x03\x04"):
        return OnnxModel(data, threads)
    try:
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"the file is damaged: {error}; export or fetch it again") from error
    if {XML, WEIGHTS} <= set(names):
        return OpenVinoModel(data, threads)
    if not any(name.endswith("archive_format") for name in names):
        raise ValueError(
            f"the zip file holds {names[:4]}; expected an OpenVINO file ({XML} and {WEIGHTS}) or a "
            "torch.export archive"
        )
    if not trusted:
        raise ValueError(
            "a .pt2 file can run code of whoever wrote it when it is loaded; give trusted=True for "
            "one that you made or whose signature you checked, or export to ONNX"
        )
    compiled = any("/aotinductor/" in name for name in names)
    return (CompiledModel if compiled else TorchModel)(data, threads)


class Loaded:
    """A model that is ready to run.

    Attributes:
        runtime: what runs it.
        suffix: how the name of such a file ends.
        inputs, outputs: what it takes and gives, in order.
        record: how the file was made, as `workbench.deploy.exporting` wrote it; {} for other files.
    """

    runtime: str
    suffix: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    record: dict

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs for one array per input. Raises ValueError where these do not fit."""
        check(self.inputs, arrays)
        return self._run(arrays)

    def _run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        raise NotImplementedError

    def at(self, arrays: Sequence[np.ndarray]) -> "Loaded":
        """The same for arrays of these shapes alone, where the runtime is faster for that."""
        return self


class OnnxModel(Loaded):
    """ONNX Runtime. ``optimized_path`` receives the graph that the runtime made of the file."""

    runtime, suffix = "onnxruntime", ".onnx"

    def __init__(
        self,
        data: bytes,
        threads: int,
        *,
        provider: str = "CPUExecutionProvider",
        optimized_path: str | None = None,
    ):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4
        if optimized_path is not None:
            options.optimized_model_filepath = optimized_path
        # A file may name other files as its weights; from bytes, there is no folder to look in.
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", os.devnull
        )
        # This pass would turn the MatMul of a dynamic int8 layer into a Gemm, which has no int8
        # kernel for dynamic ranges.
        disabled = ["MatMulAddFusion"] if b"DynamicQuantizeLinear" in data else []
        try:
            self.session = onnxruntime.InferenceSession(
                data, options, providers=[provider], disabled_optimizers=disabled
            )
        except Exception as error:  # onnxruntime has no common class for its errors
            raise ValueError(f"ONNX Runtime does not load the file: {error}") from error
        self.inputs = tuple(_onnx_spec(entry) for entry in self.session.get_inputs())
        self.outputs = tuple(_onnx_spec(entry) for entry in self.session.get_outputs())
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.record = _record(metadata.get(RECORD))
        self._names = [spec.name for spec in self.inputs]

    def _run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self.session.run(None, dict(zip(self._names, arrays, strict=True)))


_ONNX_TYPES = {"float": "float32", "double": "float64"}


def _onnx_spec(entry) -> TensorSpec:
    inner = entry.type.removeprefix("tensor(").removesuffix(")")
    shape = tuple(length if isinstance(length, int) else ANY for length in entry.shape)
    return TensorSpec(entry.name, _numpy_name(entry.name, _ONNX_TYPES.get(inner, inner)), shape)


class OpenVinoModel(Loaded):
    """OpenVINO on a zip of its two files; see `lowering.openvino_zip`.

    It takes any batch. `at` compiles once for each shape, and that answers sooner.
    """

    runtime, suffix = "openvino", ".zip"

    def __init__(self, data: bytes, threads: int):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > _MOST_UNPACKED * len(data):
                raise ValueError(
                    f"{len(data):,} bytes would unpack to {unpacked:,}; a model does not, so this "
                    "file is not one"
                )
            parts = {name: archive.read(name) for name in (XML, WEIGHTS)}
            record = archive.read(RECORD) if RECORD in archive.namelist() else None
        self._compile(read_openvino(parts[XML], parts[WEIGHTS]), threads)
        self.record = _record(record)

    @classmethod
    def of(cls, graph, threads: int, record: dict | None = None) -> "OpenVinoModel":
        """The same of an ``openvino.Model`` that is in memory already."""
        loaded = cls.__new__(cls)
        loaded._compile(graph, threads)
        loaded.record = record or {}
        return loaded

    def at(self, arrays: Sequence[np.ndarray]) -> "OpenVinoModel":
        key = tuple(array.shape for array in arrays)
        if key not in self._fixed:
            check(self.inputs, arrays)
            fixed = self.graph.clone()
            names = [spec.name for spec in self.inputs]
            fixed.reshape(dict(zip(names, key, strict=True)))
            self._fixed[key] = self.of(fixed, self.threads, self.record)
        return self._fixed[key]

    def _compile(self, graph, threads: int) -> None:
        self.graph, self.threads, self._fixed = graph, threads, {}
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # Else it computes in 16 bits where the processor has them, and answers differ.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self.compiled = openvino_core().compile_model(graph, "CPU", settings)
        self.inputs = tuple(openvino_spec(port) for port in self.compiled.inputs)
        self.outputs = tuple(openvino_spec(port) for port in self.compiled.outputs)
        self._request = self.compiled.create_infer_request()

    def _run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(self._request.infer(dict(enumerate(arrays)), share_inputs=True).to_tuple())


_MOST_UNPACKED = 50  # the graph is text, and shrinks to a twentieth; weights hardly shrink


def import_openvino():
    """The package ``openvino``. Raises ImportError with what to install."""
    try:
        import openvino
    except ImportError as error:
        raise ImportError(
            'OpenVINO is not installed; install it with pip install -e ".[openvino]"'
        ) from error
    return openvino


@functools.cache
def openvino_core():
    """The one ``openvino.Core`` of this process.

    Each core gives the thread that it first compiles in a new stack for signals, and takes it away
    at its end (OpenVINO 2026.4). Where a later core is alive then, that thread is left on a stack
    that is gone in the end, and the next interrupt of a notebook ends its kernel.
    """
    return import_openvino().Core()


def read_openvino(xml: bytes, weights: bytes):
    """An ``openvino.Model`` from the bytes of its two files."""
    openvino = import_openvino()
    try:
        shared = openvino.Tensor(np.frombuffer(weights, np.uint8)) if weights else openvino.Tensor()
        return openvino_core().read_model(xml, shared)
    except RuntimeError as error:
        raise ValueError(f"OpenVINO does not load the file: {error}") from error


def openvino_spec(port) -> TensorSpec:
    shape = tuple(
        ANY if length.is_dynamic else length.get_length() for length in port.partial_shape
    )
    name = port.any_name
    return TensorSpec(name, _numpy_name(name, port.element_type.to_dtype().name), shape)


class TorchModel(Loaded):
    """A program of ``torch.export``, run by PyTorch operation by operation."""

    runtime, suffix = "torch.export", ".pt2"

    def __init__(self, data: bytes, threads: int):
        import torch

        extra = {RECORD: ""}
        program = torch.export.load(io.BytesIO(data), extra_files=extra)
        values = {
            node.name: node.meta["val"]
            for node in program.graph.nodes
            if "val" in node.meta and torch.is_tensor(node.meta["val"])
        }
        signature = program.graph_signature
        self.inputs = tuple(_torch_spec(name, values[name]) for name in signature.user_inputs)
        self.outputs = tuple(_torch_spec(name, values[name]) for name in signature.user_outputs)
        self.record = _record(extra[RECORD])
        self.threads, self.function = threads, program.module()

    def _run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with torch.no_grad():
                outputs = self.function(*(torch.as_tensor(np.require(a, requirements="W"))
                                           for a in arrays))  # fmt: skip
        finally:
            torch.set_num_threads(before)
        outputs = (outputs,) if torch.is_tensor(outputs) else outputs
        return [output.numpy() for output in outputs]


class CompiledModel(TorchModel):
    """A package of AOTInductor: machine code for one kind of processor, called by PyTorch."""

    runtime = "aotinductor"

    def __init__(self, data: bytes, threads: int):
        import torch

        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found = [name for name in archive.namelist() if name.endswith(f"/{RECORD}")]
            self.record = _record(archive.read(found[0]) if found else None)
        if not self.record:
            raise ValueError(
                "the package does not say what inputs it takes; make it with "
                "workbench.deploy.exporting"
            )
        self.inputs = tuple(_recorded_spec(entry) for entry in self.record["inputs"])
        self.outputs = tuple(_recorded_spec(entry) for entry in self.record["outputs"])
        with tempfile.TemporaryDirectory() as folder:  # the loader takes a path, and unpacks it
            path = Path(folder, "model.pt2")
            path.write_bytes(data)
            self.function = torch._inductor.aoti_load_package(str(path))
        self.threads = threads


def _recorded_spec(entry: dict) -> TensorSpec:
    return TensorSpec(entry["name"], entry["dtype"], tuple(entry["shape"]))


def _torch_spec(name: str, value) -> TensorSpec:
    shape = tuple(length if isinstance(length, int) else ANY for length in value.shape)
    return TensorSpec(name, _numpy_name(name, str(value.dtype).removeprefix("torch.")), shape)


def _numpy_name(name: str, dtype: str) -> str:
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.kind not in "biuf":
        raise ValueError(f"{name!r} is of type {dtype}; only booleans, integers and floats are run")
    return found.name


def _record(text: str | bytes | None) -> dict:
    try:
        record = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"the record in the file is not JSON: {error}; export it again") from error
    if not isinstance(record, dict):
        raise ValueError(f"the record in the file is a {type(record).__name__}; expected an object")
    return record
