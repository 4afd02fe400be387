"""A model learns from the answers of another.

The answers of a trained model, its teacher, say more than the right label: which wrong classes are
nearly right. A smaller student learns from them faster than from labels alone, and a model that
compression has hurt recovers with what it was before as its teacher.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from workbench import models
from workbench.compress.computed import copy_of
from workbench.compress.layers import check_model, finish, layers_of
from workbench.data import IGNORED, Split, Task
from workbench.training import ADAMW, Precision, evaluation_mode, fit

Inputs = tuple[Tensor, ...]


def distill(
    model: nn.Module,
    task: Task,
    *,
    student: str | nn.Module | None = None,
    teacher: nn.Module | None = None,
    temperature: float = 4.0,
    alpha: float = 0.9,
    hints: Mapping[str, str] | None = None,
    hint_weight: float = 1.0,
    cache: bool = False,
    epochs: int = 1,
    batch_size: int = 128,
    optimizer: Callable[..., torch.optim.Optimizer] = ADAMW,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    precision: Precision = "float32",
    device: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Train a student to give the answers of a teacher, and return it.

    ``distill(big, task, student="resnet-8")`` trains a small network, ``distill(pruned, task,
    teacher=dense)`` repairs a compressed one (its zeros stay zero, its codebooks codebooks), and
    ``distill(model, task)`` lets a model learn from itself.

    The loss is ``alpha * temperature**2 * KL(teacher || student) + (1 - alpha) * task.loss``, with
    the logits of both divided by ``temperature`` in the divergence. The teacher sees the same
    augmented inputs, in evaluation mode.

    Args:
        student: a new reference network by name, or a module to start from; a copy of ``model``
            by default.
        teacher: whose answers are learnt; ``model`` by default.
        temperature: above 1 it brings out how the teacher ranks the wrong classes.
        alpha: share of the teacher in the loss, 0 to 1.
        hints: student layer -> teacher layer, by name. The student's activation there, through a
            linear map where one dimension (the width) differs, is drawn to the teacher's. The maps
            are trained too, and thrown away.
        hint_weight: of the mean squared error of the hints, each divided by the mean square of
            the teacher's activation.
        cache: keep the teacher's logits of the first epoch for the others: saves its time where
            there is memory for one set of logits for each training example.
        epochs, batch_size, optimizer, augment, precision, device, seed, progress: as in
            `workbench.training.fit`.

    Raises:
        ValueError: a setting out of range, an unknown layer or network, teacher and student with
            different outputs, answers that are not finite, ``cache`` where inputs change, or as
            `workbench.training.fit`.
        TypeError: a student or teacher that is no module, or whose output is no tensor.

    References: Hinton, Vinyals and Dean (2015), "Distilling the knowledge in a neural network";
    Romero et al. (2015), "FitNets: hints for thin deep nets"; Furlanello et al. (2018), "Born again
    neural networks".
    """
    _check_settings(temperature, alpha, hint_weight)
    if cache:
        _check_cache(task, augment, hints)
    work, origin, teacher = _student_and_teacher(model, student, teacher, seed)
    check_model(work, (), "distill")
    hints = dict(hints or {})
    with (
        _captured(work, hints, "student") as learnt,
        _captured(teacher, hints.values(), "teacher") as shown,
    ):
        _check_outputs(work, teacher, task.example_input)
        pupil = _Pupil(work, _regressors(hints, learnt, shown, seed))
        ask = _Remembered(teacher, len(task.train)) if cache else _asked(teacher)

        def objective(pupil: nn.Module, inputs: Inputs, target: Tensor) -> Tensor:
            expected = ask(*inputs)
            outputs = pupil(*(inputs[:-1] if cache else inputs))
            soft = divergence(outputs, expected, target, temperature)
            loss = alpha * soft + (1 - alpha) * task.loss(outputs, target)
            for regressor, (own, other) in zip(pupil.regressors, hints.items(), strict=True):
                loss = loss + hint_weight * relative_error(regressor(learnt[own]), shown[other])
            return loss

        fit(
            pupil,
            _numbered(task) if cache else task,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            augment=augment,
            objective=objective,
            precision=precision,
            device=device,
            seed=seed,
            progress=progress,
        )
    layers = layers_of(work, every=True)
    left = {
        name: "frozen: nothing in it is trained"
        for name, layer in layers.items()
        if not any(p.requires_grad for p in layer.parameters())
    }
    step = f"distilled (from {type(teacher).__name__}, temperature {temperature:g})"
    return finish(work, origin, step, layers.keys() - left.keys(), left, "distilled")


