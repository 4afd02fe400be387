"""How easily a classifier is fooled on purpose, and what its answers give away.

`fgsm` makes one step against the model, `pgd` many small ones. Both know the weights, which is what
someone who has the file can do; someone who has only the answers attacks a model of their own and
hopes that the changes transfer. `under_attack` puts both into one table. `membership` tells whether
an example was trained on.

Shapes: B batch, C classes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from tqdm.auto import tqdm

from workbench.data import Task, correct
from workbench.measure.accuracy import interval
from workbench.training import evaluation_mode

Model = nn.Module | Callable[..., Tensor]
Bounds = tuple[float, float]


def fgsm(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    target: Tensor,
    *,
    epsilon: float,
    bounds: Bounds = (0.0, 1.0),
) -> Tensor:
    """Move every value of the first input by ``epsilon``, in the direction that raises the loss.

    To first order nothing within ``epsilon`` of each value (the L-infinity ball) is worse.

    Args:
        model: its answer is (B, C); it is used in evaluation mode and not changed.
        inputs: the first is what is attacked, in floating point.
        target: the right classes, (B,).
        epsilon: in units of the input: 0.1 is a tenth of the range of a pixel.
        bounds: smallest and largest value that an input may have.

    Returns:
        The first input, changed; where the model gives no gradient, it stays as it is.

    Raises:
        ValueError: ``epsilon`` is negative, or the bounds are no range or leave out an input.
        TypeError: the first input is not in floating point.

    Reference: Goodfellow, Shlens and Szegedy (2015), "Explaining and harnessing adversarial
    examples".
    """
    x, rest = _check(inputs, epsilon, bounds)
    gradient, _ = _gradient(model, x, rest, target)
    return _project(x + epsilon * gradient.sign(), x, epsilon, bounds)


def pgd(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    target: Tensor,
    *,
    epsilon: float,
    bounds: Bounds = (0.0, 1.0),
    steps: int = 10,
    seed: int = 0,
) -> Tensor:
    """Many small steps of `fgsm` from a random start, kept within ``epsilon`` after each.

    Of all points on the way, that of `fgsm` among them, the one with the highest loss is returned
    for each example: so it is never weaker than one step.

    Args:
        model, inputs, target, epsilon, bounds: as for `fgsm`.
        steps: of 2.5 epsilon / steps each, so that every corner can be reached.
        seed: of the random start.

    Raises:
        ValueError, TypeError: as for `fgsm`; or ``steps`` is below 1.

    Reference: Madry, Makelov, Schmidt, Tsipras and Vladu (2018), "Towards deep learning models
    resistant to adversarial attacks".
    """
    x, rest = _check(inputs, epsilon, bounds)
    if steps < 1:
        raise ValueError(f"steps is {steps}; give 1 or more")
    if epsilon == 0:
        return x
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    worst = fgsm(model, inputs, target, epsilon=epsilon, bounds=bounds)
    _, highest = _gradient(model, worst, rest, target)
    point = _project(x + epsilon * (2 * noise - 1), x, epsilon, bounds)
    for step in range(steps + 1):
        gradient, loss = _gradient(model, point, rest, target)
        better = loss > highest  # (B,)
        worst = torch.where(better.view(-1, *[1] * (x.dim() - 1)), point, worst)
        highest = torch.where(better, loss, highest)
        if step < steps:
            moved = point + 2.5 * epsilon / steps * gradient.sign()
            point = _project(moved, x, epsilon, bounds)
    return worst


def under_attack(
    task: Task,
    models: Mapping[str, Model],
    *,
    epsilons: Sequence[float] = (0.0, 0.01, 0.02, 0.05),
    attack: Literal["fgsm", "pgd"] = "pgd",
    source: str | None = None,
    bounds: Bounds = (0.0, 1.0),
    count: int = 1000,
    batch_size: int = 250,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Accuracy of several models on test images that were changed to fool one of them.

    Each model is attacked twice: with the changes made against ``source``, which transfer or not
    (``against`` is its name), and with changes made against the model itself (``against`` is its
    own). The second needs gradients: a model that rounds its activations has none, or none that
    help, which hides its weakness and does not remove it. ``no_gradient`` is the share of examples
    for which every derivative is 0: where it is high, only the first attack says anything.

    Args:
        models: name -> a module, or any callable of the inputs, such as a `deploy.Predictor`, which
            is attacked by transfer only.
        epsilons: sizes of the change; 0 gives the accuracy without an attack.
        source: name of the module that is attacked for the others; the first unless told.
        bounds: smallest and largest value of an input.
        count: so many of the test examples, drawn with ``seed``; all if there are fewer.

    Returns:
        One row for each epsilon, model and ``against``: accuracy as ``score``, its 95 % interval,
        the number of examples, and ``no_gradient`` (NaN by transfer).

    Raises:
        ValueError: no models, an unknown source or attack, or what `fgsm` refuses.
        TypeError: the source is not a module.
    """
    attacks = {"fgsm": fgsm, "pgd": partial(pgd, seed=seed)}
    if attack not in attacks:
        raise ValueError(f"attack is {attack!r}; choose from {tuple(attacks)}")
    source = next(iter(models), None) if source is None else source
    if source not in models:
        raise ValueError(f"source is {source!r}; name one of the models: {[*models]}")
    if not isinstance(models[source], nn.Module):
        raise TypeError(f"{source!r} has no gradients; name a module as the source")
    attacked = {name: model for name, model in models.items() if isinstance(model, nn.Module)}
    pairs = [(name, other) for name in models for other in dict.fromkeys((source, name))
             if other in attacked]  # fmt: skip
    right = {(epsilon, *pair): [] for epsilon in epsilons for pair in pairs}
    silent = {name: [] for name in attacked}
    test = task.test.subset(min(count, len(task.test)), seed=seed)
    total = len(epsilons) * len(attacked) * test.count_batches(batch_size)
    with tqdm(total=total, disable=not progress, desc=attack, unit="batch") as bar:
        for inputs, target in test.batches(batch_size):
            for against, model in attacked.items():
                gradient, _ = _gradient(model, inputs[0], inputs[1:], target)
                silent[against].append((gradient == 0).flatten(1).all(1).double())
                for epsilon in epsilons:
                    changed = attacks[attack](model, inputs, target, epsilon=epsilon, bounds=bounds)
                    for name in [name for name, other in pairs if other == against]:
                        answer = _answer(models[name], changed, inputs[1:])
                        right[epsilon, name, against].append(correct(answer, target).double())
                    bar.update()
    rows = []
    for (epsilon, name, against), parts in right.items():
        scores = torch.cat(parts)
        low, high = interval(scores, proportion=True)
        rows.append({
            "epsilon": epsilon, "name": name, "against": against,
            "score": scores.mean().item(), "score_low": low, "score_high": high,
            "count": len(scores),
            "no_gradient": torch.cat(silent[name]).mean().item() if name == against else math.nan,
        })  # fmt: skip
    return pd.DataFrame(rows)


