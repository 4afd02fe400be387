"""Layers as products of thinner layers: a weight keeps the directions that carry most of it.

A linear layer, or a 1x1 convolution, becomes two, by the singular value decomposition. A larger
convolution becomes three, by the Tucker decomposition of its channels: 1x1 to fewer inputs, the
kernel between few channels, 1x1 to all outputs. These are plain layers of torch, so the model is
truly smaller, and computes less. An embedding becomes a narrow one and a linear layer to the full
width.

The energy of a weight is the sum of its squares, which is the sum of its squared singular values.

Shapes: O output channels, I input channels, P positions of the kernel (1 for a linear layer).
"""

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workbench.compress.computed import (
    CONVOLUTIONS,
    LINEAR,
    copy_of,
    layer_type,
    make_dense,
    source_of,
    weight_of,
    weights,
)
from workbench.compress.layers import (
    ROUNDED_INPUTS,
    check_model,
    finish,
    layers_of,
    per_layer,
    reasons_left,
)

Shape = tuple[int, int, int]  # O, I, P
Ranks = tuple[int, ...]  # of a matrix, or of the inputs and of the outputs of a convolution


def factorize(
    model: nn.Module,
    *,
    energy: float | None = None,
    parameters: float | None = None,
    rank: int | Mapping[str, int] | None = None,
    skip: Sequence[str] = (),
) -> nn.Module:
    """Replace linear, convolution and embedding layers by products of layers of low rank.

    Give one of the three settings; without any, 90% of the energy is kept. A layer that would not
    get smaller is left, and so is a channel mode of a convolution whose full rank takes fewer
    parameters. Weights that are pruned, quantized or shared become dense. Training afterwards
    (`workbench.training.fit`) repairs most of what was lost.

    Args:
        energy: share of each weight's energy to keep at least, above 0 and up to 1.
        parameters: most parameters of the result as a share of the model's, above 0 and up to 1.
            The directions that lose the least of their layer's energy for each parameter saved go
            first.
        rank: of all layers or by layer name; a layer that is not named is left. In a convolution
            it is the rank of both inputs and outputs.

    Raises:
        ValueError: more than one setting or one out of range, fewer parameters than rank 1 takes,
            NaN in weights, or an unknown layer name.

    References: Denton et al. (2014), "Exploiting linear structure within convolutional networks for
    efficient evaluation"; Kim et al. (2016), "Compression of deep convolutional neural networks for
    fast and low power mobile applications".
    """
    if energy is None and parameters is None and rank is None:
        energy = 0.9
    step = _check_settings(energy, parameters, rank)
    work = copy_of(model)
    check_model(work, skip, "factorize")
    layers = layers_of(work)
    given = per_layer(rank, layers, "rank")
    left = _reasons_unfit(work)
    left |= reasons_left(work, {*given} - {*skip}, skip, "not named in rank")
    layers = {name: layer for name, layer in layers.items() if name not in left}
    budget = None if parameters is None else _budget(work, layers, parameters)
    found = {name: _modes(layer) for name, layer in layers.items()}
    if budget is not None:
        ranks = _spend(found, budget)
    elif energy is not None:
        ranks = {name: modes.ranks_for(energy) for name, modes in found.items()}
    else:
        ranks = {
            name: tuple(min(given[name], full) for full in _full(modes.shape))
            for name, modes in found.items()
        }
    for name, modes in found.items():
        chosen = _smallest(modes.shape, ranks[name])
        if chosen == _full(modes.shape):
            tried = " and ".join(map(str, ranks[name]))
            left[name] = f"rank {tried} would not make it smaller"
        else:
            work = replace_layer(layers[name], _product(layers[name], modes, chosen), work)
    done = [name for name in layers if name not in left]
    return finish(work, model, step, done, left, "factorized")