def divergence(outputs: Tensor, expected: Tensor, target: Tensor, temperature: float) -> Tensor:
    """``temperature**2 * KL(teacher || student)`` in nats, the mean over all counted positions.

    The square keeps the size of its gradient when the temperature changes. For high temperatures
    it is half the mean squared difference of the logits, each centred (Hinton et al., section 2.1).

    Args:
        outputs, expected: logits of student and teacher, (..., classes).
        target: (...), where `data.IGNORED` positions do not count; of any other shape, all count.
    """
    student = F.log_softmax(outputs.float() / temperature, -1)
    teacher = F.log_softmax(expected.float() / temperature, -1)
    each = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)  # (...)
    if target.shape == each.shape:
        each = each[target != IGNORED]
    return temperature**2 * each.mean()


def relative_error(activation: Tensor, hint: Tensor) -> Tensor:
    """Mean squared error divided by the mean square of the hint: 1 for an answer of all zeros."""
    hint = hint.float()
    scale = hint.square().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return F.mse_loss(activation.float(), hint) / scale


def _check_settings(temperature: float, alpha: float, hint_weight: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; give a number above 0, such as 4")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; give a share of the loss from 0 to 1")
    if not 0 < hint_weight < math.inf:
        raise ValueError(f"hint_weight is {hint_weight}; give a number above 0, or no hints")


def _check_cache(task: Task, augment: Callable | None, hints: Mapping | None) -> None:
    if augment is not None:
        raise ValueError("cache keeps the answers to inputs that augment changes; give one of them")
    if hints:
        raise ValueError("hints need the teacher's activations for each batch; give cache=False")
    if not isinstance(task.train.source, TensorDataset):
        raise ValueError(
            f"cache needs a training split of tensors, to know each example again; this one is a "
            f"{type(task.train.source).__name__}; give cache=False"
        )


