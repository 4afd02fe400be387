"""Each operation of a model as a point under the roofs of the machine.

An operation does arithmetic and moves bytes. Their ratio, the arithmetic intensity, says which of
the two limits it at best (Williams, Waterman and Patterson, 2009, "Roofline: an insightful visual
performance model for multicore architectures"); its own speed says how far it is from there. Times
are taken inside a whole pass, so that caches hold what they hold in use, and are medians over
passes. Bytes are those of the operands: each read once, the result written once.
"""

import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from workbench.measure.peaks import Roofs
from workbench.measure.size import _FUSED_FLOPS
from workbench.training import evaluation_mode

if TYPE_CHECKING:
    import onnx

_WARM_UP = 3


def layers(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    *,
    passes: int = 30,
    threads: int = 1,
    device: str = "cpu",
) -> pd.DataFrame:
    """Operations of an eager model, in the order in which they run, with their work and speed.

    Columns: ``layer`` (the innermost module), ``operation``, ``dtype`` of the first operand,
    ``flops`` (matrix products, convolutions and attention; 0 for the rest), ``moved_bytes``,
    ``intensity`` (FLOPs per byte), ``latency_ms``, ``flops_s`` and ``share`` of the time.

    Args:
        inputs: as the model takes them; their leading dimension is the batch.
        passes: of which the median counts, at least 3.
        threads: torch's intra-op threads; restored afterwards.

    Raises:
        ValueError: too few passes or threads.

    Shown in notebook 12.
    """
    _check(passes, threads)
    inputs = tuple(x.to(device) for x in ((inputs,) if torch.is_tensor(inputs) else inputs))
    before, home = torch.get_num_threads(), next((p.device for p in model.parameters()), device)
    torch.set_num_threads(threads)
    model.to(device)
    try:
        with evaluation_mode(model), torch.no_grad(), _path(model) as path:
            with (work := _Work(path)):
                model(*inputs)
            times_ms = []
            for _ in range(_WARM_UP + passes):
                with (clock := _Clock(device)):
                    model(*inputs)
                times_ms.append(clock.times_ms())
    finally:
        model.to(home)
        torch.set_num_threads(before)
    frame = pd.DataFrame(work.rows)
    frame["latency_ms"] = np.median(times_ms[_WARM_UP:], axis=0)
    return _finished(frame[frame["operation"] != "view"])


