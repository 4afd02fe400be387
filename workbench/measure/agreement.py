"""How much a candidate answers as its original does, where there are no labels.

Four numbers that need inputs alone: the same answer, the distance between the two distributions,
the angle between the two outputs, and the neighbours that each input keeps. They tell that a model
changed, not that it got worse: an answer that differs may be the better one.

Shapes: N inputs, C classes or width of the vectors, K neighbours.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from workbench.measure.accuracy import interval
from workbench.measure.latency import choose_baseline
from workbench.training import evaluation_mode

Model = nn.Module | Callable[..., Tensor]


def agreement(
    models: Mapping[str, Model],
    inputs: Tensor | tuple[Tensor, ...],
    *,
    baseline: str | None = None,
    outputs: Literal["logits", "vectors"] = "logits",
    neighbours: int = 10,
    batch_size: int = 50,
    progress: bool = True,
) -> pd.DataFrame:
    """Compare what models answer to the same inputs with what the baseline answers.

    Args:
        models: by name; modules, or callables such as a runtime's predictor, from the inputs to
            (N, C). Modules run in evaluation mode and are not changed.
        inputs: one tensor, or one for each input of the models, with N examples each.
        baseline: what the others are compared with; the first where it is not named.
        outputs: "logits" of classes, or "vectors" that are compared with one another, for which an
            answer and a distribution have no meaning: their columns hold NaN.
        neighbours: how many nearest other inputs, by the cosine, are asked for.

    Returns:
        A frame, one row per model: ``examples``; ``agreement``, the share of equal answers, with
        Wilson's interval; ``kl_bits``, the mean Kullback-Leibler divergence from the baseline's
        distribution; ``cosine``, the mean; ``neighbours_kept``, the mean share of the nearest
        inputs that stay among them, with Student's interval.

    Raises:
        ValueError: an unknown baseline, fewer examples than neighbours need, or outputs of another
            shape than the baseline's, or with a NaN.

    Reference: Kullback and Leibler (1951), "On information and sufficiency".

    >>> net = nn.Linear(4, 3)
    >>> frame = agreement({"a": net, "same": net}, torch.randn(20, 4), progress=False)
    >>> frame.agreement.tolist()
    [1.0, 1.0]
    """
    baseline = choose_baseline(models, baseline)
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    if outputs not in ("logits", "vectors"):
        raise ValueError(f"outputs is {outputs!r}; choose 'logits' or 'vectors'")
    examples = len(inputs[0])
    if not 1 <= neighbours < examples:
        raise ValueError(
            f"neighbours is {neighbours}, with {examples} examples; give from 1 to {examples - 1}"
        )
    answered = {}
    for name in tqdm(models, desc="answers", disable=not progress):
        answered[name] = _answers(name, models[name], inputs, batch_size)
    before = answered[baseline]
    for name, after in answered.items():
        if after.shape != before.shape:
            raise ValueError(
                f"{name!r} answers with the shape {tuple(after.shape)}, {baseline!r} with "
                f"{tuple(before.shape)}; compare models of one task"
            )
    near = _nearest(before, neighbours)
    rows = []
    for name, after in answered.items():
        row = {"name": name, "examples": examples}
        if outputs == "logits":
            row |= _as_distributions(before, after)
        row["cosine"] = F.cosine_similarity(before, after, dim=1).mean().item()
        kept = _shared(near, _nearest(after, neighbours))
        low, high = interval(kept, proportion=False)
        row |= {
            "neighbours_kept": kept.mean().item(),
            "neighbours_kept_low": max(low, 0.0),
            "neighbours_kept_high": min(high, 1.0),
        }
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


COLUMNS = [
    "name", "examples", "agreement", "agreement_low", "agreement_high", "kl_bits", "cosine",
    "neighbours_kept", "neighbours_kept_low", "neighbours_kept_high",
]  # fmt: skip


def _answers(name: str, model: Model, inputs: tuple[Tensor, ...], batch_size: int) -> Tensor:
    """Outputs for all inputs, (N, C), in 64 bits: what differs is small."""
    pieces = zip(*(x.split(batch_size) for x in inputs), strict=True)
    with torch.inference_mode(), evaluation_mode(model):
        found = torch.cat([torch.as_tensor(model(*piece)).double() for piece in pieces])
    if found.dim() != 2 or not found.isfinite().all():
        what = f"the shape {tuple(found.shape)}" if found.dim() != 2 else "a NaN or an infinity"
        raise ValueError(f"{name!r} answers with {what}; give models from (N, ...) to (N, C)")
    return found


def _as_distributions(before: Tensor, after: Tensor) -> dict[str, float]:
    same = (before.argmax(1) == after.argmax(1)).double()  # (N,)
    low, high = interval(same, proportion=True)
    expected, found = before.log_softmax(1), after.log_softmax(1)
    nats = F.kl_div(found, expected, log_target=True, reduction="batchmean").item()
    return {
        "agreement": same.mean().item(),
        "agreement_low": low,
        "agreement_high": high,
        "kl_bits": max(nats, 0.0) / math.log(2),
    }


def _nearest(vectors: Tensor, count: int) -> Tensor:
    """For each vector, which others have the largest cosine with it: (N, K)."""
    unit = F.normalize(vectors, dim=1)
    likeness = unit @ unit.T  # (N, N)
    likeness.fill_diagonal_(-torch.inf)  # nobody is their own neighbour
    return likeness.topk(count, dim=1).indices


def _shared(before: Tensor, after: Tensor) -> Tensor:
    """Share of the neighbours before, (N, K), that are neighbours after: (N,)."""
    return (before[:, :, None] == after[:, None, :]).any(2).double().mean(1)
