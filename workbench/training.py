"""Fit and evaluate: the same code for every network, on CPU and CUDA."""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from tqdm.auto import tqdm

from workbench.data import Task

Precision = Literal["float32", "mixed"]
Schedule = Callable[[Optimizer, int], LRScheduler]
Objective = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]
ADAMW = partial(torch.optim.AdamW, lr=1e-3)
_raise_interrupts = ContextVar("raise_interrupts", default=False)


def one_cycle(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Warm up over a tenth of the steps to the optimizer's learning rate, then a cosine to zero.

    Reference: Smith and Topin (2018), "Super-convergence".
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    warm_up = 0.15 if steps == 10 else 0.1  # torch divides by zero where it is exactly one step
    return OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=warm_up, cycle_momentum=False)


@dataclass(frozen=True)
class History:
    """What `fit` did: one row per epoch, which epoch was kept, and whether it was cut short."""

    frame: pd.DataFrame
    best_epoch: int | None
    interrupted: bool = field(default=False)


def fit(
    model: nn.Module,
    task: Task,
    *,
    epochs: int = 1,
    batch_size: int = 128,
    optimizer: Callable[..., Optimizer] = ADAMW,
    schedule: Schedule = one_cycle,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    gradient_norm: float | None = None,
    objective: Objective | None = None,
    device: str = "auto",
    precision: Precision = "float32",
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Train ``model`` in place and leave it with the weights of its best epoch on validation.

    Args:
        epochs: passes over ``task.train``.
        optimizer: called with the parameters, e.g. ``partial(torch.optim.SGD, lr=0.1)``.
        schedule: called with the optimizer and the number of steps, stepped after each batch.
        augment: called with the first input of a batch and a seeded generator.
        gradient_norm: the gradient's norm is clipped to this, if given.
        objective: called with the model, the inputs and the target of a batch, on ``device``; the
            loss to minimise, by default ``task.loss`` of the output and the target.
        device: "auto" (CUDA when present), or any torch device; the model comes back to its own.
        precision: "mixed" trains in bfloat16 where the device computes in it natively, in float16
            with loss scaling on older GPUs, and in float32 elsewhere.
        seed: of the order of examples, the augmentation and dropout.

    Interrupting the notebook stops training and keeps the best weights so far (see
    `raising_interrupts`). Device and modes of the model are afterwards what they were.

    Raises:
        ValueError: ``epochs`` < 1, a model with nothing to train, no batches, a device that is not
            there, or a loss that is not finite.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; give 1 or more")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no parameter to train; set requires_grad on some")
    steps = epochs * task.train.count_batches(batch_size)
    if steps == 0:
        raise ValueError("the training split gave no batches; give it at least one example")
    objective = objective or (lambda model, inputs, target: task.loss(model(*inputs), target))
    device, home = _device(device), trainable[0].device
    autocast, scaler = _mixed(device, precision)
    generator = torch.Generator().manual_seed(seed)
    better = max if task.metric.higher_is_better else min
    rows, best, interrupted = [], None, False
    start = time.perf_counter()
    bar = tqdm(total=steps, disable=not progress, desc="fit", unit="batch")

    def train_one_epoch(epoch: int) -> float:
        total, count = 0.0, 0
        for inputs, target in task.train.batches(batch_size, shuffle=True, seed=seed + epoch):
            if augment is not None:
                inputs = (augment(inputs[0], generator), *inputs[1:])
            with autocast():
                loss = objective(model, tuple(x.to(device) for x in inputs), target.to(device))
            stepper.zero_grad()
            scaler.scale(loss).backward()
            if gradient_norm is not None:
                scaler.unscale_(stepper)
                nn.utils.clip_grad_norm_(trainable, gradient_norm)
            scaler.step(stepper)
            scaler.update()
            scheduler.step()
            total, count = total + loss.item() * len(target), count + len(target)
            bar.update()
        if not math.isfinite(total):
            raise ValueError(
                f"the training loss of epoch {epoch} is {total / count}; lower the learning rate "
                "or look for NaN in the data and the weights"
            )
        return total / count

    with kept_modes(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            torch.manual_seed(seed)
            stepper = optimizer([p for p in model.to(device).parameters() if p.requires_grad])
            scheduler = schedule(stepper, steps)
            for epoch in range(1, epochs + 1):
                model.train()
                row = {"epoch": epoch, "training_loss": train_one_epoch(epoch)}
                with autocast():
                    value = evaluate(model, task, split="validation", device=device).value
                row[f"validation_{task.metric.name.replace(' ', '_')}"] = value
                rows.append(row | {"seconds": time.perf_counter() - start})
                bar.set_postfix({task.metric.name: f"{value:.4f}"})
                if best is None or better(value, best[0]) != best[0]:
                    best = (value, epoch, copy.deepcopy(model.state_dict()))
        except KeyboardInterrupt:
            if _raise_interrupts.get():
                raise
            interrupted = True
        finally:
            bar.close()
            if best is not None:
                model.load_state_dict(best[2])
            model.zero_grad()
            model.to(home)
    return History(pd.DataFrame(rows), best and best[1], interrupted)


@contextlib.contextmanager
def raising_interrupts() -> Iterator[None]:
    """Inside it, interrupting a `fit`, however deep, raises KeyboardInterrupt.

    For callers to whom half a training is no result.
    """
    token = _raise_interrupts.set(True)
    try:
        yield
    finally:
        _raise_interrupts.reset(token)


@dataclass(frozen=True)
class Evaluation:
    """``scores`` has one value per example; ``value`` is their mean, the task's metric."""

    scores: Tensor
    loss: float

    @property
    def value(self) -> float:
        return self.scores.double().mean().item()


def evaluate(
    model: Callable[..., Tensor],
    task: Task,
    *,
    split: Literal["train", "validation", "test"] = "test",
    batch_size: int = 500,
    device: str | torch.device = "cpu",
) -> Evaluation:
    """Score a model, or any callable that takes the inputs, on one split of the task.

    A module is put in evaluation mode for the time of the call. It must already be on ``device``.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split is {split!r}; choose 'train', 'validation' or 'test'")
    scores, losses, count = [], 0.0, 0
    with evaluation_mode(model), torch.no_grad():
        for inputs, target in getattr(task, split).batches(batch_size):
            output = model(*(x.to(device) for x in inputs)).float()
            target = target.to(device)
            scores.append(task.metric.score(output, target).cpu())
            losses += task.loss(output, target).item() * len(target)
            count += len(target)
    if not scores:
        raise ValueError(f"the {split} split gave no batches; give it at least one example")
    return Evaluation(torch.cat(scores).flatten(), losses / count)


@contextlib.contextmanager
def kept_modes(model: object) -> Iterator[None]:
    """Give every module its own mode, training or evaluation, back afterwards."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


@contextlib.contextmanager
def evaluation_mode(model: object) -> Iterator[None]:
    """Put every module in evaluation mode and give each its own mode back afterwards."""
    with kept_modes(model):
        if isinstance(model, nn.Module):
            model.eval()
        yield


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but this machine has no CUDA device; use 'auto'")
    return torch.device(device)


def _mixed(device: torch.device, precision: Precision) -> tuple[Callable, torch.amp.GradScaler]:
    """An autocast for the forward pass and a loss scaler that does nothing unless it is needed."""
    if precision not in ("float32", "mixed"):
        raise ValueError(f"precision is {precision!r}; choose 'float32' or 'mixed'")
    if device.type == "cuda":
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Without these instructions bfloat16 is emulated, and slower than float32.
        bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    float16 = device.type == "cuda" and not bfloat16
    enabled = precision == "mixed" and (bfloat16 or float16)
    dtype = torch.float16 if float16 else torch.bfloat16
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=enabled)
    return autocast, torch.amp.GradScaler(device.type, enabled=enabled and float16)
