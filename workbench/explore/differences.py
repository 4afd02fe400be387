"""What a technique did to the answers of a model: which changed, for whom, and by how much.

Two models of equal accuracy can differ in many answers. `difference` looks at both, example by
example. Reference: Hooker et al. (2019), "What do compressed deep neural networks forget?"
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from workbench.data import IGNORED, Task
from workbench.measure import interval
from workbench.training import evaluation_mode


@dataclass(frozen=True, eq=False, repr=False)
class Difference:
    """What `difference` found; the last line of a cell shows it.

    Attributes:
        answers: how many answers were compared.
        agreement: share of equal answers, right or wrong, with its 95 % interval (Wilson)
            ``agreement_low`` to ``agreement_high``.
        kl_nats: mean divergence KL(before || after) of the two distributions over classes.
        flips: one row for each answer that changed: ``index`` of the example, ``position`` in it
            (sequences only), ``target``, the answers ``before`` and ``after``, and ``kind``:
            "fixed" (wrong, then right), "broken" (right, then wrong) or "other" (wrong both times).
        per_class: one row for each class that is a target: ``label``, ``count``, the share of
            right answers ``before`` and ``after``, and its ``change``, the greatest loss first.
    """

    answers: int
    agreement: float
    agreement_low: float
    agreement_high: float
    kl_nats: float
    flips: pd.DataFrame
    per_class: pd.DataFrame

    def __repr__(self) -> str:
        kinds = self.flips["kind"].value_counts()
        counts = ", ".join(
            f"{kinds.get(kind, 0):,} {kind}" for kind in ("fixed", "broken", "other")
        )
        return (
            f"{self.agreement:.2%} of {self.answers:,} answers are the same (95 % interval "
            f"{self.agreement_low:.2%} to {self.agreement_high:.2%}); {len(self.flips):,} changed: "
            f"{counts}; mean KL divergence {self.kl_nats:.3g} nats"
        )

    def _repr_html_(self) -> str:
        shares = dict.fromkeys(("before", "after"), "{:.1%}".format)
        table = self.per_class.head(12).to_html(
            index=False, formatters=shares | {"change": "{:+.1%}".format, "count": "{:,}".format}
        )
        return f"<p>{self!r}</p>{table}"


def difference(
    before: Callable[..., Tensor],
    after: Callable[..., Tensor],
    task: Task,
    *,
    split: str = "test",
) -> Difference:
    """Compare the answers of two models to the same questions.

    The models are modules, predictors or callables that give logits, (batch, classes) or
    (batch, positions, classes); positions whose target is `workbench.data.IGNORED` are left out.

    Raises:
        ValueError: an unknown split, outputs of different shapes or that do not fit the targets,
            NaN in an output, or nothing to compare.

    Pictures of the same: `workbench.explore.plots.confusion_change`.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split is {split!r}; choose 'train', 'validation' or 'test'")
    rows, divergence, start = [], 0.0, 0
    for _, target, old, new in paired_outputs(before, after, task, split):
        _check_outputs(old, new, target)
        counted = target != IGNORED  # (batch) or (batch, positions)
        places = counted.nonzero()  # (answers, 1 or 2)
        places[:, 0] += start
        answers = (target[counted], old[counted].argmax(-1), new[counted].argmax(-1))
        rows.append(torch.cat([places, torch.stack(answers, 1)], 1))
        divergence += _divergence(old[counted], new[counted]).sum().item()
        start += len(target)
    table = torch.cat(rows) if rows else torch.empty(0, 4)
    if len(table) == 0:
        raise ValueError(f"the {split} split gives no answers to compare; give it an example")
    places = ["index", "position"][: table.shape[1] - 3]
    frame = pd.DataFrame(table.numpy(), columns=[*places, "target", "before", "after"])
    same = frame["before"] == frame["after"]
    low, high = interval(same, proportion=True)
    return Difference(
        answers=len(frame),
        agreement=float(same.mean()),
        agreement_low=low,
        agreement_high=high,
        kl_nats=divergence / len(frame),
        flips=_flips(frame[~same], task),
        per_class=_per_class(frame, task),
    )


def paired_outputs(
    before: Callable[..., Tensor], after: Callable[..., Tensor], task: Task, split: str
) -> Iterator[tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]]:
    """Batches of (inputs, target, outputs before, outputs after), in evaluation mode."""
    for inputs, target in getattr(task, split).batches():
        # Not around the loop: the caller's own code runs between the batches.
        with evaluation_mode(before), evaluation_mode(after), torch.no_grad():
            outputs = _output(before, inputs), _output(after, inputs)
        yield inputs, target, *outputs


def kind_of_change(right: int, was: int, now: int) -> str:
    """Whether a changed answer was "fixed", "broken", or is wrong both times ("other")."""
    return "fixed" if now == right else "broken" if was == right else "other"


def class_name(task: Task, number: int) -> str | int:
    """The label of a class where the task has labels, else its number."""
    return task.labels[number] if task.labels else number


def _output(model: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    device = getattr(model, "device", "cpu")
    if isinstance(model, nn.Module):
        device = next((p.device for p in model.parameters()), "cpu")
    return model(*(x.to(device) for x in inputs)).cpu()


def _check_outputs(old: Tensor, new: Tensor, target: Tensor) -> None:
    if old.shape != new.shape:
        raise ValueError(
            f"outputs have shape {tuple(old.shape)} before and {tuple(new.shape)} after; compare "
            "models of the same classes"
        )
    if old.dim() not in (2, 3) or old.shape[:-1] != target.shape:
        raise ValueError(
            f"outputs of shape {tuple(old.shape)} for targets of shape {tuple(target.shape)}; give "
            "logits, (batch, classes) or (batch, positions, classes), and classes as targets"
        )
    for when, output in (("before", old), ("after", new)):
        if output.isnan().any():
            raise ValueError(f"the model {when} answers NaN; repair or retrain it first")


def _divergence(old: Tensor, new: Tensor) -> Tensor:
    """KL(old || new) of each answer, in nats: (answers, classes) -> (answers,)."""
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (old, new))
    # A class that was ruled out counts nothing, though its logarithm is infinite.
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0).sum(-1)


def _flips(changed: pd.DataFrame, task: Task) -> pd.DataFrame:
    answers = ["target", "before", "after"]
    triples = changed[answers].itertuples(index=False)
    kinds = [kind_of_change(*triple) for triple in triples]
    names = changed[answers].map(lambda number: class_name(task, number))
    return changed.assign(**names, kind=kinds).reset_index(drop=True)


def _per_class(frame: pd.DataFrame, task: Task) -> pd.DataFrame:
    right = frame[["before", "after"]].eq(frame["target"], axis=0).assign(label=frame["target"])
    table = right.groupby("label").mean()
    table.insert(0, "count", right.groupby("label").size())
    table["change"] = table["after"] - table["before"]
    table = table.sort_values("change", kind="stable").reset_index()
    table["label"] = [class_name(task, number) for number in table["label"]]
    return table
