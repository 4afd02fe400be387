"""Words and pages made from a comparison: nothing measured is ever typed by hand.

`say` writes a sentence, `table` a short table, `page` one HTML page on a model and what was done to
it, from which `read_page` gets the frames back. As a program, ``python -m
workbench.explore.report`` runs the main comparison and writes its page.
"""

import argparse
import inspect
import os
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from workbench import compress, data, measure, models
from workbench.data import Task
from workbench.explore import evidence, plots
from workbench.explore.page import html
from workbench.explore.page import read as read_page
from workbench.measure.comparison import Candidate

__all__ = ["Prose", "main", "markdown", "page", "read_page", "say", "table"]


@dataclass(frozen=True)
class Prose:
    """Text that a notebook shows as Markdown."""

    text: str

    def __repr__(self) -> str:
        return self.text

    def _repr_markdown_(self) -> str:
        return self.text


def say(
    template: str, rows: pd.Series | Mapping[str, object] | pd.DataFrame | None = None, **values
) -> Prose:
    """A sentence whose numbers come from the frame, so that it cannot drift from them.

    Args:
        template: a `str.format` template.
        rows: a row, whose columns are the fields; or a comparison, whose candidates are: write
            ``{int8 static[speedup]:.1f}``. A frame of one row counts as that row.
        values: further fields.

    A value that is not known is written as "unknown".

    Raises:
        ValueError: the template has a field or a format that does not fit; the error lists what
            is known.

    >>> say("{name} is {speedup:.1f} times faster", {"name": "int8", "speedup": 2.42})
    int8 is 2.4 times faster
    """
    if isinstance(rows, pd.DataFrame):
        if len(rows) == 1:
            rows = rows.iloc[0]
        else:
            rows = {row["name"]: row.to_dict() for _, row in rows.iterrows()}
    fields = {**({} if rows is None else dict(rows)), **values}
    try:
        return Prose(_Formatter().vformat(template, (), fields))
    except (KeyError, IndexError, AttributeError) as error:
        known = [repr(name) for name in fields]
        inner = [list(value) for value in fields.values() if isinstance(value, dict)]
        known += [f"[{name}]" for name in inner[0]] if inner else []
        raise ValueError(
            f"the template has no value for {error}; known are {', '.join(known)}"
        ) from error


def table(frame: pd.DataFrame, *, timing: bool = True) -> pd.DataFrame:
    """The comparison as a short table to read, with rounded texts; candidates as its index.

    Without ``timing`` it holds nothing that differs from run to run.
    """
    frame = plots.ready(frame)
    columns = {"technique": frame["technique"]}
    if "runtime" in frame:
        columns["runtime"] = frame["runtime"]
    columns["kind"] = ["simulated" if yes else "real" for yes in frame["simulated"]]
    columns["size (kB)"] = [_number(size / 1e3, ",.0f") for size in frame["size_bytes"]]
    if "compression_ratio" in frame:
        columns["times smaller"] = [_number(ratio, ".2f") for ratio in frame["compression_ratio"]]
    scale, digits = (100, ".1f") if plots.is_percent(frame) else (1, ".3f")
    columns[plots.score_label(frame)] = _with_interval(frame, "score", scale, digits)
    if timing:
        columns["latency (ms)"] = _with_interval(frame, "latency_ms", 1, ".3g")
        if "speedup" in frame:
            columns["speed-up"] = _with_interval(frame, "speedup", 1, ".2f")
        if "verdict" in frame:
            columns["verdict"] = frame["verdict"]
    remarks = _remarks(frame)
    if any(remarks):
        columns["remarks"] = remarks
    index = pd.Index(frame["name"], name="candidate")
    return pd.DataFrame({name: list(column) for name, column in columns.items()}, index=index)


