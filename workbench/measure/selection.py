"""Which model, in which runtime, answers fastest within a loss of accuracy and a size."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd
from torch import nn

from workbench.data import Task
from workbench.deploy.runtimes import RUNTIMES, Predictor, installed, prepare
from workbench.measure.comparison import compare
from workbench.measure.latency import REPEATS


@dataclass(frozen=True)
class Best:
    """What `best` chose: ``predictor`` answers; ``frame`` is the table it was chosen from.

    The frame is that of `workbench.measure.compare` with two columns more: ``loss``, by how much
    the metric is worse than the baseline's, and ``fits``, whether the row is within the limits.
    """

    name: str
    predictor: Predictor
    frame: pd.DataFrame


def best(
    models: nn.Module | Mapping[str, nn.Module | Predictor],
    task: Task,
    *,
    loss: float = 0.003,
    size_bytes: float | None = None,
    runtimes: Sequence[str] | None = None,
    split: Literal["train", "validation", "test"] = "validation",
    examples: int = 1000,
    batch_size: int = 1,
    threads: int = 1,
    repeats: int = REPEATS,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> Best:
    """Measure every model in every runtime that is installed, interleaved; return the fastest.

    Args:
        models: a module, or several by name, among them predictors of exported files
            (`workbench.deploy.load`), which run as they are. The first one, in the first runtime,
            is the baseline of speed and accuracy.
        loss: most that the task's metric may be worse than the baseline's.
        size_bytes: largest file, if given.
        runtimes: those to try; all that are installed by default.
        split, examples: what is scored: this many examples, drawn with ``seed``.
        batch_size, threads, repeats, device: of the latency, as in `compare`.

    Raises:
        ValueError: nothing is within the limits, or what `compare` refuses.

    Shown in notebook 13.
    """
    if not loss >= 0:
        raise ValueError(f"loss is {loss}; give 0 or more")
    if examples < 1:
        raise ValueError(f"examples is {examples}; give 1 or more")
    part = getattr(task, split, None)
    if part is None or split not in ("train", "validation", "test"):
        raise ValueError(f"split is {split!r}; choose 'train', 'validation' or 'test'")
    models = {"model": models} if isinstance(models, nn.Module) else models
    runtimes = installed() if runtimes is None else tuple(runtimes)
    if unknown := set(runtimes) - set(RUNTIMES):
        raise ValueError(f"runtimes names {sorted(unknown)}; choose from {RUNTIMES}")
    few = replace(task, **{split: part.subset(min(examples, len(part)), seed=seed)})

    candidates = {}
    for name, model in models.items():
        if isinstance(model, Predictor):
            candidates[name] = model
            continue
        for runtime in runtimes:
            candidate = (model, runtime)
            # Where this fails, so it does in `compare`, which writes the reason into the frame.
            with contextlib.suppress(Exception):
                candidate = prepare(
                    model, runtime, example_input=task.example_input, device=device, threads=threads
                )
            candidates[f"{name}, {runtime}"] = candidate
    frame = compare(
        few,
        candidates,
        split=split,
        batch_size=batch_size,
        threads=threads,
        repeats=repeats,
        device=device,
        seed=seed,
        progress=progress,
    )
    change = frame["score"] - frame["score"].iloc[0]
    frame["loss"] = -change if task.metric.higher_is_better else change
    frame["fits"] = (frame["loss"] <= loss) & frame["error"].eq("")
    if size_bytes is not None:
        frame["fits"] &= frame["size_bytes"] <= size_bytes
    if not frame["fits"].any():
        ran = frame[frame["error"].eq("")]
        if ran.empty:
            raise ValueError(f"nothing could be measured; {frame['name'][0]}: {frame['error'][0]}")
        smallest = ran.loc[ran["size_bytes"].idxmin()]
        raise ValueError(
            f"nothing is within a loss of {loss} and a size of {size_bytes}: the smallest file, "
            f"{smallest['name']}, has {smallest['size_bytes']:,.0f} bytes and a loss of "
            f"{smallest['loss']:.4f}; allow more of one"
        )
    chosen = frame.loc[frame["latency_ms"].where(frame["fits"]).idxmin(), "name"]
    return Best(chosen, candidates[chosen], frame)
