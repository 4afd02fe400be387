"""Fewer bytes on the wire for each step of data-parallel training.

Ranks that train one model exchange a gradient at each step. `compress_gradients` puts a compressor
between `DistributedDataParallel` and the wire; `local_sgd` and `diloco` exchange less often. All of
them leave the same bits in the weights of every rank, and count what a rank sends.

Two collectives carry everything. The sum of S bytes among p ranks (a ring all-reduce) lets each
rank send ``2 (p - 1) / p * S`` bytes; p ranks that hand each other S bytes (an all-gather) send
``(p - 1) * S`` each. Sums suit what can be added without being unpacked: short floats, and the
factors of PowerSGD. All else is gathered, which costs more with each rank.

What a compressor leaves out is not lost. With *error feedback* a rank keeps it and adds it to the
next gradient, so that all it ever sent, and what it still keeps, is the sum of its gradients.

Shapes: N values of a bucket of gradients, C chunks of them, K values kept, r rank of a
factorization of a matrix of n rows and m columns.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from workbench.parallel.shares import check_whole

_BLOCK = 2**16  # places that 16 bits can tell apart


# Values of a message. A long one leaves the link idle between its halves; several short ones under
# way keep it busy (5.8 MB at 100 Mbit/s on gloo: 0.49 s for 0.61 s).
_PIECE = 2**19


def compress_gradients(model: DistributedDataParallel, compressor: "Compressor") -> "Exchange":
    """Let a model exchange compressed gradients from now on; ``.report()`` tells how many bytes.

    Works on gloo and nccl. Each bucket is exchanged when it is full, one after the other. Counted
    are gradients: what DDP sends once at the start, and buffers (those of BatchNorm) if it
    broadcasts them, come on top.

    Raises:
        TypeError: not a `DistributedDataParallel`, or not a compressor.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"expected a DistributedDataParallel, got {type(model).__name__}; wrap the model first"
        )
    _check_compressor(compressor)
    exchange = Exchange(model.process_group)

    def hook(exchange: Exchange, bucket: dist.GradBucket) -> Future[Tensor]:
        gradient = bucket.buffer()
        exchange.plain_bytes += exchange.summed(gradient.nbytes)
        average = compressor.average(gradient, bucket.parameters(), exchange)
        exchange.steps += bucket.is_last()
        done = Future(devices=[gradient.device] if gradient.is_cuda else None)
        done.set_result(average.to(gradient.dtype))
        return done

    model.register_comm_hook(exchange, hook)
    return exchange


def local_sgd(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    every: int = 8,
    compressor: "Compressor | None" = None,
) -> "LocalTraining":
    """Each rank trains alone, and every so many steps all take the mean of their weights.

    Reference: Stich (2019), "Local SGD converges fast and communicates little".
    """
    return LocalTraining(model, optimizer, every, 1.0, 0.0, compressor)


def diloco(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    every: int = 64,
    outer_learning_rate: float = 0.7,
    outer_momentum: float = 0.9,
    compressor: "Compressor | None" = None,
) -> "LocalTraining":
    """Ranks train alone for long; how far they came on average is the gradient of an outer step.

    The outer optimizer is SGD with Nesterov momentum; the inner one, ``optimizer``, AdamW in the
    paper.

    Reference: Douillard et al. (2023), "DiLoCo: distributed low-communication training of language
    models".
    """
    return LocalTraining(model, optimizer, every, outer_learning_rate, outer_momentum, compressor)