def onnx_layers(
    artifact: bytes,
    inputs: Tensor | tuple[Tensor, ...],
    *,
    passes: int = 30,
    threads: int = 1,
) -> pd.DataFrame:
    """The same for an ONNX file, from ONNX Runtime's own profiler: of any number type.

    Layers are the nodes that the runtime made of the graph, fused and in int8 where it has such
    kernels; channels that it adds to fill its registers (20 become 32) count as work. Its clock
    counts whole microseconds, so ``latency_ms`` is a mean of the middle half.
    """
    import onnx
    import onnxruntime

    _check(passes, threads)
    inputs = (inputs,) if torch.is_tensor(inputs) else tuple(inputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder, "profile"))
        options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
        session = onnxruntime.InferenceSession(
            artifact, options, providers=["CPUExecutionProvider"]
        )
        names = [entry.name for entry in session.get_inputs()]
        feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        for _ in range(_WARM_UP + passes):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
        graph = onnx.load(options.optimized_model_filepath).graph
    times_us, results = defaultdict(list), {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            times_us[name].append(event["dur"])
            results[name] = event["args"]["output_type_shape"]
    frame = pd.DataFrame(_node_work(graph, feed, results))
    frame["latency_ms"] = [_middle_mean(times_us[name][_WARM_UP:]) / 1e3 for name in frame["layer"]]
    return _finished(frame)


def under(frame: pd.DataFrame, roofs: Roofs, source: str = "memory") -> pd.DataFrame:
    """The operations of `layers` or `onnx_layers` that multiply, with the roof above each.

    Adds ``roof_flops_s``, ``attained`` (its share) and ``bound``, "arithmetic" or the name of the
    source of the bytes. A share above 1 says that they came from a nearer cache than ``source``.
    """
    frame = frame[frame["flops"] > 0].copy()
    numbers = frame["dtype"].map(lambda t: "int8" if "int8" in t else t)
    unknown = sorted(set(numbers) - set(roofs.operations_s))
    if unknown:
        raise ValueError(f"no roof is known for {unknown}; there are {list(roofs.operations_s)}")
    frame["roof_flops_s"] = [
        roofs.attainable(intensity, dtype, source)
        for intensity, dtype in zip(frame["intensity"], numbers, strict=True)
    ]
    frame["attained"] = frame["flops_s"] / frame["roof_flops_s"]
    flat = numbers.map(roofs.operations_s)
    frame["bound"] = np.where(frame["roof_flops_s"] >= flat, "arithmetic", source)
    return frame


class _Work(TorchDispatchMode):
    """Counts the work of each operation."""

    def __init__(self, path: list[str]):
        super().__init__()
        self.path, self.rows = path, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        counter = FlopCounterMode(display=False, custom_mapping=_FUSED_FLOPS)
        with counter:
            result = operation(*args, **(kwargs or {}))
        operands = _tensors((args, kwargs))
        self.rows.append(
            {
                "layer": self.path[-1],
                "operation": "view" if _is_view(operation) else _name(operation),
                "dtype": str(operands[0].dtype).removeprefix("torch.") if operands else "",
                "flops": counter.get_total_flops(),
                "moved_bytes": _moved_bytes(operation, operands, _tensors(result)),
            }
        )
        return result


class _Clock(TorchDispatchMode):
    """Times each operation: with the host's clock, or on CUDA with the device's events."""

    def __init__(self, device: str):
        super().__init__()
        self.cuda, self.marks = torch.device(device).type == "cuda", []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        start = self._mark()
        result = operation(*args, **(kwargs or {}))
        self.marks.append((start, self._mark()))
        return result

    def _mark(self) -> "float | torch.cuda.Event":
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def times_ms(self) -> list[float]:
        if self.cuda:
            torch.cuda.synchronize()
            return [start.elapsed_time(end) for start, end in self.marks]
        return [1e3 * (end - start) for start, end in self.marks]


@contextmanager
def _path(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that are running, innermost last."""
    names = {module: name for name, module in model.named_modules()}
    path = [""]

    def enter(module: nn.Module, _inputs: tuple) -> None:
        path.append(names.get(module, path[-1]))

    def leave(*_) -> None:  # what a hook returns would take the place of the output
        path.pop()

    hooks = (
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    )
    try:
        yield path
    finally:
        for hook in hooks:
            hook.remove()


def _check(passes: int, threads: int) -> None:
    for name, value, least in (("passes", passes, 3), ("threads", threads, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}; give {least} or more")


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _name(operation: torch._ops.OpOverload) -> str:
    return operation.name().removeprefix("aten::").split(".")[0]


def _is_view(operation: torch._ops.OpOverload) -> bool:
    """Whether it only says how to look at bytes that stay where they are."""
    return operation.is_view or _name(operation) in ("_unsafe_view", "detach", "lift_fresh")


# These read, of their first tensor, only as much as they return.
_PICKING = {"embedding", "index", "index_select", "gather"}


def _moved_bytes(
    operation: torch._ops.OpOverload, operands: list[Tensor], results: list[Tensor]
) -> int:
    written = sum(x.nbytes for x in results)
    if _name(operation) in _PICKING:
        return 2 * written + sum(x.nbytes for x in operands[1:])
    # Expanded tensors repeat numbers that are there once.
    read = {(x.data_ptr(), x.shape): min(x.nbytes, x.untyped_storage().nbytes()) for x in operands}
    return written + sum(read.values())


def _node_work(
    graph: "onnx.GraphProto", feed: dict[str, np.ndarray], results: dict[str, list[dict]]
) -> list[dict]:
    """Work of the nodes that ran, from the type and shape of each of their operands.

    The profiler tells those of the results; the weights stand in the graph.
    """
    import onnx

    known = {name: (str(x.dtype), x.shape) for name, x in feed.items()}
    for weight in graph.initializer:
        numbers = onnx.helper.tensor_dtype_to_np_dtype(weight.data_type)
        known[weight.name] = (numbers.name, tuple(weight.dims))
    rows = []
    for node in graph.node:
        if node.name not in results:  # computed once, before the first run
            continue
        shapes = [next(iter(entry.items())) for entry in results[node.name]]
        written = [(_ONNX_DTYPES.get(kind, kind), tuple(shape)) for kind, shape in shapes]
        known |= dict(zip(filter(None, node.output), written, strict=False))
        read = [known[name] for name in node.input if name in known]
        rows.append(
            {
                "layer": node.name,
                "operation": node.op_type,
                "dtype": read[0][0] if read else "",
                "flops": 2 * _node_macs(node.op_type, read, written),
                "moved_bytes": sum(
                    _ONNX_BYTES.get(kind, 4) * math.prod(shape) for kind, shape in read + written
                ),
            }
        )
    return rows


def _node_macs(operation: str, read: list[tuple], written: list[tuple]) -> int:
    """Multiply-accumulates: each number of the result takes one per number that it is summed from.

    The quantized operators have scales and zero points among their operands; what they multiply
    are the first two with at least two dimensions.
    """
    wide = [shape for _, shape in read if len(shape) > 1]
    if len(wide) < 2 or not any(part in operation for part in ("Conv", "Gemm", "MatMul")):
        return 0
    result = math.prod(written[0][1])
    if "Conv" in operation:
        return result * math.prod(wide[1][1:])  # weights (outputs, inputs / groups, *kernel)
    return result * wide[0][-1]  # (..., rows, inner) times (inner, columns)


_ONNX_DTYPES = {"float": "float32", "double": "float64"}  # the profiler's names of numpy's
_ONNX_BYTES = {"float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "bool": 1, "int64": 8,
               "float64": 8}  # fmt: skip


def _middle_mean(times: list[float]) -> float:
    quarter = len(times) // 4
    return float(np.mean(sorted(times)[quarter : len(times) - quarter]))


def _finished(frame: pd.DataFrame) -> pd.DataFrame:
    frame["intensity"] = frame["flops"] / frame["moved_bytes"].clip(lower=1)
    frame["flops_s"] = frame["flops"] / (frame["latency_ms"] / 1e3)
    frame["share"] = frame["latency_ms"] / frame["latency_ms"].sum()
    return frame.reset_index(drop=True)
