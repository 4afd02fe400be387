"""Few distinct weights: a layer keeps a short codebook, and for a weight the number of its entry.

k-means finds the shared values. With 32 of them a weight takes 5 bits instead of 32. The codebook
is trained like any parameter (`workbench.training.fit`): the gradient of a shared value is the sum
of the gradients of the weights that share it. Weights that are exactly zero are taken for pruned:
they stay zero under a code of their own, 0, which has no entry in the codebook.

Shapes: O output channels, V values of a channel, B values of a block, N blocks, G groups of
channels with a codebook each, K entries of a codebook. A block is B neighbouring values of one
flattened channel: of a convolution in the order (input, height, width).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from workbench.compress.computed import Source, Stored, copy_of
from workbench.compress.grid import from_rows, pack, unpack
from workbench.compress.layers import (
    check_model,
    finish,
    layers_of,
    per_layer,
    places,
    reasons_left,
    replace_weights,
)

Initialization = Literal["linear", "density", "random"]


def share_weights(
    model: nn.Module,
    *,
    clusters: int | Mapping[str, int] = 32,
    initialization: Initialization | None = None,
    block: int = 1,
    group_channels: int | None = None,
    iterations: int = 300,
    skip: Sequence[str] = (),
    seed: int = 0,
) -> nn.Module:
    """Replace the weights of each layer by a few shared values, or by a few shared blocks of them.

    The file is smaller, the model is not faster: no kernel computes with these codes, so it is
    labelled simulated wherever its speed is shown. Pruned weights stay zero and take one code more:
    31 clusters and zero fill 5 bits. With ``block`` above 1, only blocks that are zero as a whole
    stay zero.

    Args:
        clusters: most entries of a codebook, 1 to 65,536, of all layers or by layer name; a layer
            that is not named is left. Weights of no more distinct values are kept exactly.
        initialization: where k-means starts. "linear": evenly spaced from the smallest weight to
            the largest, which serves the few large ones; "density": as many weights for each;
            "random": weights drawn with ``seed``. None is "linear" for single values, and for
            blocks, which have no order, "random".
        block: neighbouring weights of an output channel with one code (product quantization). A
            layer whose channels do not divide into blocks is left.
        group_channels: output channels with a codebook in common; None is all of the layer.
        iterations: most steps of k-means. It ends before that where nothing moves any more and, for
            blocks, where a step lowers the error by less than a thousandth.

    Raises:
        ValueError: a setting out of range, NaN in weights, or an unknown layer name.

    References: Han, Mao and Dally (2016), "Deep compression"; Gong et al. (2014), "Compressing
    deep convolutional networks using vector quantization"; Stock et al. (2020), "And the bit goes
    down: revisiting the quantization of neural networks".
    """
    work = copy_of(model)
    check_model(work, skip, "share")
    layers = layers_of(work)
    initialization = initialization or ("linear" if block == 1 else "random")
    settings = {
        name: Clustering(count, initialization, block, group_channels, iterations, seed)
        for name, count in per_layer(clusters, layers, "clusters").items()
    }
    left = reasons_left(work, {*settings} - {*skip}, skip, "not named in clusters")
    layers = {name: layer for name, layer in layers.items() if name not in left}
    for name, layer in layers.items():
        for place in places({name: layer}).values():
            values = place.dense.numel() // place.dense.shape[place.axis]
            if values % block:
                left[name] = f"{values} weights of a channel do not divide into blocks of {block}"
    layers = {name: layer for name, layer in layers.items() if name not in left}
    shared = {
        original: SharedWeight.of(
            place.dense, settings[place.layer], place.axis, _is_trained(original)
        )
        for original, place in places(layers).items()
    }
    for name, layer in layers.items():
        found = places({name: layer})
        before_bytes = sum(place.dense.nbytes for place in found.values())
        if sum(shared[original].nbytes for original in found) >= before_bytes:
            left[name] = "codes and codebook would take no less than the weights"
    layers = {name: layer for name, layer in layers.items() if name not in left}
    replace_weights(layers, lambda place: shared[place.original])
    kinds = {settings[name].describe() for name in settings if name not in skip}
    amount = kinds.pop().replace("shared ", "") if len(kinds) == 1 else "by layer"
    return finish(work, model, f"shared weights ({amount})", layers, left, "shared")


def _is_trained(original: nn.Parameter | Source) -> bool:
    """Whether a weight is trained. One without parameters (integer codes) was never frozen."""
    if isinstance(original, nn.Parameter):
        return original.requires_grad
    return all(parameter.requires_grad for parameter in original.parameters())


@dataclass(frozen=True)
class Clustering:
    """How weights are grouped; the fields are those of `share_weights`.

    block  shape of the codebook
    -----  -----------------------------------------
    1      (ceil(O / group_channels), clusters)
    B > 1  (ceil(O / group_channels), clusters, B)
    """

    clusters: int
    initialization: Initialization
    block: int
    group_channels: int | None
    iterations: int
    seed: int

    def __post_init__(self):
        for name, most in {"clusters": 65_536, "block": None, "iterations": None}.items():
            _check_whole(name, getattr(self, name), most)
        if self.group_channels is not None:
            _check_whole("group_channels", self.group_channels)
        if self.initialization not in ("linear", "density", "random"):
            raise ValueError(
                f"initialization is {self.initialization!r}; choose 'linear', 'density' or 'random'"
            )
        if self.block > 1 and self.initialization != "random":
            raise ValueError(
                f"initialization is {self.initialization!r}, but blocks have no order; choose "
                "'random', or block=1"
            )

    def describe(self) -> str:
        group = f" per {self.group_channels} channels" if self.group_channels else ""
        return _entries(self.clusters, self.block) + group


def _check_whole(name: str, value: object, most: int | None = None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 1 or (most and value > most):
        limits = f"from 1 to {most:,}" if most else "from 1"
        raise ValueError(f"{name} is {value!r}; give a whole number {limits}")


def _entries(clusters: int, block: int) -> str:
    if block == 1:
        return _plural(clusters, "shared value")
    return f"{_plural(clusters, 'shared block')} of {block}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


class SharedWeight(Source):
    """The source of a weight of few values: a codebook, and packed codes that point into it.

    ``codes`` has one code a block in the order of the channels: the entry in the codebook of the
    channel's group or, where the weight has ``zeros``, 0 for zero and the entry plus 1.
    """

    packed: Tensor

    def __init__(
        self,
        codebook: Tensor,  # (G, K), or (G, K, B) for blocks
        codes: Tensor,  # (N,)
        shape: torch.Size,
        axis: int,
        group_channels: int,
        zeros: bool,
        requires_grad: bool = True,
    ):
        super().__init__()
        self.shape, self.axis, self.group_channels, self.zeros = shape, axis, group_channels, zeros
        self.block = codebook.shape[2] if codebook.dim() == 3 else 1
        self.bits = max(1, (codebook.shape[1] + zeros - 1).bit_length())
        self.codebook = nn.Parameter(codebook.detach().clone(), requires_grad=requires_grad)
        self.register_buffer("packed", pack(codes.cpu(), self.bits).to(codebook.device))
        self._unpacked: tuple[Tensor, int, Tensor] | None = None

    @classmethod
    def of(
        cls, weight: Tensor, clustering: Clustering, axis: int = 0, requires_grad: bool = True
    ) -> "SharedWeight":
        """Cluster a weight of finite values, whose channels divide into blocks."""
        exact = torch.promote_types(weight.dtype, torch.float32)
        rows = weight.detach().cpu().to(exact).movedim(axis, 0).flatten(1)  # (O, V)
        blocks = rows.unflatten(1, (-1, clustering.block))  # (O, V / B, B)
        group_channels = min(clustering.group_channels or len(rows), len(rows))
        codebooks, codes = [], []
        for group in blocks.split(group_channels):
            group = group.flatten(0, 1)  # (N, B)
            filled = (group != 0).any(1)
            values = group[filled]
            # Rounded to how it is stored, so that each weight gets the nearest of what is there.
            codebook = _k_means(values, clustering).to(weight.dtype).to(exact)  # (up to K, B)
            found = torch.zeros(len(group), dtype=torch.int32)
            found[filled] = _nearest(values, codebook) + 1
            codebooks.append(codebook)
            codes.append(found)
        codes = torch.cat(codes)
        zeros = bool((codes == 0).any())
        size = max(map(len, codebooks))  # the places that a group does not need hold 0
        table = torch.zeros(len(codebooks), size, clustering.block, dtype=exact)
        for entries, codebook in zip(table, codebooks, strict=True):
            entries[: len(codebook)] = codebook
        table = table.squeeze(2) if clustering.block == 1 else table
        table = table.to(weight.device, weight.dtype)
        codes = codes if zeros else codes - 1
        return cls(table, codes, weight.shape, axis, group_channels, zeros, requires_grad)

    @property
    def nbytes(self) -> int:
        """Bytes that are stored."""
        return self.codebook.nbytes + self.packed.nbytes

    def codes(self) -> Tensor:
        """The codes as int32, one a block: (N,)."""
        count = self.shape.numel() // self.block
        pieces = self.packed.split(_PIECE // 8 * self.bits)
        counts = (min(_PIECE, count - start) for start in range(0, count, _PIECE))
        return torch.cat(
            [unpack(piece, self.bits, n).int() for piece, n in zip(pieces, counts, strict=True)]
        )

    def forward(self) -> Tensor:
        # Gradients of many weights are summed here: not in 16 bits.
        table = self.codebook.to(torch.promote_types(self.codebook.dtype, torch.float32))
        table = table.flatten(0, 1)  # (G K,) or (G K, B)
        if self.zeros:
            table = torch.cat([torch.zeros_like(table[:1]), table])
        dense = table.index_select(0, self._index()).to(self.codebook.dtype)  # (N,) or (N, B)
        return from_rows(dense.view(self.shape[self.axis], -1), self.shape, self.axis)

    def _index(self) -> Tensor:
        """Where each block stands among zero, if there is one, and the codebooks: (N,) int32.

        Unpacking takes longer than a training step may, so the index is kept until the codes are
        others: another buffer, or the same one after it was written to.
        """
        if self.packed.is_inference():  # has no version that would tell
            return self._compute_index()
        if self._unpacked is not None:
            packed, version, index = self._unpacked
            if packed is self.packed and version == packed._version:
                return index
        with torch.inference_mode(False):  # what is kept must serve training too
            index = self._compute_index()
        self._unpacked = (self.packed, self.packed._version, index)
        return index

    @torch.no_grad()
    def _compute_index(self) -> Tensor:
        codes = self.codes().view(self.shape[self.axis], -1)  # (O, V / B)
        channels = torch.arange(len(codes), device=codes.device, dtype=torch.int32)
        first = (channels // self.group_channels * self.codebook.shape[1])[:, None]
        index = torch.where(codes == 0, 0, codes + first) if self.zeros else codes + first
        return index.flatten()

    def describe(self) -> str:
        groups, entries = self.codebook.shape[:2]
        group = f" per {self.group_channels} channels" if groups > 1 else ""
        zero = " and zero" if self.zeros else ""
        return f"{_entries(entries, self.block)}{group}{zero}, {_plural(self.bits, 'bit')}"

    def masked(self, keep: Tensor) -> "SharedWeight | None":
        blocks = keep.movedim(self.axis, 0).flatten(1).reshape(-1, self.block)  # (N, B)
        kept = blocks.all(1)
        if not torch.equal(kept, blocks.any(1)):
            return None
        zeros = self.zeros or not bool(kept.all())
        codes = torch.where(kept, self.codes() + (zeros - self.zeros), 0)
        form = (self.shape, self.axis, self.group_channels, zeros)
        return SharedWeight(self.codebook, codes, *form, self.codebook.requires_grad)

    def stored(self) -> Stored:
        least = next(t for t in _CODE_TYPES if self.bits <= t.itemsize * 8)
        codes = self.codes().to(least)
        channels = self.shape[self.axis]
        codes = codes.view(channels, len(codes) // max(1, channels))  # (O, V / B)
        settings = (self.axis, self.group_channels, int(self.zeros))
        return Stored(
            tuple(self.shape), settings, {"codebook": self.codebook.detach(), "codes": codes}
        )

    @classmethod
    def restored(cls, stored: Stored) -> "SharedWeight":
        axis, group_channels, zeros = stored.settings
        codebook, codes = stored.parts["codebook"], stored.parts["codes"].flatten().int()
        return cls(codebook, codes, torch.Size(stored.shape), axis, group_channels, bool(zeros))

    def extra_repr(self) -> str:
        return f"{self.describe()}, shape={tuple(self.shape)}"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_unpacked": None}  # copies and pickles hold what is stored


_PIECE = 2**16  # codes that are unpacked at a time: a multiple of 8
_CODE_TYPES = (torch.uint8, torch.uint16, torch.int32)
_DISTANCES = 2**23  # distances that are held at a time


def _k_means(values: Tensor, clustering: Clustering) -> Tensor:
    """The codebook, (up to K, B), for values of (N, B)."""
    if len(values) == 0:
        return values.new_zeros(1, clustering.block)
    generator = torch.Generator().manual_seed(clustering.seed)
    drawn = torch.randint(len(values), (clustering.clusters,), generator=generator)
    if clustering.block > 1:
        return _block_means(values, values[drawn], clustering)
    # Sorted, a cluster is a stretch of values: only its two ends are to be found.
    ordered = np.sort(values.flatten().numpy())
    distinct = ordered[np.append(True, ordered[1:] != ordered[:-1])]
    if len(distinct) <= clustering.clusters:
        return torch.from_numpy(distinct)[:, None]
    if clustering.initialization == "linear":
        start = np.linspace(ordered[0], ordered[-1], clustering.clusters, dtype=np.float64)
    elif clustering.initialization == "density":
        shares = (np.arange(clustering.clusters) + 0.5) / clustering.clusters
        start = ordered[(shares * len(ordered)).astype(np.int64)].astype(np.float64)
    else:
        start = np.sort(values.flatten().numpy()[drawn]).astype(np.float64)
    return torch.from_numpy(_stretch_means(ordered, start, clustering.iterations))[:, None]


def _stretch_means(ordered: np.ndarray, means: np.ndarray, iterations: int) -> np.ndarray:
    """Lloyd's k-means of sorted values, (N,), from sorted means, (K,).

    A cluster that is left empty moves to the value that is furthest from its mean, the next empty
    one to the next such value: among the first and last value of all clusters.
    """
    sums = np.append(0, np.cumsum(ordered, dtype=np.float64))  # of all values before a place
    for _ in range(iterations):
        # A value in the middle of two means goes to the lower, here and in `_nearest`.
        inner = np.searchsorted(ordered, _middles(means, ordered.dtype), side="right")
        bounds = np.concatenate([[0], inner, [len(ordered)]])  # (K + 1,)
        filled = bounds[1:] > bounds[:-1]
        first, end = bounds[:-1][filled], bounds[1:][filled]
        ends = np.stack([ordered[first], ordered[end - 1]]).astype(np.float64)  # (2, filled)
        # Differences of large sums lose digits, but a mean is between its smallest and largest.
        new = np.clip((sums[end] - sums[first]) / (end - first), *ends)
        furthest = np.argsort(-np.abs(ends - new), axis=None, kind="stable")
        moved = ends.flat[furthest[: len(means) - len(new)]]
        stuck = np.repeat(new[-1], len(means) - len(new) - len(moved))
        new = np.sort(np.concatenate([new, moved, stuck]))
        if np.array_equal(new, means):
            break
        means = new
    return means


def _middles(means: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Half-way between neighbours, rounded down to ``dtype``: it divides its values the same way,
    and the millions of them need no conversion."""
    middles = (means[1:] + means[:-1]) / 2
    rounded = middles.astype(dtype)
    return np.where(rounded > middles, np.nextafter(rounded, dtype.type(-np.inf)), rounded)