class LocalTraining:
    """Training that exchanges weights every so many steps; made by `local_sgd` and `diloco`.

    Call `step` in place of the optimizer's, and `synchronize` once at the end. Ranks begin with the
    weights of rank 0. The model is a plain one, not a `DistributedDataParallel`.

    Args:
        every: steps between two exchanges.
        learning_rate: of the outer step, momentum likewise. With 1 and 0 the outer step is the mean
            of the ranks' weights.
        compressor: of what is exchanged; None sends it as it is.

    Raises:
        ValueError: a setting out of range, or no process group.
        TypeError: a model that is wrapped, or not a compressor.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        every: int,
        learning_rate: float,
        momentum: float,
        compressor: "Compressor | None" = None,
    ):
        if isinstance(model, DistributedDataParallel):
            raise TypeError(
                "expected a plain model, got a DistributedDataParallel; give its module"
            )
        check_whole("every", every)
        _check_range("outer_learning_rate", learning_rate, learning_rate > 0, "above 0")
        _check_range("outer_momentum", momentum, 0 <= momentum < 1, "from 0 to below 1")
        self.compressor = compressor or Uncompressed()
        _check_compressor(self.compressor)
        self.exchange = Exchange()
        self.optimizer, self.every = optimizer, every
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.buffers = [b for b in model.buffers() if b.is_floating_point()]
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        self.anchors = [p.detach().clone() for p in self.parameters]  # where all ranks were last
        self.outer = torch.optim.SGD(
            self.anchors, lr=learning_rate, momentum=momentum, nesterov=momentum > 0
        )
        self._since = 0

    def step(self) -> None:
        """One step of this rank's own optimizer, and the exchange where it is due."""
        self.optimizer.step()
        self.exchange.steps += 1
        plain_bytes = sum(p.nbytes for p in self.parameters)
        self.exchange.plain_bytes += self.exchange.summed(plain_bytes)
        self._since += 1
        if self._since == self.every:
            self.synchronize()

    @torch.no_grad()
    def synchronize(self) -> None:
        """Bring all ranks to the same weights; nothing is sent where they have them already."""
        if self._since == 0:
            return
        self._since = 0
        moved = [a - p for a, p in zip(self.anchors, self.parameters, strict=True)]
        moved = torch.cat([change.flatten() for change in moved])  # (N,)
        average = self.compressor.average(moved, self.parameters, self.exchange)
        for anchor, change in zip(self.anchors, _by_parameter(average, self.anchors), strict=True):
            anchor.grad = change.view_as(anchor).to(anchor.dtype)
        self.outer.step()
        for parameter, anchor in zip(self.parameters, self.anchors, strict=True):
            parameter.copy_(anchor)
        for buffer in self.buffers:
            buffer.copy_(self.exchange.sum(buffer) / self.exchange.ranks)

    def report(self) -> "Report":
        """What this rank sent so far."""
        return self.exchange.report()


@dataclass(frozen=True)
class Report:
    """What one rank sent to others so far, and what it would have sent without compression."""

    steps: int
    sent_bytes: float
    plain_bytes: float

    @property
    def bytes_per_step(self) -> float:
        return self.sent_bytes / max(1, self.steps)

    @property
    def times_smaller(self) -> float:
        if self.sent_bytes == 0:
            return math.nan if self.plain_bytes == 0 else math.inf
        return self.plain_bytes / self.sent_bytes


