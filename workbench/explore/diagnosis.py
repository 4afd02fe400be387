"""Why a model that should be smaller or faster is not: the usual causes, each looked for.

`doctor` measures two models, then goes through a list of checks. Each check is one function that
looks at facts, never at names, and gives its findings with the numbers behind them.
"""

import contextlib
import html
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase
from torch.nn.utils import parametrize, prune

from workbench.compress.computed import (
    MaskedWeight,
    Source,
    layer_type,
    source_of,
    steps,
    weight_names,
)
from workbench.compress.layers import coverage, layers_of, weight_count
from workbench.compress.quantizers import QuantizedWeight
from workbench.data import Task
from workbench.deploy.runtimes import MANY_ZEROS, Predictor, prepare
from workbench.measure import artifact_bytes, macs, measure_latency

_FEW_VALUES = 256  # what one byte can tell apart
_SMALL_LAYER = 4096  # weights; below, rounding the input costs more than int8 saves
_CACHE_BYTES = 2**20  # weights of this size stay in the cache of one core from call to call
_MACS_PER_BYTE = 1.0  # below, a core waits for the memory; a float32 linear layer has 0.25
_LARGE_BATCH = 32


@dataclass(frozen=True)
class Finding:
    """One cause, the numbers that show it, and what to do."""

    cause: str
    evidence: str
    advice: str


@dataclass(frozen=True, repr=False)
class Findings:
    """What `doctor` measured and found; the last line of a cell shows it as a table."""

    measured: str
    findings: tuple[Finding, ...]

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __repr__(self) -> str:
        lines = (f"- {f.cause}: {f.evidence}. {f.advice}." for f in self)
        return "\n".join([self.measured, *(lines if len(self) else ["Nothing wrong was found."])])

    def _repr_html_(self) -> str:
        head = f"<p>{html.escape(self.measured)}</p>"
        if not len(self):
            return f"{head}<p>Nothing wrong was found.</p>"
        rows = "".join(
            "<tr>" + "".join(
                f"<td style='text-align:left'>{html.escape(text)}</td>"
                for text in (finding.cause, finding.evidence, finding.advice)
            ) + "</tr>"
            for finding in self
        )  # fmt: skip
        titles = "".join(f"<th>{title}</th>" for title in ("cause", "evidence", "advice"))
        return f"{head}<table><tr>{titles}</tr>{rows}</table>"


Patient = nn.Module | tuple[nn.Module, str] | Predictor


@dataclass(frozen=True)
class _Case:
    """What the checks look at. Without example inputs there is no ``speed``."""

    before: Predictor
    after: Predictor
    inputs: tuple[Tensor, ...]  # of one batch, or ()
    threads: int
    repeats: int
    size_bytes: tuple[int, int]
    speed: pd.DataFrame | None  # summary of `measure_latency`

    @property
    def model(self) -> nn.Module:
        return self.after.model

    @property
    def faster(self) -> bool:
        return self.speed is not None and self.speed.speedup_low["after"] > 1

    @property
    def slow(self) -> bool:
        """Whether it was measured, and is not faster."""
        return self.speed is not None and not self.faster


def doctor(
    before: Patient,
    after: Patient,
    example_input: Task | Tensor | tuple[Tensor, ...] | None = None,
    *,
    batch_size: int = 1,
    threads: int | None = None,
    repeats: int = 20,
) -> Findings:
    """Say in plain words why ``after`` is not smaller or not faster than ``before``.

    Args:
        before, after: modules (run in eager PyTorch), pairs (module, runtime) or predictors.
        example_input: inputs with a batch dimension, or the task to take them from. Without them
            only what is stored is looked at.
        batch_size: how often the first example is repeated for the measurement.
        threads: of one call; those of ``torch.set_num_threads`` by default.
        repeats: rounds of the latency measurement.

    Raises:
        ValueError: a number out of range, a pair without ``example_input``, or a model that fails
            on it.
        TypeError: a bare callable, which cannot be looked into.
    """
    threads = torch.get_num_threads() if threads is None else threads
    for name, value, least in (
        ("batch_size", batch_size, 1), ("threads", threads, 1), ("repeats", repeats, 10)
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"{name} is {value}; give {least} or more")
    example = _example(example_input)
    inputs = tuple(torch.cat([x] * batch_size) for x in example)
    patients = {
        name: _prepared(name, patient, example, threads)
        for name, patient in (("before", before), ("after", after))
    }
    with contextlib.ExitStack() as stack:
        for predictor in patients.values():
            stack.enter_context(_copyable(predictor.model))
        sizes = tuple(artifact_bytes(predictor) for predictor in patients.values())
    speed = _speed(patients, inputs, threads, repeats) if inputs else None
    case = _Case(*patients.values(), inputs, threads, repeats, sizes, speed)
    return Findings(_measured(case), tuple(found for check in _CHECKS for found in check(case)))