def _student_and_teacher(
    model: nn.Module, student: str | nn.Module | None, teacher: nn.Module | None, seed: int
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A student to train, the model that it comes from, and a teacher that is ours alone."""
    if not isinstance(teacher, (nn.Module, type(None))):
        raise TypeError(f"teacher is a {type(teacher).__name__}; give a torch.nn.Module")
    if not isinstance(student, (str, nn.Module, type(None))):
        raise TypeError(
            f"student is a {type(student).__name__}; give a torch.nn.Module or the name of a "
            "reference network"
        )
    if student is not None and teacher is not None:
        raise ValueError(
            "student and teacher are both given, so model has no part; give the teacher as model"
        )
    taught_by = copy_of(model if teacher is None else teacher).eval()
    if isinstance(student, str):
        fresh = models.build(student, seed=seed).train(model.training)
        return fresh, fresh, taught_by
    origin = model if student is None else student
    return copy_of(origin), origin, taught_by


def _check_outputs(student: nn.Module, teacher: nn.Module, example: Inputs) -> None:
    """Let both answer one example: what cannot be compared is refused before training."""
    shapes = {}
    for role, module in (("student", student), ("teacher", teacher)):
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        try:
            with evaluation_mode(module), torch.no_grad():
                output = module(*(x.to(device) for x in example))
        except (RuntimeError, IndexError, TypeError) as error:
            given = [tuple(x.shape) for x in example]
            raise ValueError(f"the {role} cannot take inputs of shapes {given}: {error}") from error
        if not torch.is_tensor(output):
            raise TypeError(f"the {role} returns a {type(output).__name__}; a tensor is needed")
        shapes[role] = tuple(output.shape)
        if output.dim() < 2 or output.shape[-1] < 2:
            raise ValueError(
                f"the {role}'s output has shape {shapes[role]}; logits of 2 or more classes are "
                "needed, (batch, ..., classes)"
            )
        if role == "teacher":
            _check_finite(output)
    if shapes["student"] != shapes["teacher"]:
        raise ValueError(
            f"for one example the student gives shape {shapes['student']} and the teacher "
            f"{shapes['teacher']}; both must answer with the same classes"
        )


def _check_finite(logits: Tensor) -> None:
    if not torch.isfinite(logits).all():
        raise ValueError("the teacher answers with NaN or infinity; repair or retrain it first")


@contextlib.contextmanager
def _captured(model: nn.Module, names: Iterable[str], role: str) -> Iterator[dict[str, Tensor]]:
    """Inside, the dictionary holds what each named layer put out in the model's last call."""
    layers = {name: layer for name, layer in model.named_modules() if name}
    unknown = set(names) - set(layers)
    if unknown:
        raise ValueError(
            f"hints name {sorted(unknown)} in the {role}; its layers are {sorted(layers)}"
        )
    seen = {}

    def keep(name: str) -> Callable:
        def hook(layer: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output  # LSTM: the sequence

        return hook

    handles = [layers[name].register_forward_hook(keep(name)) for name in set(names)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _regressors(
    hints: dict[str, str], learnt: dict[str, Tensor], shown: dict[str, Tensor], seed: int
) -> list[nn.Module]:
    """For each hint, what brings the student's activation to the width of the teacher's."""
    regressors = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for own, other in hints.items():
            for role, name, seen in (("student", own, learnt), ("teacher", other, shown)):
                if not torch.is_tensor(seen.get(name)):
                    raise ValueError(f"layer {name} of the {role} gives no tensor to hint with")
            ours, theirs = tuple(learnt[own].shape), tuple(shown[other].shape)
            differing = [d for d, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
            if len(ours) != len(theirs) or len(differing) > 1 or 0 in differing:
                raise ValueError(
                    f"hint {own} has shape {ours} and {other} {theirs}; all dimensions but one, "
                    "the width, must agree"
                )
            regressors += [_Regressor(d, ours[d], theirs[d]) for d in differing] or [nn.Identity()]
    return regressors


class _Regressor(nn.Module):
    """A linear map along one dimension; along the channels of an image, a 1x1 convolution."""

    def __init__(self, dimension: int, width_in: int, width_out: int):
        super().__init__()
        self.dimension, self.map = dimension, nn.Linear(width_in, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x.float().movedim(self.dimension, -1)).movedim(-1, self.dimension)


class _Pupil(nn.Module):
    """The student with its regressors, so that one optimizer trains them; it answers alone."""

    def __init__(self, student: nn.Module, regressors: list[nn.Module]):
        super().__init__()
        self.student, self.regressors = student, nn.ModuleList(regressors)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.student(*inputs)


def _asked(teacher: nn.Module) -> Callable[..., Tensor]:
    """Called with inputs: the teacher's logits, without gradient."""

    @torch.no_grad()
    def ask(*inputs: Tensor) -> Tensor:
        logits = teacher.to(inputs[0].device)(*inputs)
        _check_finite(logits)
        return logits

    return ask


class _Remembered:
    """Called with inputs and their numbers: the teacher's logits, worked out once for each."""

    def __init__(self, teacher: nn.Module, examples: int):
        self.ask, self.logits = _asked(teacher), None
        self.known = torch.zeros(examples, dtype=torch.bool)

    def __call__(self, *inputs: Tensor) -> Tensor:
        *inputs, numbers = inputs
        if not self.known[numbers.cpu()].all():
            logits = self.ask(*inputs)
            if self.logits is None:
                self.logits = logits.new_empty(len(self.known), *logits.shape[1:])
            self.logits[numbers] = logits
            self.known[numbers.cpu()] = True
        return self.logits[numbers]


def _numbered(task: Task) -> Task:
    """The task with the number of each training example as its last input."""
    *inputs, target = task.train.source.tensors
    return replace(task, train=Split(TensorDataset(*inputs, torch.arange(len(target)), target)))
