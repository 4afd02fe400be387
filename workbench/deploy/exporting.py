"""One file of a model, for one runtime, with the proof that it answers like the model.

`export` writes ONNX, ``torch.export``, AOTInductor or OpenVINO. A compressed model is exported as
compressed: int8 codes stay int8, removed channels stay removed. Before the file gets its name, what
will be in it is loaded, and its answers on the task's test data are compared with the model's.
See notebook 13.
"""

import importlib.metadata
import io
import json
import math
import os
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from workbench import data
from workbench.compress.computed import steps
from workbench.compress.quantizers import DynamicQuantizer, StaticQuantizer
from workbench.data import Task
from workbench.deploy.loading import RECORD, Loaded, TorchModel, import_openvino
from workbench.deploy.lowering import aot_bytes, lower, openvino_zip, quiet, torch_bytes
from workbench.deploy.runtimes import (
    Predictor,
    described,
    load,
    openvino_int8_kernels,
    prepare,
)
from workbench.training import evaluation_mode

Format = Literal[
    "onnx", "openvino", "openvino-fp16", "openvino-int8", "torch.export", "aotinductor"
]
Precision = Literal["float32", "float16", "int8"]
FORMATS: tuple[Format, ...] = get_args(Format)
# The least share of equal answers. Float kernels add in other orders, which turns a tie now and
# then; int8 kernels round where the reference computes on.
AGREEMENT: dict[Precision, float] = {"float32": 0.9999, "float16": 0.999, "int8": 0.99}
TOLERANCE = 0.003  # of the metric: 0.3 points of an accuracy


class ParityError(ValueError):
    """An exported model that does not answer like the model that it was made of."""


@dataclass(frozen=True)
class Parity:
    """How far the answers of two models are the same on the same data.

    ``agreement`` is the share of equal answers, an answer being the position of the largest output
    (of an example, or of each position of a sequence); ``score_before`` and ``score_after`` are the
    task's metric, ``largest_difference`` is between two outputs.
    """

    examples: int
    agreement: float
    score_before: float
    score_after: float
    largest_difference: float


@dataclass(frozen=True)
class Export:
    """What `export` wrote. ``record`` is what the file itself says of how it was made."""

    path: Path
    format: Format
    precision: Precision
    size_bytes: int
    parity: Parity
    record: dict


