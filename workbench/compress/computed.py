"""Layers whose weight is computed from something smaller: the common ground of the techniques.

A technique stores what it makes of a weight (codes and scales, a sign and a scale, a shared
codebook) in a *source*: a module that returns the dense weight when called. `compute_weight` puts
it in the place of the layer's parameter; the layer keeps its type, its forward pass and its
``weight`` attribute, so everything that reads a weight goes on working, while the state dict holds
only what the source stores.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod

RECORD = "_workbench_"  # how the names of all that techniques note on a model begin
_STEPS = f"{RECORD}steps"


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy for a technique to work on, so that the caller's model is never changed."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    for name, module in model.named_modules():
        if any(isinstance(h, BasePruningMethod) for h in module._forward_pre_hooks.values()):
            raise ValueError(
                f"{name or type(model).__name__} is pruned by torch.nn.utils.prune, which computes "
                "its weight before each call; make that permanent with prune.remove first"
            )
        if is_parametrized(module):
            raise ValueError(
                f"{name or type(model).__name__} has parametrizations; remove them first with "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
    return copy.deepcopy(model)


def record_step(model: nn.Module, step: str, previous: nn.Module | None = None) -> nn.Module:
    """Note on ``model`` that ``step`` was applied, after the steps of ``previous``; return it."""
    setattr(model, _STEPS, (*steps(previous if previous is not None else model), step))
    return model


def steps(model: object) -> tuple[str, ...]:
    """The techniques that made this model, in order; empty for an untouched one."""
    return getattr(model, _STEPS, ())


def set_steps(model: nn.Module, done: Sequence[str]) -> None:
    """Note on ``model`` that it was made by these steps, and forget what others left on it."""
    if steps(model) != tuple(done):
        for key in [key for key in vars(model) if key.startswith(RECORD)]:
            delattr(model, key)
        setattr(model, _STEPS, tuple(done))


@dataclass(frozen=True)
class Stored:
    """What has to be kept of a source or quantizer, for `restored` to make it again.

    ``shape`` is that of the dense weight. ``parts`` are tensors; codes stand unpacked, one row for
    each output channel, as an entropy coder wants them. ``settings`` are whole numbers from 0.
    """

    shape: tuple[int, ...] = ()
    settings: tuple[int, ...] = ()
    parts: dict[str, Tensor] = field(default_factory=dict)


class Source(nn.Module):
    """What computes a weight: called, it returns the dense weight, through which gradients flow to
    its parameters."""

    lowers_to_int8 = False  # whether runtimes have kernels that compute with what it stores
    shape: tuple[int, ...]  # of the weight

    def forward(self) -> Tensor:
        raise NotImplementedError

    def stored(self) -> Stored:
        """What a file keeps of it."""
        raise NotImplementedError

    @classmethod
    def restored(cls, stored: Stored) -> "Source":
        """The inverse of `stored`."""
        raise NotImplementedError

    def describe(self) -> str:
        """How the weight is stored, in a few words."""
        raise NotImplementedError

    def masked(self, keep: Tensor) -> "Source | None":
        """The same, with zeros where ``keep`` (in the weight's shape) is False.

        None where what it stores cannot stand for zero.
        """
        return None


class MaskedWeight(Source):
    """The source of a pruned weight: where ``keep`` is False it is zero, and stays so in training.

    No gradient reaches the zeros, so momentum and weight decay leave them zero too, and the stored
    weight alone tells which they are.
    """

    keep: Tensor

    def __init__(self, weight: Tensor, keep: Tensor, requires_grad: bool = True):
        super().__init__()
        # Chosen, not multiplied: a pruned weight is +0, never -0, which would be a second symbol.
        kept = torch.where(keep, weight.detach(), 0)
        self.weight = nn.Parameter(kept, requires_grad=requires_grad)
        self.register_buffer("keep", keep, persistent=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def forward(self) -> Tensor:
        return self.weight * self.keep

    def stored(self) -> Stored:
        return Stored(self.shape, parts={"weight": torch.where(self.keep, self.weight.detach(), 0)})

    @classmethod
    def restored(cls, stored: Stored) -> "MaskedWeight":
        weight = stored.parts["weight"]
        return cls(weight, weight != 0)

    def describe(self) -> str:
        return f"float, {1 - self.keep.float().mean().item():.1%} zeros"

    def masked(self, keep: Tensor) -> "MaskedWeight":
        return MaskedWeight(self.weight, self.keep & keep, self.weight.requires_grad)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}weight" in state_dict:
            self.keep = self.weight.detach() != 0


class _Computed:
    """What a layer gains when weights of it are computed: ``sources`` by parameter name.

    Its input may go through a quantizer first.
    """

    sources: nn.ModuleDict

    @property
    def weight(self) -> Tensor:
        return self.sources["weight"]()

    def forward(self, x: Tensor, *args):
        quantizer = self._modules.get("input_quantizer")
        return super().forward(x if quantizer is None else quantizer(x), *args)


class _ComputedRecurrent(_Computed):
    def _update_flat_weights(self) -> None:
        """Nothing to update: the list of weights is made anew for each call."""

    def forward(self, *args):
        # Recurrent layers read their weights from this list, in this order.
        self._flat_weights = [
            self.sources[name]() if name in self.sources else self._parameters[name]
            for name in self._flat_weights_names
        ]
        try:
            return super().forward(*args)
        finally:
            self._flat_weights = []


class ComputedLinear(_Computed, nn.Linear): ...


class ComputedConv1d(_Computed, nn.Conv1d): ...


class ComputedConv2d(_Computed, nn.Conv2d): ...


class ComputedConv3d(_Computed, nn.Conv3d): ...


class ComputedConvTranspose1d(_Computed, nn.ConvTranspose1d): ...


class ComputedConvTranspose2d(_Computed, nn.ConvTranspose2d): ...


class ComputedConvTranspose3d(_Computed, nn.ConvTranspose3d): ...


class ComputedEmbedding(_Computed, nn.Embedding): ...


class ComputedLSTM(_ComputedRecurrent, nn.LSTM): ...


class ComputedGRU(_ComputedRecurrent, nn.GRU): ...


# Exact types only: a subclass may use its weight in ways of its own, and is left alone.
_CLASSES = {
    cls.__bases__[1]: cls
    for cls in (
        ComputedLinear, ComputedConv1d, ComputedConv2d, ComputedConv3d, ComputedConvTranspose1d,
        ComputedConvTranspose2d, ComputedConvTranspose3d, ComputedEmbedding, ComputedLSTM,
        ComputedGRU,
    )
}  # fmt: skip
LINEAR = (nn.Linear,)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.LSTM, nn.GRU)


def layer_type(layer: nn.Module) -> type[nn.Module] | None:
    """The plain torch type of a layer that can have computed weights, else None."""
    cls = type(layer)
    if isinstance(layer, _Computed):
        return cls.__bases__[1]
    return cls if cls in _CLASSES else None


def inner_dims(layer: nn.Module) -> int:
    """How many dimensions of a linear or convolution layer's output come after its channels."""
    return len(getattr(layer, "kernel_size", ()))


def weight_names(layer: nn.Module) -> list[str]:
    """Names of the weights (not biases) of a layer that can be computed."""
    if isinstance(layer, RECURRENT):
        return [name for name in layer._flat_weights_names if name.startswith("weight")]
    return ["weight"]


def compute_weight(layer: nn.Module, name: str, source: nn.Module) -> None:
    """From now on, ``layer``'s weight ``name`` is what ``source()`` returns."""
    if not isinstance(layer, _Computed):
        layer.__class__ = _CLASSES[type(layer)]
        layer.sources = nn.ModuleDict()
    if name in layer._parameters:
        del layer._parameters[name]
    if isinstance(layer, RECURRENT):
        layer._flat_weights = []
    layer.sources[name] = source


def source_of(layer: nn.Module, name: str) -> nn.Module | None:
    """The source that computes this weight, or None for a plain parameter."""
    return layer.sources[name] if isinstance(layer, _Computed) and name in layer.sources else None


def weight_of(layer: nn.Module, name: str) -> Tensor:
    """The dense weight, whether it is a parameter or computed."""
    source = source_of(layer, name)
    return layer._parameters[name] if source is None else source()


def make_dense(*layers: nn.Module) -> None:
    """Turn computed weights back into plain parameters that hold the same values.

    Layers of one call that share a weight go on sharing it.
    """
    made: dict[nn.Module, nn.Parameter] = {}
    for layer in layers:
        if not isinstance(layer, _Computed):
            continue
        sources = dict(layer.sources.items())
        del layer.sources
        layer.__class__ = layer_type(layer)
        for name, source in sources.items():
            if source not in made:
                frozen = [not parameter.requires_grad for parameter in source.parameters()]
                trained = not frozen or not all(frozen)
                made[source] = nn.Parameter(source().detach().clone(), requires_grad=trained)
            layer.register_parameter(name, made[source])
        # Parameters stand in the order in which torch makes them.
        order = layer._flat_weights_names if isinstance(layer, RECURRENT) else ["weight", "bias"]
        layer._parameters = {n: layer._parameters[n] for n in order if n in layer._parameters}
        if isinstance(layer, RECURRENT):
            layer._init_flat_weights()


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight and bias of ``model`` by name, dense, and each shared one once."""
    seen = set()
    for prefix, module in model.named_modules():
        if _inside_source(prefix):
            continue
        entries = {name: p for name, p in module._parameters.items() if p is not None}
        if isinstance(module, _Computed):
            entries |= dict(module.sources.items())
        for name, entry in entries.items():
            if id(entry) in seen:
                continue
            seen.add(id(entry))
            value = entry() if isinstance(entry, nn.Module) else entry
            yield f"{prefix}.{name}" if prefix else name, value.detach()


def _inside_source(prefix: str) -> bool:
    return "sources" in prefix.split(".")
