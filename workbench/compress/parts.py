"""A model taken apart into named entries that can be stored, and put together again.

An entry is a tensor, or a module that computes one from less: the source of a weight, under the
name of the dense weight, or the quantizer of an activation. Names are those of the plain network,
so that it can be filled in another process: what steps did to its layers (low rank, removed
channels, rounded activations) is done again, without values, and then each entry takes its place.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from workbench.compress.computed import (
    CONVOLUTIONS,
    LINEAR,
    MaskedWeight,
    Source,
    compute_weight,
    layer_type,
    make_dense,
    set_steps,
    source_of,
    weight_names,
)
from workbench.compress.equalization import CLIP, EQUALIZED, ChannelClip, clip_channels
from workbench.compress.layers import ROUNDED_INPUTS, layers_of
from workbench.compress.low_rank import replace_layer, thin_layers
from workbench.compress.quantization import ROUND, round_activations
from workbench.compress.quantizers import DynamicQuantizer, QuantizedWeight, StaticQuantizer
from workbench.compress.smoothing import SCALE, SMOOTHED, ChannelScale, scale_channels
from workbench.compress.structured import set_sizes
from workbench.compress.tracing import TracedModel, fold_batch_norms, trace
from workbench.compress.weight_sharing import SharedWeight

Entry = Tensor | nn.Module
Place = tuple[nn.Module, str]  # a module, and the name of a tensor in it
# The place in this list is what a file stores: add to its end only.
KINDS = (SharedWeight, QuantizedWeight, MaskedWeight, StaticQuantizer, DynamicQuantizer)
QUANTIZERS = (StaticQuantizer, DynamicQuantizer)


class MismatchError(ValueError):
    """What was stored does not fit the architecture that it is to be loaded into."""


def take_apart(model: nn.Module | Mapping[str, Tensor]) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries of a model or state dict by name, and for each name that shares one, the first
    name of it. Entries are the model's own, not copies.

    Raises:
        TypeError: no model; or something of it would be lost: a tensor without values, a source
            of a kind that cannot be stored, or what a module keeps as extra state.
    """
    if not isinstance(model, (nn.Module, Mapping)):
        raise TypeError(f"got a {type(model).__name__}; give a torch.nn.Module or a state dict")
    first: dict[object, str] = {}
    entries: dict[str, Entry] = {}
    aliases: dict[str, str] = {}
    for name, entry in _entries(model) if isinstance(model, nn.Module) else model.items():
        if not isinstance(entry, nn.Module):
            _check_tensor(name, entry)
        known = first.setdefault(_identity(entry), name)
        if known == name:
            entries[name] = entry
        else:
            aliases[name] = known
    return entries, aliases


def put_together(
    into: nn.Module, entries: Mapping[str, Entry], aliases: Mapping[str, str], done: Sequence[str]
) -> nn.Module:
    """A new model of the architecture of ``into``, in evaluation mode, that has these entries.

    Args:
        into: the plain network, or the compressed model itself; its values are not read.
        entries, aliases: as `take_apart` gives them; the entries become the model's own.
        done: the steps that made the model that was taken apart.

    Raises:
        MismatchError: entries and architecture do not fit; says which are missing, unexpected, or
            of another shape.
    """
    shapes = {n: tuple(e.shape) for n, e in entries.items() if not isinstance(e, QUANTIZERS)}
    shapes |= {name: shapes[kept] for name, kept in aliases.items()}
    model = _without_values(into)
    _make_plain(model)
    static = [name for name, entry in entries.items() if isinstance(entry, StaticQuantizer)]
    model = _restructured(model, shapes, static, done)
    places = dict(_places(model))
    chosen = _chosen(places, aliases, shapes)
    _check(model, places, chosen, shapes, entries)
    parameters: dict[str, nn.Parameter] = {}
    computed = []
    for name, (module, key) in places.items():
        old, entry = getattr(module, key), entries[chosen[name]]
        if isinstance(entry, Source):
            computed.append((module, key, entry.requires_grad_(old.requires_grad)))
            continue
        if isinstance(old, nn.Parameter):
            trained = old.requires_grad and (entry.is_floating_point() or entry.is_complex())
            new = nn.Parameter(entry, requires_grad=trained)
            entry = parameters.setdefault(chosen[name], new)
        setattr(module, key, entry)
    for module, key, source in computed:  # last: a recurrent layer lists its plain ones by place
        compute_weight(module, key, source)
    for name, entry in entries.items():
        if isinstance(entry, QUANTIZERS):
            path, _, key = name.rpartition(".")
            setattr(model.get_submodule(path), key, entry)
    set_steps(model, done)
    if isinstance(model, TracedModel):
        rounded = {p for p, m in layers_of(model).items() if layer_type(m) is not nn.Embedding}
        computing = {id(module) for module, _, _ in computed}
        names = frozenset(p for p in rounded if id(model.get_submodule(p)) in computing)
        setattr(model, ROUNDED_INPUTS, names)
    devices = {tensor.device for tensor in (*into.parameters(), *into.buffers())}
    devices.discard(torch.device("meta"))
    return model.eval().to(devices.pop()) if len(devices) == 1 else model.eval()


