"""A data set among ranks: every example of an epoch goes to exactly one of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

from workbench.data import Split


@dataclass(frozen=True)
class Share:
    """What one rank has of a batch; ``weight`` is its part of the batch's examples.

    Where a batch has fewer examples than there are ranks, some get an example of another rank with
    weight 0: they must take part in what all ranks do together.
    """

    inputs: tuple[Tensor, ...]
    target: Tensor
    weight: float

    def split(self, pieces: int) -> "list[Share]":
        """The share in so many pieces, of weights that sum up to its own."""
        parts = torch.arange(len(self.target)).tensor_split(pieces)
        return [self._take(part, len(part) / len(self.target)) for part in parts]

    def _take(self, part: Tensor, fraction: float) -> "Share":
        part = part if len(part) else torch.zeros(1, dtype=torch.long)
        return Share(tuple(x[part] for x in self.inputs), self.target[part], self.weight * fraction)


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
) -> Iterator[Share]:
    """This rank's share of each batch of an epoch: every example goes to exactly one rank.

    The batches are those of ``split.batches(batch_size, shuffle=True, seed=seed + epoch)``. All
    ranks get equally many shares, of sizes that differ by one at most. (torch's own
    ``DistributedSampler`` repeats examples until all ranks have equally many, or drops some.)

    Args:
        start: how many batches to leave out at the start, to go on with an interrupted epoch.
        rank, world_size: by default, of the process group.

    Raises:
        ValueError: a setting out of range, or no process group to take rank and world size from.
        TypeError: the split is a loader or a callable, which gives batches of its own.
    """
    examples = examples_of(split)
    check_whole("batch_size", batch_size)
    if rank is None or world_size is None:
        rank, world_size = rank_and_world_size()
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} of {world_size}; give 0 to {world_size - 1}")
    numbers = torch.arange(len(split))
    order = Split(TensorDataset(numbers, numbers))
    weights = []

    def read() -> Iterator:
        whole = order.batches(batch_size, shuffle=True, seed=seed + epoch)
        for _, batch in islice(whole, start, None):
            mine = batch.tensor_split(world_size)[rank]
            weights.append(len(mine) / len(batch))
            mine = mine if len(mine) else batch[:1]
            if isinstance(examples, TensorDataset):
                yield examples[mine]
            else:
                yield default_collate([examples[number] for number in mine.tolist()])

    for inputs, target in Split(read).batches():
        yield Share(inputs, target, weights.pop())


def rank_and_world_size() -> tuple[int, int]:
    """Of the process group; ValueError where there is none."""
    if not dist.is_initialized():
        raise ValueError(
            "there is no process group; call this in a function that workbench.parallel.run or "
            "workbench.parallel.torchrun.launch starts"
        )
    return dist.get_rank(), dist.get_world_size()


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Refuse what is not a whole number, or too small."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; give a whole number from {least}")


def examples_of(split: Split) -> Dataset:
    """The data set of a split; TypeError where there are batches only."""
    if not isinstance(split.source, Dataset):
        kind = type(split.source).__name__
        raise TypeError(
            f"the split's source is a {kind}, which gives batches of its own; ranks divide "
            "examples: give tensors or a Dataset"
        )
    return split.source