class Exchange:
    """The exchange of one training run as one rank sees it: its collectives and its memory.

    The collectives count what this rank sends. A memory is kept by parameter, not by bucket: DDP
    puts parameters into other buckets after the first step.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        if not dist.is_initialized():
            raise ValueError(
                "there is no process group; call this in a function that workbench.parallel.run "
                "or torchrun started"
            )
        self.group, self.ranks = group, dist.get_world_size(group)
        self.steps, self.sent_bytes, self.plain_bytes = 0, 0.0, 0.0
        self.generator: torch.Generator | None = None
        self.factors: dict[Tensor, Tensor] = {}  # of PowerSGD, by parameter
        self._memories: dict[str, dict[Tensor, Tensor]] = {}

    def report(self) -> Report:
        """What this rank sent so far."""
        return Report(self.steps, self.sent_bytes, self.plain_bytes)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all ranks' values, the same bits on each."""
        total = values.contiguous().clone()
        dist.all_reduce(total, group=self.group)
        self.sent_bytes += self.summed(total.nbytes)
        return total

    def gather(self, payload: Tensor) -> list[Tensor]:
        """All ranks' payloads, which are of one length, in the order of ranks."""
        received = [torch.empty_like(payload) for _ in range(self.ranks)]
        pieces = zip(*(whole.split(_PIECE) for whole in (payload, *received)), strict=True)
        under_way = [
            dist.all_gather(places, piece, group=self.group, async_op=True)
            for piece, *places in pieces
        ]
        for piece in under_way:
            piece.wait()
        self.sent_bytes += (self.ranks - 1) * payload.nbytes
        return received

    def summed(self, size_bytes: int) -> float:
        """Bytes that a rank sends where all ranks sum ``size_bytes``, around a ring."""
        return 2 * (self.ranks - 1) / self.ranks * size_bytes

    def recall(self, name: str, parameters: Sequence[Tensor]) -> Tensor:
        """What is kept of these parameters, one after the other: (N,); at first zeros."""
        memory = self._memories.setdefault(name, {})
        return torch.cat(
            [
                memory[p] if p in memory else p.new_zeros(p.numel(), dtype=torch.float32)
                for p in parameters
            ]
        )

    def keep(self, name: str, parameters: Sequence[Tensor], values: Tensor) -> None:
        """Keep (N,) values until the next step; what overflowed must not stay, and becomes 0."""
        values = values.nan_to_num(0, 0, 0)
        pieces = _by_parameter(values, parameters)
        self._memories.setdefault(name, {}).update(zip(parameters, pieces, strict=True))

    def drawn(self, seed: int, device: torch.device) -> torch.Generator:
        """Random numbers that differ from rank to rank."""
        if self.generator is None:
            self.generator = torch.Generator(device).manual_seed(
                seed * self.ranks + dist.get_rank(self.group)
            )
        return self.generator


class Compressor(ABC):
    """How a gradient crosses the wire. Compressors are settings; memory is the `Exchange`'s."""

    @abstractmethod
    def average(self, gradient: Tensor, parameters: Sequence[Tensor], exchange: Exchange) -> Tensor:
        """The mean over all ranks, as far as it was sent, with the same bits on each.

        Args:
            gradient: (N,) of a bucket: those of its parameters, one after the other.
        """


@dataclass(frozen=True)
class Uncompressed(Compressor):
    """The gradient as it is: what is sent without compression, counted."""

    def average(self, gradient, parameters, exchange):
        return exchange.sum(gradient) / exchange.ranks


