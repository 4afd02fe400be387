"""Tensor parallelism: each rank holds a part of every large weight, and all work on one batch.

Two linear layers with something elementwise between them are cut along the width in the middle:
the first by its outputs (`ColumnParallel`), the second by its inputs (`RowParallel`). One sum over
the ranks forward and one backward is all they need to say to each other. `shard_tensors` does it
to a whole model by means of DTensor; on a mesh of two dimensions it adds FSDP along the first.

Shapes: B batch, T positions, D width, I and O inputs and outputs of a layer, p ranks.
"""

import copy
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from workbench.models import Attention, CharTransformer

_ELEMENTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Identity)


class ColumnParallel(nn.Module):
    """This rank's outputs of a linear layer: (..., I) on every rank -> (..., O / p).

    All ranks have the same input, so its gradient is the sum of what they find. (In the papers a
    weight is (I, O), and its columns are cut; in torch it is (O, I), and they are rows.)

    Raises:
        ValueError: the outputs do not divide among the ranks.

    Reference: Shoeybi et al. (2019), "Megatron-LM: training multi-billion parameter language models
    using model parallelism".
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = _own_part(linear.weight, 0, "outputs")  # (O / p, I)
        self.bias = None if linear.bias is None else _own_part(linear.bias, 0, "outputs")  # (O / p)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(_SumBackward.apply(x), self.weight, self.bias)


class RowParallel(nn.Module):
    """This rank's part of every output of a linear layer, summed: (..., I / p) -> (..., O).

    The bias is added once, after the sum; every rank has all of it.

    Raises:
        ValueError: the inputs do not divide among the ranks.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = _own_part(linear.weight, 1, "inputs")  # (O, I / p)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = _SumForward.apply(F.linear(x, self.weight))  # (..., O)
        return y if self.bias is None else y + self.bias


class _SumBackward(torch.autograd.Function):
    """The f of Megatron: forward nothing happens, backward the ranks' gradients are summed."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _summed(gradient)


class _SumForward(torch.autograd.Function):
    """The g of Megatron: forward the ranks' parts are summed, backward nothing happens."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


def shard_tensors(model: nn.Module, mesh: DeviceMesh, *, sequence: bool = False) -> nn.Module:
    """A copy of the model in which each rank holds a part of the large weights.

    It is trained as any module, with the same batch on all ranks of a tensor group. What the plan
    does not name, every rank has in full and computes with like the others. See `plan_for`.

    Args:
        mesh: of one dimension, or of two: with (data, tensor), the parts are sharded once more
            along the first by FSDP, and each of its ranks has a batch of its own.
        sequence: also cut what lies between the layers, by positions.

    Raises:
        ValueError: nothing can be cut, or heads or widths do not divide among the ranks.

    Reference: Shoeybi et al. (2019), "Megatron-LM".
    """
    if mesh.ndim not in (1, 2):
        raise ValueError(f"the mesh has {mesh.ndim} dimensions; give (tensor) or (data, tensor)")
    names = mesh.mesh_dim_names
    if mesh.ndim == 2 and names is None:
        raise ValueError("the mesh has no names; give mesh_dim_names=('data', 'tensor')")
    tensor = mesh if mesh.ndim == 1 else mesh[names[1]]
    plan, ranks = plan_for(model, sequence=sequence), tensor.size()
    _check_widths(model, plan, ranks)
    work = copy.deepcopy(model)
    tied = _names_by_parameter(work)
    for module in work.modules():
        if isinstance(module, Attention):
            for tensor_ in module.query_key_value.parameters():
                tensor_.data = _by_rank(tensor_.data, ranks)
            module.heads //= ranks
    if sequence:
        work.register_forward_pre_hook(_PositionsDivide(ranks))
    parallelize_module(work, tensor, plan)
    for first, *others in tied:
        for name in others:  # each of them has become a parameter of its own
            path, _, leaf = name.rpartition(".")
            setattr(work.get_submodule(path), leaf, work.get_parameter(first))
    if mesh.ndim == 2:
        for block in work.blocks if isinstance(work, CharTransformer) else ():
            fully_shard(block, mesh=mesh[names[0]])
        fully_shard(work, mesh=mesh[names[0]])
    return work


def plan_for(model: nn.Module, *, sequence: bool = False) -> dict[str, ParallelStyle]:
    """How `shard_tensors` cuts each layer, by name.

    Cut are pairs of linear layers in an `nn.Sequential` with an activation between them, the
    attention of `workbench.models` by whole heads, and the embedding of `CharTransformer` with the
    output layer that shares its weight, by symbols.

    Args:
        sequence: for `CharTransformer`, also cut the norms and the residual stream by positions;
            the sum over the ranks becomes a reduce-scatter, and an all-gather where it is needed
            whole. Korthikanti et al. (2022), "Reducing activation recomputation in large
            transformer models".

    Raises:
        ValueError: nothing can be cut; or ``sequence`` for another model.
    """
    if sequence and not isinstance(model, CharTransformer):
        raise ValueError(
            f"sequence is for CharTransformer; {type(model).__name__} has no known positions"
        )
    between = Shard(1) if sequence else Replicate()  # (B, T, D), between the layers
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, Attention):
            plan[f"{prefix}query_key_value"] = ColwiseParallel()
            plan[f"{prefix}out"] = RowwiseParallel(output_layouts=between)
            if sequence:
                plan[name] = _moved(between, Replicate())
        elif isinstance(module, nn.Sequential):
            for first, second in _pairs(module):
                plan[f"{prefix}{first}"] = ColwiseParallel(input_layouts=between)
                plan[f"{prefix}{second}"] = RowwiseParallel(output_layouts=between)
        elif isinstance(module, nn.LayerNorm) and sequence:
            plan[name] = SequenceParallel(use_local_output=True)
    if isinstance(model, CharTransformer):
        plan["embedding"] = RowwiseParallel(input_layouts=Replicate())
        plan["head"] = ColwiseParallel(input_layouts=between, output_layouts=Replicate())
        if sequence:
            plan["blocks"] = _moved(Replicate(), between)
    if not plan:
        raise ValueError(
            f"{type(model).__name__} has no pair of linear layers with an activation between them "
            "in an nn.Sequential, and no attention of workbench.models: nothing can be cut"
        )
    return plan