def _block_means(blocks: Tensor, means: Tensor, clustering: Clustering) -> Tensor:
    """Lloyd's k-means of blocks, (N, B), from means, (K, B).

    An empty cluster moves to the block that is furthest from its mean, as for single values.
    """
    few = len(means)
    # Blocks are seldom this few; most often a part of them tells, without sorting all.
    distinct = blocks[: 16 * few].unique(dim=0)
    if len(distinct) <= few:
        distinct = blocks.unique(dim=0)
        if len(distinct) <= few:
            return distinct
    error = np.inf
    for _ in range(clustering.iterations):
        nearest, distances = _nearest_blocks(blocks, means)
        previous, error = error, distances.sum(dtype=torch.float64).item()
        if error > previous * (1 - 1e-3):
            break
        counts = nearest.bincount(minlength=few)
        sums = torch.zeros(few, blocks.shape[1], dtype=torch.float64)
        sums.index_add_(0, nearest, blocks.double())
        means = (sums / counts[:, None]).to(blocks.dtype)
        empty = counts == 0
        means[empty] = blocks[distances.topk(int(empty.sum())).indices]
    return means


def _nearest(values: Tensor, codebook: Tensor) -> Tensor:
    """Which entry of the codebook, (K, B), is closest to each of the values, (N, B)."""
    if values.shape[1] > 1 or len(codebook) < 2:
        return _nearest_blocks(values, codebook)[0]
    middles = _middles(codebook.flatten().double().numpy(), values.numpy().dtype)
    return torch.bucketize(values.flatten(), torch.from_numpy(middles), out_int32=True)


def _nearest_blocks(blocks: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the means, (K, B), each block, (N, B), is closest to, and its squared distance."""
    nearest, distances = [], []
    for piece in blocks.split(max(1, _DISTANCES // len(means))):
        # Differences first: the faster form by products cannot tell near blocks apart.
        away = torch.cdist(piece, means, compute_mode="donot_use_mm_for_euclid_dist")
        distance, index = away.min(1)
        nearest.append(index.int())
        distances.append(distance.square())
    return torch.cat(nearest), torch.cat(distances)
