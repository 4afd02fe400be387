"""Data parallelism: each rank computes on its share of every batch, and all keep the same weights.

The gradient of a batch is the mean over its examples, so it is the weighted mean of the gradients
of its shares. `train` is the whole loop, `Replica` one rank's part in it. What differs between the
layouts is what a rank keeps, of p ranks, and what it sends:

how    parameters gradients optimizer  sent for each step
-----  ---------- --------- ---------  -------------------------------------------------------
naive  all        all       all        all-reduce of each gradient, after the backward pass
ddp    all        all       all        all-reduce of buckets of gradients, while it still runs
zero   all        all       1/p        as ddp; then each rank sends the parameters it has updated
fsdp   1/p        1/p       1/p        all-gather of each block's parameters, before each use;
                                       reduce-scatter of its gradients
"""

import contextlib
import copy
import json
import math
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    load,
    save,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tqdm.auto import tqdm

from workbench.data import Task, cross_entropy
from workbench.parallel.batch_norm import SynchronizedBatchNorm
from workbench.parallel.shares import (
    Share,
    batches,
    check_whole,
    examples_of,
    rank_and_world_size,
)
from workbench.parallel.tensor_parallel import rank_bytes
from workbench.training import ADAMW, Schedule, one_cycle

Layout = Literal["naive", "ddp", "zero", "fsdp"]