def _check_settings(
    energy: float | None, parameters: float | None, rank: int | Mapping[str, int] | None
) -> str:
    """What the step is called, once its settings are known to be good."""
    settings = {"energy": energy, "parameters": parameters, "rank": rank}
    given = [name for name, value in settings.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given; give one of {', '.join(settings)}")
    if rank is not None:
        for value in rank.values() if isinstance(rank, Mapping) else [rank]:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"rank is {value!r}; give a whole number from 1")
        return "low rank (by layer)" if isinstance(rank, Mapping) else f"low rank ({rank})"
    name, share = given[0], settings[given[0]]
    if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share <= 1:
        raise ValueError(f"{name} is {share!r}; give a share above 0 and up to 1")
    return f"low rank ({100 * share:g}% of the {name})"


def _reasons_unfit(model: nn.Module) -> dict[str, str]:
    """Why layers cannot be replaced by a product, by name."""
    owners: dict[object, list[str]] = {}  # of each parameter and source, in all modules
    readers = {}
    for name, module in model.named_modules():
        for entry in [*module._parameters.values(), *getattr(module, "sources", {}).values()]:
            owners.setdefault(entry, []).append(name)
        if isinstance(module, nn.TransformerEncoderLayer):  # in its fast path
            readers |= dict.fromkeys(module.children(), type(module).__name__)
    reasons = {}
    for name, layer in layers_of(model).items():
        kind = layer_type(layer)
        if kind not in (*LINEAR, *CONVOLUTIONS, nn.Embedding):
            reasons[name] = f"low rank has no rule for {kind.__name__}"
        elif getattr(layer, "max_norm", None) is not None:
            reasons[name] = "an embedding with max_norm, which looking up a word changes"
        elif getattr(layer, "groups", 1) > 1:
            reasons[name] = f"a convolution of {layer.groups} groups"
        elif len(tied := owners[source_of(layer, "weight") or layer.weight]) > 1:
            others = ", ".join(other for other in tied if other != name)
            reasons[name] = f"its weight is also that of {others}"
        elif layer in readers:
            reasons[name] = f"{readers[layer]} reads its weight past the layer"
        elif "input_quantizer" in layer._modules or name in getattr(model, ROUNDED_INPUTS, ()):
            reasons[name] = "its input is rounded: factorize before activations are quantized"
    return reasons


def _shape(layer: nn.Module) -> Shape:
    outputs, inputs, *kernel = weight_of(layer, "weight").shape
    if layer_type(layer) is nn.Embedding:  # a linear layer that is shown one word of all
        outputs, inputs = inputs, outputs
    return outputs, inputs, math.prod(kernel)


def _full(shape: Shape) -> Ranks:
    outputs, inputs, positions = shape
    return (min(outputs, inputs),) if positions == 1 else (inputs, outputs)


def _size(shape: Shape, ranks: Ranks) -> int:
    """Parameters of the product. Nothing is made thinner where a rank is full."""
    outputs, inputs, positions = shape
    full = _full(shape)
    if positions == 1:
        (rank,) = ranks
        return outputs * inputs if ranks == full else rank * (outputs + inputs)
    before, after = ranks
    thin_in = inputs * before if before < inputs else 0
    thin_out = outputs * after if after < outputs else 0
    return thin_in + before * positions * after + thin_out


def _smallest(shape: Shape, ranks: Ranks) -> Ranks:
    """These ranks, or the full one for any of them where that takes no more parameters."""
    choices = itertools.product(*zip(_full(shape), ranks, strict=True))
    return min(choices, key=lambda choice: _size(shape, choice))  # the first: full wins ties