@dataclass(frozen=True)
class Cast(Compressor):
    """Gradients as shorter floats, 2 times smaller: summed as such, so no rank unpacks them.

    float16 has 11 bits of precision and ends at 65,504; bfloat16 has 8, and the range of float32.
    """

    dtype: Literal["float16", "bfloat16"] = "float16"

    def __post_init__(self):
        if self.dtype not in ("float16", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; choose 'float16' or 'bfloat16'")

    def average(self, gradient, parameters, exchange):
        # Divided first, so that the sum does not overflow where no gradient does.
        short = (gradient / exchange.ranks).to(getattr(torch, self.dtype))
        return exchange.sum(short).float()


class Codec(Compressor):
    """A compressor that packs a gradient into bytes, which all ranks gather and unpack."""

    feedback: ClassVar[bool] = True
    seed: ClassVar[int] = 0

    @abstractmethod
    def encode(self, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pack (N,) float32 values into uint8; how many depends on N alone."""

    @abstractmethod
    def decode(self, payload: Tensor, count: int) -> Tensor:
        """The (N,) values that a payload stands for."""

    def average(self, gradient, parameters, exchange):
        values = gradient.float()
        if self.feedback:
            values = values + exchange.recall("unsent", parameters)
        payload = self.encode(values, exchange.drawn(self.seed, values.device))
        if self.feedback:
            unsent = values - self.decode(payload, len(values))
            exchange.keep("unsent", parameters, unsent)
        return self.mean_of(exchange.gather(payload), len(values))

    def mean_of(self, payloads: Sequence[Tensor], count: int) -> Tensor:
        """The mean of what payloads stand for: (N,)."""
        total = self.decode(payloads[0], count)
        for payload in payloads[1:]:  # in the order of ranks, or the last bits would differ
            total += self.decode(payload, count)
        return total / len(payloads)


@dataclass(frozen=True)
class Chunked(Codec):
    """A code of a few bits for each value, and a float32 scale for each chunk of them.

    payload: (C,) scales, then (N,) codes packed into bytes.
    """

    chunk: int = 1024
    bits: ClassVar[int]

    def __post_init__(self):
        check_whole("chunk", self.chunk)

    def encode(self, values, generator=None):
        chunks = _chunks(values, self.chunk)  # (C, chunk)
        scales, codes = self.quantize(chunks, len(values), generator)  # (C,), (C, chunk)
        return _bytes(scales, pack(codes.flatten()[: len(values)], self.bits))

    def decode(self, payload, count):
        scales_bytes = 4 * math.ceil(count / self.chunk)
        scales = payload[:scales_bytes].view(torch.float32)  # (C,)
        codes = unpack(payload[scales_bytes:], self.bits, count)  # (N,)
        levels = _chunks(self.levels(codes.float()), self.chunk)  # (C, chunk)
        return (levels * scales[:, None]).flatten()[:count]

    @abstractmethod
    def quantize(
        self, chunks: Tensor, count: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Scales, (C,), and uint8 codes, (C, chunk), of which the first ``count`` are real."""

    @abstractmethod
    def levels(self, codes: Tensor) -> Tensor:
        """What codes stand for, in units of the scale."""


@dataclass(frozen=True)
class Int8(Chunked):
    """8 bits for each value, 4 times smaller: rounded to 255 levels up to its chunk's largest."""

    bits: ClassVar[int] = 8
    feedback: ClassVar[bool] = False  # at most 1/254 of the largest value is lost

    def quantize(self, chunks, count, generator):
        scales = chunks.abs().amax(1) / 127
        return scales, ((chunks / _divisor(scales)).round() + 127).to(torch.uint8)

    def levels(self, codes):
        return codes - 127


@dataclass(frozen=True)
class Ternary(Chunked):
    """-1, 0 or 1 times a scale, 16 times smaller: drawn so that the mean is right.

    A value of 0.3 times the scale is sent as 1 in three of ten steps. Beyond 2.5 times a chunk's
    root mean square values are clipped first. What is right on average needs no error feedback.
    The paper has one scale for a layer where this has one for a chunk.

    Reference: Wen et al. (2017), "TernGrad: ternary gradients to reduce communication in
    distributed deep learning".
    """

    seed: int = 0
    bits: ClassVar[int] = 2
    feedback: ClassVar[bool] = False

    def quantize(self, chunks, count, generator):
        limit = 2.5 * _means(chunks.square(), count).sqrt()
        scales = torch.minimum(limit, chunks.abs().amax(1))
        chance = chunks.abs() / _divisor(scales)
        drawn = torch.rand(chunks.shape, generator=generator, device=chunks.device) < chance
        return scales, (drawn * chunks.sign() + 1).to(torch.uint8)

    def levels(self, codes):
        return codes - 1


@dataclass(frozen=True)
class Sign(Chunked):
    """One bit for each value, its sign, 31 times smaller; the scale is its chunk's mean size.

    Without error feedback it does not converge: small values that are always of one sign would
    count as much as large ones. The paper has one scale for a layer where this has one for a chunk.

    Reference: Karimireddy et al. (2019), "Error feedback fixes SignSGD and other gradient
    compression schemes".
    """

    bits: ClassVar[int] = 1

    def quantize(self, chunks, count, generator):
        return _means(chunks.abs(), count), (chunks >= 0).to(torch.uint8)

    def levels(self, codes):
        return 2 * codes - 1


@dataclass(frozen=True)
class TopK(Codec):
    """The largest values and their places; at 1 %, 100 times smaller. All others wait their turn.

    payload: (blocks,) counts as int32, (K,) places as uint16, (K,) values as bfloat16, whose error
    waits too. A place is told by its block of 65,536, from the counts, and its place therein.

    Reference: Stich, Cordonnier and Jaggi (2018), "Sparsified SGD with memory".
    """

    density: float = 0.01

    def __post_init__(self):
        _check_range("density", self.density, 0 < self.density <= 1, "above 0, to 1")

    def encode(self, values, generator=None):
        kept = self.kept(len(values))
        places = values.abs().topk(kept, sorted=False).indices.sort().values  # (K,)
        counts = torch.bincount(places // _BLOCK, minlength=math.ceil(len(values) / _BLOCK))
        in_block = (places % _BLOCK).to(torch.uint16)
        return _bytes(counts.int(), in_block, values[places].bfloat16())

    def decode(self, payload, count):
        blocks, kept = math.ceil(count / _BLOCK), self.kept(count)
        counts, in_block, values = payload.split([4 * blocks, 2 * kept, 2 * kept])
        first = torch.arange(blocks, device=payload.device) * _BLOCK
        first = first.repeat_interleave(counts.view(torch.int32), output_size=kept)  # (K,)
        places = first + in_block.view(torch.uint16).long()
        decoded = torch.zeros(count, device=payload.device)
        decoded[places] = values.view(torch.bfloat16).float()
        return decoded

    def kept(self, count: int) -> int:
        """K of N values."""
        return min(count, max(1, round(self.density * count)))


@dataclass(frozen=True)
class DeepGradient(Compressor):
    """Deep Gradient Compression: top-k that knows of momentum, and begins gently.

    A value that waits 100 steps for its turn missed 100 steps of momentum. So each rank applies
    momentum before it selects; the optimizer is then SGD without any. A value that was sent starts
    with no momentum again. Over ``warm_up_steps`` the density falls from 1/4 to ``density``.

    Reference: Lin et al. (2018), "Deep gradient compression: reducing the communication bandwidth
    for distributed training".
    """

    density: float = 0.01
    momentum: float = 0.9
    warm_up_steps: int = 0

    def __post_init__(self):
        _check_range("density", self.density, 0 < self.density <= 1, "above 0, to 1")
        _check_range("momentum", self.momentum, 0 <= self.momentum < 1, "from 0 to below 1")
        check_whole("warm_up_steps", self.warm_up_steps, least=0)

    def average(self, gradient, parameters, exchange):
        codec = TopK(self.density_at(exchange.steps))
        velocity = self.momentum * exchange.recall("velocity", parameters) + gradient.float()
        values = exchange.recall("unsent", parameters) + velocity
        payload = codec.encode(values)
        sent = codec.decode(payload, len(values))
        exchange.keep("velocity", parameters, torch.where(sent == 0, velocity, 0))
        exchange.keep("unsent", parameters, values - sent)
        return codec.mean_of(exchange.gather(payload), len(values))

    def density_at(self, step: int) -> float:
        """The share of values that is sent at a step, counted from 0."""
        if step >= self.warm_up_steps or self.density >= 0.25:
            return self.density
        return 0.25 * (self.density / 0.25) ** (step / self.warm_up_steps)


@dataclass(frozen=True)
class PowerSGD(Compressor):
    """The gradient of a matrix as a product of two thin ones, from one step of power iteration.

    ``(n + m) * rank`` numbers are sent in place of ``n * m``. The right factor of the last step
    starts the next one, so the factorization gets better while gradients change slowly. Vectors and
    small matrices are sent as they are. All of a bucket takes two sums, one for each factor.

    Reference: Vogels, Karimireddy and Jaggi (2019), "PowerSGD: practical low-rank gradient
    compression for distributed optimization".
    """

    rank: int = 4
    seed: int = 0

    def __post_init__(self):
        check_whole("rank", self.rank)

    def average(self, gradient, parameters, exchange):
        values = gradient.float() + exchange.recall("unsent", parameters)
        vectors = dict(zip(parameters, _by_parameter(values, parameters), strict=True))
        matrices = {
            p: vectors.pop(p).view(len(p), -1)  # (n, m)
            for p in parameters
            if self.factorizes(p)
        }
        right = {p: self._right(p, exchange) for p in matrices}  # (m, r)
        left = {p: matrix @ right[p] for p, matrix in matrices.items()}  # (n, r)
        left, mean_vectors = _means_of_ranks(exchange, left, vectors)
        left = {p: torch.linalg.qr(factor).Q for p, factor in left.items()}
        right = {p: matrix.T @ left[p] for p, matrix in matrices.items()}
        own = {p: left[p] @ right[p].T for p in matrices}  # what this rank sent: (n, m)
        exchange.keep("unsent", parameters, values - _flat(own | vectors, parameters))
        (right,) = _means_of_ranks(exchange, right)
        exchange.factors |= right
        mean_matrices = {p: left[p] @ right[p].T for p in matrices}
        return _flat(mean_matrices | mean_vectors, parameters)

    def factorizes(self, parameter: Tensor) -> bool:
        """Whether two factors are smaller than the gradient of a parameter."""
        if parameter.dim() < 2:
            return False
        rows, columns = len(parameter), parameter[0].numel()
        return self.rank * (rows + columns) < rows * columns

    def _right(self, parameter: Tensor, exchange: Exchange) -> Tensor:
        """The right factor of the last step, at first a random one, the same on all ranks."""
        if parameter in exchange.factors:
            return exchange.factors[parameter].nan_to_num(0, 0, 0)  # after an overflow
        generator = torch.Generator().manual_seed(self.seed)
        factor = torch.randn(parameter[0].numel(), self.rank, generator=generator)
        return factor.to(parameter.device)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Write (N,) codes below ``2 ** bits``, for 1, 2, 4 or 8 bits, one after the other into bytes.

    >>> pack(torch.tensor([1, 0, 3, 2], dtype=torch.uint8), bits=2)
    tensor([177], dtype=torch.uint8)
    """
    per_byte = 8 // bits
    codes = F.pad(codes, (0, -len(codes) % per_byte)).view(-1, per_byte)
    return sum(codes[:, i] << i * bits for i in range(per_byte))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: (``count``,) codes as uint8."""
    shifts = range(0, 8, bits)
    codes = torch.stack([packed >> shift & (2**bits - 1) for shift in shifts], dim=1)
    return codes.flatten()[:count]


def _bytes(*tensors: Tensor) -> Tensor:
    return torch.cat([tensor.contiguous().view(torch.uint8) for tensor in tensors])


def _chunks(values: Tensor, chunk: int) -> Tensor:
    """(N,) values as (C, chunk), the last row filled with zeros."""
    return F.pad(values, (0, -len(values) % chunk)).view(-1, chunk)


def _means(chunks: Tensor, count: int) -> Tensor:
    """The mean of each chunk, (C,), of ``count`` values in all: without those that fill it."""
    sums = chunks.sum(1)
    lengths = torch.full_like(sums, chunks.shape[1])
    lengths[-1] = count - (len(chunks) - 1) * chunks.shape[1]
    return sums / lengths


def _divisor(scales: Tensor) -> Tensor:
    """Scales to divide by, (C, 1): a chunk of zeros stays one."""
    return torch.where(scales == 0, 1, scales)[:, None]


def _by_parameter(values: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return values.split([p.numel() for p in parameters])


def _flat(parts: dict[Tensor, Tensor], parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([parts[p].flatten() for p in parameters])


def _means_of_ranks(
    exchange: Exchange, *groups: dict[Tensor, Tensor]
) -> list[dict[Tensor, Tensor]]:
    """The same tensors with the mean of all ranks' values, summed in one collective."""
    tensors = [tensor for group in groups for tensor in group.values()]
    if not tensors:
        return [*groups]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    means = iter(_by_parameter(exchange.sum(flat) / exchange.ranks, tensors))
    return [{p: next(means).view_as(old) for p, old in group.items()} for group in groups]


def _check_compressor(compressor: object) -> None:
    if not isinstance(compressor, Compressor):
        raise TypeError(f"expected a compressor, such as PowerSGD(rank=4), got {compressor!r}")


def _check_range(name: str, value: float, fits: bool, limits: str) -> None:
    if not fits:
        raise ValueError(f"{name} is {value!r}; give a number {limits}")