def gather_tensors(sharded: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of ``model`` with the weights of what `shard_tensors` made of it. On every rank."""
    whole = copy.deepcopy(model)
    state = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
        for name, value in sharded.state_dict().items()
    }
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            ranks = module.heads // sharded.get_submodule(name).heads
            for leaf, _ in module.query_key_value.named_parameters():
                key = f"{name}.query_key_value.{leaf}".removeprefix(".")
                state[key] = _by_part(state[key], ranks)
    whole.load_state_dict(state)
    return whole


def rank_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
    """Bytes on this rank of parameters, gradients and state of the optimizer."""
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    kept = [] if optimizer is None else [v for s in optimizer.state.values() for v in s.values()]
    groups = {"parameters": parameters, "gradients": gradients, "optimizer": kept}
    return {
        name: sum(_local(t).nbytes for t in tensors if isinstance(t, Tensor))
        for name, tensors in groups.items()
    }


def count_collectives(function: Callable, *args: object) -> dict[str, int]:
    """How often each collective is called by ``function(*args)``, by name: "all_reduce" and so on.

    Counts those of autograd too, if the function calls ``backward``.
    """
    with warnings.catch_warnings(), CommDebugMode() as mode:
        warnings.filterwarnings("ignore", message="Full backward hook is firing")  # of the mode
        function(*args)
    counts: dict[str, int] = {}
    for operation, count in mode.get_comm_counts().items():
        name = str(operation).split(".")[-1].strip("_")
        name = _COLLECTIVES.get(name, name)
        counts[name] = counts.get(name, 0) + count
    return dict(sorted(counts.items()))


_COLLECTIVES = {  # torch has several names for each
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "allgather_base": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
}


def _own_part(whole: Tensor, dimension: int, what: str) -> nn.Parameter:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if whole.shape[dimension] % ranks:
        raise ValueError(f"{whole.shape[dimension]} {what} do not divide among {ranks} ranks")
    return nn.Parameter(whole.detach().chunk(ranks, dimension)[rank].clone())


def _summed(x: Tensor) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


def _check_widths(model: nn.Module, plan: dict[str, ParallelStyle], ranks: int) -> None:
    for name, module in model.named_modules():
        if isinstance(module, Attention) and module.heads % ranks:
            raise ValueError(
                f"{name or 'the attention'} has {module.heads} heads, which do not divide among "
                f"{ranks} ranks; use as many ranks as divide the heads"
            )
    seconds = [name for name, style in plan.items() if isinstance(style, RowwiseParallel)]
    for name in seconds:
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear) and module.in_features % ranks:
            raise ValueError(
                f"{name} has {module.in_features} inputs, which do not divide among {ranks} ranks; "
                "use as many ranks as divide them"
            )


def _names_by_parameter(model: nn.Module) -> list[list[str]]:
    """The names of each parameter, by parameter."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return list(names.values())


def _by_rank(fused: Tensor, ranks: int) -> Tensor:
    """Query, key and value of all heads, (3 D, ...), as those of each rank's heads in turn."""
    return fused.unflatten(0, (3, ranks, -1)).transpose(0, 1).flatten(0, 2).contiguous()


def _by_part(fused: Tensor, ranks: int) -> Tensor:
    """The way back from `_by_rank`."""
    return fused.unflatten(0, (ranks, 3, -1)).transpose(0, 1).flatten(0, 2).contiguous()


class _PositionsDivide:
    """Ranks with unequal parts would wait for each other for ever: refuse first."""

    def __init__(self, ranks: int):
        self.ranks = ranks

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        positions = inputs[0].shape[1]
        if positions % self.ranks:
            raise ValueError(
                f"{positions} positions do not divide among {self.ranks} ranks; pad the input, or "
                "use sequence=False"
            )


def _moved(before: Replicate | Shard, after: Replicate | Shard) -> PrepareModuleInput:
    return PrepareModuleInput(
        input_layouts=before, desired_input_layouts=after, use_local_output=True
    )


def _pairs(chain: nn.Sequential) -> list[tuple[str, str]]:
    """Names of two linear layers with an activation between them; no layer is in two pairs."""
    found, first, clear = [], None, False
    for name, module in chain.named_children():
        if isinstance(module, nn.Linear):
            if first is not None and clear:
                found.append((first, name))
                first = None
            else:
                first, clear = name, False
        elif isinstance(module, _ELEMENTWISE):
            clear = True
        else:
            first = None
    return found


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
