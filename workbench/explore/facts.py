"""What can be measured of a model before anything is done to it, layer by layer.

`facts` costs seconds and needs no labels: where the bytes are, where the time goes, and what is
redundant. What to make of it is said in `workbench.explore.advice`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from workbench import models
from workbench.compress.computed import copy_of, layer_type, source_of, weight_names, weight_of
from workbench.compress.layers import coverage, layers_of
from workbench.compress.tracing import fold_batch_norms, trace
from workbench.deploy.runtimes import prepare
from workbench.measure.hardware import hardware
from workbench.measure.latency import measure_latency
from workbench.measure.roofline import layers as operations

LARGE_BATCH = 32
_MOST_ROWS = 4096  # of a weight that are compared with each other: an embedding has many more
_DEAD = 0.01  # a channel whose weights are this small beside its layer's largest
_PARALLEL = 0.99  # cosine from which on two channels say the same


@dataclass(frozen=True)
class Facts:
    """What `facts` measured.

    Attributes:
        layers: one row for each layer with weights: ``layer``, ``type``, ``weights``,
            ``stored_as``, ``tied`` (to an earlier one); ``weight_share``, ``mac_share`` and
            ``time_share`` of the model's; ``macs`` of one example; ``rank_share`` (directions that
            hold 90 % of the energy, of all), ``spare`` (share of the channels that are almost zero
            or parallel to another), ``zeros`` (share), ``values`` (how many differ), ``spread``
            (the range of the widest channel over that of the median one).
        size_bytes: of the plain file.
        latency_ms: of one example in eager PyTorch.
        fixed_share: how much of that does not depend on the number of examples.
        extensions: vector instructions of the processor that matter here.
    """

    layers: pd.DataFrame
    size_bytes: int
    latency_ms: float
    fixed_share: float
    extensions: tuple[str, ...]

    def share(self, column: str, *types: type[nn.Module]) -> float:
        """What the layers of these types have of ``column``, e.g. ``mac_share``."""
        names = [kind.__name__ for kind in types]
        return float(self.layers.loc[self.layers["type"].isin(names), column].sum())

    def mean(self, column: str) -> float:
        """Over all weights, e.g. of ``zeros``."""
        return float(np.average(self.layers[column], weights=self.layers["weights"]))

    def top(self, column: str) -> pd.Series:
        """The layer with the most of ``column``."""
        return self.layers.loc[self.layers[column].idxmax()]


def facts(model: nn.Module, inputs: tuple[Tensor, ...], *, threads: int = 1) -> Facts:
    """Measure a model on the inputs of one example.

    Args:
        inputs: each with a leading batch dimension of 1.
        threads: of torch, when time is measured; restored afterwards.

    Raises:
        ValueError: a model without weights.
    """
    table = coverage(model)
    if table.empty:
        raise ValueError(f"{type(model).__name__} has no layer with weights; nothing to advise on")
    folded, plain = _folded(model), _matrices(model)
    rows = [_row(folded.get(name), plain.get(name)) for name in table["layer"]]
    layers = pd.concat([table.drop(columns=["activations", "reason"]), pd.DataFrame(rows)], axis=1)
    work = operations(model, inputs, passes=5, threads=threads)
    home = work["layer"].map(lambda name: _owner(name, layers["layer"]))
    sums = (work.assign(macs=work["flops"] / 2).groupby(home)[["macs", "latency_ms"]].sum()
            .reindex(layers["layer"], fill_value=0.0))  # fmt: skip
    total = work[["flops", "latency_ms"]].sum()
    layers["tied"] = _tied(model, layers["layer"])
    own = layers["weights"].where(~layers["tied"], 0)  # what is shared has its bytes once
    layers["weight_share"] = own / max(1, own.sum())
    layers["macs"] = sums["macs"].to_numpy().astype(int)
    layers["mac_share"] = sums["macs"].to_numpy() / max(1, total["flops"] / 2)
    layers["time_share"] = sums["latency_ms"].to_numpy() / total["latency_ms"]
    one_ms, many_ms = _latencies(model, inputs, threads)
    each_ms = max(0.0, many_ms - one_ms) / (LARGE_BATCH - 1)
    return Facts(
        layers, models.file_bytes(model), one_ms, max(0.0, 1 - each_ms / one_ms),
        hardware().vector_extensions,
    )  # fmt: skip


def _folded(model: nn.Module) -> Mapping[str, Tensor]:
    """The weights as matrices (channels, inputs), batch norms folded in where that can be."""
    work = copy_of(model).eval()
    try:
        graph, _ = trace(work)
        fold_batch_norms(graph)
    except ValueError:  # untraceable: as they stand
        graph = work
    return _matrices(graph)


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: weight_of(layer, weight_names(layer)[0]).detach().float().flatten(1).cpu()
        for name, layer in layers_of(model).items()
        if weight_names(layer)
    }


def _tied(model: nn.Module, names: pd.Series) -> list[bool]:
    """Whether a layer's weight is also that of one before it."""
    seen, found = set(), []
    for name in names:
        layer = model.get_submodule(name)
        keys = weight_names(layer) if layer_type(layer) is not None else []
        entries = {id(source_of(layer, key) or layer._parameters.get(key)) for key in keys}
        found.append(bool(entries & seen))
        seen |= entries
    return found