def _example(given: Task | Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    if given is None:
        return ()
    if isinstance(given, Task):
        return given.example_input
    return tuple(x[:1] for x in ((given,) if torch.is_tensor(given) else given))


def _prepared(name: str, patient: Patient, example: tuple[Tensor, ...], threads: int) -> Predictor:
    model, runtime = patient if isinstance(patient, tuple) else (patient, "eager")
    if isinstance(model, nn.Module):
        if runtime != "eager" and not example:
            raise ValueError(f"{name} is to run in {runtime}; give example_input as well")
        with _copyable(model):
            return prepare(model, runtime, example_input=example, threads=threads)
    if isinstance(model, Predictor) and model.model is not None:
        return model
    raise TypeError(
        f"{name} is a {type(model).__name__}, which cannot be looked into; give a torch.nn.Module, "
        "a pair (module, runtime) or a Predictor of a module"
    )


@contextlib.contextmanager
def _copyable(model: nn.Module) -> Iterator[None]:
    """Lets a model be copied that torch.nn.utils.prune works on: its weights carry a gradient."""
    masked = [(layer, hook._tensor_name) for layer, hook in _pruning_hooks(model)]
    tensors = [getattr(layer, name) for layer, name in masked]
    for (layer, name), tensor in zip(masked, tensors, strict=True):
        setattr(layer, name, tensor.detach())
    try:
        yield
    finally:
        for (layer, name), tensor in zip(masked, tensors, strict=True):
            setattr(layer, name, tensor)


def _pruning_hooks(model: nn.Module) -> list[tuple[nn.Module, prune.BasePruningMethod]]:
    return [
        (layer, hook)
        for layer in model.modules()
        for hook in layer._forward_pre_hooks.values()
        if isinstance(hook, prune.BasePruningMethod)
    ]


def _speed(
    patients: dict[str, Predictor], inputs: tuple[Tensor, ...], threads: int, repeats: int
) -> pd.DataFrame:
    summary = measure_latency(patients, inputs, threads=threads, repeats=repeats).summary
    for name, error in summary.error.items():
        if error:
            raise ValueError(f"{name} cannot be run on the example: {error}")
    return summary


def _measured(case: _Case) -> str:
    old, new = case.size_bytes
    text = f"Stored in {old:,} bytes before and {new:,} after"
    if case.speed is None:
        return f"{text}; speed was not measured, for there was no example_input."
    old_ms, new_ms = case.speed.latency_ms
    return (
        f"{text}; one call on a batch of {len(case.inputs[0])} with {case.threads} threads took "
        f"{old_ms:.3g} ms in {case.before.runtime} before and {new_ms:.3g} ms in "
        f"{case.after.runtime} after: {case.speed.verdict['after']}."
    )


def _zeros(case: _Case) -> Iterator[Finding]:
    """Pruned weights that still have their place in the file and in the product."""
    zeros = total = stored_bytes = 0
    for entry, weight in _entries(case.model):
        if isinstance(entry, (nn.Parameter, MaskedWeight, QuantizedWeight)):
            count = weight.numel() - int(weight.count_nonzero())
            zeros, total = zeros + count, total + weight.numel()
            stored_bytes += count * _bytes(entry) // weight.numel()
    if total and zeros / total >= MANY_ZEROS:
        size_bytes = case.size_bytes[1]
        yield Finding(
            "Zeros are stored and multiplied like any other number",
            f"{zeros / total:.1%} of the weights are zero, and take {stored_bytes:,} of "
            f"{size_bytes:,} bytes; without them {size_bytes - stored_bytes:,} and their places "
            "would be left",
            "Compress the file, or remove whole channels, which makes the layers themselves "
            "smaller; dense kernels gain nothing from single zeros",
        )


def _simulated(case: _Case) -> Iterator[Finding]:
    """Rounded numbers that no kernel of the runtime computes with."""
    kinds = {True: set(), False: set()}  # whether there are int8 kernels for it -> descriptions
    for entry, _ in _entries(case.model):
        if isinstance(entry, Source) and not isinstance(entry, MaskedWeight):
            kinds[bool(entry.lowers_to_int8)].add(entry.describe())
    runtime = case.after.runtime
    if kinds[True] and case.after.int8_kernels == 0:
        yield Finding(
            "int8 is only imitated in this runtime",
            f"{', '.join(sorted(kinds[True]))} weights, and 0 int8 kernels in {runtime}",
            "Run it as (model, 'onnxruntime') or (model, 'compiled'), with activations rounded too",
        )
    if kinds[False]:
        yield Finding(
            "No kernel computes with weights of this form",
            f"{', '.join(sorted(kinds[False]))} weights become float in {runtime} before each "
            "product",
            "Count on a smaller file only; int8 per tensor or channel is what kernels take",
        )
    fakes = sum(isinstance(module, FakeQuantizeBase) for module in case.model.modules())
    if fakes:
        yield Finding(
            "Fake quantization was left in place",
            f"{fakes} modules round in float what an integer kernel would compute",
            "Convert the model once it is trained, or use workbench.compress.quantize_static",
        )


def _computed_anew(case: _Case) -> Iterator[Finding]:
    """Eager PyTorch makes the dense weights from what is stored in each call."""
    made = [
        weight
        for entry, weight in _entries(case.model)
        if isinstance(entry, Source) and not isinstance(entry, MaskedWeight)
    ]
    if case.slow and case.after.runtime == "eager" and made:
        yield Finding(
            "Each call makes the weights anew",
            f"{len(made)} weights, {sum(map(_bytes_of, made)):,} bytes, are computed from "
            "codes before they are used",
            "Run it as (model, 'compiled') or (model, 'onnxruntime'), which do so once",
        )


def _few_values(case: _Case) -> Iterator[Finding]:
    """Weights that were rounded and are kept in float all the same."""
    found = []
    for entry, weight in _entries(case.model):
        if isinstance(entry, nn.Parameter) and weight.numel() >= 4 * _FEW_VALUES:
            values = len(weight.unique())
            if values <= _FEW_VALUES:
                bits = max(1, math.ceil(math.log2(values)))
                packed = weight.numel() * bits // 8 + values * weight.element_size()
                found.append((_bytes(entry), packed, values))
    if found:
        stored, packed, values = (sum(column) for column in zip(*found, strict=True))
        yield Finding(
            "Rounded weights are stored as float",
            f"{len(found)} weights hold {values / len(found):.0f} distinct values on average, in "
            f"{stored:,} bytes; packed codes would take {packed:,}",
            "Store codes instead of values: workbench.compress.quantize_weights",
        )


def _leftovers(case: _Case) -> Iterator[Finding]:
    """Masks and originals that torch keeps until it is told that a change is final."""
    hooks = _pruning_hooks(case.model)
    masks = [getattr(layer, f"{hook._tensor_name}_mask") for layer, hook in hooks]
    if masks:
        yield Finding(
            "torch.nn.utils.prune keeps mask and original",
            f"{len(masks)} masks add {sum(map(_bytes_of, masks)):,} bytes to the file, and each "
            "call multiplies by them anew",
            "Call torch.nn.utils.prune.remove on each once pruning is done",
        )
    changed = [layer for layer in case.model.modules() if parametrize.is_parametrized(layer)]
    if changed:
        inside = [layer.parametrizations for layer in changed]
        yield Finding(
            "Parametrizations were left in place",
            f"{len(changed)} layers compute their weight anew in each call, from "
            f"{sum(map(_bytes, inside)):,} stored bytes",
            "Call torch.nn.utils.parametrize.remove_parametrizations on each",
        )


def _left(case: _Case) -> Iterator[Finding]:
    """Layers that the last technique did not reach."""
    if not steps(case.model):
        return
    table = coverage(case.model)
    left = table[table.reason != ""].sort_values("weights", ascending=False, kind="stable")
    share = left.weights.sum() / max(1, table.weights.sum())
    if share >= 0.05:
        named = [
            f"{row.layer} ({row.weights / table.weights.sum():.1%}: {row.reason})"
            for row in left.head(4).itertuples()
        ]
        more = f" and {len(left) - 4} more" if len(left) > 4 else ""
        yield Finding(
            "The technique left layers as they were",
            f"{share:.1%} of the weights are in {', '.join(named)}{more}",
            "Look at workbench.compress.coverage, and choose settings or a technique that reaches "
            "them",
        )


def _small_layers(case: _Case) -> Iterator[Finding]:
    """int8 layers in which rounding the inputs costs more than the product saves."""
    small = [
        name
        for name, layer in layers_of(case.model).items()
        if any(getattr(source_of(layer, w), "lowers_to_int8", False) for w in weight_names(layer))
        and weight_count(layer) < _SMALL_LAYER
    ]
    if case.slow and case.after.int8_kernels and small:
        yield Finding(
            "Layers are too small for int8 to pay",
            f"{len(small)} int8 layers have fewer than {_SMALL_LAYER:,} weights: "
            f"{', '.join(small[:4])}{', ...' if len(small) > 4 else ''}; the model is not faster "
            f"at batch size {len(case.inputs[0])}",
            "Name them in skip, or use a larger batch",
        )


def _memory_bound(case: _Case) -> Iterator[Finding]:
    """Large weights that are read for a few products."""
    weight_bytes = _running_bytes(case)
    if case.slow and weight_bytes > _CACHE_BYTES:
        batch = len(case.inputs[0])
        count = macs(case.model, case.inputs) * batch
        intensity = count / weight_bytes
        if intensity < _MACS_PER_BYTE:
            yield Finding(
                "Reading the weights takes longer than computing with them",
                f"{count:,} multiply-accumulates for {weight_bytes:,} bytes of weights, "
                f"{intensity:.2f} for each byte, at batch size {batch}",
                "Fewer bytes that kernels can read (int8, smaller layers) help here, fewer "
                f"products do not; a batch of {_LARGE_BATCH} makes more of each byte",
            )


def _overhead(case: _Case) -> Iterator[Finding]:
    """Models so small that calling the layers takes longer than what they compute."""
    batch = len(case.inputs[0]) if case.inputs else _LARGE_BATCH
    if not case.slow or batch >= _LARGE_BATCH or _running_bytes(case) > _CACHE_BYTES:
        return
    # time(batch) = fixed + batch * each, from two points
    times_ms = []
    for size in (batch, _LARGE_BATCH):
        inputs = tuple(torch.cat([x[:1]] * size) for x in case.inputs)
        speed = _speed({"after": case.after}, inputs, case.threads, case.repeats)
        times_ms.append(speed.latency_ms["after"])
    each_ms = (times_ms[1] - times_ms[0]) / (_LARGE_BATCH - batch)
    share = min(1.0, 1 - batch * each_ms / times_ms[0])
    if share >= 0.5:
        yield Finding(
            "Most of a call is not arithmetic",
            f"{times_ms[0]:.3g} ms for a batch of {batch} and {times_ms[1]:.3g} ms for "
            f"{_LARGE_BATCH}: {share:.0%} of the shorter call is a fixed cost",
            "Use a larger batch, or a runtime with less to do between layers ('compiled', "
            "'onnxruntime'); cheaper weights cannot show at this size",
        )


def _threads(case: _Case) -> Iterator[Finding]:
    """More threads than cores, or a runtime that has other threads than the one beside it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if case.threads > cores:
        yield Finding(
            "More threads than cores",
            f"{case.threads} threads share {cores} cores",
            f"Call torch.set_num_threads({cores}), and prepare runtimes with threads={cores}",
        )
    for name, predictor in (("before", case.before), ("after", case.after)):
        if predictor.runtime == "onnxruntime":
            own = predictor.session.get_session_options().intra_op_num_threads
            if own != case.threads:
                yield Finding(
                    "The runtimes have different numbers of threads",
                    f"{own} in onnxruntime ({name}), {case.threads} in PyTorch",
                    f"Prepare the predictor with threads={case.threads}",
                )


def _wide(case: _Case) -> Iterator[Finding]:
    """Numbers of 64 bits."""
    wide = [t for t in _stored(case.model).values() if t.dtype == torch.float64]
    if wide:
        total = sum(map(_bytes_of, wide))
        yield Finding(
            "Weights are stored in float64",
            f"{len(wide)} tensors take {total:,} bytes; float32 would take {total // 2:,}",
            "Call model.float(): no network here needs more",
        )


def _duplicates(case: _Case) -> Iterator[Finding]:
    """One tensor stored several times, as happens when tied weights are replaced one by one."""
    groups = defaultdict(list)
    for name, tensor in _stored(case.model).items():
        if tensor.numel() > 1 and (tensor != tensor.flatten()[0]).any():
            content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            groups[tensor.dtype, tensor.shape, content].append((name, tensor))
    for twins in groups.values():
        names, tensors = zip(*twins, strict=True)
        extra_bytes = sum(map(_bytes_of, tensors[1:]))
        if extra_bytes >= 0.01 * case.size_bytes[1]:  # small ones are equal by the mathematics
            yield Finding(
                "The same tensor is stored more than once",
                f"{' = '.join(names)}: {extra_bytes:,} bytes too many",
                "Let the layers share one parameter",
            )


def _buffers(case: _Case) -> Iterator[Finding]:
    """What is stored beside the weights: tables, masks and counters of the layers."""
    inside = {
        id(tensor)
        for module in case.model.modules()
        if isinstance(module, Source)
        for tensor in module.state_dict(keep_vars=True).values()
    } | {
        id(getattr(layer, f"{hook._tensor_name}_mask"))
        for layer, hook in _pruning_hooks(case.model)
    }  # fmt: skip
    stored = case.model.state_dict(keep_vars=True)
    found = {
        name: _bytes_of(tensor)
        for name, tensor in stored.items()
        if not isinstance(tensor, nn.Parameter) and id(tensor) not in inside
    }
    total = sum(found.values())
    if total >= 0.1 * case.size_bytes[1]:
        largest = max(found, key=found.get)
        yield Finding(
            "Buffers are a large part of the file",
            f"{len(found)} buffers take {total:,} of {case.size_bytes[1]:,} bytes; the largest is "
            f"{largest}",
            "Register what can be computed again with persistent=False",
        )


_CHECKS: tuple[Callable[[_Case], Iterator[Finding]], ...] = (
    _leftovers, _zeros, _simulated, _computed_anew, _few_values, _left, _wide, _duplicates,
    _buffers, _small_layers, _memory_bound, _overhead, _threads,
)  # fmt: skip


def _entries(model: nn.Module) -> Iterator[tuple[nn.Parameter | Source, Tensor]]:
    """Each weight of two or more dimensions once: what stores it, and its dense values."""
    seen = set()
    for layer in layers_of(model, every=True).values():
        known = layer_type(layer) is not None
        for name in weight_names(layer) if known else list(layer._parameters):
            entry = (source_of(layer, name) if known else None) or layer._parameters.get(name)
            if entry is None or id(entry) in seen:
                continue
            seen.add(id(entry))
            weight = (entry if isinstance(entry, nn.Parameter) else entry()).detach()
            if weight.dim() > 1 and weight.numel():
                yield entry, weight


def _running_bytes(case: _Case) -> int:
    """Bytes of the weights that a call reads: their codes where int8 kernels run, else float."""
    if case.after.int8_kernels:
        return sum(_bytes(entry) for entry, _ in _entries(case.model))
    return sum(_bytes_of(weight) for _, weight in _entries(case.model))


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict on the CPU, shared ones once."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in seen:
            seen.add(key)
            tensors[name] = tensor.cpu()
    return tensors


def _bytes(entry: nn.Parameter | nn.Module) -> int:
    """Bytes that a parameter or a module stores."""
    if isinstance(entry, nn.Parameter):
        return _bytes_of(entry)
    return sum(map(_bytes_of, _stored(entry).values()))


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