def train(
    model: nn.Module,
    task: Task,
    *,
    how: Layout = "ddp",
    epochs: int = 1,
    batch_size: int = 128,
    accumulate: int = 1,
    optimizer: Callable[..., Optimizer] = ADAMW,
    schedule: Schedule = one_cycle,
    folder: str | os.PathLike | None = None,
    every: int = 100,
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Train a copy of a model on all ranks together; each rank calls it, and each gets the result.

    It takes the batches that `workbench.training.fit` takes, in the same order, however many ranks
    there are; no example is lost or repeated.

    Args:
        batch_size: examples of a batch, over all ranks.
        accumulate: pieces in which a rank computes its share of a batch, one after the other.
        folder: of checkpoints, seen by all ranks; training goes on from the newest. It may have
            been written by another number of ranks, and in another layout.
        every: steps from one checkpoint to the next.
        device: of this rank.
        seed: of the order of examples, and of random numbers in the model, which differ by rank.

    Raises:
        ValueError: no process group, a setting out of range, a checkpoint of another run, or a loss
            that is not finite.
        TypeError: the training split is a loader or a callable, which cannot be divided by example.
    """
    replica = Replica(model, task.loss, how=how, optimizer=optimizer, device=device)
    for name, value in {"epochs": epochs, "every": every, "accumulate": accumulate}.items():
        check_whole(name, value)
    count = len(examples_of(task.train))
    check_whole("batch_size", batch_size)
    per_epoch = math.ceil(count / batch_size)
    run = {"examples": count, "batch_size": batch_size, "epochs": epochs, "seed": seed}
    first = replica.load(folder, run) if folder is not None else 0
    scheduler = schedule(replica.optimizer, epochs * per_epoch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer has not moved yet
        for _ in range(first):  # a schedule follows from the number of steps: none is saved
            scheduler.step()
    show = progress and dist.get_rank() == 0
    devices = [device] if torch.device(device).type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        tqdm(initial=first, total=epochs * per_epoch, disable=not show, unit="batch") as bar,
    ):
        step = first
        while step < epochs * per_epoch:
            epoch, position = divmod(step, per_epoch)
            shares = batches(task.train, batch_size, seed=seed, epoch=epoch + 1, start=position)
            loss = torch.zeros((), device=device)
            for share in shares:
                # Nor is the state of the generator: it follows from the step and the rank.
                torch.manual_seed(hash((seed, step, dist.get_rank())))
                loss += replica.step(share, accumulate=accumulate)
                scheduler.step()
                step += 1
                bar.update()
                if folder is not None and (step % every == 0 or step == epochs * per_epoch):
                    replica.save(folder, step, run)
            dist.all_reduce(loss)
            if not loss.isfinite():
                raise ValueError(
                    f"the training loss of epoch {epoch + 1} is {loss.item()}; lower the learning "
                    "rate or look for NaN in the data and the weights"
                )
    return replica.whole()


def average_gradients(model: nn.Module) -> None:
    """Replace each gradient by its mean over the ranks: data parallelism in its plainest form.

    A parameter that was not used on this rank counts as one with gradient 0, so that all ranks send
    equally often.
    """
    _, world_size = rank_and_world_size()
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size


class Replica:
    """One rank's part in training a model: its copy or its shard, and its optimizer.

    Each rank makes one, with the same arguments, and calls the same methods in the same order.

    Attributes:
        model: the copy that is trained. In the layout fsdp its parameters are shards, `DTensor`s.
        network: what is called for the forward pass: the model, or the model wrapped in
            `DistributedDataParallel`, which takes communication hooks.
        optimizer: takes learning-rate schedules as any does.

    Args:
        loss: of the outputs and the targets, a mean over the examples.
        optimizer: called with the parameters, e.g. ``partial(torch.optim.SGD, lr=0.1)``.
        device: of this rank.

    References: Li et al. (2020), "PyTorch Distributed: experiences on accelerating data parallel
    training"; Rajbhandari et al. (2020), "ZeRO: memory optimizations toward training trillion
    parameter models"; Zhao et al. (2023), "PyTorch FSDP: experiences on scaling fully sharded data
    parallel".
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
        *,
        how: Layout = "ddp",
        optimizer: Callable[..., Optimizer] = ADAMW,
        device: str | torch.device = "cpu",
    ):
        if how not in get_args(Layout):
            raise ValueError(f"how is {how!r}; choose one of {list(get_args(Layout))}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; expected a torch module")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("the model has no parameter to train; set requires_grad on some")
        _, self._world_size = rank_and_world_size()
        self._original, self._loss, self._how = model, loss, how
        self.model = copy.deepcopy(model).to(device).train()
        for tensor in _state(self.model).values():
            _broadcast(tensor)
        if how == "fsdp":
            mesh = init_device_mesh(torch.device(device).type, (self._world_size,))
            for block in (*_blocks(self.model), self.model):
                fully_shard(block, mesh=mesh)
        self.network = self.model
        if how in ("ddp", "zero"):
            self.network = DistributedDataParallel(
                self.model, forward_sync_buffers=False, gradient_as_bucket_view=True
            )
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        if how == "zero":
            self.optimizer = ZeroRedundancyOptimizer(
                trainable, lambda groups, **_: optimizer(groups)
            )
        else:
            self.optimizer = optimizer(trainable)

    def step(self, share: Share, *, accumulate: int = 1) -> Tensor:
        """Move the weights by the gradient of a whole batch, of which this rank has a share.

        With ``accumulate`` the share is computed in so many pieces, which takes less memory for
        activations. The gradients are communicated once all the same. Batch normalisation takes the
        statistics of a piece, not of the batch.

        Returns:
            The share's part of the batch's mean loss; the sum over the ranks is that loss.
        """
        check_whole("accumulate", accumulate)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=next(self.model.parameters()).device)
        for number, piece in enumerate(share.split(accumulate), 1):
            with self._communicating(number == accumulate), _counting(self.model, piece.weight > 0):
                outputs = self.network(*(x.to(total.device) for x in piece.inputs))
                loss = self._loss(outputs, piece.target.to(total.device)) * piece.weight
                # All layouts divide the sum over the ranks by their number.
                (loss * self._world_size).backward()
            total += loss.detach()
        if self._how == "naive":
            average_gradients(self.model)
        self.optimizer.step()
        return total

    def gradients(self) -> dict[str, Tensor]:
        """Mean gradient of the last step, whole, by name of the parameter."""
        named = self.model.named_parameters()
        return {name: _whole(p.grad) for name, p in named if p.grad is not None}

    def whole(self) -> nn.Module:
        """The model as it is now, whole, as a model of its own."""
        self._share_buffers()
        state = {name: _whole(tensor).cpu() for name, tensor in self.model.state_dict().items()}
        result = copy.deepcopy(self._original)
        result.load_state_dict(state)
        return result

    def memory(self) -> dict[str, int]:
        """Bytes that this rank keeps between steps: parameters, gradients, optimizer state.

        On top of them come activations, and in the layout fsdp the block that is computed on.
        """
        sizes = rank_bytes(self.model, self._stepper)
        return {
            "parameter_bytes": sizes["parameters"],
            "gradient_bytes": sizes["gradients"],
            "optimizer_bytes": sizes["optimizer"],
        }

    def save(self, folder: str | os.PathLike, step: int, run: dict | None = None) -> None:
        """Write a checkpoint that any number of ranks can go on from, in any layout.

        It is written under a temporary name, then renamed; the one before it is deleted then. Each
        rank writes what it has, in ``.safetensors``; parameters have their own names and shapes.

        Args:
            folder: of this run's checkpoints, seen by all ranks.
            step: how many steps were done.
            run: facts of the run, kept as JSON; `load` refuses where they differ.
        """
        rank, _ = rank_and_world_size()
        folder = Path(folder)
        final = folder / f"step-{step:08d}"
        temporary = folder / f"{final.name}.part"
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._share_buffers()
        dist.barrier()
        tensors = _state(self.model) | {
            f"{_OPTIMIZER}{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self._stepper.state.get(parameter, {}).items()
        }
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        with _quiet():
            save(tensors, storage_writer=writer)
        if rank == 0:
            (temporary / "progress.json").write_text(json.dumps({"step": step, "run": run or {}}))
            older = _checkpoints(folder)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            for path in older:
                if path != final:
                    shutil.rmtree(path)
        dist.barrier()

    def load(self, folder: str | os.PathLike, run: dict | None = None) -> int:
        """Go on from the newest checkpoint of a folder; gives its step, or 0 if there is none.

        Raises:
            ValueError: the checkpoint is of another run or of another model.
        """
        dist.barrier()
        found = _checkpoints(Path(folder))
        if not found:
            return 0
        progress = json.loads((found[-1] / "progress.json").read_text())
        for name, value in (run or {}).items():
            if progress["run"].get(name) != value:
                raise ValueError(
                    f"{found[-1]} is of a run with {name} {progress['run'].get(name)}, and this "
                    f"one has {value}; give another folder, or the same settings"
                )
        reader = HuggingFaceStorageReader(str(found[-1]))
        saved = {
            name: (entry.size, entry.properties.dtype)
            for name, entry in reader.read_metadata().state_dict_metadata.items()
        }
        tensors = _state(self.model)
        expected = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        weights = {name: what for name, what in saved.items() if not name.startswith(_OPTIMIZER)}
        if weights != expected:
            names = sorted(name for name, _ in weights.items() ^ expected.items())
            raise ValueError(f"{found[-1]} is of another model: they differ in {names[:3]}")
        for group in self._stepper.param_groups:
            for parameter in group["params"]:
                self._stepper.state[parameter] = {}
        for name, parameter in self.model.named_parameters():
            prefix = f"{_OPTIMIZER}{name}."
            for entry in saved if parameter in self._stepper.state else ():
                if entry.startswith(prefix) and "." not in entry.removeprefix(prefix):
                    size, dtype = saved[entry]
                    if size == parameter.shape and size != ():
                        value = torch.zeros_like(parameter, dtype=dtype)
                    else:  # such as the number of steps
                        value = torch.zeros(size, dtype=dtype)
                    self._stepper.state[parameter][entry.removeprefix(prefix)] = value
                    tensors[entry] = value
        with _quiet():
            load(tensors, storage_reader=reader)
        return progress["step"]

    @property
    def _stepper(self) -> Optimizer:
        """The optimizer that holds this rank's state."""
        return self.optimizer.optim if self._how == "zero" else self.optimizer

    def _communicating(self, now: bool) -> contextlib.AbstractContextManager:
        """In it a backward pass sends gradients, or only adds them up."""
        if self._how == "fsdp":
            self.model.set_requires_gradient_sync(now)
        elif self._how != "naive" and not now:
            return self.network.no_sync()
        return contextlib.nullcontext()

    def _share_buffers(self) -> None:
        """Running statistics are of a rank's own share: those of rank 0 are kept."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tensor in _state(self.model).items():
            if name not in parameters:
                _broadcast(tensor)


_OPTIMIZER = "optimizer: "  # of a name in a checkpoint; no parameter's name has a blank


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What is gathered at once: the outermost elements of sequences, each with all that shares a
    parameter with it. The rest of the model is gathered as a whole."""

    def uses(module: nn.Module) -> Counter:
        owners = {*module.modules()}
        return Counter(id(p) for owner in owners for p in owner.parameters(recurse=False))

    everywhere = uses(model)

    def within(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            inside = uses(child)
            alone = all(everywhere[number] == count for number, count in inside.items())
            listed = isinstance(module, (nn.Sequential, nn.ModuleList))
            called = not isinstance(child, (nn.ModuleList, nn.ModuleDict))
            if inside and alone and listed and called:
                yield child
            else:
                yield from within(child)

    return list(dict.fromkeys(within(model)))


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are saved, each once, by the first of its names."""
    named = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(named.items())}
    return {name: tensor.detach() for name, tensor in named.items() if first[id(tensor)] == name}


def _broadcast(tensor: Tensor) -> None:
    """Give all ranks what rank 0 has."""
    dist.broadcast(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor, 0)


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@contextlib.contextmanager
def _counting(model: nn.Module, own: bool) -> Iterator[None]:
    """Tell batch normalisation whether the examples are this rank's own."""
    layers = [module for module in model.modules() if isinstance(module, SynchronizedBatchNorm)]
    for layer in layers:
        layer.counts = own
    yield
    for layer in layers:
        del layer.counts


def _checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".part")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch warns where one process saves alone, which is meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