def _row(weight: Tensor | None, plain: Tensor | None) -> dict[str, float]:
    """Redundancy and ranges of one weight, (channels, inputs): as it acts, and as it is stored."""
    if weight is None or plain is None:  # a kind of layer that no technique has a rule for
        return {"rank_share": 1.0, "spare": 0.0, "zeros": 0.0, "values": 0, "spread": 1.0}
    some = weight[:_MOST_ROWS]
    return {
        "rank_share": _rank_share(weight),
        "spare": _spare(some),
        "zeros": float((plain == 0).float().mean()),
        "values": len(plain.unique()),
        "spread": _spread(weight.abs().amax(1)),
    }


def _rank_share(weight: Tensor, energy: float = 0.9) -> float:
    gram = weight.T @ weight if weight.shape[0] > weight.shape[1] else weight @ weight.T
    squared = torch.linalg.eigvalsh(gram.double()).clamp(min=0).flip(0)
    if squared.sum() == 0:
        return 0.0
    needed = int((squared.cumsum(0) < energy * squared.sum()).sum()) + 1
    return needed / len(squared)


def _spare(weight: Tensor) -> float:
    """Share of the rows that another one could stand in for, or nothing at all."""
    norms = weight.norm(dim=1)
    alive = norms > _DEAD * norms.max()
    rows = weight[alive] / norms[alive, None]  # (alive, inputs)
    if weight.shape[1] < 8:  # short rows, as of depthwise kernels, are parallel by chance
        return 1 - float(alive.float().mean())
    like = (rows @ rows.T).abs().triu(diagonal=1) > _PARALLEL  # (alive, alive)
    return 1 - float(alive.sum() - like.any(0).sum()) / len(weight)


def _spread(ranges: Tensor) -> float:
    middle = float(ranges[ranges > 0].median()) if (ranges > 0).any() else 0.0
    return float(ranges.max()) / middle if middle else 1.0


def _owner(name: str, layers: pd.Series) -> str:
    """The layer that an operation belongs to: itself or the one that it is inside of."""
    inside = [layer for layer in layers if name == layer or name.startswith(f"{layer}.")]
    return max(inside, key=len, default="")


def _latencies(model: nn.Module, inputs: tuple[Tensor, ...], threads: int) -> list[float]:
    """Milliseconds of one call on one example, and on a large batch."""
    eager = prepare(model, "eager", example_input=inputs)
    found = []
    for size in (1, LARGE_BATCH):
        batch = tuple(torch.cat([x[:1]] * size) for x in inputs)
        timed = measure_latency({"eager": eager}, batch, repeats=10, warmup=2, threads=threads)
        found.append(float(timed.summary["latency_ms"].iloc[0]))
    return found