def membership(
    model: Model, task: Task, *, count: int = 2000, batch_size: int = 500, seed: int = 0
) -> dict[str, float]:
    """How well the answers tell an example that was trained on from one that was not.

    The attack takes a low loss for a sign of training. Its success is the area under the ROC curve,
    the probability that of one example of each kind it picks the right one: 0.5 is a guess, 1.0
    gives every name away. Someone who is told the class alone can only see whether it is right.

    Args:
        count: so many examples of the training and of the test split.

    Returns:
        ``probabilities``: the area where the answer has the probability of each class; ``label``:
        where it is the class alone; ``p_value``: that the first is no better than a guess.

    Raises:
        ValueError: the answers are not (B, C).

    Reference: Yeom, Giacomelli, Fredrikson and Jha (2018), "Privacy risk in machine learning:
    analyzing the connection to overfitting".
    """
    losses, wrong = {}, {}
    for name in ("train", "test"):
        split = getattr(task, name)
        drawn = split.subset(min(count, len(split)), seed=seed)
        found = []
        for inputs, target in drawn.batches(batch_size):
            answer = _answer(model, inputs[0], inputs[1:])
            if answer.dim() != 2:
                shape = tuple(answer.shape)
                raise ValueError(f"the answer has shape {shape}; give a model of (batch, classes)")
            loss = F.cross_entropy(answer.double(), target, reduction="none")
            found.append((loss, 1 - correct(answer, target).double()))
        losses[name], wrong[name] = (torch.cat(part).numpy() for part in zip(*found, strict=True))

    def area(values: dict) -> tuple[float, float]:
        test = stats.mannwhitneyu(values["test"], values["train"], alternative="greater")
        pairs = len(values["test"]) * len(values["train"])
        return float(test.statistic) / pairs, float(test.pvalue)

    (probabilities, p_value), (label, _) = area(losses), area(wrong)
    return {"probabilities": probabilities, "label": label, "p_value": p_value}


def _check(
    inputs: tuple[Tensor, ...], epsilon: float, bounds: Bounds
) -> tuple[Tensor, tuple[Tensor, ...]]:
    x, *rest = inputs
    if not x.is_floating_point():
        raise TypeError(f"the first input is {x.dtype}; only floating point can change a little")
    if not epsilon >= 0:
        raise ValueError(f"epsilon is {epsilon}; give 0 or more, in units of the input")
    low, high = bounds
    if not low < high:
        raise ValueError(f"bounds are {bounds}; give the smallest and the largest value")
    if x.numel() and not (low <= x.min() and x.max() <= high):
        raise ValueError(
            f"inputs reach from {x.min():g} to {x.max():g}, outside of the bounds {bounds}; give "
            "bounds=(smallest, largest)"
        )
    return x.detach(), tuple(rest)


def _gradient(
    model: nn.Module, x: Tensor, rest: tuple[Tensor, ...], target: Tensor
) -> tuple[Tensor, Tensor]:
    """How the loss of each example changes with its input, and the losses (B,).

    The model's parameters gather no gradients. Zero where the output does not depend on the input
    by differentiable steps.
    """
    x = x.detach().requires_grad_()
    with evaluation_mode(model), torch.enable_grad():
        loss = F.cross_entropy(model(x, *rest).float(), target, reduction="none")  # (B,)
        if not loss.requires_grad:
            return torch.zeros_like(x), loss
        (gradient,) = torch.autograd.grad(loss.sum(), x, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient, loss.detach()


def _project(moved: Tensor, x: Tensor, epsilon: float, bounds: Bounds) -> Tensor:
    """The nearest point that is within epsilon of ``x`` and within the bounds."""
    return moved.clamp(x - epsilon, x + epsilon).clamp(*bounds)


def _answer(model: Model, x: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
    with evaluation_mode(model), torch.no_grad():
        return model(x, *rest).float()
