"""Batch normalisation over the examples of all ranks: what data parallelism needs to compute what
one process does."""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronize_batch_norm(model: nn.Module) -> nn.Module:
    """A copy whose batch normalisation takes mean and variance over the examples of all ranks.

    Without it each rank normalises its share by that share's own statistics: another computation
    than one process makes of the whole batch. (torch's ``SyncBatchNorm`` is for GPUs only.) Outside
    a process group, and in evaluation mode, the copy computes what the model does.
    """
    work = copy.deepcopy(model)
    for module in work.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.__class__ = SynchronizedBatchNorm  # what it has and where it stands are kept
    return work


class SynchronizedBatchNorm(_BatchNorm):
    """Batch normalisation over all ranks; see `synchronize_batch_norm`.

    Attributes:
        counts: whether the input is this rank's own, or an example of another rank.
    """

    counts = True

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"input has shape {tuple(x.shape)}; expected (batch, channels, ...)")

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        others = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        number = wide.new_full((1,), x.numel() // x.shape[1])
        sums = torch.cat([wide.sum(others), number]) * self.counts
        *sums, count = _Sum.apply(sums).split(x.shape[1])
        mean = sums[0] / count.clamp(min=1)  # (channels,)
        # Squares of deviations, not deviations of squares: those lose the digits that are compared.
        squares = (wide - mean.view(shape)).square().sum(others) * self.counts
        variance = _Sum.apply(squares) / count.clamp(min=1)  # (channels,)
        if self.running_mean is not None and count > 0:  # 0: no rank has an example of its own
            self._follow(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        y = (wide - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked += 1
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / self.num_batches_tracked.item()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


class _Sum(torch.autograd.Function):
    """Forward: the sum over the ranks. Backward: as every rank's loss depends on that sum, the
    gradient with respect to one rank's part is the sum of the gradients of all ranks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total