@dataclass(frozen=True)
class _Modes:
    """A weight, (O, I, P), with the energies, (C,), and directions, (C, C) in columns, of each of
    its modes, largest first: the shorter side of a matrix; inputs and outputs of a convolution."""

    weight: Tensor
    energies: tuple[Tensor, ...]
    directions: tuple[Tensor, ...]

    @property
    def shape(self) -> Shape:
        return tuple(self.weight.shape)

    def ranks_for(self, share: float) -> Ranks:
        """The smallest ranks that keep this share of the energy.

        What two modes lose adds up at most, so each may lose half of what may be lost.
        """
        ranks = []
        for energies in self.energies:
            lost = energies.flip(0).cumsum(0).flip(0)  # with the directions from a place on
            allowed = (1 - share) / len(self.energies) * lost[0]
            ranks.append(max(1, int((lost > allowed).sum())))
        return tuple(ranks)


def _modes(layer: nn.Module) -> _Modes:
    weight = weight_of(layer, "weight").detach().cpu().double()
    weight = weight.T if layer_type(layer) is nn.Embedding else weight
    weight = weight.reshape(_shape(layer))
    transposed = weight.transpose(0, 1)
    if weight.shape[2] == 1:
        modes = [weight if len(weight) <= len(transposed) else transposed]
    else:
        modes = [transposed, weight]
    return _Modes(weight, *zip(*map(_directions, modes), strict=True))