def page(
    task: Task,
    models: Mapping[str, Candidate],
    path: str | os.PathLike,
    *,
    baseline: str | None = None,
    after: str | None = None,
    comparison: pd.DataFrame | None = None,
    recipe: compress.Recipe | None = None,
    code: str | None = None,
    title: str | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    examples: int = 16,
    attacked: int = 500,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Measure models, and write what was found as one HTML page that needs nothing else.

    It opens without a network, prints, and holds the frames that it was drawn from: `read_page`
    returns them.

    Args:
        task, models: as for `workbench.measure.compare`; at least two models.
        path: of the page; its folder is made.

    The other arguments are those of `workbench.explore.evidence.gather`. ``baseline`` and ``after``
    name the two models that are looked at closely, by default the first and the last; ``recipe`` is
    what the second was made with.

    Returns:
        The path.

    Raises:
        ValueError: what `gather` refuses. No page is written then.

    See notebook 16.
    """
    frames = evidence.gather(
        task, models, baseline=baseline, after=after, comparison=comparison, recipe=recipe,
        code=code, title=title, bounds=bounds, examples=examples, attacked=attacked, seed=seed,
        progress=progress,
    )  # fmt: skip
    text = html(frames)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.write_whole(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
    return path


def markdown(frame: pd.DataFrame) -> str:
    """The most important columns of `table` as Markdown, for a README."""
    rows = table(frame)
    accuracy = plots.score_label(frame)
    rows = rows[["runtime", "size (kB)", "times smaller", accuracy, "latency (ms)", "verdict"]]
    lines = [["candidate", *rows], ["---"] * (1 + rows.shape[1])]
    lines += [[str(cell) for cell in row] for row in rows.itertuples()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main_models() -> tuple[Task, compress.Recipe, dict[str, Candidate]]:
    """What the main comparison compares: a residual network on Fashion-MNIST, and cheaper ones."""
    task = data.fashion_mnist()
    model = models.pretrained("resnet-14")
    recipe = compress.Recipe(compress.QuantizeStatic())
    int8 = recipe(model, task)
    return task, recipe, {
        "float32": model,
        "float32, compiled": (model, "compiled"),
        "float32, ORT": (model, "onnxruntime"),
        "int8, compiled": (int8, "compiled"),
        "int8, ORT": (int8, "onnxruntime"),
        "4-bit weights": compress.quantize_weights(model, bits=4, granularity="group"),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the main comparison and write its page."""
    parser = argparse.ArgumentParser(prog="workbench.explore.report", description=main.__doc__)
    parser.add_argument("--output", default="build/report.html", help="file to write")
    given = parser.parse_args(arguments)
    task, recipe, candidates = main_models()
    frame = measure.compare(task, candidates)
    path = page(
        task, candidates, given.output, comparison=frame, after="int8, ORT", recipe=recipe,
        code=inspect.getsource(main_models),
    )  # fmt: skip
    print(f"wrote {path}")


class _Formatter(string.Formatter):
    """`str.format`, except that a value which is not known is called so."""

    def format_field(self, value: object, spec: str) -> str:
        if _unknown(value):
            return "unknown"
        if spec in ("", ",") and isinstance(value, float) and value.is_integer():
            value = int(value)  # a count, a float only because another row has none
        try:
            return super().format_field(value, spec)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{value!r} cannot be written as {spec!r}: {error}") from error


def _unknown(value: object) -> bool:
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def _number(value: float, digits: str) -> str:
    return "unknown" if _unknown(value) else format(value, digits)


def _with_interval(frame: pd.DataFrame, column: str, scale: float, digits: str) -> list[str]:
    """ "93.5 (93.0 to 94.0)", or the value alone where the frame has no interval."""
    low, high = plots.interval_columns(column)
    texts = []
    for _, row in frame.iterrows():
        text = _number(row[column] * scale, digits)
        if not _unknown(row.get(low)) and not _unknown(row.get(high)):
            text += f" ({row[low] * scale:{digits}} to {row[high] * scale:{digits}})"
        texts.append(text)
    return texts


def _remarks(frame: pd.DataFrame) -> list[str]:
    remarks = [[row.get("error"), row.get("note")] for _, row in frame.iterrows()]
    return ["; ".join(text for text in pair if isinstance(text, str) and text) for pair in remarks]


if __name__ == "__main__":
    main()
