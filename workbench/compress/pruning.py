"""Zeros in the place of the weights that matter least.

`prune` chooses them by a share, `prune_threshold` by their size, `clip_weights` by soft
thresholding; `prune_gradually` prunes and trains in turns. Zeros stay zero in training, whatever
the optimizer, until `make_permanent` turns them into ordinary weights. They are zeros in dense
tensors: by themselves they make no file smaller and no kernel faster. Channels that really go are
the work of `workbench.compress.prune_structured`. See notebook 03.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from workbench.compress.computed import (
    MaskedWeight,
    Source,
    copy_of,
    layer_type,
    make_dense,
    source_of,
    weight_names,
)
from workbench.compress.layers import (
    Place,
    check_model,
    finish,
    layers_of,
    per_layer,
    places,
    reasons_left,
    replace_weights,
)
from workbench.data import Task
from workbench.training import ADAMW, Precision, evaluation_mode, fit

Criterion = Literal["magnitude", "random", "taylor"]
Scope = Literal["global", "layer"]


def prune(
    model: nn.Module,
    *,
    sparsity: float | Mapping[str, float] | None = None,
    granularity: str = "weight",
    scope: Scope = "global",
    criterion: Criterion = "magnitude",
    task: Task | None = None,
    samples: int = 512,
    skip: Sequence[str] = (),
    seed: int = 0,
) -> nn.Module:
    """Set the least important weights to zero. Biases and normalisation stay as they are.

    Args:
        sparsity: share of the weights that are zero afterwards, those pruned before included, from
            0 to 1; 0.5 if not given. By layer name, it holds for each of these layers by itself.
        granularity: "weight", or "N:M" such as "2:4": of every M neighbours along the input
            channels of one output channel, at most N stay. N and M fix the sparsity.
        scope: whether weights compete over the whole model ("global") or in their "layer".
        criterion: what makes a weight important: its "magnitude"; the first-order "taylor" term of
            the loss, (gradient x weight)², summed over batches of ``samples`` training examples of
            ``task``; or nothing ("random", a control).
        skip: names of layers to leave.
        seed: of "random" and of the examples for "taylor".

    Raises:
        ValueError: a setting out of range, an unknown layer, NaN in weights, "taylor" without a
            task.

    References: Han, Pool, Tran and Dally (2015), "Learning both weights and connections for
    efficient neural networks"; Molchanov et al. (2019), "Importance estimation for neural network
    pruning"; Mishra et al. (2021), "Accelerating sparse deep neural networks" (N:M).
    """
    pattern = _pattern(granularity)
    sparsity = _check_sparsity(sparsity, pattern, granularity)
    if scope not in ("global", "layer"):
        raise ValueError(f"scope is {scope!r}; choose 'global' or 'layer'")
    if criterion not in _IMPORTANCE:
        raise ValueError(f"criterion is {criterion!r}; choose from {sorted(_IMPORTANCE)}")
    if criterion == "taylor" and task is None:
        raise ValueError("criterion is 'taylor', which needs gradients; pass task=... as well")
    work = copy_of(model)
    check_model(work, skip, "prune")
    layers = layers_of(work)
    shares = per_layer(sparsity, layers, "sparsity")
    layers = {name: layers[name] for name in shares if name not in skip}
    left = reasons_left(work, layers, skip, "not named in sparsity")
    found = places(layers)
    if pattern is not None:
        uneven = {name for name, layer in layers.items() if not _divides(layer, pattern[1])}
        left |= dict.fromkeys(uneven, f"its inputs are not a multiple of {pattern[1]}")
        layers = {name: layer for name, layer in layers.items() if name not in uneven}
        found = places(layers)
    scores = _IMPORTANCE[criterion](work, found, task, samples, seed)
    for original, place in found.items():  # pruned before, pruned first
        scores[original] = torch.where(place.dense == 0, -1, scores[original].float())
    if pattern is not None:
        keep = {key: _best_of(scores[key], place.axis, *pattern) for key, place in found.items()}
        amount = granularity
    elif scope == "global" and not isinstance(sparsity, Mapping):
        keep = _most_important(scores, sparsity)
        amount = f"{sparsity:.4g}, global"
    else:
        keep = {}
        for key, place in found.items():
            keep |= _most_important({key: scores[key]}, shares[place.layer])
        amount = "by layer" if isinstance(sparsity, Mapping) else f"{sparsity:.4g}, each layer"
    _mask(layers, lambda place: keep[place.original])
    return finish(work, model, f"pruned by {criterion} ({amount})", layers, left, "pruned")


def prune_threshold(
    model: nn.Module, *, threshold: float = 0.01, skip: Sequence[str] = ()
) -> nn.Module:
    """Set every weight of a smaller size than ``threshold`` to zero.

    Raises:
        ValueError: a negative threshold, an unknown layer, NaN in weights.

    Reference: Han, Pool, Tran and Dally (2015), "Learning both weights and connections for
    efficient neural networks".
    """
    if not threshold >= 0:
        raise ValueError(f"threshold is {threshold}; give 0 or more")
    work, layers, left = _ready(model, skip)
    _mask(layers, lambda place: place.dense.abs() >= threshold)
    return finish(work, model, f"pruned by threshold ({threshold:.4g})", layers, left, "pruned")


def clip_weights(model: nn.Module, *, alpha: float = 0.01, skip: Sequence[str] = ()) -> nn.Module:
    """Move every weight towards zero by ``alpha``, and to zero those that would pass it.

    Soft thresholding, ``sign(w) max(|w| - alpha, 0)``: what a step of L1 regularisation does.

    Raises:
        ValueError: a negative alpha, an unknown layer, NaN in weights.

    Reference: Donoho (1995), "De-noising by soft-thresholding".
    """
    if not alpha >= 0:
        raise ValueError(f"alpha is {alpha}; give 0 or more")
    work, layers, left = _ready(model, skip)

    def clipped(place: Place) -> MaskedWeight:
        shrunk = place.dense.sign() * (place.dense.abs() - alpha).clamp(min=0)
        return MaskedWeight(shrunk, shrunk != 0, _trains(place))

    replace_weights(layers, clipped)
    return finish(work, model, f"clipped ({alpha:.4g})", layers, left, "clipped")


def prune_gradually(
    model: nn.Module,
    task: Task,
    *,
    sparsity: float = 0.9,
    rounds: int = 3,
    schedule: Literal["cubic", "linear", "constant"] = "cubic",
    scope: Scope = "global",
    criterion: Criterion = "magnitude",
    rewind_to: nn.Module | None = None,
    skip: Sequence[str] = (),
    epochs: int = 1,
    batch_size: int = 128,
    optimizer: Callable[..., torch.optim.Optimizer] = ADAMW,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    precision: Precision = "float32",
    device: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Prune a little, train, and again: ``rounds`` times up to ``sparsity``.

    Args:
        schedule: sparsity s of round i of n. "cubic" prunes fast while there is much to spare,
            ``s (1 - (1 - i/n)³)``; "linear" is ``s i/n``; "constant" prunes all at once.
        rewind_to: an earlier state of the model, such as before its training. Before each round of
            training, what is left goes back to its values there: lottery tickets.
        scope, criterion, skip: as in `prune`.
        epochs: of each round; this and the rest as in `workbench.training.fit`.

    Raises:
        ValueError: as `prune` and `workbench.training.fit`; fewer than 1 round.

    References: Zhu and Gupta (2018), "To prune, or not to prune" (the cubic schedule); Frankle and
    Carbin (2019), "The lottery ticket hypothesis".
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; give 1 or more")
    if schedule not in _SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; choose from {sorted(_SCHEDULES)}")
    _check_sparsity(sparsity, None, "weight")
    work = model
    for i in range(1, rounds + 1):
        work = prune(
            work,
            sparsity=sparsity * _SCHEDULES[schedule](i / rounds),
            scope=scope,
            criterion=criterion,
            task=task,
            skip=skip,
            seed=seed,
        )
        if rewind_to is not None:
            work = rewind(work, rewind_to)
        fit(
            work,
            task,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            augment=augment,
            precision=precision,
            device=device,
            seed=seed + i,
            progress=progress,
        )
    layers = {name for name, layer in layers_of(work).items() if name not in skip}
    amount = f"{sparsity:.4g}, {rounds} rounds" + ("" if rewind_to is None else ", rewound")
    left = reasons_left(work, layers, skip, "")
    return finish(work, model, f"pruned gradually ({amount})", layers, left, "pruned")


def rewind(model: nn.Module, to: nn.Module) -> nn.Module:
    """A copy of the pruned ``model`` with all values of the model ``to``, and its own zeros.

    Raises:
        ValueError: the two do not have the same weights, by name and shape.

    Reference: Frankle and Carbin (2019), "The lottery ticket hypothesis".
    """
    work = copy_of(model)
    origin = copy_of(to)
    make_dense(*layers_of(origin).values())
    values = dict(origin.named_parameters(remove_duplicate=False))
    values |= dict(origin.named_buffers(remove_duplicate=False))
    for name, value in _plain_names(work):
        if name not in values or values[name].shape != value.shape:
            raise ValueError(
                f"{name} of the pruned model is not in the model to rewind to, or has another "
                "shape; give the same network at an earlier time"
            )
        with torch.no_grad():
            value.copy_(values[name])
    for module in work.modules():
        if isinstance(module, MaskedWeight):
            with torch.no_grad():
                module.weight.mul_(module.keep)
    return work


def make_permanent(model: nn.Module) -> nn.Module:
    """A copy whose pruned weights are ordinary parameters again: zero, but free to change."""
    work = copy_of(model)
    make_dense(
        *(
            layer
            for layer in layers_of(work).values()
            if any(isinstance(source_of(layer, name), MaskedWeight) for name in weight_names(layer))
        )
    )
    return work


def _pattern(granularity: str) -> tuple[int, int] | None:
    if granularity == "weight":
        return None
    match = re.fullmatch(r"(\d+):(\d+)", str(granularity))
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(
            f"granularity is {granularity!r}; choose 'weight', or 'N:M' with 0 < N < M, as '2:4'"
        )
    return int(match[1]), int(match[2])


def _check_sparsity(
    sparsity: float | Mapping[str, float] | None, pattern: tuple[int, int] | None, granularity: str
) -> float | Mapping[str, float]:
    if pattern is not None:
        if sparsity is not None:
            raise ValueError(
                f"sparsity is {sparsity}, but granularity {granularity!r} fixes it; leave it out"
            )
        return 1 - pattern[0] / pattern[1]
    if sparsity is None:
        return 0.5
    for share in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]:
        if not 0 <= share <= 1:
            raise ValueError(f"sparsity is {share}; give a share from 0 to 1")
    return sparsity


def _ready(
    model: nn.Module, skip: Sequence[str]
) -> tuple[nn.Module, dict[str, nn.Module], dict[str, str]]:
    work = copy_of(model)
    check_model(work, skip, "prune")
    layers = {name: layer for name, layer in layers_of(work).items() if name not in skip}
    return work, layers, reasons_left(work, layers, skip, "")


def _divides(layer: nn.Module, size: int) -> bool:
    return all(
        _rows(place.dense, place.axis).shape[-1] % size == 0
        for place in places({"": layer}).values()
    )


def _rows(weight: Tensor, axis: int) -> Tensor:
    """A weight as (output channels, ..., input channels): neighbours are along the last one."""
    return weight.movedim(axis, 0).movedim(1, -1)


def _magnitude(
    model: nn.Module, found: Mapping[object, Place], task: Task | None, samples: int, seed: int
) -> dict[object, Tensor]:
    return {key: place.dense.abs() for key, place in found.items()}


def _random(
    model: nn.Module, found: Mapping[object, Place], task: Task | None, samples: int, seed: int
) -> dict[object, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.rand(place.dense.shape, generator=generator).to(place.dense.device)
        for key, place in found.items()
    }


def _taylor(
    model: nn.Module, found: Mapping[object, Place], task: Task, samples: int, seed: int
) -> dict[object, Tensor]:
    """Sum over batches of (gradient x weight)², where the gradient is that of the dense weight."""
    twin = copy_of(model)
    layers = layers_of(twin)
    parameters: dict[tuple[str, str], nn.Parameter] = {}

    def parameter(place: Place) -> MaskedWeight:
        source = MaskedWeight(place.dense, torch.ones_like(place.dense, dtype=torch.bool))
        parameters[place.layer, place.name] = source.weight
        return source

    replace_weights({place.layer: layers[place.layer] for place in found.values()}, parameter)
    total = {key: torch.zeros_like(weight) for key, weight in parameters.items()}
    device = next(iter(total.values())).device
    examples = task.train.subset(min(samples, len(task.train)), seed=seed)
    with evaluation_mode(twin), torch.enable_grad():
        for inputs, target in examples.batches(64):
            loss = task.loss(twin(*(x.to(device) for x in inputs)), target.to(device))
            gradients = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
            for (key, weight), gradient in zip(parameters.items(), gradients, strict=True):
                if gradient is not None:
                    total[key] += (gradient * weight.detach()).square()
    return {original: total[place.layer, place.name] for original, place in found.items()}


_IMPORTANCE: dict[str, Callable] = {"magnitude": _magnitude, "random": _random, "taylor": _taylor}
_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cubic": lambda part: 1 - (1 - part) ** 3,
    "linear": lambda part: part,
    "constant": lambda part: 1.0,
}


def _most_important(scores: Mapping[object, Tensor], sparsity: float) -> dict[object, Tensor]:
    """Where to keep weights, so that exactly this share goes; of equal scores the first go."""
    if not scores:
        return {}
    flat = torch.cat([score.flatten() for score in scores.values()])
    count = round(sparsity * len(flat))
    keep = torch.ones_like(flat, dtype=torch.bool)
    if count > 0:
        last = flat.kthvalue(count).values  # the highest score that goes
        keep = flat > last
        equal = (flat == last).nonzero().flatten()
        keep[equal[count - int((flat < last).sum()) :]] = True
    parts = keep.split([score.numel() for score in scores.values()])
    return {
        key: part.view(score.shape)
        for (key, score), part in zip(scores.items(), parts, strict=True)
    }


def _best_of(score: Tensor, axis: int, n: int, m: int) -> Tensor:
    """Where to keep weights, so that of every ``m`` neighbours the best ``n`` stay."""
    rows = _rows(score, axis)
    groups = rows.unflatten(-1, (-1, m))  # (output channels, ..., groups, m)
    best = groups.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)
    return keep.flatten(-2).movedim(-1, 1).movedim(0, axis)


def _mask(layers: dict[str, nn.Module], keep: Callable[[Place], Tensor]) -> None:
    """Put zeros where ``keep(place)`` is False, in what each weight is stored in if that can."""

    def masked(place: Place) -> Source:
        where = keep(place)
        if not where.any():
            warnings.warn(f"{place.layer} has no weight left; prune it less", stacklevel=4)
        if isinstance(place.original, Source):
            source = place.original.masked(where)
            if source is not None:
                return source
        return MaskedWeight(place.dense, where, _trains(place))

    replace_weights(layers, masked)


def _trains(place: Place) -> bool:
    """Whether a weight is to be trained: parameters say so, what is computed may be."""
    return getattr(place.original, "requires_grad", True)


def _plain_names(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers under the names they have where nothing is computed."""
    found = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Source):
            continue
        entries = {**module._parameters, **module._buffers}
        for name in weight_names(module) if layer_type(module) else ():
            source = source_of(module, name)
            if isinstance(source, MaskedWeight):
                entries[name] = source.weight
            elif source is not None:
                raise ValueError(
                    f"{prefix}.{name} is stored as {source.describe()}; rewind before that step"
                )
        found += [
            (f"{prefix}.{name}" if prefix else name, value)
            for name, value in entries.items()
            if value is not None
        ]
    return found