def _directions(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Energies, (C,), and directions, (C, C) in columns, of the first mode, largest first."""
    rows = weight.flatten(1)
    energies, directions = torch.linalg.eigh(rows @ rows.T)
    return energies.flip(0).clamp(min=0), directions.flip(1)


def _budget(model: nn.Module, layers: dict[str, nn.Module], share: float) -> int:
    """Parameters that these layers may have, so that the model has this share of its own."""
    total = sum(weight.numel() for _, weight in weights(model))
    shapes = [_shape(layer) for layer in layers.values()]
    fixed = total - sum(map(math.prod, shapes))
    smallest = fixed + sum(
        _size(shape, _smallest(shape, (1,) * len(_full(shape)))) for shape in shapes
    )
    if smallest > share * total:
        least = math.ceil(1000 * smallest / total) / 1000
        raise ValueError(
            f"parameters is {share}, but with rank 1 everywhere {smallest:,} of {total:,} remain; "
            f"give {least} or more"
        )
    return math.floor(share * total) - fixed


def _spend(found: dict[str, _Modes], budget: int) -> dict[str, Ranks]:
    """Ranks within the budget: from full ones, the cheapest direction goes until it is kept."""
    ranks = {name: list(_full(modes.shape)) for name, modes in found.items()}
    sizes = {name: math.prod(modes.shape) for name, modes in found.items()}
    energies = {
        name: [(mode / mode.sum().clamp(min=1e-300)).tolist() for mode in modes.energies]
        for name, modes in found.items()
    }

    def cheapest(name: str) -> tuple[float, str, int] | None:
        """The energy lost for each parameter saved, layer and mode of its next direction."""
        outputs, inputs, positions = found[name].shape
        if positions == 1:
            saved = [outputs + inputs]
        else:
            saved = [inputs + positions * ranks[name][1], outputs + positions * ranks[name][0]]
        costs = (
            (energies[name][mode][rank - 1] / saved[mode], name, mode)
            for mode, rank in enumerate(ranks[name])
            if rank > 1
        )
        return min(costs, default=None)

    queue = [entry for name in found if (entry := cheapest(name))]
    heapq.heapify(queue)
    total = sum(sizes.values())
    while total > budget:
        _, name, mode = heapq.heappop(queue)
        ranks[name][mode] -= 1
        shape = found[name].shape
        size = _size(shape, _smallest(shape, tuple(ranks[name])))
        total += size - sizes[name]
        sizes[name] = size
        if entry := cheapest(name):
            heapq.heappush(queue, entry)
    return {name: tuple(chosen) for name, chosen in ranks.items()}


_ITERATIONS = 5  # more change the error of a Tucker decomposition in the fourth digit


def _factors(modes: _Modes, ranks: Ranks) -> list[Tensor | None]:
    """The weights, (outputs, inputs, positions), in the order in which they are applied.

    Two of a matrix; three of a convolution, of which the outer ones are None where a rank is full.
    """
    weight = modes.weight
    outputs, inputs, positions = weight.shape
    if positions == 1:
        kept = modes.directions[0][:, : ranks[0]]  # (the shorter of O and I, rank)
        if outputs <= inputs:
            return [(kept.T @ weight[..., 0])[..., None], kept[..., None]]
        return [kept.T[..., None], (weight[..., 0] @ kept)[..., None]]
    # A mode of full rank keeps its own coordinates, for it gets no layer that would change them.
    kept_in, kept_out = (
        found[:, :rank] if rank < len(found) else torch.eye(rank, dtype=weight.dtype)
        for found, rank in zip(modes.directions, ranks, strict=True)
    )
    for _ in range(_ITERATIONS):  # each mode is best for what the other one keeps
        if ranks[0] < inputs:
            kept_in = _directions(_onto(kept_out, weight).transpose(0, 1))[1][:, : ranks[0]]
        if ranks[1] < outputs:
            rest = _onto(kept_in, weight.transpose(0, 1)).transpose(0, 1)
            kept_out = _directions(rest)[1][:, : ranks[1]]
    core = _onto(kept_in, _onto(kept_out, weight).transpose(0, 1)).transpose(0, 1)
    thin_in = kept_in.T[..., None] if ranks[0] < inputs else None
    return [thin_in, core, kept_out[..., None] if ranks[1] < outputs else None]


def _onto(kept: Tensor, weight: Tensor) -> Tensor:
    """The first mode of a weight in the coordinates of the directions kept, (C, rank)."""
    return torch.einsum("cr,c...->r...", kept, weight)


def _product(layer: nn.Module, modes: _Modes, ranks: Ranks) -> nn.Sequential:
    """The layers that take the place of ``layer``, with its bias, mode and hooks."""
    make_dense(layer)
    factors = [factor for factor in _factors(modes, ranks) if factor is not None]
    product = thin_layers(layer, [tuple(factor.shape) for factor in factors])
    for thin, factor in zip(product, factors, strict=True):
        factor = factor[..., 0].T if isinstance(thin, nn.Embedding) else factor
        weight = factor.reshape(thin.weight.shape).to(layer.weight).contiguous()
        thin.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    return product


def thin_layers(layer: nn.Module, shapes: Sequence[Shape]) -> nn.Sequential:
    """The product that takes the place of a plain ``layer``: its last layer has its bias, all of
    it its mode and hooks; the weights have no values yet."""
    kernel = math.prod(getattr(layer, "kernel_size", ()))
    looking = [positions for *_, positions in shapes].index(kernel)  # the first looks at the image
    embedding = layer_type(layer) is nn.Embedding
    made = []
    for place, (outputs, inputs, _) in enumerate(shapes):
        kind, settings = layer_type(layer), {"bias": False}
        if embedding and place == 0:
            names = ("padding_idx", "scale_grad_by_freq", "sparse")
            settings = {name: getattr(layer, name) for name in names}
        elif embedding:
            kind = nn.Linear
        elif isinstance(layer, CONVOLUTIONS):
            names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
            looks = {name: getattr(layer, name) for name in names}
            settings |= looks if place == looking else {"kernel_size": 1}
        # Without first values: to draw them would move on the caller's random state.
        device = layer.weight.device
        made.append(nn.utils.skip_init(kind, inputs, outputs, device=device, **settings))
    made[-1].bias = getattr(layer, "bias", None)
    product = nn.Sequential(*made).train(layer.training)
    # Hooks on the layer see the same input and output as before.
    vars(product).update({k: v for k, v in vars(layer).items() if k.startswith("_forward_")})
    return product


def replace_layer(layer: nn.Module, new: nn.Module, model: nn.Module) -> nn.Module:
    """``model`` with ``new`` in every place where ``layer`` is."""
    if model is layer:
        return new
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is layer:
                module._modules[name] = new
    return model