def export(
    model: nn.Module,
    path: str | os.PathLike,
    format: Format = "onnx",
    *,
    task: Task,
    split: Literal["train", "validation", "test"] = "test",
    agreement: float | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Export:
    """Write ``model`` as one file that runs without it, after a proof that both answer alike.

    The file takes any batch size; the other dimensions are those of the task's example. It holds
    names, types and shapes of its inputs and outputs and, as JSON under "workbench" in its
    metadata, the record of its making. `runtimes.load` reads it.

    ==============  ====  ====================================================================
    format          file  what is in it
    ==============  ====  ====================================================================
    onnx            onnx  the graph; int8 models keep their scales and codes
    openvino        zip   the same for OpenVINO (extra)
    openvino-fp16   zip   float weights in 16 bits; computes in 32
    openvino-int8   zip   a float model, quantized and calibrated on training data by NNCF (extra)
    torch.export    pt2   the graph, for PyTorch
    aotinductor     pt2   machine code for this kind of processor (needs a C++ compiler)
    ==============  ====  ====================================================================

    Args:
        task: gives the example input, the data of the proof and, to NNCF, that of calibration.
        split: the examples of the proof.
        agreement: least share of equal answers; by default 0.9999 for float32, 0.999 for float16
            and 0.99 for int8.
        tolerance: most that the task's metric may change.
        seed: of the calibration examples.

    Raises:
        ParityError: the answers differ by more than that. Nothing is written.
        UnsupportedError: the format has no operation for a layer, which is named.
        ValueError: an unknown format, a name that does not end as its files do, or a quantized
            model that is to be quantized again.
        ImportError: an extra is not installed.
    """
    path = Path(path)
    _check(model, path, format)
    example = tuple(x[:1] for x in task.example_input)
    precision = _precision(model, format)
    made, facts = _MAKERS[format](model, example, task, seed)
    record = {
        "format": format,
        "precision": precision,
        "model": type(model).__name__,
        "techniques": list(steps(model)),
        "labels": list(task.labels),
        "versions": _versions(format),
        **facts,
    }
    threads = torch.get_num_threads()
    loaded = load(_with_record(made, record), threads=threads, trusted=True)
    found = parity(model, loaded, task, split=split)
    _require(found, AGREEMENT[precision] if agreement is None else agreement, tolerance, task)
    record |= _specs(loaded.loaded) | {"parity": {"split": split, **asdict(found)}}
    artifact = _with_record(made, record)
    data.write_whole(path, lambda temporary: Path(temporary).write_bytes(artifact))
    return Export(path, format, precision, len(artifact), found, record)


def parity(
    model: nn.Module | Callable[..., Tensor],
    other: Callable[..., Tensor],
    task: Task,
    *,
    split: Literal["train", "validation", "test"] = "test",
    batch_size: int = 500,
) -> Parity:
    """Compare the answers of two models on one split of the task. See `Parity`."""
    same = answers = examples = 0
    largest = 0.0
    before, after = [], []
    with evaluation_mode(model), torch.no_grad():
        for inputs, target in getattr(task, split).batches(batch_size):
            expected, given = model(*inputs).float(), other(*inputs).float()
            equal = expected.argmax(-1) == given.argmax(-1)
            same, answers = same + int(equal.sum()), answers + equal.numel()
            difference = (expected - given).abs().max().item()
            largest = max(largest, math.inf if math.isnan(difference) else difference)
            before.append(task.metric.score(expected, target).flatten())
            after.append(task.metric.score(given, target).flatten())
            examples += len(target)
    if not examples:
        raise ValueError(f"the {split} split gave no batches; give it at least one example")
    score_before, score_after = (torch.cat(scores).mean().item() for scores in (before, after))
    return Parity(examples, same / answers, score_before, score_after, largest)


def _check(model: nn.Module, path: Path, format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; choose from {FORMATS}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    suffix = SUFFIXES[format]
    if path.suffix != suffix:
        raise ValueError(f"{path.name} is to hold {format}; give it a name that ends in {suffix}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}; make it first")
    if format.startswith("openvino"):
        import_openvino()
    if format == "openvino-int8":
        _import_nncf()
        if _is_quantized(model):
            raise ValueError("the model is int8 already; export it in the format 'openvino'")


SUFFIXES = {
    format: ".onnx" if format == "onnx" else ".zip" if format.startswith("openvino") else ".pt2"
    for format in FORMATS
}


def _is_quantized(model: nn.Module) -> bool:
    return any(isinstance(m, (StaticQuantizer, DynamicQuantizer)) for m in model.modules())


def _precision(model: nn.Module, format: Format) -> Precision:
    if format == "openvino-int8" or _is_quantized(model):
        return "int8"
    return "float16" if format == "openvino-fp16" else "float32"


Made = tuple[bytes, dict]  # the file, and what the record has to say about it


def _onnx(model: nn.Module, example: tuple[Tensor, ...], task: Task, seed: int) -> Made:
    predictor = prepare(model, "onnxruntime", example_input=example)
    return predictor.artifact, _facts(predictor)


def _openvino(model: nn.Module, example: tuple[Tensor, ...], task: Task, seed: int) -> Made:
    predictor = prepare(model, "openvino", example_input=example)
    return predictor.artifact, _facts(predictor)


def _openvino_fp16(model: nn.Module, example: tuple[Tensor, ...], task: Task, seed: int) -> Made:
    predictor = prepare(model, "openvino", example_input=example)
    return openvino_zip(predictor.graph, half=True), _facts(predictor)


def _openvino_int8(model: nn.Module, example: tuple[Tensor, ...], task: Task, seed: int) -> Made:
    plain = prepare(model, "openvino", example_input=example)
    few = task.validation.subset(min(_CALIBRATION, len(task.validation)), seed=seed)
    chosen = replace(task, validation=few)
    kept, best = None, -1.0
    for smoothing in _SMOOTHINGS if _has_attention(plain.graph) else _SMOOTHINGS[:1]:
        artifact = openvino_zip(_quantize(plain.graph, task, smoothing, seed))
        found = parity(model, load(artifact), chosen, split="validation")
        if found.agreement > best:
            kept, best = (artifact, smoothing), found.agreement
        if best >= AGREEMENT["int8"]:
            break
    artifact, smoothing = kept
    smooth = f", SmoothQuant {smoothing}" if smoothing > 0 else ""
    note = "; ".join(filter(None, [plain.note, f"quantized by NNCF{smooth}"]))
    kernels = openvino_int8_kernels(load(artifact).loaded)
    return artifact, {"simulated": kernels == 0, "note": note, "int8_kernels": kernels}


def _facts(predictor: Predictor) -> dict:
    return {name: getattr(predictor, name) for name in ("simulated", "note", "int8_kernels")}


# SmoothQuant moves outliers of activations into the weights. Off serves most models; what is right
# differs from model to model, so the next is tried where answers differ too often.
_SMOOTHINGS = (-1.0, 0.5, 0.95)
_CALIBRATION = 512  # examples


def _has_attention(graph) -> bool:
    return any(op.get_type_name() == "Softmax" for op in graph.get_ops())


def _quantize(graph, task: Task, smoothing: float, seed: int):
    nncf = _import_nncf()
    part = task.train.subset(min(_CALIBRATION, len(task.train)), seed=seed)
    names = [port.any_name for port in graph.inputs]
    batches = [
        dict(zip(names, (x.numpy() for x in inputs), strict=True)) for inputs, _ in part.batches(1)
    ]
    advanced = nncf.AdvancedQuantizationParameters(
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=smoothing)
    )
    with quiet():
        return nncf.quantize(
            graph.clone(),
            nncf.Dataset(batches),
            subset_size=len(batches),
            model_type=nncf.ModelType.TRANSFORMER if _has_attention(graph) else None,
            advanced_parameters=advanced,
        )


def _import_nncf():
    os.environ.setdefault("NNCF_CI", "1")  # it reports its use to its maker otherwise
    try:
        import nncf
    except ImportError as error:
        raise ImportError(
            'NNCF is not installed; install it with pip install -e ".[openvino]"'
        ) from error
    return nncf


def _torch_export(model: nn.Module, example: tuple[Tensor, ...], task: Task, seed: int) -> Made:
    lowered, note = lower(model)
    simulated, note = described(model, 0, note)
    facts = {"simulated": simulated, "note": note, "int8_kernels": 0}
    return torch_bytes(lowered, example), facts


def _aotinductor(model: nn.Module, example: tuple[Tensor, ...], task: Task, seed: int) -> Made:
    lowered, note = lower(model)
    specs = _specs(TorchModel(torch_bytes(lowered, example), threads=1))
    artifact, kernels = aot_bytes(lowered, example)
    simulated, note = described(model, kernels, note)
    return artifact, specs | {"simulated": simulated, "note": note, "int8_kernels": kernels}


def _specs(loaded: Loaded) -> dict[str, list[dict]]:
    """Inputs and outputs as they stand in a record."""
    return {
        name: [asdict(spec) | {"shape": list(spec.shape)} for spec in getattr(loaded, name)]
        for name in ("inputs", "outputs")
    }


_MAKERS: dict[str, Callable[..., Made]] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "openvino-fp16": _openvino_fp16,
    "openvino-int8": _openvino_int8,
    "torch.export": _torch_export,
    "aotinductor": _aotinductor,
}


