"""Which layers bear how much, and the best use of a budget of bytes.

`sensitivity` compresses one layer at a time to each level and scores the model. `plan` chooses a
level for every layer from that table, so that the file stays within a budget at the least harm.
"""

import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
from torch import nn
from tqdm.auto import tqdm

from workbench import models
from workbench.compress.computed import source_of, weight_names
from workbench.compress.layers import check_model, coverage, layers_of, places, weight_count
from workbench.compress.recipe import Recipe, Step, device_of
from workbench.data import Task
from workbench.training import Evaluation, evaluate

COLUMNS = (
    "technique", "layer", "shared_with", "level", "weights", "size_bytes", "dense_bytes",
    "model_bytes", "score", "drop", "loss", "loss_increase",
)  # fmt: skip


def sensitivity(
    model: nn.Module,
    task: Task,
    technique: Step | type[Step],
    levels: Sequence[float],
    *,
    layers: Sequence[str] | None = None,
    split: Literal["train", "validation", "test"] = "validation",
    examples: int | None = 2000,
    executor: Executor | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Compress one layer at a time to each level, leave all others, and score the model.

    Args:
        technique: a step class, or a step with the settings to keep; one whose ``bits``,
            ``sparsity``, ``clusters`` or the like can be given by layer name.
        levels: values of that setting.
        layers: names of the layers to try; all by default. Layers that share a weight are
            compressed together.
        examples: how many, drawn once, every model is scored on; None for the whole split.
        executor: works on the pairs of layer and level, if given.
        seed: of the draw.

    Returns:
        One row for each layer and level that the technique handles. ``technique`` is the step
        without the level; ``shared_with`` are the layers compressed along; ``weights`` counts the
        layer's weights. ``size_bytes`` is what these take in the saved file, with their entries
        in its header, ``dense_bytes`` what they took before, and ``model_bytes`` the file of the
        whole model. ``drop`` is how much worse the ``score`` is than the model's own, in units
        of the metric and negative where it is better; ``loss_increase`` the same for ``loss``.

    Raises:
        ValueError: no levels, a technique without a setting by layer, an unknown layer, a count of
            examples below 1, or a technique that handles none of the layers.
    """
    template = technique() if isinstance(technique, type) else technique
    setting = layer_setting(template)
    if not levels:
        raise ValueError(f"levels is {levels!r}; give at least one value of {setting}")
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split is {split!r}; choose 'train', 'validation' or 'test'")
    check_model(model, (), "compress")
    groups = list(_tied(model, layers))
    if examples is not None:
        part = getattr(task, split)
        if examples < 1:
            raise ValueError(f"examples is {examples}; give 1 or more, or None for the whole split")
        scored = replace(task, **{split: part.subset(min(examples, len(part)), seed=seed)})
    else:
        scored = task
    before = evaluate(model, scored, split=split, device=device_of(model))
    entries, model_bytes = _file(model)
    jobs = [
        (model, task, scored, split, replace(template, **{setting: dict.fromkeys(group, level)}))
        for group in groups
        for level in levels
    ]
    bar = tqdm(total=len(jobs), desc="sensitivity", unit="model", disable=not progress)
    rows = []
    with bar:
        results = _in_turn(jobs) if executor is None else executor.map(_measure, jobs)
        for (*_, step), (left, after, after_entries) in zip(jobs, results, strict=True):
            bar.update()
            (first, *others), (level, *_) = zip(*getattr(step, setting).items(), strict=True)
            if left:
                continue
            size_bytes, dense_bytes = _change(entries, after_entries)
            worse = before.value - after.value
            row = (
                template, first, tuple(others), level, weight_count(model.get_submodule(first)),
                size_bytes, dense_bytes, model_bytes,
                after.value, worse if task.metric.higher_is_better else -worse,
                after.loss, after.loss - before.loss,
            )  # fmt: skip
            rows.append(dict(zip(COLUMNS, row, strict=True)))
    if not rows:
        raise ValueError(f"{template!r} handles none of the layers, e.g. {left}")
    # Levels of several techniques, 4 bits and a sparsity of 0.5, keep their types side by side.
    return pd.DataFrame(rows, columns=COLUMNS).astype({"level": object})


@dataclass(frozen=True)
class Plan:
    """A level for each layer: the ``recipe`` that applies them, and what is to be expected.

    ``table`` has one row for each layer: layer, technique and level (None and NaN where it is
    left), size_bytes, dense_bytes, drop, loss_increase. ``predicted_bytes`` is never below the
    file's real size; ``predicted_drop`` is the sum over the layers, as if none made another's harm
    worse.
    """

    recipe: Recipe
    predicted_drop: float
    predicted_bytes: int
    table: pd.DataFrame


def plan(
    sensitivity: pd.DataFrame, *, size: float | None = None, size_bytes: int | None = None
) -> Plan:
    """The level of each layer that does the least harm while the model's file fits the budget.

    Harm is the sum of the increases of the loss, which tells levels apart where the metric does
    not; one that seems to help counts as none. Every layer may also be left as it is. The choice
    is exact: a multiple-choice knapsack, solved over the Pareto front of bytes and harm.

    Args:
        sensitivity: the table that `sensitivity` made, or several of the same model together, to
            choose among techniques as well.
        size: the budget as a share of the model's file, e.g. 0.12; or else
        size_bytes: the budget in bytes. The file holds what is not compressed as well.

    Raises:
        ValueError: not exactly one budget, no rows, rows of different models, or a budget that
            cannot be met.

    Reference: Sinha and Zoltners (1979), "The multiple-choice knapsack problem".
    """
    model_bytes = _model_bytes(sensitivity)
    if (size is None) == (size_bytes is None):
        raise ValueError("give either size, a share such as 0.12, or size_bytes")
    budget = size_bytes if size is None else size * model_bytes
    frames = [frame.reset_index(drop=True) for _, frame in sensitivity.groupby("layer", sort=False)]
    groups = []
    for frame in frames:
        change = (frame.size_bytes - frame.dense_bytes).to_numpy(np.int64)
        harm = frame.loss_increase.fillna(math.inf).clip(lower=0).to_numpy(float)
        groups.append((np.append(change, 0), np.append(harm, 0.0)))  # the last is to leave it
    smallest = model_bytes + sum(int(change[np.isfinite(harm)].min()) for change, harm in groups)
    if not budget >= smallest:
        raise ValueError(
            f"the budget is {budget:,.0f} bytes; the levels in the table reach {smallest:,} bytes, "
            f"a share of {math.ceil(smallest / model_bytes * 1e4) / 1e4:.4f}, at the least"
        )
    chosen = best_choice(groups, budget - model_bytes)
    table = pd.DataFrame(
        [_row(frame, at) for frame, at in zip(frames, chosen, strict=True)],
        columns=["layer", "technique", "level", "size_bytes", "dense_bytes", "drop",
                 "loss_increase"],
    )  # fmt: skip
    used = pd.concat([frame.iloc[at : at + 1] for frame, at in zip(frames, chosen, strict=True)])
    used_steps = list(dict.fromkeys(used.technique))
    recipe = Recipe(*(_with_levels(step, used) for step in used_steps))
    saved_bytes = int((used.dense_bytes - used.size_bytes).sum())
    return Plan(recipe, float(used["drop"].sum()), model_bytes - saved_bytes, table)


def best_choice(groups: Sequence[tuple[np.ndarray, np.ndarray]], budget: float) -> list[int]:
    """The index to take from each group of (sizes, costs) so that the sizes sum up to at most
    ``budget`` and the costs to the least possible; of equal costs, the smaller.

    Partial sums are kept while no other is both smaller and cheaper, and while a bound from
    Lagrangian relaxation does not rule them out.
    """
    usable = [np.isfinite(costs) for _, costs in groups]
    weight, limit = _relaxed(groups, budget)
    # What the groups still to come take at the least: in size, and in cost + weight * size.
    smallest = [sizes[ok].min() for (sizes, _), ok in zip(groups, usable, strict=True)]
    cheapest = [(costs + weight * sizes).min() for sizes, costs in groups]
    slack = 1e-9 * (1 + abs(limit))  # of rounding in the sums
    size, cost = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []  # (which state before, which index)
    for at, ((sizes, costs), ok) in enumerate(zip(groups, usable, strict=True)):
        indices = np.flatnonzero(ok)
        before = np.repeat(np.arange(len(size)), len(indices))
        index = np.tile(indices, len(size))
        new_size, new_cost = size[before] + sizes[index], cost[before] + costs[index]
        rest_size, rest_cost = sum(smallest[at + 1 :]), sum(cheapest[at + 1 :])
        bound = new_cost + weight * new_size + rest_cost - weight * budget
        kept = np.flatnonzero((new_size + rest_size <= budget) & (bound <= limit + slack))
        kept = kept[np.lexsort((new_cost[kept], new_size[kept]))]
        least = np.minimum.accumulate(new_cost[kept])
        kept = kept[np.concatenate(([True], least[1:] < least[:-1]))]  # the Pareto front
        size, cost = new_size[kept], new_cost[kept]
        trail.append((before[kept], index[kept]))
    chosen, state = [], len(size) - 1  # the last of the front is the cheapest
    for before, index in reversed(trail):
        chosen.append(int(index[state]))
        state = before[state]
    return chosen[::-1]


def layer_setting(step: Step) -> str:
    """The setting of a step that can be given by layer name.

    Raises:
        TypeError: not a step.
        ValueError: there is none.
    """
    if not isinstance(step, Step):
        raise TypeError(f"technique is {step!r}; give a step, such as QuantizeWeights")
    for name, hint in get_type_hints(type(step)).items():
        kinds = get_args(hint)
        for kind in kinds:
            # Such as int | Mapping[str, int]: the same kind of value for one layer and for all.
            if get_origin(kind) is Mapping and get_args(kind)[1] in kinds:
                return name
    raise ValueError(f"{type(step).__name__} has no setting that can be given by layer name")


def _tied(model: nn.Module, chosen: Sequence[str] | None) -> Iterator[tuple[str, ...]]:
    """Names of the layers to try, together where they share a weight."""
    layers = layers_of(model)
    if isinstance(chosen, str):
        raise TypeError(f"layers is the string {chosen!r}; give a list of layer names")
    unknown = set(chosen or ()) - set(layers)
    if unknown:
        raise ValueError(f"layers names {sorted(unknown)}; layers are {sorted(layers)}")
    found, order = places(layers), list(layers)
    groups: dict[str, list[str]] = {}
    for name, layer in layers.items():
        originals = [source_of(layer, key) or layer._parameters[key] for key in weight_names(layer)]
        first = min((found[original].layer for original in originals), key=order.index)
        groups.setdefault(first, []).append(name)
    for group in groups.values():
        if chosen is None or not set(group).isdisjoint(chosen):
            yield tuple(group)


def _in_turn(jobs: Iterable[tuple]) -> Iterator[tuple]:
    return map(_measure, jobs)


def _measure(job: tuple) -> tuple[str, Evaluation, dict]:
    """Why the layer was left, or ""; the score; and the entries of the file."""
    model, task, scored, split, step = job
    small = step(model, task, progress=False)
    table = coverage(small).set_index("layer")
    (first, *_) = getattr(step, layer_setting(step))
    left = table.reason.get(first, "")
    return left, evaluate(small, scored, split=split, device=device_of(small)), _file(small)[0]


def _file(model: nn.Module) -> tuple[dict[str, tuple[int, int]], int]:
    """What stands in the saved file, with the bytes of each in the header and behind it; and the
    bytes of the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        models.save(model, path)
        content = path.read_bytes()
    # Eight bytes of length, then the header as JSON, padded to eight bytes, then the tensors.
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header.pop("__metadata__", {})
    entries = {
        _json({key: value}): (len(_json({key: value})), 0) for key, value in metadata.items()
    }
    for name, entry in header.items():
        text = len(_json({name: entry}))
        start, end = entry.pop("data_offsets")
        entries[_json({name: entry})] = (text, end - start)
    return entries, len(content)


def _json(value: dict) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _change(before: dict, after: dict) -> tuple[int, int]:
    """Bytes of what is in one file alone, afterwards and before.

    A sum of such changes is never below the real one: offsets get shorter, never longer, and the
    header's change is rounded up to the eight bytes to which it is padded.
    """
    gone = [before[key] for key in before.keys() - after.keys()]
    new = [after[key] for key in after.keys() - before.keys()]
    dense_bytes = sum(text + data for text, data in gone)
    text_change = sum(text for text, _ in new) - sum(text for text, _ in gone)
    data_change = sum(data for _, data in new) - sum(data for _, data in gone)
    return dense_bytes + data_change + math.ceil(text_change / 8) * 8, dense_bytes


def _model_bytes(sensitivity: pd.DataFrame) -> int:
    if sensitivity.empty:
        raise ValueError("the table has no rows; make it with sensitivity")
    sizes = sensitivity.model_bytes.unique()
    if len(sizes) != 1:
        raise ValueError(f"the table holds models of {sorted(sizes)} bytes; give rows of one")
    return int(sizes[0])


def _row(frame: pd.DataFrame, at: int) -> dict:
    if at < len(frame):
        return frame.iloc[at].to_dict()
    dense_bytes = frame.dense_bytes.iloc[0]
    return {
        "layer": frame.layer.iloc[0],
        "technique": None,
        "level": math.nan,
        "size_bytes": dense_bytes,
        "dense_bytes": dense_bytes,
        "drop": 0.0,
        "loss_increase": 0.0,
    }


def _with_levels(step: Step, used: pd.DataFrame) -> Step:
    """The step with the level of each layer that it was chosen for."""
    levels = {}
    for row in used.itertuples():
        if row.technique == step:
            levels |= dict.fromkeys((row.layer, *row.shared_with), row.level)
    return replace(step, **{layer_setting(step): levels})


def _relaxed(groups: Sequence[tuple[np.ndarray, np.ndarray]], budget: float) -> tuple[float, float]:
    """A price of size at which the best of each group, by itself, fits the budget, as low as
    possible; and what that choice costs."""

    def at(weight: float) -> tuple[float, float]:
        size = cost = 0.0
        for sizes, costs in groups:
            best = np.lexsort((sizes, costs + weight * sizes))[0]
            size, cost = size + sizes[best], cost + costs[best]
        return size, cost

    low, high = 0.0, 1e-12
    if at(low)[0] <= budget:
        return low, at(low)[1]
    while at(high)[0] > budget:
        low, high = high, high * 10
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle)[0] <= budget else (middle, high)
    return high, at(high)[1]
