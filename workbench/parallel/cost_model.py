"""What a training step would cost on machines that are not here: time and memory, *modelled*.

A step does ``3 * forward FLOPs``, one forward and two backward, and sends what its layout makes it
send. A collective among p workers takes ``steps * latency + bytes / bandwidth`` (the alpha-beta
model of a link), where a ring all-reduce of S bytes has ``2 (p - 1)`` steps and lets each worker
send ``2 (p - 1) / p * S`` bytes; an all-gather or a reduce-scatter has half of both.

A `Layout` is a grid of data * tensor * pipeline workers:

- **data**: each has a share of the batch; gradients are summed once a step. *Sharded* (FSDP, ZeRO
  stage 3), parameters are gathered before each use and gradients scattered: 1.5 times the bytes,
  and more if a share of the batch is computed in several pieces.
- **tensor**: each has a part of every layer; the activations of a block are summed twice forward
  and twice backward.
- **pipeline**: each has some of the layers; micro-batches pass from one to the next, and of the
  time the share ``(p - 1) / (m + p - 1)`` is idle.

Communication of gradients and parameters may hide behind computation; that of activations cannot.
No machine does its peak FLOP/s: `Machine.flops_per_s` is what it reaches on one worker, measured.

References: Patarasu and Yuan (2009), "Bandwidth optimal all-reduce algorithms for clusters of
workstations"; Shoeybi et al. (2019), "Megatron-LM: training multi-billion parameter language models
using model parallelism"; Rajbhandari et al. (2020), "ZeRO: memory optimizations toward training
trillion parameter models"; Narayanan et al. (2021), "Efficient large-scale language model training
on GPU clusters using Megatron-LM".
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

BACKWARD = 2  # of the FLOPs of a forward pass: by the inputs, and by the weights
_SUMS_OF_A_BLOCK = 4  # all-reduces of its activations among tensor-parallel workers, in a step


@dataclass(frozen=True)
class Link:
    """What lies between workers: seconds until the first byte, and bytes a second after it."""

    latency_s: float
    bandwidth_bytes_s: float

    def __post_init__(self):
        if self.latency_s < 0 or not self.bandwidth_bytes_s > 0:
            raise ValueError(f"{self}: a latency is 0 or more, a bandwidth above 0")

    @classmethod
    def of_bits(cls, bandwidth_bit_s: float, latency_s: float) -> "Link":
        return cls(latency_s, bandwidth_bit_s / 8)

    def send_s(self, size_bytes: float) -> float:
        """From one worker to another."""
        return self.latency_s + size_bytes / self.bandwidth_bytes_s

    def all_gather_s(self, size_bytes: float, workers: int) -> float:
        """By a ring, of ``size_bytes`` in all; a reduce-scatter takes the same."""
        steps = workers - 1
        return steps * self.latency_s + steps / workers * size_bytes / self.bandwidth_bytes_s

    def all_reduce_s(self, size_bytes: float, workers: int) -> float:
        """By a ring: a reduce-scatter, then an all-gather."""
        return 2 * self.all_gather_s(size_bytes, workers)


@dataclass(frozen=True)
class Machine:
    """One worker, and its links: to few others near it, and to all.

    Attributes:
        flops_per_s: that it reaches when it trains by itself.
        memory_bytes: that it has for training.
        near: the link among the ``near_workers`` of one box; None where there is but one link.
        far: the link between boxes.
        overlap: share of the communication of gradients and parameters that can hide behind
            computation, where there is enough of that.
    """

    flops_per_s: float
    memory_bytes: float
    far: Link
    near: Link | None = None
    near_workers: int = 1
    overlap: float = 0.0

    def __post_init__(self):
        if not self.flops_per_s > 0 or not self.memory_bytes > 0 or not 0 <= self.overlap <= 1:
            raise ValueError(
                f"{self}: FLOP/s and memory are above 0, and overlap is between 0 and 1"
            )

    def link(self, span: int) -> Link:
        """The slowest link within a group of so many neighbours."""
        return self.near if self.near and span <= self.near_workers else self.far


@dataclass(frozen=True)
class Work:
    """A model in training, for a layer model of equal blocks.

    Attributes:
        parameters: how many.
        blocks: layers that a pipeline can be cut between and that tensor parallelism splits.
        forward_flops: of one example.
        boundary_bytes: activations between two blocks, of one example.
        activation_bytes: kept for the backward pass, of one example.
        parameter_bytes: of one parameter, and so of one gradient on the wire.
        state_bytes: of one parameter with its gradient and the optimizer's state: 16 for Adam in
            float32, and in mixed precision (Rajbhandari et al., 2020).
    """

    parameters: float
    blocks: int
    forward_flops: float
    boundary_bytes: float
    activation_bytes: float
    parameter_bytes: float = 4
    state_bytes: float = 16

    @classmethod
    def transformer(
        cls,
        parameters: float,
        *,
        blocks: int,
        width: int,
        context: int,
        parameter_bytes: float = 2,
        recompute: bool = False,
    ) -> "Work":
        """A transformer by its size: an example is a sequence of ``context`` tokens.

        A token takes two FLOPs for each parameter, and attention ``2 * context * width`` more for
        each block and each of its two products. A block keeps about 34 bytes for each number of
        its input in 16 bits (without the scores, as flash attention does), or, if it is
        recomputed, its input alone (Korthikanti et al. 2022, "Reducing activation recomputation in
        large transformer models"); recomputing costs one more forward pass.
        """
        flops = context * (2 * parameters + 4 * blocks * context * width)
        boundary = 2 * context * width
        kept = blocks * (boundary if recompute else 34 / 2 * boundary)
        flops *= (2 + BACKWARD) / (1 + BACKWARD) if recompute else 1
        return cls(parameters, blocks, flops, boundary, kept, parameter_bytes)


@dataclass(frozen=True)
class Layout:
    """How many workers share the batch, each layer, and the chain of layers.

    Each share of the batch passes in ``microbatches``, one after the other: a pipeline is filled
    with them, and elsewhere the activations of only one are kept.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    sharded: bool = False
    microbatches: int = 1

    def __post_init__(self):
        sizes = (self.data, self.tensor, self.pipeline, self.microbatches)
        if any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError(f"{self}: all sizes are whole numbers from 1")

    @property
    def workers(self) -> int:
        return self.data * self.tensor * self.pipeline

    def __str__(self) -> str:
        parts = [
            f"{'sharded' if self.sharded else 'data'} {self.data}" if self.data > 1 else "",
            f"tensor {self.tensor}" if self.tensor > 1 else "",
            f"pipeline {self.pipeline}" if self.pipeline > 1 else "",
        ]
        pieces = f" in {self.microbatches}" if self.microbatches > 1 else ""
        return (" x ".join(filter(None, parts)) or "one worker") + pieces


def predict(work: Work, layout: Layout, machine: Machine, *, batch: int) -> dict[str, float]:
    """Time and memory of a training step, modelled.

    Args:
        batch: examples of a step, of all workers together.

    Returns:
        ``step_s`` and its parts: ``compute_s``, ``bubble_s`` (idle in the pipeline),
        ``activations_s`` (sent between tensor- and pipeline-parallel workers) and ``gradients_s``
        (with parameters, where they are sharded: what does not hide); ``memory_bytes`` of a worker
        and whether it ``fits``; ``efficiency``: the share of the workers' FLOP/s that is used.

    Raises:
        ValueError: a layout that this work cannot have: more stages than blocks, or less than one
            example for each micro-batch.

    >>> from workbench.parallel.cost_model import Layout, Link, Machine, Work, predict
    >>> laptop = Machine(flops_per_s=1e11, memory_bytes=8e9, far=Link.of_bits(100e6, 1e-4))
    >>> net = Work(parameters=1e6, blocks=4, forward_flops=1e8, boundary_bytes=1e4,
    ...            activation_bytes=1e6)
    >>> two = predict(net, Layout(data=2), laptop, batch=64)
    >>> round(two["compute_s"], 3), round(two["gradients_s"], 3)  # 4 MB over 100 Mbit/s
    (0.096, 0.32)
    """
    _check(work, layout, batch)
    share = batch / layout.data  # examples that pass through one chain of stages
    microbatch = share / layout.microbatches
    compute = (1 + BACKWARD) * work.forward_flops * batch / layout.workers / machine.flops_per_s
    bubble = compute * (layout.pipeline - 1) / layout.microbatches

    tensor_link = machine.link(layout.tensor)
    blocks_here = work.blocks / layout.pipeline
    boundary = microbatch * work.boundary_bytes
    sums = _SUMS_OF_A_BLOCK * blocks_here * layout.microbatches
    activations = sums * tensor_link.all_reduce_s(boundary, layout.tensor)
    if layout.pipeline > 1:
        stage_link = machine.link(layout.tensor * layout.pipeline)
        activations += 2 * layout.microbatches * stage_link.send_s(boundary / layout.tensor)

    data_link = machine.link(layout.workers)
    parameters_here = work.parameters / layout.tensor / layout.pipeline
    gradient = parameters_here * work.parameter_bytes
    if layout.sharded:  # gathered forward and backward, for each micro-batch; scattered once
        passes = 2 * layout.microbatches + 1
        gradients = passes * data_link.all_gather_s(gradient, layout.data)
    else:
        gradients = data_link.all_reduce_s(gradient, layout.data)
    gradients -= min(machine.overlap * gradients, compute)

    in_flight = min(layout.pipeline, layout.microbatches)  # of the first stage, as 1F1B has it
    kept = in_flight * microbatch * work.activation_bytes / layout.tensor / layout.pipeline
    state = parameters_here * work.state_bytes / (layout.data if layout.sharded else 1)
    step = compute + bubble + activations + gradients
    return {
        "step_s": step,
        "compute_s": compute,
        "bubble_s": bubble,
        "activations_s": activations,
        "gradients_s": gradients,
        "memory_bytes": kept + state,
        "fits": kept + state <= machine.memory_bytes,
        "efficiency": compute / step,
    }


def layouts(work: Work, workers: int, *, batch: int) -> Iterator[Layout]:
    """All layouts of so many workers whose sizes are powers of two, but for the data's."""
    sizes = [2**i for i in range(workers.bit_length()) if workers % 2**i == 0]
    for tensor, pipeline in itertools.product(sizes, sizes):
        if workers % (tensor * pipeline) or pipeline > work.blocks:
            continue
        data = workers // (tensor * pipeline)
        if batch % data:
            continue
        share = batch // data
        counts = {2**i for i in range(share.bit_length()) if share % 2**i == 0}
        for microbatches in sorted(counts):
            for sharded in (False, True) if data > 1 else (False,):
                yield Layout(data, tensor, pipeline, sharded, microbatches)


def best_layout(work: Work, workers: int, machine: Machine, *, batch: int) -> pd.Series | None:
    """The layout of least time among those that fit in memory, with what `predict` says of it.

    None where nothing fits.
    """
    found = [
        {"layout": layout, "workers": workers, **predict(work, layout, machine, batch=batch)}
        for layout in layouts(work, workers, batch=batch)
    ]
    fitting = [row for row in found if row["fits"]]
    return pd.Series(min(fitting, key=lambda row: row["step_s"])) if fitting else None


def scaling(
    work: Work,
    machine: Machine,
    *,
    batch: int,
    workers: Sequence[int] = tuple(2**i for i in range(13)),
) -> pd.DataFrame:
    """`best_layout` for each number of workers that the batch can keep busy, modelled.

    Returns:
        A row for each: the layout, the columns of `predict`, and ``speedup`` against one worker's
        FLOP/s.
    """
    rows = [best_layout(work, count, machine, batch=batch) for count in workers]
    frame = pd.DataFrame([row for row in rows if row is not None])
    if len(frame):
        alone = (1 + BACKWARD) * work.forward_flops * batch / machine.flops_per_s
        frame["speedup"] = alone / frame["step_s"]
    return frame.reset_index(drop=True)


def fit_link(sizes_bytes: Sequence[float], seconds: Sequence[float]) -> Link:
    """The link for which `Link.send_s` is nearest to what was measured, in relative terms.

    Raises:
        ValueError: fewer than two sizes.
    """
    if len(set(sizes_bytes)) < 2 or len(sizes_bytes) != len(seconds):
        raise ValueError(f"{len(sizes_bytes)} sizes and {len(seconds)} times; give two or more")
    weights = [1 / s**2 for s in seconds]
    total = math.fsum(weights)
    x = math.fsum(w * b for w, b in zip(weights, sizes_bytes, strict=True)) / total
    y = math.fsum(w * s for w, s in zip(weights, seconds, strict=True)) / total
    rows = list(zip(weights, sizes_bytes, seconds, strict=True))
    slope = math.fsum(w * (b - x) * (s - y) for w, b, s in rows)
    slope /= math.fsum(w * (b - x) ** 2 for w, b, _ in rows)
    return Link(max(0.0, y - slope * x), 1 / max(slope, 1e-15))


def _check(work: Work, layout: Layout, batch: int) -> None:
    if layout.pipeline > work.blocks:
        raise ValueError(f"{layout.pipeline} stages of {work.blocks} blocks; give one or more each")
    if batch < layout.data * layout.microbatches:
        raise ValueError(
            f"a batch of {batch} is less than one example for each of {layout.data} workers' "
            f"{layout.microbatches} micro-batches"
        )