def _entries(model: nn.Module) -> Iterator[tuple[str, Entry]]:
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QUANTIZERS):
            yield path, module
        elif not isinstance(module, Source):
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                raise TypeError(
                    f"{path or type(module).__name__} keeps extra state, which may be anything; "
                    "keep it in buffers (register_buffer) instead"
                )
            for key, tensor in _tensors(module).items():
                yield _join(path, key), tensor
            for key, source in _sources(module).items():
                if not isinstance(source, KINDS):
                    raise TypeError(
                        f"{_join(path, key)} is computed by a {type(source).__name__}, which no "
                        "file can keep; finish the training that it serves, or make it dense"
                    )
                yield _join(path, key), source


def _check_tensor(name: object, tensor: object) -> None:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise TypeError(f"{name!r} is a {type(tensor).__name__}; a state dict has tensors by name")
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        kind = "without values" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
        raise TypeError(f"{name} is a tensor {kind}; make it a dense one first")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the module itself."""
    lasting = {
        key: buffer
        for key, buffer in module._buffers.items()
        if key not in module._non_persistent_buffers_set
    }
    own = module._parameters | lasting
    return {key: tensor for key, tensor in own.items() if tensor is not None}


def _sources(module: nn.Module) -> dict[str, Source]:
    if layer_type(module) is None:
        return {}
    found = {key: source_of(module, key) for key in weight_names(module)}
    return {key: source for key, source in found.items() if source is not None}


def _identity(entry: Entry) -> object:
    """Equal for tensors that are the same memory, seen in the same way."""
    if isinstance(entry, nn.Module) or entry.is_meta or entry.numel() == 0:
        return id(entry)
    return entry.device, entry.data_ptr(), entry.dtype, entry.shape, entry.stride()


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _without_values(model: nn.Module) -> nn.Module:
    """A copy whose tensors have shapes but no memory, apart from what a state dict leaves out."""
    memo = {}
    for module in model.modules():
        empty = module._parameters | module._buffers
        if not isinstance(module, Source):
            empty = _tensors(module)
        for tensor in filter(torch.is_tensor, empty.values()):
            copied = torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)
            memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if isinstance(
                tensor, nn.Parameter
            ) else copied  # fmt: skip
    return copy.deepcopy(model, memo)


def _make_plain(model: nn.Module) -> None:
    """Turn what is computed into parameters without values, in place."""
    empty: dict[Source, Source] = {}
    for layer in layers_of(model).values():
        layer._modules.pop("input_quantizer", None)
        for key, source in _sources(layer).items():
            if source not in empty:
                trained = all(parameter.requires_grad for parameter in source.parameters())
                weight = torch.empty(source.shape, device="meta")
                keep = torch.empty(source.shape, device="meta", dtype=torch.bool)
                empty[source] = MaskedWeight(weight, keep, trained)
            compute_weight(layer, key, empty[source])
    make_dense(*layers_of(model).values())


def _restructured(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    rounded: Sequence[str],
    done: Sequence[str],
) -> nn.Module:
    """``model`` with the layers and shapes that the steps left, as far as the entries tell them."""
    for name, layer in layers_of(model).items():
        factors = []
        while shape := shapes.get(_join(name, f"{len(factors)}.weight")):
            factors.append((*shape[:2], math.prod(shape[2:])))
        kernel = math.prod(getattr(layer, "kernel_size", ()))
        fits = layer_type(layer) in (*LINEAR, *CONVOLUTIONS, nn.Embedding) and kernel in [
            f[2] for f in factors
        ]
        if fits and _join(name, "weight") not in shapes:
            words = layer_type(layer) is nn.Embedding
            if words:  # which keeps its weight the other way round
                factors[0] = (factors[0][1], factors[0][0], 1)
            # What leaves them is as wide as before, to fit a norm that is folded into the last.
            factors[-1] = (layer.weight.shape[words], *factors[-1][1:])
            model = replace_layer(layer, thin_layers(layer, factors), model)
    rescaled = any(step.startswith((EQUALIZED, SMOOTHED)) for step in done)
    if (rounded or rescaled) and not isinstance(model, TracedModel):
        graph, _ = trace(model.eval())
        fold_batch_norms(graph)
        graph = _rescaled(graph, shapes) if rescaled else graph
        nodes = {f"{ROUND}{node.name}": node for node in graph.graph.nodes}
        round_activations(graph, {nodes[n]: nn.Identity() for n in rounded if n in nodes})
        model = graph
    if any(step.startswith("channels removed") for step in done):
        smaller = {}
        for name, (module, key) in _places(model):
            old, shape = getattr(module, key), shapes.get(name)
            if shape is not None and len(shape) == old.dim() and shape != tuple(old.shape):
                new = old.new_empty(shape)
                if isinstance(old, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=old.requires_grad)
                setattr(module, key, smaller.setdefault(id(old), new))
        for module in model.modules():
            set_sizes(module)
    return model


def _rescaled(graph: fx.GraphModule, shapes: Mapping[str, tuple[int, ...]]) -> fx.GraphModule:
    """With what the rescaling of channels put in: clips of their own, and divisions."""

    def stored(prefix: str, key: str) -> dict[fx.Node, Tensor]:
        nodes = {f"{prefix}{node.name}.{key}": node for node in graph.graph.nodes}
        empty = {nodes[name]: shape for name, shape in shapes.items() if name in nodes}
        return {node: torch.empty(shape, device="meta") for node, shape in empty.items()}

    clips = {node: ChannelClip(high) for node, high in stored(CLIP, "high").items()}
    clip_channels(graph, clips)
    scales = {node: ChannelScale(factor) for node, factor in stored(SCALE, "factor").items()}
    linear = {name for name, layer in layers_of(graph).items() if layer_type(layer) in LINEAR}
    scale_channels(graph, scales, linear)
    return trace(graph)[0]  # quantizers are named after the nodes of the graph that they saw


def _places(model: nn.Module) -> Iterator[tuple[str, Place]]:
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, QUANTIZERS):
            for key in _tensors(module):
                yield _join(path, key), (module, key)


def _chosen(
    places: Mapping[str, Place], aliases: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """The entry for each place that has one: its own, or that of a place that shares its tensor."""
    shared = defaultdict(list)
    for name, (module, key) in places.items():
        shared[id(getattr(module, key))].append(name)
    chosen = {}
    for names in shared.values():
        known = [name for name in names if name in shapes]
        for name in names:
            if known:
                source = name if name in shapes else known[0]
                chosen[name] = aliases.get(source, source)
    return chosen


def _check(
    model: nn.Module,
    places: Mapping[str, Place],
    chosen: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    entries: Mapping[str, Entry],
) -> None:
    wrong = []
    for name, (module, key) in places.items():
        expected = tuple(getattr(module, key).shape)
        if name not in chosen:
            wrong.append(f"{name} is missing")
        elif shapes[chosen[name]] != expected:
            wrong.append(f"{name} has shape {shapes[chosen[name]]}, here {expected}")
        elif isinstance(entries[chosen[name]], Source) and not _can_compute(module, key):
            wrong.append(f"{name} is computed, which no {type(module).__name__} can do")
    modules = dict(model.named_modules())
    unexpected = [name for name in shapes if name not in places]
    for name, entry in entries.items():
        at = name if isinstance(entry, StaticQuantizer) else name.rpartition(".")[0]
        if isinstance(entry, QUANTIZERS) and at not in modules:
            unexpected.append(name)
    wrong += [f"{name} is unexpected" for name in unexpected]
    for name, module in modules.items():
        if isinstance(module, QUANTIZERS) and name not in entries:
            wrong.append(f"{name} is missing")
    if wrong:
        more = f"; and {len(wrong) - _MOST:,} more" if len(wrong) > _MOST else ""
        raise MismatchError(
            f"the model does not fit this {type(model).__name__}: {'; '.join(wrong[:_MOST])}{more}"
        )


def _can_compute(module: nn.Module, key: str) -> bool:
    return layer_type(module) is not None and key in weight_names(module)


_MOST = 8  # misfits that an error names