def _versions(format: Format) -> dict[str, str]:
    packages = ["torch"]
    if not format.startswith(("torch", "aot")):
        packages += ["onnx", "openvino"] if format.startswith("openvino") else ["onnx"]
    if format == "openvino-int8":
        packages.append("nncf")
    return {name: importlib.metadata.version(name) for name in packages}


def _with_record(made: bytes, record: dict) -> bytes:
    """The file with the record in its metadata."""
    text = json.dumps(record, sort_keys=True)
    if not made.startswith(b"PK"):
        import onnx

        proto = onnx.load_from_string(made)
        proto.metadata_props.add(key=RECORD, value=text)
        return proto.SerializeToString(deterministic=True)
    buffer = io.BytesIO(made)
    with zipfile.ZipFile(buffer, "a") as archive:
        first = archive.namelist()[0]  # torch's files lie in one folder
        place = f"{first.split('/')[0]}/extra/{RECORD}" if "/" in first else RECORD
        archive.writestr(zipfile.ZipInfo(place), text)
    return buffer.getvalue()


def _require(found: Parity, agreement: float, tolerance: float, task: Task) -> None:
    if found.agreement < agreement:
        raise ParityError(
            f"the exported model gives the same answer to {found.agreement:.2%} of "
            f"{found.examples:,} examples, less than the {agreement:.2%} that were asked for; "
            "quantize fewer layers (skip), try another format, or lower agreement"
        )
    change = abs(found.score_after - found.score_before)
    if not change <= tolerance:
        raise ParityError(
            f"the {task.metric.name} changes from {found.score_before:.4f} to "
            f"{found.score_after:.4f}, by more than the tolerance of {tolerance}; quantize fewer "
            "layers (skip), try another format, or raise tolerance"
        )
